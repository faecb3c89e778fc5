"""The help of every option is a sentence, every option has one, and a number says what it may be."""

import argparse
import re
from importlib import import_module

import pytest

from trainer.__main__ import COMMANDS

LIGHTNING = ("trainer.", "seed_everything", "config", "print_config", "help")  # not our words
SOURCES = ("data.source",)  # the class itself

RANGE = re.compile(r"at least|at most|above|multiple of|any number|[(]\d+ to \w+")


def parser_of(command: str) -> argparse.ArgumentParser:
    if command in ("fit", "validate"):
        return import_module("trainer.cli.train").make_parser(command)
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
