"""The help of `trainer fit` and `trainer validate`: what one changes in a line each, and all of it on request.

Written by hand, because argparse prints options in the order of their classes, with the defaults of the classes:
Lightning's hundred first, and not the values of the recipe.
"""

import argparse
import pkgutil
import re
import shutil
import textwrap
from typing import Any

import docstring_parser
import yaml
from jsonargparse import ArgumentParser

# What the first help shows, by heading: names of options, or where they begin. A name counts before a beginning.
FIT = {
    "the run and its length": (
        *("config", "ckpt", "run_name", "dry_run", "seed_everything", "precision", "trainer.devices"),
        *("wallclock.", "trainer.max_steps"),
    ),
    "text": ("data.",),
    "model": ("model.",),
    "optimizer": ("model.optimizer.", "model.schedule."),
    "averaged weights": ("averaging.",),
    "speed": ("model.micro_batch_tokens", "model.compile", "model.fused", "model.attention.backend", "warmup."),
    "validation": ("trainer.val_check_interval", "eval.", "samples."),
    "export": ("export.",),
    "files and messages": ("trainer.log_every_n_steps", "progress.mode", "checkpoints.every", "stability."),
}
REFUSED_BY_FIT = "eval.adapt_"
VALIDATE = {
    "what is scored": ("ckpt", "weights", "split", "text", "tokenizer", "text_field", "source_field", "per_document"),
    "how; the run's own settings where none is given": (
        *("config", "eval.window", "eval.stride", "eval.batch_windows", "eval.max_tokens", "eval.attention_window"),
        *("eval.adapt_rate", "eval.adapt_ema_decay", "eval.canonical", "data.source", "precision"),
    ),
    "on what": ("trainer.accelerator", "trainer.devices", "model.attention.backend", "model.compile", "progress.mode"),
}
# Lightning's options say too little of what they do here.
TEXTS = {
    "config": "Recipe: a name that `trainer recipes` lists, or a YAML file; the last of several wins",
    "seed_everything": "Seed of the weights and, unless data.seed has one, of the order of the text",
    "trainer.accelerator": "Kind of device: cpu, cuda, or auto, which takes a GPU where there is one",
    "trainer.devices": "Number of GPUs or processes, or auto: all GPUs, one process on a CPU",
    "trainer.max_steps": "Steps after which the training ends; -1 sets no limit",
    "trainer.val_check_interval": "Steps between two validations",
    "trainer.log_every_n_steps": "Steps between two rows of metrics.csv",
    "data.source": "Class of the text; --data.source.help LocalText lists the options of one",
}
SOURCE_OPTIONS = 2  # of the chosen class; the other ones are rarely changed
NAMES_OF_GROUPS = "_ActionConfigLoad"  # jsonargparse's `--model FILE` and the like
COLUMN = 46


def take_help(args: list[str]) -> tuple[str | None, list[str]]:
    """Find the request for help in the arguments of a command.

    Returns:
        What it is about (empty: the first help; all; or a part, such as model), or None; and the other arguments.
    """
    for index, arg in enumerate(args):
        name, _, value = arg.partition("=")
        topic = args[index + 1 : index + 2]
        if arg in ("-h", "--help") and topic and not topic[0].startswith("-"):
            return topic[0], args[:index] + args[index + 2 :]
        if arg == "-h" or name == "--help" or name.startswith("--help."):
            return value or name.removeprefix("--help").removeprefix("."), args[:index] + args[index + 1 :]
    return None, args


def first_help(parser: ArgumentParser, values: dict[str, Any], recipe: str) -> str:
    """What one changes, with the values of the recipe.

    Args:
        parser: The options of the command.
        values: Their values by dotted key.
        recipe: Name of the recipe, or empty where the values are those of a run.
    """
    is_fit = bool(recipe)
    shown: dict[str, list[str]] = {title: [] for title in (FIT if is_fit else VALIDATE)}
    for name, text in _texts(parser, values).items():
        title = _title(name, FIT if is_fit else VALIDATE)
        if title is not None and not (is_fit and name.startswith(REFUSED_BY_FIT)):
            value = recipe if name == "config" else _as_yaml(_value(values, name)) if is_fit else ""
            shown[title].append(_line(f"--{name} {value}", TEXTS.get(name, text)))
    lines = [f"usage: {parser.usage}", *textwrap.wrap(str(parser.description), _width())]
    for title, entries in shown.items():
        lines += [f"{title}:", *entries]
    about = f"The values are those of {recipe}. " if is_fit else ""
    lines.append(f"{about}A part in full: --help.eval. Everything: --help all.")
    return "\n".join(lines)


def _value(values: dict[str, Any], name: str) -> Any:
    """The value of an option; those of the source lie one level deeper."""
    if name == "data.source":
        return values.get("data.source.class_path")
    return values.get(name, values.get(name.replace("data.source.", "data.source.init_args.")))


def help_of(parser: ArgumentParser, part: str) -> str:
    """Every option whose name begins with a part, with its whole text; empty if there is none."""
    blocks = []
    for action in parser._actions:
        if (action.dest == part or action.dest.startswith(f"{part}.")) and _is_shown(action):
            default = "" if action.default in (None, argparse.SUPPRESS) else f" (default: {_as_yaml(action.default)})"
            text = textwrap.indent(textwrap.fill(f"{_text(action)}{default}", _width() - 6), " " * 6)
            blocks.append(f"  {f'{action.option_strings[0]} {_choices(action)}'.rstrip()}\n{text}")
    note = ["The defaults are Python's; a recipe's values are in --config X --help."] if blocks else []
    return "\n".join([*blocks, *note])


def parts_named(parser: ArgumentParser, name: str) -> list[str]:
    """The groups of options with such a name somewhere in it, or all groups at the top."""
    groups = {action.dest.rpartition(".")[0] for action in parser._actions if _is_shown(action)} - {""}
    return sorted(each for each in groups if name in each.split(".")) or sorted({each.split(".")[0] for each in groups})


def _texts(parser: ArgumentParser, values: dict[str, Any]) -> dict[str, str]:
    """The help of every option by name; a class that is chosen adds its own, after the option that chooses it."""
    texts: dict[str, str] = {}
    for action in parser._actions:
        if _is_shown(action):
            texts[action.dest] = f"{_first_sentence(_text(action))} {_choices(action)}".rstrip()
        if action.dest == "data.source" and (name := values.get("data.source.class_path")):
            constructor = pkgutil.resolve_name(name).__init__
            for parameter in docstring_parser.parse(constructor.__doc__ or "").params[:SOURCE_OPTIONS]:
                texts[f"data.source.{parameter.arg_name}"] = _first_sentence(parameter.description or "")
    return texts


def _is_shown(action: argparse.Action) -> bool:
    is_option = bool(action.option_strings) and action.option_strings[0].startswith("-") and action.dest != "help"
    return is_option and type(action).__name__ != NAMES_OF_GROUPS and not action.dest.endswith(".help")


def _text(action: argparse.Action) -> str:
    return " ".join((action.help if isinstance(action.help, str) else "").split())


def _title(name: str, titles: dict[str, tuple[str, ...]]) -> str | None:
    """The heading of an option: of all beginnings that fit, the longest one's."""
    fitting = [(len(start), title) for title, starts in titles.items() for start in starts if _begins(name, start)]
    return max(fitting)[1] if fitting else None


def _begins(name: str, start: str) -> bool:
    return name == start or (start.endswith(".") and name.startswith(start)) or name.startswith(f"{start}.")


def _as_yaml(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True).replace("...", "").strip()
    return re.sub(r"^trainer\.data\.\w+\.", "", text)


def _choices(action: argparse.Action) -> str:
    return action.metavar if isinstance(action.metavar, str) and action.metavar.startswith("{") else ""


def _first_sentence(text: str) -> str:
    """A help text to its first full stop, semicolon or colon outside of brackets."""
    for end in re.finditer(r"(?<=[a-z0-9)`])[.;:](?: |$)", text):
        start = text[: end.start()]
        if start.count("(") == start.count(")"):
            return start
    return text


def _line(option: str, text: str) -> str:
    start = f"  {option:<{COLUMN - 2}}  "
    return start + textwrap.shorten(text, max(_width() - len(start), 20), placeholder="...")


def _width() -> int:
    return max(shutil.get_terminal_size((120, 24)).columns, 80)
