"""The model card: README.md beside a stored model, which says what it was trained on, how it scores, what it is not."""

from collections import defaultdict
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.files import atomic_write
from trainer.logging import logger
from trainer.paired import read_table
from trainer.run_folder import CARD, RunFolder

# What the stages of a run's end are called in a sentence.
STAGES = {
    "parent_plain": "the model it started from, plain windows",
    "live_plain": "last step, before it was stored, plain windows",
    "averaged_plain": "averaged weights, before they were stored, plain windows",
    "artifact_plain": "{file}, plain windows",
    "artifact_sliding": "{file}, sliding windows",
}
FRONT = "---\npipeline_tag: text-generation\ntags: [parameter-golf, golf-trainer]\n---\n"
SAME = 1e-4  # bits per byte by which two evaluations of one model may differ
LIMITS = """\
- It continues text. It follows no instructions, knows nothing reliably and invents facts, names and numbers.
- It has read only {text}, with whatever is wrong, private or offensive in it. Nothing was filtered here.
- The scores are of one validation split. They compare only with scores of the same text, window and stride.
- The text belongs to its authors, and its license decides what may be done with the model. This card names none."""

USE = """\
Beside numpy, the file needs only zstandard to be read, or constriction too if its codec is `ans`: docs/artifact.md of
the project describes the format. With golf-trainer installed:

```sh
trainer generate --artifact artifact.zst --prompt "The"
trainer validate --ckpt artifact.zst --text YOUR.jsonl
```"""
USE_OPEN = """\
`model.safetensors` holds all tensors, `config.json` the shape of the model. docs/artifact.md of the project has a
program of one page that runs them with torch alone."""


def write_model_card(
    folder: Path, run: RunFolder, summary: dict[str, Any], is_scored: bool = True, open_format: bool = False
) -> None:
    """Write `README.md` beside a stored model.

    Args:
        folder: Folder of the model's files.
        run: The run that it comes from; its `documents.csv` gives the score by source.
        summary: The run's `summary.json`; may be empty if the run has not ended.
        is_scored: Whether the run's scores are those of this very model.
        open_format: Whether the model is stored for other programs.
    """
    card = folder / CARD
    if card.is_file() and not card.read_bytes().startswith(FRONT.encode()):
        logger.warning(f"{card}: is not a model card, and is kept; none is written")
        return
    try:
        text = _card(run, summary, is_scored, open_format)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        logger.warning(f"{card}: is not written, because {run.summary} or {run.config} was changed by hand ({error})")
        return
    with atomic_write(card) as file:
        file.write(text.encode())


def _card(run: RunFolder, summary: dict[str, Any], is_scored: bool, open_format: bool) -> str:
    settings = run.settings()
    read = "this text and that of the model it started from" if summary.get("ancestry") else "this text"
    sections = [
        _head(run, {**summary, "bytes_model": None} if summary and open_format else summary),
        _scores(summary, settings, is_scored, "the artifact" if open_format else "this file"),
        _by_source(run.documents, summary) if is_scored and summary else "",
        _training(summary, settings),
        "## Limits\n\n" + LIMITS.format(text=read),
        f"## Use\n\n{USE_OPEN if open_format else USE}",
    ]
    return "\n\n".join(each for each in sections if each) + "\n"


def _cell(text: object) -> str:
    """A text as part of a table or a heading."""
    return " ".join(str(text).replace("|", "/").replace("`", "'").replace("*", "\\*").split())


def _head(run: RunFolder, summary: dict[str, Any]) -> str:
    name = _cell(f"{run.path.resolve().parent.name}, run {run.path.resolve().name}")
    if not summary:
        return f"{FRONT}# {name}\n\nA small language model."
    size = f" in {summary['bytes_model']:,} bytes" if summary.get("bytes_model") else ""
    origin = "trained further on another text" if summary.get("ancestry") else "trained from scratch"
    return f"{FRONT}# {name}\n\nA language model of {summary['parameters']:,} parameters{size}, {origin}."


def _scores(summary: dict[str, Any], settings: dict[str, Any], is_scored: bool, file: str) -> str:
    if not is_scored or not summary:
        return "## Score\n\nThese weights were not scored. `trainer validate --ckpt FILE` scores them."
    rows = []
    for name, stage in summary["stages"].items():
        title = STAGES.get(name, name).format(file=file)
        rows.append(f"| {title} | {stage['bpb']:.4f} | {stage['tokens']:,} | {stage['bytes']:,} |")
    window, stride = settings.get("eval.window"), settings.get("eval.stride")
    windows = f" Windows have {window} tokens." if window else ""
    windows += f" Sliding ones move by {stride}." if stride else ""
    if settings.get("eval.canonical"):
        windows += " Tokens that the tokenizer never puts after the one before have no probability (`eval.canonical`)."
    head = "| of | bits per byte | tokens | bytes |\n|---|---|---|---|\n"
    return f"## Score\n\nBits per byte of text, lower is better.{windows}\n\n{head}" + "\n".join(rows)


def _by_source(documents: Path, summary: dict[str, Any]) -> str:
    """The score of each source, if `trainer validate --per_document` has written it of this model and this text."""
    if not documents.is_file():
        return ""
    try:
        table = read_table(documents)
    except UserError:  # of another program
        return ""
    if table.bytes.sum() != summary["val_bytes"] or abs(table.bpb - summary["val_bpb"]) > SAME:
        return ""
    sums: dict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    for name, size, bits in zip(table.sources, table.bytes, table.bits, strict=True):
        row = sums[name]
        row[0], row[1], row[2] = row[0] + 1, row[1] + size, row[2] + bits
    rows = [
        f"| {_cell(name) or 'unknown'} | {bits / size:.4f} | {count:,} | {int(size):,} |"
        for name, (count, size, bits) in sums.items()
        if size
    ]
    head = "| source | bits per byte | documents | bytes |\n|---|---|---|---|\n"
    return f"### By source\n\nOf `{documents.name}` in the folder of the run.\n\n{head}" + "\n".join(rows)


def _training(summary: dict[str, Any], settings: dict[str, Any]) -> str:
    """Text, budget and ancestry; of paths only the last name, since they are a machine's own."""
    facts: list[tuple[str, str]] = []
    if source := settings.get("data.source.class_path"):
        folder = settings.get("data.source.init_args.folder")
        facts.append(
            ("text", str(source).rpartition(".")[2] + (f", folder `{_cell(Path(folder).name)}`" if folder else ""))
        )
    if summary:
        facts.append(("text, fingerprint", f"`{summary['text_fingerprint'] or summary['shards_fingerprint']}`"))
        facts.append(("tokens read", f"{summary['train_tokens']:,}, {summary['epochs']:.2f} epochs"))
        facts.append(("tokenizer, sha256", f"`{summary['tokenizer_sha256']}`"))
        facts.append(("training time", f"{summary['train_seconds']:,.0f} s for {summary['steps']:,} steps"))
        facts.append(("device", str(summary["versions"].get("device", "unknown"))))
        facts.append(("weights", "averaged" if summary["weights"] == "averaged" else "those of the last step"))
        facts += [("code, sha256", f"`{summary['code_sha256']}`")] if "code_sha256" in summary else []
        facts += [
            ("started from", f"`{_cell(Path(each['file']).name)}`, sha256 `{each['sha256']}`")
            for each in summary.get("ancestry", [])
        ]
    if budget := settings.get("wallclock.seconds"):
        facts.append(("budget", f"{budget} s"))
    if length := settings.get("data.sequence_length"):
        facts.append(("context", f"{length} tokens"))
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts)
    return f"## Training\n\n| | |\n|---|---|\n{rows}" if facts else ""
