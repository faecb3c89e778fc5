"""`trainer completion`: a script with which a shell completes commands, options, recipes and files."""

import argparse
from importlib import import_module
from typing import Any

from trainer.__main__ import COMMANDS
from trainer.errors import UserError
from trainer.options import Parser
from trainer.recipes import recipe_names

EXAMPLE = "completion bash >> ~/.bash_completion"
PATHS = ("ckpt", "artifact", "out", "runs", "folder", "tokenizer", "prompts", "data")


def make_parser() -> Parser:
    """The options of the command."""
    parser = Parser("completion", "Print a script that completes the words of trainer; it runs no Python.", EXAMPLE)
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="your shell")
    return parser


def run(words: list[str]) -> None:
    """Run with the words after the command.

    Raises:
        UserError: If the package that knows the shells is not installed.
    """
    options = make_parser().parse_args(words)
    try:
        import shtab  # noqa: PLC0415 - optional
    except ModuleNotFoundError as error:
        raise UserError("completion needs the package shtab; pip install shtab") from error
    print(shtab.complete(all_commands(shtab.FILE), shell=options.shell))


def all_commands(files: Any) -> argparse.ArgumentParser:
    """One parser with the options of every command.

    Args:
        files: Says to shtab that an argument is a file.
    """
    root = argparse.ArgumentParser("trainer")
    root.add_argument("--version", action="store_true", help="print the version")
    commands = root.add_subparsers()
    for name, (what, _) in COMMANDS.items():
        command = commands.add_parser(name, help=what)
        for action in options_of(name)._actions:
            known = command._option_string_actions
            flags = [flag for flag in action.option_strings if flag not in known]
            if action.option_strings and not flags:  # --help
                continue
            if not flags:
                added = command.add_argument(action.dest, nargs="*", choices=action.choices)
            elif action.nargs == 0:
                command.add_argument(*flags, action="store_true", help=_first(action))
                continue
            else:
                choices = recipe_names() if action.dest == "config" else action.choices
                added = command.add_argument(*flags, help=_first(action), choices=choices)
            if action.dest in PATHS:
                added.complete = files  # type: ignore[attr-defined]
    return root


def options_of(command: str) -> argparse.ArgumentParser:
    """The parser of a command."""
    if command in ("fit", "validate"):
        from trainer.cli import TrainerCLI  # noqa: PLC0415 - Lightning takes seconds to import

        return TrainerCLI.make_parser(command)
    return import_module(f"trainer.commands.{command}").make_parser()


def _first(action: argparse.Action) -> str:
    """The first sentence of an option's help, without what a shell or argparse would expand."""
    text = (action.help or "").split(". ")[0].split("\n")[0]
    return text.replace("%", "%%") if "%(" not in text else text.split("(%(")[0]
