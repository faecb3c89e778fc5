"""Settings from a config.yaml that lies beside a file to score; somebody else may have made both."""

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from trainer.errors import UserError
from trainer.evaluation.windows import EvaluationConfig
from trainer.recipes import load_recipe
from trainer.run_folder import RunFolder

# What is taken from a config.yaml that lies beside a file to score, and the classes that it may name there.
TRUSTED_SETTINGS = ("data", "eval", "precision")
TRUSTED_SOURCES = [
    f"trainer.data.{name}"
    for name in (
        *("sources.Shards", "sources.LocalText", "sources.PythonDocumentation", "published.PublishedFineWeb"),
        *("local_text.LocalText", "python_documentation.PythonDocumentation"),
    )
]
DATA_OPTIONS = ("batch_tokens", "sequence_length", "order", "seed", "held_out_tokens", "vocab_size", "case_markup")


def settings_beside(ckpt: str, rest: list[str], has_source: bool) -> list[str]:
    """How to score a file, and on which text, as an argument of the command; nothing that runs code.

    Args:
        ckpt: The file.
        rest: The other arguments.
        has_source: Whether they name a source.

    Raises:
        UserError: If the config sets more than plain values, or there is none and nothing names the text.
    """
    config = RunFolder.containing(Path(ckpt)).config
    if not config.is_file():
        if has_source or any(arg.startswith("--data.") for arg in rest):
            return []
        raise UserError(f"--ckpt {ckpt}: its run folder has no config.yaml; name its recipe with --config")
    settings = {key: value for key, value in load_recipe(config).items() if key in TRUSTED_SETTINGS}
    source = settings["data"].pop("source", None) if isinstance(settings.get("data"), dict) else None
    for problem in _untrusted(settings, None if has_source else source):
        raise UserError(
            f"{config}: {problem}, which nobody named on the command line; give --data.source, or --config {config} "
            "if you trust that file"
        )
    if source is not None and not has_source:
        settings["data"]["source"] = source
    return [f"--config={yaml.safe_dump(settings, sort_keys=False)}"] if settings else []


def _untrusted(settings: dict[str, Any], source: Any) -> Iterator[str]:
    """What in settings from somebody else is more than plain values for options that every run has."""
    known = {"data": DATA_OPTIONS, "eval": [field.name for field in fields(EvaluationConfig)]}
    for room, values in settings.items():
        if room not in known:
            if not isinstance(values, str):
                yield f"sets {room} to something else than a name"
        elif not isinstance(values, dict):
            yield f"sets {room} to something else than options"
        else:
            for key, value in values.items():
                if key not in known[room]:
                    yield f"sets {room}.{key}"
                elif not isinstance(value, int | float | None) and not (key == "order" and isinstance(value, str)):
                    yield f"sets {room}.{key} to something else than a number"
    if source is not None:
        name = (
            source.get("class_path")
            if isinstance(source, dict) and set(source) <= {"class_path", "init_args"}
            else None
        )
        if name not in TRUSTED_SOURCES:
            yield f"names the source {name or source}"
        elif not isinstance(source.get("init_args") or {}, dict):
            yield "names the settings of its source in another file"
