"""`trainer recipes`: the recipes that come with the package, each with its purpose."""

from trainer.cli.parser import CommandParser
from trainer.recipes import find_recipe, recipe_names


def recipes() -> None:
    """List the recipes that come with the package."""
    for name in recipe_names():
        first = find_recipe(name).read_text(encoding="utf-8").splitlines()[0]
        print(f"{name:<22} {first.removeprefix('#').strip()}")


def make_parser() -> CommandParser:
    """The options of the command."""
    return CommandParser(recipes, "recipes")
