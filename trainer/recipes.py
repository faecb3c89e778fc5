"""Recipes by name: the YAML files of `configs/`, in a checkout or inside the installed package."""

from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from trainer.errors import UserError

DEFAULT = "quickstart"  # the recipe where none is named
REFERENCE = "int5mlp_10l"  # which sets every option
MAX_VALUES = 1_000_000  # of a recipe


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key may occur once: of two, the later would win in silence, with all that is below it."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # of another mapping, whose keys may be replaced
                continue
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if not isinstance(key, str):
                raise UserError(f"line {line}: the key {key!r} is not a name")
            if key in seen:
                raise UserError(f"line {line}: the key {key!r} is on line {seen[key]}, too; keep one of them")
            seen[key] = line
        return super().construct_mapping(node, deep)


@cache
def recipe_folder() -> Path:
    """The folder of the packaged recipes."""
    package = Path(str(resources.files("trainer")))
    packaged = package / "configs"
    return packaged if packaged.is_dir() else package.parent / "configs"


def recipe_names() -> list[str]:
    """Names of the packaged recipes."""
    return sorted(path.stem for path in recipe_folder().glob("*.yaml"))


def find_recipe(name: str) -> Path:
    """A recipe by path, else by the name of a packaged one.

    Raises:
        UserError: If there is neither.
    """
    if (path := Path(name)).is_file():
        return path
    packaged = recipe_folder() / f"{name}.yaml"
    if "/" not in name and packaged.is_file():
        return packaged
    raise UserError(f"--config {name}: is neither a file nor one of the recipes {', '.join(recipe_names())}")


def load_recipe(path: Path) -> dict[str, Any]:
    """The settings of a recipe.

    Raises:
        UserError: If the file is not a recipe.
    """
    try:
        values = yaml.load(path.read_text(), _UniqueKeys)
    except UserError as error:
        raise UserError(f"--config {path}: {error}") from error
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--config {path}: is not a text; give a recipe in YAML") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        raise UserError(f"--config {path}: is not a recipe ({line}{error.problem or error.context})") from error
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"--config {path}: is not a recipe ({(str(error) or '?').splitlines()[0]})") from error
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: is not a recipe; it must hold settings in YAML")
    if not _is_small(values):
        raise UserError(f"--config {path}: is not a recipe; its aliases stand for too many values, or for themselves")
    _check_groups(path, values, _all_options())
    return values


def _is_small(values: Any) -> bool:
    """Whether it has few values, each alias counted as often as it is used."""
    left, count = [values], 0
    while left and count < MAX_VALUES:
        value, count = left.pop(), count + 1
        if isinstance(value, dict | list):
            left += value.values() if isinstance(value, dict) else value
    return not left


@cache
def _all_options() -> dict[str, Any]:
    """The recipe that sets every option."""
    return dict(yaml.safe_load((recipe_folder() / f"{REFERENCE}.yaml").read_text()))


def _check_groups(path: Path, values: dict[str, Any], options: dict[str, Any], prefix: str = "") -> None:
    """Refuse one value where a group of options belongs, such as a heading without anything below it."""
    for key, group in options.items():
        name = f"{prefix}{key}"
        if not isinstance(group, dict) or key not in values or name == "data.source":
            continue
        if not isinstance(values[key], dict):
            raise UserError(
                f"--config {path}: {name} is a group of options, not {values[key]!r}; give options of it, or remove it"
            )
        _check_groups(path, values[key], group, f"{name}.")


def flatten(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested settings as (dotted key, value) pairs."""
    pairs: list[tuple[str, Any]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        pairs += flatten(value, f"{name}.") if isinstance(value, dict) else [(name, value)]
    return pairs
