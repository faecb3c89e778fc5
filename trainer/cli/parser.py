"""What the parsers of all commands share: errors in one line, near-miss hints, options from a function's docstring."""

import argparse
import inspect
import math
import pkgutil
import types
import typing
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from itertools import takewhile
from typing import Any, NoReturn

import docstring_parser
from jsonargparse import ArgumentParser

from trainer.cli.parse_errors import reword
from trainer.errors import OptionError, UserError

UNKNOWN = "unrecognized arguments: "
REQUIRED = "the following arguments are required: "
MAY_BE_EMPTY = ("prompt", "blurb")  # texts; every other empty value is an unset shell variable, or a slip


class ShortErrors:
    """Mixed into a parser of jsonargparse, whose own errors print the usage first."""

    prog: str
    _option_string_actions: dict[str, Any]

    def parse_args(self, *args: Any, **options: Any) -> Any:
        """Parse, and refuse empty values and numbers that are none.

        Raises:
            UserError: If an option is empty that names something, or is not finite.
        """
        config = super().parse_args(*args, **options)  # type: ignore[misc]
        for key, value in config.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"--{key.replace('.init_args', '')}: must be a finite number, not {value}")
            is_ours = not key.startswith("trainer.") or key == "trainer.default_root_dir"
            if is_ours and key not in MAY_BE_EMPTY and "" in (value if isinstance(value, list) else [value]):
                refuse_empty(f"--{key.replace('.init_args', '')}")
            if value is None and ".init_args." in key:
                self._check_null(key, config)
        return config

    def _check_null(self, key: str, config: Any) -> None:
        """Refuse null for a parameter of a class that takes none; jsonargparse lets it through.

        Raises:
            UserError: If it is such a parameter.
        """
        option, _, name = key.rpartition(".init_args.")
        parameters = inspect.signature(pkgutil.resolve_name(config[f"{option}.class_path"])).parameters
        if name in parameters and parameters[name].default is not None and not _takes_null(parameters[name].annotation):
            raise UserError(f"--{option.replace('.init_args', '')}.{name}: must not be null")

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Name the problem, the option that was probably meant and where all options are listed.

        Raises:
            OptionError: Always.
        """
        hint = ""
        if not self.prog.startswith("trainer "):  # of a class inside an option: its own parser collects the reasons
            raise argparse.ArgumentError(None, message)
        if message.startswith(UNKNOWN):
            names = [arg.partition("=")[0] for arg in message.removeprefix(UNKNOWN).split() if arg.startswith("-")]
            options = [*self._option_string_actions, *_source_options(self._option_string_actions)]
            near = [match for name in names for match in _near(name, options)]
            hint = f"; did you mean {' and '.join(near)}?" if near else ""
        if message.startswith(REQUIRED):
            dests = message.removeprefix(REQUIRED).split(", ")
            flags = {action.dest: flag for flag, action in reversed(self._option_string_actions.items())}
            message = REQUIRED + ", ".join(flags.get(dest, dest) for dest in dests)
        raise OptionError(self.prog, f"{reword(message)}{hint}") from ex


def _near(name: str, options: list[str]) -> list[str]:
    """The option that was probably meant: one that ends so, or one that is written alike."""
    ending = [option for option in options if option.endswith(f".{name.lstrip('-')}")]
    return ending[:1] or get_close_matches(name, options, n=1)


def _source_options(options: Iterable[str]) -> list[str]:
    """The options of all sources, which a parser does not list; none if it has no source."""
    if "--data.source" not in options:
        return []
    from trainer.cli.trusted_settings import TRUSTED_SOURCES  # noqa: PLC0415 - other commands do without

    classes = [pkgutil.resolve_name(name) for name in TRUSTED_SOURCES]
    return [f"--data.source.{name}" for each in classes for name in inspect.signature(each).parameters]


class CommandParser(ShortErrors, ArgumentParser):
    """Options of a command that is a function: its signature and its docstring."""

    def __init__(self, command: Callable[..., None], example: str, **by_hand: dict[str, Any]) -> None:
        """Add the options.

        Args:
            command: The function. The first paragraph of its docstring is the description.
            example: Arguments after `trainer` that show a use.
            by_hand: Settings of argparse for parameters that jsonargparse would parse in another way: positional lists
                without brackets, options that may be repeated, flags without a value, aliases.
        """
        docstring = docstring_parser.parse(command.__doc__ or "")
        super().__init__(
            prog=f"trainer {command.__name__}",
            description=docstring.short_description or "",
            epilog=f"example: trainer {example}",
            allow_abbrev=False,
        )
        help_of = {each.arg_name: each.description for each in docstring.params}
        for name, settings in by_hand.items():
            flags = settings.pop("flags", [name if "nargs" in settings else f"--{name}"])
            self.add_argument(*flags, help=help_of[name], **settings)
        self.add_function_arguments(command, as_group=False, skip=set(by_hand))

    def parse_args(self, *args: Any, **options: Any) -> Any:
        """Parse; an unknown option is named before its value is taken for another argument."""
        names = [arg.partition("=")[0] for arg in takewhile(lambda arg: arg != "--", args[0])]
        known = self._option_string_actions
        unknown = [name for name in names if name.startswith("--") and " " not in name and name not in known]
        if unknown:
            self.error(UNKNOWN + " ".join(unknown))
        return super().parse_args(*args, **options)


def _takes_null(annotation: Any) -> bool:
    is_open = annotation in (inspect.Parameter.empty, Any, None) or isinstance(annotation, str)
    return is_open or types.NoneType in typing.get_args(annotation)


def refuse_empty(option: str) -> NoReturn:
    """Refuse an option whose value is empty.

    Raises:
        UserError: Always.
    """
    raise UserError(f"{option}: its value is empty (an unset variable?); give one, or leave the option out")


def split_options(args: list[str], *flags: str) -> tuple[dict[str, list[str]], list[str]]:
    """Find some options before all options are known.

    Args:
        args: Arguments of a command.
        flags: Options with a value, each with its aliases after a comma: "--ckpt,--ckpt_path".

    Returns:
        All values of each option by the name of its first flag, and the other arguments.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for flag in flags:
        names = flag.split(",")
        parser.add_argument(*names, dest=names[0].lstrip("-"), action="append", default=[])
    try:
        known, others = parser.parse_known_args(args)
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from error
    for name, values in vars(known).items():
        if "" in values:
            refuse_empty(f"--{name}")
    return vars(known), others
