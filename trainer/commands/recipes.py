"""`trainer recipes`: the recipes that come with the package, each with its purpose."""

from trainer.options import Parser
from trainer.recipes import find_recipe, recipe_names


def make_parser() -> Parser:
    """The options of the command."""
    return Parser("recipes", "List the recipes that come with the package.", "fit --config quickstart")


def run(words: list[str]) -> None:
    """Run with the words after the command."""
    make_parser().parse_args(words)
    for name in recipe_names():
        first = find_recipe(name).read_text(encoding="utf-8").splitlines()[0]
        print(f"{name:<22} {first.removeprefix('#').strip()}")
