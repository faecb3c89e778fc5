"""What --help shows: first what one changes, on request everything; a text is a sentence, a number has a range."""

import argparse
import re
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from trainer.__main__ import COMMANDS, main
from trainer.recipes import find_recipe, flatten, recipe_names

LIGHTNING = ("trainer.", "seed_everything", "config", "print_config", "help")  # not our words
SOURCES = ("data.source",)  # the class itself

RANGE = re.compile(r"at least|at most|above|multiple of|any number|[(]\d+ to \w+")


def parser_of(command: str) -> argparse.ArgumentParser:
    if command in ("fit", "validate"):
        return import_module("trainer.cli.lightning_cli").make_parser(command)
    return import_module(f"trainer.cli.{command}").make_parser()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_explained_in_a_sentence(command: str):
    ours = [
        action
        for action in parser_of(command)._actions
        if not action.dest.startswith(LIGHTNING) and action.dest not in SOURCES and action.help != argparse.SUPPRESS
    ]
    for action in ours:
        if not action.option_strings and action.nargs is None and "." in action.dest:
            continue  # a group's own entry
        if isinstance(action.help, str) and action.help.startswith("Path to a configuration file"):
            continue  # --model and the like, of jsonargparse
        text = " ".join((action.help or "").split()).split(" (type:")[0].split(" (default:")[0].split(" (required")[0]
        assert text.endswith("."), f"--{action.dest}: {text!r}"
        assert text[0].isupper(), f"--{action.dest}: {text!r}"
        assert not text.startswith("Of "), f"--{action.dest}: {text!r}"
        assert " " in text.strip(), f"--{action.dest}: {text!r}"
        kind = str(getattr(action, "_typehint", None) or action.type)  # jsonargparse keeps a union in _typehint
        if re.search(r"\b(int|float)\b", kind):
            assert RANGE.search(text), f"--{action.dest} names no range: {text!r}"


@pytest.fixture
def help_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """What a command prints in an empty folder, where it may write nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")

    def run(*args: str) -> str:
        assert main([*args]) == 0
        assert not list(tmp_path.iterdir())
        return capsys.readouterr().out

    return run


LONGEST_SOURCE = [
    "--data.source=LocalText",
    "--data.source.train_files=[texts]",
    "--data.source.folder=shards",
]


@pytest.mark.parametrize("more", [[], LONGEST_SOURCE], ids=["", "longest source"])
@pytest.mark.parametrize("recipe", recipe_names())
def test_the_first_help_has_what_recipes_set_with_the_values_of_the_chosen_one(help_text, recipe: str, more: list[str]):
    text = help_text("fit", "--config", recipe, "--model.num_layers=7", *more, "--help")
    assert len(text.splitlines()) <= 120
    assert max(map(len, text.splitlines())) <= 120
    shown = dict(re.findall(r"^  --(\S+) (.*?)  ", text, re.MULTILINE))
    for each in recipe_names():
        for key, value in flatten(yaml.safe_load(find_recipe(each).read_text())):
            name = key.replace(".class_path", "").replace(".init_args", "")
            if name.startswith("data.source.") and (more or each != recipe):  # of another class
                continue
            if name in ("eval.adapt_rate", "eval.adapt_ema_decay"):  # which fit refuses
                assert name not in shown
                continue
            assert name in shown, name
            if each == recipe and name not in ("model.num_layers", "data.source"):
                assert yaml.safe_load(shown[name]) == value, name
    assert shown["model.num_layers"] == "7"
    assert shown["config"] == recipe
    assert "--ckpt" in text


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_help_all_has_every_option(help_text, command: str):
    text = help_text(command, "--help", "all")
    for action in parser_of(command)._actions:
        # All options of the warm start are set by --init_from and --init_from_sha256.
        if action.help != argparse.SUPPRESS and action.dest != "warm_start":
            assert re.search(rf"{re.escape(action.option_strings[0])}\b", text), action.dest


def test_the_help_of_a_part_is_its_options_in_full(help_text, capsys: pytest.CaptureFixture[str]):
    text = help_text("fit", "--help.model.smear")
    assert re.findall(r"--\S+", text)[:-2] == ["--model.smear.gate", "--model.smear.dims"]
    assert "{per_channel,per_token}" in text
    assert "(default: 12)" in text
    assert help_text("--help", "model.smear") == text
    assert main(["fit", "--help.modle"]) == 1
    assert "no option begins with modle" in capsys.readouterr().err


def test_validate_shows_what_it_uses(help_text):
    text = help_text("validate", "--help")
    assert help_text("--help", "validate") == text
    assert len(text.splitlines()) < 40
    names = "ckpt weights eval.stride eval.adapt_rate eval.adapt_ema_decay data.source precision trainer.devices"
    for name in names.split():
        assert f"--{name} " in text
    assert "optimizer" not in text


@pytest.mark.parametrize("args", [["--data.source=LocalText"], ["--model.num_layers=abc"]])
def test_help_comes_also_for_arguments_that_are_wrong(help_text, args: list[str]):
    assert "--model.num_layers 3 " in help_text("fit", *args, "--help")
    assert "--eval.stride" in help_text("fit", *args, "--help", "eval")
