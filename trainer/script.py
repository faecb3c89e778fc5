"""A user's own code that changes the trainer, as docs/extending.md shows: a script, a notebook, or what they import."""

import hashlib
import inspect
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from functools import cache, partial
from pathlib import Path
from types import FunctionType, ModuleType

PACKAGE = Path(__file__).resolve().parent
STDLIB = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib")]
Plain = bool | int | float | str | None


def user_script(*commands: str) -> list[str] | None:
    """What Python was started with, a script or -m and a module, if it is the user's own.

    Args:
        commands: Commands of the trainer that it may have been given as its first argument. A script without one
            calls the Python API, and its settings are in the run's config.
    """
    main = sys.modules["__main__"]
    if sys.argv[1:2] == [] or sys.argv[1] not in commands or user_file("__main__") is None:
        return None
    spec = getattr(main, "__spec__", None)
    return [str(main.__file__)] if spec is None else ["-m", spec.name.removesuffix(".__main__")]


def script_record(code: bytes, objects: Iterable[object] = ()) -> dict[str, str] | None:
    """Name and sha256 of the user's code that may have changed this run, for `summary.json`.

    That is a script which runs a command of the trainer, with what it imports. A program that calls the Python API
    counts only if it has replaced functions or classes of the trainer, or made one of the run's objects: it may hold
    the settings of many runs, which their configs name.

    Args:
        code: The trainer's own sources as one script, which is nobody's patch.
        objects: Objects that take part in the run, such as callbacks.
    """
    main = user_file("__main__")
    if main is not None and main.read_bytes() == code:
        return None
    script = user_script("fit", "rerun", "sprint")
    changes = [] if script else sorted(_patches())  # one program may make runs with and without them
    owners = [type(each).__module__ for each in objects if is_users(type(each))]
    if not script and not changes and not owners:
        return None
    files = {path: name for name in list(sys.modules) if (path := user_file(name)) is not None}
    content = [path.read_bytes() for path in sorted(files, key=lambda path: (path != main, files[path]))]
    names = [*([] if main is None else [main.name]), *owners, *(owner for owner, _ in changes)]
    digest = hashlib.sha256(b"".join(content + [text.encode() for _, text in changes]))
    return {"name": "notebook" if names[0] == "__main__" else names[0], "sha256": digest.hexdigest()}


@cache
def _is_library(folder: Path) -> bool:
    """Whether packages are installed in a folder."""
    return folder.name in ("site-packages", "dist-packages") or any(folder.glob("*.dist-info"))


def user_file(name: str) -> Path | None:
    """The Python file of an imported module, unless it is of the trainer, of Python or of an installed package."""
    path = getattr(sys.modules.get(name), "__file__", None)
    if not isinstance(path, str) or not path.endswith(".py") or not Path(path).is_file():
        return None
    file = Path(path).resolve()
    is_other = PACKAGE in file.parents or any(folder in file.parents for folder in STDLIB)
    return None if is_other or any(map(_is_library, file.parents)) else file


def is_users(thing: type | FunctionType) -> bool:
    """Whether a class or function was defined in the user's own code."""
    module = thing.__module__
    in_notebook = module == "__main__" and not hasattr(sys.modules[module], "__file__")
    return in_notebook or user_file(module) is not None


def _patches() -> Iterator[tuple[str, str]]:
    """The user's functions and classes that stand in the trainer's place: their modules, and what they do."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "trainer" and isinstance(module, ModuleType):
            for key, value in list(vars(module).items()):
                yield from _describe(f"{name}.{key}", value)
                if isinstance(value, type) and value.__module__ == name:
                    for attribute, member in list(vars(value).items()):
                        yield from _describe(f"{name}.{key}.{attribute}", member)


def _describe(place: str, value: object) -> Iterator[tuple[str, str]]:
    """What stands at a place of the trainer, if it is the user's."""
    value = getattr(value, "__func__", getattr(value, "fget", value))  # of a static or class method, or a property
    value = value.func if isinstance(value, partial) else value
    if isinstance(value, FunctionType | type) and is_users(value):
        try:
            source = inspect.getsource(value)
        except (OSError, TypeError):
            source = value.__qualname__
        yield value.__module__, f"{place} {source} {_values(value)}"


def _values(value: FunctionType | type) -> list[tuple[str, object]]:
    """Plain values that a function takes from around it, such as a number that a loop sets."""
    if isinstance(value, type):
        return []
    around = inspect.getclosurevars(value)
    values = {**around.globals, **around.nonlocals, "defaults": str(value.__defaults__)}
    return sorted((name, each) for name, each in values.items() if isinstance(each, Plain))
