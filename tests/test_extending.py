"""The examples of docs/extending.md, exactly as they are printed there."""

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, TEXT
from tests.helpers import python
from trainer.checkpoint import load_checkpoint
from trainer.quantize.container import read_container
from trainer.run_folder import RunFolder

DOCUMENT = (ROOT / "docs/extending.md").read_text()
FILES = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", DOCUMENT, re.DOTALL))
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", DOCUMENT, re.DOTALL) for line in block.splitlines()]
SMALL = ["--eval.fit_tokens=512", "--eval.max_tokens=512"]
SMALL += ["--trainer.max_steps=12", "--trainer.val_check_interval=4", "--report.enabled=false"]
PYTHON_TEXT = ["--data.source.max_bytes=200000", "--data.source.vocab_size=512", "--model.vocab_size=512"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("extending")
    for name, code in FILES.items():
        (folder / name).write_text(code)
    words = TEXT.split()
    stanzas = ["\n".join(" ".join(words[k : k + 6] + words[n % 9 : n % 9 + 3]) for k in range(5)) for n in range(300)]
    (folder / "poems.txt").write_text("\n\n".join(f"{text} {number}" for number, text in enumerate(stanzas)))
    return folder


def run(command: str, cwd: Path, *more: str, **env: str) -> str:
    words = shlex.split(command)
    assert words[0] == "python"
    result = python(*words[1 + (words[1] == "-m") :], *more, cwd=cwd, **env)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_examples_run(workplace: Path):
    stop, poems, store, validate, _, plain, adamw, cosine = COMMANDS
    output = run(stop, workplace, *SMALL, *PYTHON_TEXT, "--trainer.callbacks.bpb=100")
    assert "trained     4 steps" in output  # the first validation was good enough
    muon, other = (
        json.loads((workplace / f"runs/quickstart/{name}/summary.json").read_text())["val_bpb"]
        for name in ("1", run(plain, workplace, *SMALL, *PYTHON_TEXT, "--run_name=plain") and "plain")
    )
    assert muon != other
    output = run(adamw, workplace, *SMALL, *PYTHON_TEXT, "--run_name=adamw")
    assert "AdamW updates the weights; of model.optimizer only grad_clip_norm has an effect" in output
    assert "trained     12 steps" in output
    assert "trainer validate --ckpt" in output
    assert "trainer submit" not in output  # which refuses it: the code that ships lacks the script
    (workplace / "nan.py").write_text(
        (workplace / "adamw.py")
        .read_text()
        .replace(
            "LanguageModel.configure",
            "def spoil(module):\n"
            "    if module.steps_done == 3:\n"
            "        module.model.token_embedding.weight.grad.fill_(float('nan'))\n\n\n"
            "LanguageModel.on_after_backward = spoil\nLanguageModel.configure",
        )
    )
    spoiled = adamw.replace("adamw.py", "nan.py")
    output = run(spoiled, workplace, *SMALL, *PYTHON_TEXT, "--run_name=nan", "--stability.nonfinite=skip")
    assert "step 4: the loss is" in output
    assert "(bad gradient: token_embedding.weight); skipped (1 of at most 20)" in output
    before, after = ("runs/quickstart/nan/checkpoints/last.ckpt", "runs/quickstart/faster/checkpoints/last.ckpt")
    (workplace / "faster.py").write_text((workplace / "adamw.py").read_text().replace("lr=0.003", "lr=0.006"))
    faster = adamw.replace("adamw.py", "faster.py")
    run(faster, workplace, *SMALL, *PYTHON_TEXT, f"--ckpt={before}", "--trainer.max_steps=14", "--run_name=faster")
    rates = [load_checkpoint(workplace / path)["optimizer_states"][0]["param_groups"][0] for path in (before, after)]
    assert [each["initial_lr"] for each in rates] == [0.003, 0.006]
    (workplace / "lbfgs.py").write_text((workplace / "adamw.py").read_text().replace("AdamW", "LBFGS"))
    refused = python("lbfgs.py", "fit", "--config=quickstart", *SMALL, *PYTHON_TEXT, cwd=workplace)
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1), refused.stderr
    assert "LBFGS computes the loss several times a step" in refused.stderr
    for name, made in (("two", "[{0}, {0}]"), ("scheduled", "[o := {0}], [torch.optim.lr_scheduler.LinearLR(o)]")):
        one = "torch.optim.AdamW(module.model.parameters(), lr=0.003)"
        (workplace / f"{name}.py").write_text(
            (workplace / "adamw.py").read_text().replace(one, f"({made.format(one)})")
        )
        refused = python(f"{name}.py", "fit", "--config=quickstart", *SMALL, *PYTHON_TEXT, cwd=workplace)
        assert (refused.returncode, refused.stderr.count("\n")) == (1, 1), refused.stderr
        assert "configure_optimizers must return one optimizer and no scheduler" in refused.stderr
    options = [*SMALL, *PYTHON_TEXT, "--run_name=cosine", "--trainer.log_every_n_steps=1", "--wallclock.seconds=null"]
    run(cosine, workplace, *options)
    rates = RunFolder(workplace / "runs/quickstart/cosine").read().curves["train/lr_multiplier"][1]
    assert rates == pytest.approx([0.5 + 0.5 * math.cos(math.pi * step / 12) for step in range(12)])
    state = load_checkpoint(workplace / "runs/quickstart/adamw/checkpoints/last.ckpt")["optimizer_states"][0]
    assert [set(each) for each in state["state"].values()] == [{"step", "exp_avg", "exp_avg_sq"}] * len(state["state"])
    run(store, workplace)
    before, after = (
        {name: tensor.kind for name, tensor in read_container(workplace / path)[1].items()}
        for path in ("runs/quickstart/1/artifact.zst", "eight/artifact.zst")
    )
    changed = {name: kind for name, kind in after.items() if kind != before[name]}
    assert set(changed.values()) == {"int8"}
    assert all(name.startswith("blocks.0.") for name in changed)
    assert "val_bpb=" in run(validate, workplace)
    score, size = (
        "validate --ckpt eight/artifact.zst --eval.max_tokens 512",
        "found/tokenizer.model: its vocabulary size is 300",
    )
    for command, message in (
        ("prepare", "in found"),
        (score, size),
    ):  # as the installed command
        source = ["--data.source=poems.Poems", "--data.source.file=poems.txt", "--data.source.folder=found"]
        words = [sys.executable, "-P", "-m", "trainer", *command.split(), *source]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        result = subprocess.run(words, cwd=workplace, env=env, capture_output=True, text=True, check=False)
        assert message in result.stdout + result.stderr
    (workplace / "poems.jsonl").unlink()
    assert "epochs unknown (poems.jsonl: there is no such text file" in run(poems, workplace, *SMALL, "--dry_run")
    output = run(poems, workplace, *SMALL)
    assert "trained     12 steps" in output
    assert (workplace / "data/poems/manifest.json").is_file()


def test_a_model_that_a_script_changes_is_reported_and_exported_with_the_script_alone(workplace: Path):
    (workplace / "norm.py").write_text("""
import sys
import torch
import trainer.model.transformer as transformer
from trainer.__main__ import main

class NormedBlock(transformer.Block):
    def __init__(self, config, index):
        super().__init__(config, index)
        self.norm = torch.nn.LayerNorm(config.model_dim)

    def forward(self, x, *args, **options):
        return super().forward(self.norm(x), *args, **options)

transformer.Block = NormedBlock
sys.exit(main(sys.argv[1:]))
""")
    options = [*SMALL, *PYTHON_TEXT, "--report.enabled=true", "--run_name=norm"]
    assert "report.html" in run("python norm.py fit --config=quickstart", workplace, *options)
    export = "python {} export --ckpt=runs/quickstart/norm/checkpoints/last.ckpt --out=normed"
    refused = python("trainer", *export.split()[2:], cwd=workplace)
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1), refused.stderr
    assert "it has no use for the tensor 'blocks.0.norm.bias'); if code of your own" in refused.stderr
    run(export.format("norm.py"), workplace)
    before, after = (
        read_container(workplace / path)[1] for path in ("runs/quickstart/norm/artifact.zst", "normed/artifact.zst")
    )
    assert before.keys() == after.keys()


def test_the_option_of_the_model_is_a_patch_that_applies_trains_and_is_stored(workplace: Path, tmp_path: Path):
    clone = tmp_path / "clone"
    for part in ("trainer", "configs"):
        shutil.copytree(ROOT / part, clone / part)
    (patch,) = re.findall(r"```diff\n(.*?)```", DOCUMENT, re.DOTALL)
    subprocess.run(["git", "apply", "-"], cwd=clone, input=patch, text=True, check=True)
    output = run(COMMANDS[4], workplace, *SMALL, *PYTHON_TEXT, "--run_name=leaky", PYTHONPATH=str(clone))
    assert "trained     12 steps" in output
    header, _ = read_container(workplace / "runs/quickstart/leaky/artifact.zst")
    assert header["model"]["mlp"]["negative_slope"] == 0.5
