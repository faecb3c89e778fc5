"""Recipes by name: the YAML files of `configs/`, in a checkout or inside the installed package."""

from functools import cache
from importlib import resources
from pathlib import Path

from trainer.errors import UserError


@cache
def recipe_folder() -> Path:
    """The folder with the packaged recipes."""
    package = Path(str(resources.files("trainer")))
    packaged = package / "configs"
    return packaged if packaged.is_dir() else package.parent / "configs"


def recipe_names() -> list[str]:
    """Names of the packaged recipes."""
    return sorted(path.stem for path in recipe_folder().glob("*.yaml"))


def find_recipe(name: str) -> Path:
    """A recipe by path, else by the name of a packaged one.

    Raises:
        UserError: If there is neither, or the file is no text.
    """
    if (path := Path(name)).is_file():
        try:
            path.read_text()
        except UnicodeDecodeError as error:
            raise UserError(f"--config {name}: is no text; give a recipe in YAML") from error
        return path
    packaged = recipe_folder() / f"{name}.yaml"
    if "/" not in name and packaged.is_file():
        return packaged
    raise UserError(f"--config {name}: is neither a file nor one of the recipes {', '.join(recipe_names())}")
