"""`trainer prepare`: make the token shards of a recipe's source, or check them."""

import logging
import time
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from trainer.cli.parser import ShortErrors, split_options
from trainer.data import manifest, published  # noqa: F401 - a choice for --data.source
from trainer.data.sources import Source
from trainer.data.tokenizer import check_case_markup, load_tokenizer
from trainer.errors import UserError
from trainer.logging import counted, logger
from trainer.recipes import DEFAULT, find_recipe, load_recipe


class PrepareParser(ShortErrors, ArgumentParser):
    """jsonargparse's parser, for the class of the source and its settings."""


def make_parser() -> PrepareParser:
    """The options of the command."""
    parser = PrepareParser(
        prog="trainer prepare",
        description="Make the token shards of a recipe's source, or check them.",
        epilog="example: trainer prepare --data.source LocalText --data.source.train_files '[texts]' "
        "--data.source.folder data/mine",
        allow_abbrev=False,
    )
    parser.add_argument("--config", default=DEFAULT, help="Recipe, by name or path.")
    parser.add_argument(
        "--verify", action="store_true", help="Make nothing: read every shard again and compare it with the manifest."
    )
    parser.add_argument("--verbose", action="store_true", help="Say what the tokenizer's normalization changes.")
    parser.add_subclass_arguments(Source, "data.source", required=True)
    parser.add_argument(
        "--data.case_markup",
        type=bool | None,
        help="Whether the tokenizer has case markup. true: shards without it are encoded again, in a copy in data. "
        "null: existing shards stay as they are. Default: the recipe's.",
    )
    return parser


def run(args: list[str]) -> None:
    """Run the command.

    Raises:
        UserError: If the recipe or its text cannot be used, or the check finds a difference.
    """
    parser = make_parser()
    given, _ = split_options(args, "--config", "--data.source,--data.source.class_path")
    path = find_recipe((given["config"] or [DEFAULT])[-1])
    recipe = load_recipe(path)
    data, model = _section(recipe, "data"), _section(recipe, "model")
    parser.set_defaults({"data.case_markup": data.get("case_markup")})
    if not given["data.source"]:  # another source must not inherit the recipe's settings
        parser.set_defaults({"data.source": data.get("source")})
    config = parser.parse_args(args)
    try:
        source: Source = parser.instantiate(config).data.source
    except ValueError as error:  # jsonargparse's, about the class of the source; its cause is the source's own
        raise UserError(str(error.__cause__ or error)) from error
    source.case_markup = config.data.case_markup
    size = model.get("vocab_size", source.model_vocab_size)
    if not isinstance(size, int):
        raise UserError(f"{path}: model.vocab_size must be a whole number, not {size!r}")
    source.model_vocab_size = size
    if getattr(source, "vocab_size", 0) is None:  # errors then name the option of this command
        source.vocab_size = source.model_vocab_size  # type: ignore[attr-defined]
    started = time.monotonic()
    if not config.verify:  # a check must not repair what it is to find
        logger.setLevel(logging.DEBUG if config.verbose else logging.INFO)
        try:
            source.prepare()
        finally:
            logger.setLevel(logging.INFO)
    text = source.prepared()
    check_case_markup(text.tokenizer, load_tokenizer(text.tokenizer), source.case_markup)
    folder = text.train[0].parent
    if config.verify:
        shards = manifest.verify(folder).shards
        print(f"verified {counted(len(shards), 'shard')} in {time.monotonic() - started:.1f} s")
    print_manifest(folder)


def _section(recipe: dict[str, Any], name: str) -> dict[str, Any]:
    content = recipe.get(name)
    return content if isinstance(content, dict) else {}


def print_manifest(folder: Path) -> None:
    """Print one line per split."""
    content = manifest.Manifest.read(folder)
    if content is None:
        print(f"{folder}: shards made elsewhere (no {manifest.MANIFEST})")
        return
    for split in ("train", "val"):
        shards = content.of(split)
        totals = {
            name: sum(getattr(shard, name) for shard in shards)
            for name in ("documents", "tokens", "bytes", "text_bytes")
        }
        print(
            f"{split:<5} {counted(len(shards), 'shard')}  {counted(totals['documents'], 'document')}  "
            f"{totals['tokens']:,} tokens  "
            f"{totals['bytes']:,} bytes ({totals['text_bytes']:,} before normalization)"
        )
    print(f"in {folder}")
