"""A user's own code that changes the trainer, as docs/extending.md shows: a script, a notebook, or what they import."""

import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from trainer.behavior import behavior, layers

PACKAGE = Path(__file__).resolve().parent
# Where Python and the starters of installed commands are.
INSTALLED = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "scripts")]
STARTER = b"from trainer.__main__ import program"  # of the command `trainer`, wherever pip puts it
SITES = ("site-packages", "dist-packages")


def user_script(*commands: str) -> list[str] | None:
    """What Python was started with: a script, a folder or archive with one, or -m and a module; None if not the user's.

    Args:
        commands: Commands of the trainer that it may have been given as its first argument. A script without one
            calls the Python API, and its settings are in the run's config.
    """
    path = main_file()
    if sys.argv[1:2] == [] or sys.argv[1] not in commands or path is None:
        return None
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is None or os.path.abspath(str(main.__file__)) != str(path):
        return [str(path)]
    if spec.name == "__main__":  # of a folder, which Python puts on its path
        return [str(path.parent)]
    return ["-m", spec.name.removesuffix(".__main__")]


def script_record(code: bytes, objects: Iterable[object] = ()) -> dict[str, str] | None:
    """Name and sha256 of the user's code that may have changed this run, for `summary.json`.

    That is a script which runs a command of the trainer, with what it imports. A program that calls the Python API
    counts only if it has replaced parts of the trainer, or made one of the run's objects: it may hold the settings of
    many runs, which their configs name.

    Args:
        code: The trainer's own sources as one script, which is nobody's patch.
        objects: Objects that take part in the run, such as callbacks.
    """
    main = main_file()
    if main is not None and main.read_bytes() == code:
        return None
    script = user_script("fit", "rerun", "sprint")
    changes = [] if script else sorted(_patches())  # one program may make runs with and without them
    owned = [type(each) for each in objects if is_users(type(each))]
    changes += [(each.__module__, f"{each.__name__}: {behavior(each)}") for each in owned]
    if not script and not changes:
        return None
    modules = [name for name in sys.modules if name != "__main__"]
    files = {path: name for name in modules if (path := user_file(name)) is not None}
    if main is not None:
        files.pop(main.resolve(), None)
    content = [main.read_bytes()] if main is not None else []
    content += [path.read_bytes() for path in sorted(files, key=lambda path: files[path])]
    texts = [] if script else [text for _, text in changes]
    name = main.name if main is not None else changes[0][0].replace("__main__", "notebook")
    return {"name": name, "sha256": hashlib.sha256(b"".join(content + [text.encode() for text in texts])).hexdigest()}


@cache
def _is_starter(file: Path) -> bool:
    return STARTER in file.read_bytes()


def main_file() -> Path | None:
    """The user's script or archive that this process runs; None in a notebook and for an installed command."""
    path = getattr(sys.modules["__main__"], "__file__", None)
    # A profiler or debugger may run a script without taking its name.
    names = [path, sys.argv[0]] if isinstance(path, str) and _is_installed(Path(path).resolve()) else [path]
    for name in names:
        if isinstance(name, str):
            place = Path(os.path.abspath(name))
            file = next((each for each in (place, *place.parents) if each.is_file()), None)  # it, or its archive
            if file is not None and not _is_installed(file.resolve()) and not _is_starter(file):
                return file
    return None


def user_file(name: str) -> Path | None:
    """The Python file of an imported module, unless it is of the trainer, of Python or of an installed package."""
    if name == "__main__":
        return main_file()
    path = getattr(sys.modules.get(name), "__file__", None)
    return _user_path(path, name.partition(".")[0]) if isinstance(path, str) and path.endswith(".py") else None


@cache
def _user_path(path: str, package: str) -> Path | None:
    file = Path(path).resolve()
    if not file.is_file() or _is_installed(file):
        return None
    # One that `pip install --target` has put there is not the user's, either.
    return None if package in _distributions() and any(map(_has_distributions, file.parents)) else file


def _is_installed(file: Path) -> bool:
    return not {PACKAGE, *INSTALLED}.isdisjoint(file.parents) or not set(SITES).isdisjoint(file.parts)


@cache
def _distributions() -> set[str]:
    return set(packages_distributions())


@cache
def _has_distributions(folder: Path) -> bool:
    """Whether packages are installed in a folder, as by `pip install --target`."""
    return any(folder.glob("*.dist-info"))


def is_users(thing: type | FunctionType) -> bool:
    """Whether a class or function was defined in the user's own code."""
    # A wrapper of functools says that it is of the module that it wraps.
    module = str(thing.__globals__.get("__name__")) if isinstance(thing, FunctionType) else str(thing.__module__)
    in_notebook = module == "__main__" and not hasattr(sys.modules[module], "__file__")
    return in_notebook or user_file(module) is not None


def _patches() -> Iterator[tuple[str, str]]:
    """The user's code that stands in the trainer's place: its modules, and what it does."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "trainer" and isinstance(module, ModuleType):
            for key, value in list(vars(module).items()):
                places = [(f"{name}.{key}", value)]
                if isinstance(value, type) and value.__module__ == name:
                    places += [(f"{name}.{key}.{inner}", member) for inner, member in list(vars(value).items())]
                for place, each in places:
                    if (owner := _owner(each)) is not None:
                        yield owner, f"{place}: {behavior(each)}"


def _owner(value: Any) -> str | None:
    """The user's module that something is of, also in a wrapper of functools; None if it is not the user's."""
    for inner in () if isinstance(value, ModuleType) else layers(value):
        if isinstance(inner, FunctionType) and is_users(inner):
            return str(inner.__globals__.get("__name__"))
        kind = inner if isinstance(inner, type) else type(inner)
        if is_users(kind):
            return str(kind.__module__)
    return None
