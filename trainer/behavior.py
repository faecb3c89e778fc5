"""What a function, a class or an object does, as text: its instructions and the plain values around it.

A hash of it tells two functions of one line apart that a loop has made with other numbers, also in a notebook.
"""

from collections.abc import Iterator
from functools import cached_property, partial
from types import CodeType, FunctionType
from typing import Any

DEPTH = 10  # of wrappers, and of classes in classes


def layers(value: Any) -> Iterator[Any]:
    """An object, and what is inside of it where it wraps a function."""
    for _ in range(DEPTH):
        yield value
        inside = [getattr(value, "__func__", None), getattr(value, "fget", None), getattr(value, "__wrapped__", None)]
        if isinstance(value, partial | cached_property):
            inside.append(value.func)
        value = next((each for each in inside if each is not None), None)
        if value is None:
            return


def behavior(value: Any, depth: int = DEPTH) -> list[object]:
    """Nested lists of instructions and values, the same in every process.

    Args:
        value: A function or class, or an object of a class of the user's; also in wrappers of functools.
        depth: How many classes may contain each other.
    """
    parts: list[object] = []
    for inner in layers(value) if depth else ():
        if isinstance(inner, FunctionType):
            parts += [
                _code(inner.__code__),
                plain(_around(inner)),
                plain(inner.__defaults__),
                plain(inner.__kwdefaults__),
            ]
        elif isinstance(inner, type):
            members = {name: each for name, each in vars(inner).items() if not name.startswith("__") or callable(each)}
            parts.append(plain(members))
            parts += [[name, behavior(each, depth - 1)] for name, each in members.items() if plain(each) is None]
        elif isinstance(inner, partial):
            parts += [plain(inner.args), plain(inner.keywords)]
        elif hasattr(inner, "__dict__"):
            parts += [behavior(type(inner), depth - 1), plain(vars(inner))]
    return parts


def _around(function: FunctionType) -> dict[str, Any]:
    """Globals and variables of the functions around it that a function may read."""
    names = set(_names(function.__code__))
    around = {name: function.__globals__[name] for name in names if name in function.__globals__}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            around[name] = cell.cell_contents
        except ValueError:  # it is empty yet
            continue
    return around


def _code(code: CodeType) -> list[object]:
    """Instructions of a function and of those in it; not where they stand."""
    consts = [_code(each) if isinstance(each, CodeType) else plain(each) for each in code.co_consts]
    return [code.co_code, code.co_names, consts]


def _names(code: CodeType) -> Iterator[str]:
    """Names that a function and those in it look up."""
    yield from code.co_names
    for each in code.co_consts:
        if isinstance(each, CodeType):
            yield from _names(each)


def plain(value: Any) -> object:
    """Numbers, texts, and collections of them, in an order that is always the same; None for anything else."""
    if isinstance(value, dict):
        pairs = ((str(key), plain(each)) for key, each in value.items())
        return sorted((key, each) for key, each in pairs if each is not None)
    if isinstance(value, list | tuple | set | frozenset):
        items = [repr(each) for each in map(plain, value) if each is not None]
        return sorted(items) if isinstance(value, set | frozenset) else items
    return repr(value) if isinstance(value, bool | int | float | complex | str | bytes) else None
