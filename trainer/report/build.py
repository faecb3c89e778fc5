"""The report of run folders, from the files in them alone."""

from pathlib import Path
from shlex import quote

from trainer.checkpoint import live_state, load_checkpoint, stored_average
from trainer.comparison import why_incomparable
from trainer.errors import UserError
from trainer.files import atomic_write
from trainer.generation import SamplingConfig, continue_text
from trainer.loading import load_artifact
from trainer.logging import logger
from trainer.paired import compare_documents, read_table
from trainer.quantize.container import Array, read_container
from trainer.report.byte_use import ByteUse, byte_use
from trainer.report.page import page
from trainer.run_folder import RunFolder

PROMPTS = ("", "", "The")
SAMPLE_TOKENS = 120


def build_report(folders: list[RunFolder], path: Path) -> None:
    """Write the report of one run, or of several laid over each other.

    Args:
        folders: The runs; the first one is described in full.
        path: The file to write.

    Raises:
        UserError: If one holds no finished run, or the file cannot be written.
    """
    runs = [folder.read() for folder in folders]
    for run in runs[1:]:
        if reason := why_incomparable(runs[0], run):
            logger.warning(f"{run.folder}: its scores do not compare with those of {runs[0].folder} ({reason})")
    first = folders[0]
    uses: list[ByteUse] = []
    samples: list[str] = []
    if first.artifact.is_file():
        header, tensors = read_container(first.artifact)
        uses = byte_use(
            tensors, _weights(first.last_checkpoint, runs[0].summary["weights"] == "averaged"), header["codec"]
        )
        if first.tokenizer.is_file():
            samples = _samples(first.artifact)
    pairs = []
    for folder in folders[1:]:
        if first.documents.is_file() and folder.documents.is_file():
            try:
                pairs.append(compare_documents(read_table(first.documents), read_table(folder.documents)))
            except UserError as error:
                logger.warning(f"no comparison of documents: {error}")
    command = f"trainer fit --config {quote(str(first.config))}"
    with atomic_write(path) as file:
        file.write(page(runs, uses, samples, command, pairs).encode())


def _weights(path: Path, is_averaged: bool) -> dict[str, Array] | None:
    """The weights that were exported, if their checkpoint still exists."""
    try:
        checkpoint = load_checkpoint(path)
    except UserError:
        return None
    state = (stored_average(checkpoint) if is_averaged else None) or live_state(checkpoint)
    return {name: tensor.float().numpy() for name, tensor in state.items()}


def _samples(artifact: Path) -> list[str]:
    model, tokenizer = load_artifact(artifact)
    return [
        prompt + "".join(continue_text(model, tokenizer, prompt, SamplingConfig(SAMPLE_TOKENS, seed=seed)))
        for seed, prompt in enumerate(PROMPTS)
    ]
