"""`trainer prepare`: make the shards of a recipe's source, or check them."""

import time
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from trainer.data import manifest, published  # noqa: F401 - a choice for --data.source
from trainer.data.sources import Source
from trainer.errors import UserError
from trainer.options import ShortErrors
from trainer.recipes import find_recipe

EXAMPLE = (
    "example: trainer prepare --data.source LocalText --data.source.train_files '[texts]' "
    "--data.source.folder data/mine"
)


class PrepareParser(ShortErrors, ArgumentParser):
    """jsonargparse's, for the source's class and its settings."""


def make_parser() -> PrepareParser:
    """The options of the command."""
    parser = PrepareParser(
        prog="trainer prepare", description="Make the token shards of a recipe's source.", epilog=EXAMPLE
    )
    parser.add_argument("--config", default="quickstart", help="Recipe, by name or path.")
    parser.add_argument(
        "--verify", action="store_true", help="Make nothing: read every shard again and compare with the manifest."
    )
    parser.add_subclass_arguments(Source, "data.source", required=True)
    return parser


def run(words: list[str]) -> None:
    """Run with the words after the command.

    Raises:
        UserError: If the recipe or its text cannot be used, or the check finds a difference.
    """
    parser = make_parser()
    named = parser_value(words, "--config")
    if named or parser_value(words, "--data.source") is None:  # another class would inherit settings of the recipe's
        recipe = find_recipe(named or "quickstart")
        try:
            values = yaml.safe_load(recipe.read_text())
        except yaml.YAMLError as error:
            raise UserError(f"{recipe}: is no recipe ({str(error).splitlines()[0]})") from error
        data = values.get("data") if isinstance(values, dict) else None
        parser.set_defaults({"data.source": data.get("source") if isinstance(data, dict) else None})
    config = parser.parse_args(words)
    try:
        source: Source = parser.instantiate(config).data.source
    except ValueError as error:
        raise UserError(str(error)) from error
    started = time.monotonic()
    if not config.verify:  # a check must not mend what it is to find
        source.prepare()
    folder = source.prepared().train[0].parent
    if config.verify:
        found = manifest.verify(folder)
        print(f"verified {len(found.shards)} shards in {time.monotonic() - started:.1f} s")
    print_manifest(folder)


def parser_value(words: list[str], name: str) -> str | None:
    """The last value of an option, read before the parser is complete."""
    value = None
    for word, following in zip(words, [*words[1:], None], strict=True):
        if word == name:
            value = following
        elif word.startswith(f"{name}="):
            value = word.partition("=")[2]
    return value


def print_manifest(folder: Path) -> None:
    """One line a split."""
    found = manifest.Manifest.read(folder)
    if found is None:
        print(f"{folder}: shards made elsewhere (no {manifest.NAME})")
        return
    for split in ("train", "val"):
        shards = found.of(split)
        total: dict[str, Any] = {
            name: sum(getattr(shard, name) for shard in shards)
            for name in ("documents", "tokens", "bytes", "text_bytes")
        }
        print(
            f"{split:<5} {len(shards)} shards  {total['documents']:,} documents  {total['tokens']:,} tokens  "
            f"{total['bytes']:,} bytes ({total['text_bytes']:,} before normalisation)"
        )
    print(f"in {folder}")
