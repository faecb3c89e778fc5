"""The rooms of the project: which may import which. CONTRIBUTING.md says why; each law is shown to catch a breach."""

import ast

import pytest

from tests.conftest import ROOT

# From the ground up: no module imports one of a higher floor.
FLOORS = (
    "errors cpu device rank files lock versions distributed logging progress_display recipes source_bundle checkpoint "
    "run_folder behavior script step clock",
    "kernels data",
    "model evaluation",
    "optim",
    "quantize summary comparison paired",
    "loading open_format model_card",
    "generation",
    "harness report",
    "submission",
    "lightning_module datamodule",
    "callbacks",
    "cli",
    "api",
    "__init__ __main__",
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms.split()}
LIGHTNING_ROOMS = (
    "trainer.lightning_module",
    "trainer.datamodule",
    "trainer.callbacks",
    "trainer.cli.dry_run",
    "trainer.cli.lightning_cli",
    "trainer.cli.lightning_loops",
    "trainer.cli.rerun",
    "trainer.cli.resume",
    "trainer.cli.train",
    "trainer.cli.validate",
)
FORBIDDEN = {  # what a room must not import, and no floor forbids
    "trainer.model": ("trainer.data", "sentencepiece"),
    "trainer.kernels": ("trainer.data", "trainer.model", "sentencepiece"),
    "trainer.data": ("trainer.kernels", "trainer.model"),
}


def sources() -> dict[str, str]:
    """Every module of the trainer with its text."""
    modules = {}
    for path in sorted((ROOT / "trainer").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        modules[".".join(parts)] = path.read_text()
    return modules


def imports_of(text: str, modules: dict[str, str]) -> set[str]:
    """Names of the modules that a text imports, anywhere, also by `import_module("...")`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            submodules = {name for name in members if name in modules or f"{name}.__init__" in modules}
            names |= submodules or {node.module}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names |= {each.value for each in node.args if isinstance(each, ast.Constant)}
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            value = node.value.value  # a name that `import_module` is given later
            names |= {value} if isinstance(value, str) and value in modules else set()
    return {f"{name}.__init__" if f"{name}.__init__" in modules else name for name in names}


def is_in(name: str, rooms: tuple[str, ...]) -> bool:
    return any(name == room or name.startswith(f"{room}.") for room in rooms)


def room_of(module: str) -> str:
    return module.split(".")[1]


def breaches(modules: dict[str, str]) -> list[str]:
    """Every import that a law forbids."""
    graph = {name: imports_of(text, modules) for name, text in modules.items()}
    problems = []
    for name, imported in graph.items():
        for other in sorted(imported):
            if is_in(other, ("lightning", "pytorch_lightning")) and not is_in(name, LIGHTNING_ROOMS):
                problems.append(f"{name} imports Lightning ({other})")
            if other in modules and FLOOR_OF[room_of(other)] > FLOOR_OF[room_of(name)]:
                problems.append(f"{name} imports {other}, which is on a higher floor")
            for room, forbidden in FORBIDDEN.items():
                if is_in(name, (room,)) and is_in(other, forbidden):
                    problems.append(f"{name} imports {other}")
    problems += [f"{name} is part of a cycle" for name in in_cycles(graph)]
    commands = [name for name in graph if room_of(name) == "cli" and not is_in(name, LIGHTNING_ROOMS)]
    for name in commands:
        reached = reachable(name, graph)
        problems += [f"{name} reaches {other}" for other in sorted(reached) if is_in(other, LIGHTNING_ROOMS)]
    return problems


def reachable(start: str, graph: dict[str, set[str]]) -> set[str]:
    reached, waiting = set(), [start]
    while waiting:
        name = waiting.pop()
        if name not in reached and name in graph:
            reached.add(name)
            waiting += graph[name]
    return reached


def in_cycles(graph: dict[str, set[str]]) -> list[str]:
    """Modules that are part of a cycle."""
    return [
        name
        for name, imported in graph.items()
        if any(name in reachable(other, graph) for other in imported if other in graph)
    ]


def test_only_kernels_and_the_device_module_ask_a_gpus_runtime():
    """What is left is device-neutral: a GPU of another vendor is served in one place."""
    modules = sources()
    asking = {name for name, text in modules.items() if "torch.cuda" in text or ".cuda()" in text}
    assert {room_of(name) for name in asking} == {"device", "kernels"}


def test_no_import_breaks_a_law():
    modules = sources()
    assert {room_of(name) for name in modules} == set(FLOOR_OF)
    assert breaches(modules) == []


@pytest.mark.parametrize(
    ("module", "line", "problem"),
    [
        ("trainer.quantize.export", "import lightning.pytorch as pl", "imports Lightning"),
        ("trainer.data.stream", "def f():\n    from lightning.pytorch import Trainer", "imports Lightning"),
        ("trainer.logging", "from lightning.pytorch.utilities import rank_zero_info", "imports Lightning"),
        ("trainer.cli.export", "from trainer.datamodule import TokenData", "trainer.cli.export reaches"),
        ("trainer.cli.report", "def f():\n    import trainer.cli.train", "trainer.cli.report reaches"),
        ("trainer.model.embedding", "from trainer.data.tokenizer import BOS", "imports trainer.data.tokenizer"),
        ("trainer.model.layers", "import sentencepiece", "imports sentencepiece"),
        ("trainer.kernels.fused_loss", "from trainer.model.layers import EPS", "imports trainer.model.layers"),
        ("trainer.kernels.fusion", 'import_module("trainer.data.shards")', "imports trainer.data.shards"),
        ("trainer.kernels.fusion", 'MODULE = "trainer.model.layers"', "imports trainer.model.layers"),
        ("trainer.data.manifest", "from trainer.model import layers", "imports trainer.model.layers"),
        ("trainer.quantize.policy", "from trainer.submission import folder", "on a higher floor"),
        ("trainer.files", "from trainer.data.shards import open_shard", "on a higher floor"),
        ("trainer.optim.schedule", "from trainer.quantize import export", "on a higher floor"),
        ("trainer.loading", "from trainer.report.build import build_report", "on a higher floor"),
        ("trainer.datamodule", "from trainer.callbacks.progress import Progress", "on a higher floor"),
        ("trainer.callbacks.warmup", "import trainer.cli.train", "on a higher floor"),
        ("trainer.errors", "from trainer.files import atomic_write", "cycle"),
    ],
)
def test_a_planted_breach_of_each_law_is_seen(module: str, line: str, problem: str):
    modules = sources()
    modules[module] += f"\n{line}\n"
    assert any(problem in each for each in breaches(modules))


def test_the_names_of_a_runs_files_stand_in_one_module():
    """So a file can be renamed there; the tokenizer.model of a shard folder is another file."""
    names = ("artifact.zst", "train_gpt.py", "summary.json", "last.ckpt", "report.html", "train.log", "metrics.csv")
    for module, text in sources().items():
        if module == "trainer.run_folder":
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert node.value not in names, f"{module}, line {node.lineno}: {node.value}"


def test_every_public_function_and_class_has_a_docstring_or_overrides_one():
    missing = []
    for module, text in sources().items():
        tree = ast.parse(text)
        public = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        public = [node for node in public if not node.name.startswith("_")]
        public += [node for outer in public if isinstance(outer, ast.ClassDef) for node in outer.body]
        for node in public:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            overrides = any("override" in ast.unparse(each) for each in node.decorator_list)
            if not ast.get_docstring(node) and not overrides:
                missing.append(f"{module}: {node.name}")
    assert missing == []
