"""The project from Python: what the commands do, with plain values in and out."""

import json
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sentencepiece
import torch

from trainer.cli import train
from trainer.data.canonical import check_canonical, excluded_pairs
from trainer.data.tokenizer import BOS, ByteTable, normalized_bytes
from trainer.errors import OptionError, UserError
from trainer.evaluation import sliding
from trainer.evaluation.metric import Score
from trainer.evaluation.windows import EvaluationConfig
from trainer.generation import SamplingConfig, continue_text
from trainer.loading import load_artifact
from trainer.logging import only_warnings
from trainer.model.transformer import Transformer
from trainer.recipes import DEFAULT
from trainer.run_folder import RunFolder

__all__ = ["TrainedRun", "Validation", "fit", "generate", "load_artifact", "score", "validate"]


class TrainedRun(NamedTuple):
    """A finished run.

    Attributes:
        run_folder: Its folder, with the artifact, `metrics.csv` and `report.html`.
        val_bpb: Score of the artifact as it is on disk, in bits per byte; of the weights if none was stored.
        bytes_total: Bytes of code and model together, or None if no artifact was stored.
        scores: The score of every stage: `live_plain`, `averaged_plain`, `artifact_plain`, `artifact_sliding`; before
            them `parent_plain` with `init_from`.
        summary: All of `summary.json`.
    """

    run_folder: Path
    val_bpb: float
    bytes_total: int | None
    scores: dict[str, Score]
    summary: dict[str, Any]


class Validation(NamedTuple):
    """Scores of stored weights.

    Attributes:
        val_bpb: Bits per byte: the sliding-window score, or the plain one where no stride is set.
        scores: `plain` and, with a stride, `sliding`, or `adapted` with `eval.adapt_rate`.
    """

    val_bpb: float
    scores: dict[str, Score]


def fit(recipe: str = DEFAULT, overrides: Mapping[str, Any] | None = None, quiet: bool = False) -> TrainedRun:
    """Train a recipe, export it and score the artifact, as `trainer fit` does.

    Args:
        recipe: Name of a packaged recipe, or path of a YAML file.
        overrides: Values of options by their dotted names, such as `{"trainer.max_steps": 12}`; `ckpt` resumes a run.
        quiet: Print nothing but warnings.

    Raises:
        UserError: If an option or the text cannot be used.
    """
    if "dry_run" in (overrides or {}):
        raise UserError("dry_run: trainer.fit makes a run; for a forecast use the command trainer fit --dry_run")
    # The default is not named: variables of the published script count only for a recipe that somebody named.
    config = [] if recipe == DEFAULT else [f"--config={recipe}"]
    folder = _run("fit", [*config, *_arguments(overrides)], quiet)
    assert isinstance(folder, RunFolder)
    summary = folder.read().summary
    scores = {name: Score(**values) for name, values in summary["stages"].items()}
    return TrainedRun(folder.path, summary["val_bpb"], summary.get("bytes_total"), scores, summary)


def validate(ckpt: str | Path, overrides: Mapping[str, Any] | None = None, quiet: bool = False) -> Validation:
    """Score an artifact or a checkpoint on the text of its run, as `trainer validate` does.

    Args:
        ckpt: The file.
        overrides: Values of options by their dotted names, such as `{"eval.stride": None, "weights": "averaged"}`.
        quiet: Print nothing but warnings.

    Raises:
        UserError: If the file or its text cannot be used.
    """
    scores = _run("validate", [f"--ckpt={ckpt}", *_arguments(overrides)], quiet)
    assert isinstance(scores, dict)
    return Validation(list(scores.values())[-1].bpb, scores)


def score(
    model: Transformer,
    tokenizer: sentencepiece.SentencePieceProcessor,
    texts: str | Iterable[str],
    window: int = 2048,
    stride: int | None = 64,
    batch_windows: int = 64,
    canonical: bool = False,
) -> Score:
    """Score texts with a model, as validation scores a split: one after the other, each after a BOS token.

    Args:
        model: A model in evaluation mode, on the device that scores.
        tokenizer: Its tokenizer.
        texts: The documents.
        window: Tokens that the model reads at once. Those of a run are in its `config.yaml` under `eval`, and only they
            give a score that compares with the run's: 128 with stride 32 for `quickstart`.
        stride: New targets that each window after the first scores; None: every window is scored whole.
        batch_windows: Windows per batch.
        canonical: Give no probability to tokens that BPE never puts after the one before, as `eval.canonical` does.

    Returns:
        The score; its bytes are those of the texts after the tokenizer's normalization.

    Raises:
        UserError: If there is no text, the tokenizer has no tokens for some of its characters, window and stride do not
            fit together, or a canonical score is not possible.
    """
    try:
        evaluation = EvaluationConfig(window, stride, batch_windows)
    except ValueError as error:
        raise UserError(str(error)) from error
    texts = [texts] if isinstance(texts, str) else list(texts)
    if not any(texts):
        raise UserError("there is no text to score")
    table, ids = ByteTable.from_tokenizer(tokenizer), []
    for index, (text, encoded) in enumerate(zip(texts, tokenizer.encode(texts), strict=True)):
        table.check(np.array(encoded, np.uint16), normalized_bytes(tokenizer, text), f"texts[{index}]")
        ids += [BOS, *encoded]
    if len(ids) < 2:
        raise UserError("there is no text to score")
    device = model.token_embedding.weight.device
    tokens = torch.tensor(ids, dtype=torch.int32, device=device)
    excluded = excluded_pairs(tokenizer).to(device) if canonical else None
    if excluded is not None:
        check_canonical(tokens, excluded, tokenizer, "texts", "set canonical=False")
    with torch.no_grad():
        return sliding.score(model.nll, tokens, table, evaluation, excluded=excluded)


def generate(
    model: Transformer, tokenizer: sentencepiece.SentencePieceProcessor, prompt: str = "", **sampling: Any
) -> str:
    """Generate the text that follows a prompt.

    Args:
        model: A model in evaluation mode.
        tokenizer: Its tokenizer.
        prompt: Text to continue, as the start of a document: BOS comes before it.
        sampling: Values of SamplingConfig: `tokens`, `temperature`, `top_k`, `top_p`, `seed`, `context`.

    Raises:
        UserError: If a value is out of range.
    """
    return "".join(continue_text(model, tokenizer, prompt, SamplingConfig(**sampling)))


def _run(command: str, arguments: list[str], quiet: bool) -> RunFolder | dict[str, Score] | None:
    try:
        with only_warnings() if quiet else nullcontext():
            return train.run(command, [*arguments, *(["--progress.mode=quiet"] if quiet else [])])
    except OptionError as error:  # it begins with the command and ends with how to ask it for help
        raise UserError(error.reason) from error


def _arguments(overrides: Mapping[str, Any] | None) -> list[str]:
    """Options of a command; a value is written in YAML, as the command line reads it."""
    arguments = []
    for name, value in (overrides or {}).items():
        value = str(value) if isinstance(value, Path) else value
        arguments.append(f"--{name.lstrip('-')}={value if isinstance(value, str) else json.dumps(value)}")
    return arguments
