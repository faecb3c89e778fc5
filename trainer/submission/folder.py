"""A submission folder made of finished runs: the files that ship, their score, and how to reproduce it."""

import datetime
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.comparison import is_compared
from trainer.data import retokenize
from trainer.data.manifest import Manifest
from trainer.errors import UserError
from trainer.files import atomic_write, copy_file
from trainer.quantize.export import SIZE_CAP
from trainer.run_folder import RunData, RunFolder
from trainer.versions import EXTRAS, PACKAGES

SHIPPED = ("artifact", "code", "config", "tokenizer")  # of a run folder
COPY = """
`DATA` is a copy, with case markup, of these shards: {shards}. With all of them and
their `tokenizer.model` in a folder `OTHER`, this makes the same copy in `data`:

```sh
python train_gpt.py prepare --config config.yaml --data.source Shards --data.source.folder OTHER --data.case_markup true
```
"""


@dataclass(frozen=True)
class Entry:
    """Author and title of a submission.

    Attributes:
        name: Title of the submission.
        author: Name of the author.
        github_id: Account of the author at GitHub.
        track: Track of the challenge.
        blurb: A sentence about the submission.
    """

    name: str
    author: str
    github_id: str
    track: str
    blurb: str


def make_folder(entry: Entry, folders: list[Path], data: Path, out: Path) -> RunData:
    """Write a submission of the best of several seeds.

    Args:
        entry: Author and title.
        folders: Run folders of one recipe.
        data: Folder with the shards that they were scored on.
        out: The folder to make.

    Returns:
        The run whose artifact ships.

    Raises:
        UserError: If a run is not finished, the runs are not of one recipe, the files are over the cap, or `out`
            exists.
    """
    runs = sorted((RunFolder(folder).read() for folder in folders), key=lambda run: float(run.summary["val_bpb"]))
    best = runs[0]
    _check_one_recipe(runs)
    manifest = Manifest.read(data)
    copy = ""
    if manifest is not None and manifest.source.get("class") == retokenize.CLASS:
        copy = COPY.format(shards=", ".join(f"`{name}`" for name, *_ in manifest.source["shards"]))
    shipped = RunFolder(out)
    sizes = {path.name: _size(path) for path in (best.folder.artifact, best.folder.code)}
    if (total := sum(sizes.values())) > SIZE_CAP:
        raise UserError(
            f"{best.folder}: {total:,} bytes are {total - SIZE_CAP:,} over the cap of {SIZE_CAP:,}; export it with "
            "--shrink_to_cap"
        )
    try:
        out.mkdir(parents=True)
    except FileExistsError as error:
        raise UserError(f"{out}: exists already; choose another --out or remove it") from error
    files = [(getattr(best.folder, name), getattr(shipped, name)) for name in SHIPPED]
    for source, target in [*files, *((run.folder.log, out / _log_name(run, runs)) for run in runs)]:
        if not source.is_file():
            raise UserError(f"{source}: is missing; run it again with this version")
        copy_file(source, target)
    record = _record(entry, runs, sizes)
    for name, text in (
        ("submission.json", json.dumps(record, indent=2) + "\n"),
        ("README.md", _readme(entry, runs, record, copy)),
        (
            "requirements.txt",
            "".join(f"{name}{EXTRAS.get(name, '')}=={_version(best, name)}\n" for name in PACKAGES),
        ),
    ):
        with atomic_write(out / name) as file:
            file.write(text.encode())
    return best


def _check_one_recipe(runs: list[RunData]) -> None:
    first = runs[0]
    for run in runs:
        if script := run.summary.get("script"):
            raise UserError(
                f"{run.folder}: ran with your own {script['name']}, which the code that ships lacks; put its changes "
                "into the trainer, as docs/extending.md shows, and train again"
            )
    for run in runs[1:]:
        if run.summary["shards_fingerprint"] != first.summary["shards_fingerprint"]:
            raise UserError(f"{run.folder}: read other shards than {first.folder}; submit seeds of one text")
        for name in sorted({*first.config, *run.config}):
            if is_compared(name) and run.config.get(name) != first.config.get(name):
                raise UserError(
                    f"{run.folder}: has another recipe than {first.folder} ({name}: {run.config.get(name)} instead of "
                    f"{first.config.get(name)}); submit seeds of one recipe"
                )
    seeds = [run.config.get("seed_everything") for run in runs]
    if len(set(seeds)) < len(seeds):
        raise UserError(
            f"two of the runs have the same seed ({', '.join(map(str, seeds))}); give runs of several seeds"
        )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; the run did not end with an export") from error


def _log_name(run: RunData, runs: list[RunData]) -> str:
    return run.folder.log.name if len(runs) == 1 else f"train_seed{run.config['seed_everything']}.log"


def _version(run: RunData, name: str) -> str:
    return str(run.summary["versions"][name]).partition("+")[0]


def _record(entry: Entry, runs: list[RunData], sizes: dict[str, int]) -> dict[str, Any]:
    """What `submission.json` holds; scores of several seeds are means."""
    summaries = [run.summary for run in runs]
    mean = {key: statistics.fmean(summary[key] for summary in summaries) for key in ("val_loss", "val_bpb")}
    record: dict[str, Any] = {
        "author": entry.author,
        "github_id": entry.github_id,
        "name": entry.name,
        "blurb": entry.blurb,
        "date": datetime.date.today().isoformat(),
        "track": entry.track,
        **mean,
        "bytes_total": sum(sizes.values()),
        "bytes_model": sizes[runs[0].folder.artifact.name],
        "bytes_code": sizes[runs[0].folder.code.name],
        "seeds": [run.config["seed_everything"] for run in runs],
        "steps": summaries[0]["steps"],
        "wallclock_seconds": summaries[0]["train_seconds"],
        "eval_time_seconds": summaries[0]["eval_seconds"],
        "hardware": summaries[0]["versions"]["device"],
        "versions": summaries[0]["versions"],
    }
    if "ancestry" in summaries[0]:
        record["ancestry"] = [{**each, "file": Path(each["file"]).name} for each in summaries[0]["ancestry"]]
    if len(runs) > 1:
        record["val_bpb_deviation"] = statistics.stdev(summary["val_bpb"] for summary in summaries)
        keys = ("val_bpb", "val_loss", "bytes_total", "steps", "train_seconds")
        record["per_seed"] = {
            str(run.config["seed_everything"]): {key: run.summary[key] for key in keys} for run in runs
        }
    return record


def _readme(entry: Entry, runs: list[RunData], record: dict[str, Any], copy: str) -> str:
    rows = "\n".join(
        f"| {run.config['seed_everything']} | {run.summary['val_bpb']:.5f} | {run.summary['val_loss']:.5f} | "
        f"{run.summary['bytes_total']:,} | {run.summary['steps']:,} | {run.summary['train_seconds']:,.0f} s |"
        for run in runs
    )
    spread = f" +- {record['val_bpb_deviation']:.5f}" if len(runs) > 1 else ""
    best = runs[0]
    ancestry = "".join(
        f"\nThe weights come from `{each['file']}` (sha256 {each['sha256']}), trained on "
        f"{each.get('train_tokens', 'unknown')} tokens of text {each.get('text_fingerprint') or 'unknown'}.\n"
        for each in record.get("ancestry", [])
    )
    parent = "To train it again, name the first of these files with `--init_from FILE`. " if ancestry else ""
    settings = "\n".join(f"{name}: {value}" for name, value in best.config.items() if value is not None)
    blurb = f"{entry.blurb}\n\n" if entry.blurb else ""
    return f"""# {entry.name}

{blurb}**{record["val_bpb"]:.5f}{spread} bits per byte**, {record["bytes_total"]:,} of {SIZE_CAP:,} bytes
({record["bytes_model"]:,} model, {record["bytes_code"]:,} code), on {record["hardware"]}.
{entry.author} (@{entry.github_id}).
{ancestry}
| seed | bits per byte | nats per token | bytes | steps | training |
|---|---|---|---|---|---|
{rows}

`artifact.zst` is the model of seed {best.config["seed_everything"]}. `train_gpt.py` holds all of the code, in one
script:

```sh
pip install -r requirements.txt
python train_gpt.py validate --ckpt artifact.zst \\
    --data.source Shards --data.source.folder DATA --data.source.tokenizer tokenizer.model
python train_gpt.py fit --config config.yaml \\
    --data.source Shards --data.source.folder DATA --data.source.tokenizer tokenizer.model
```

{parent}`DATA` is a folder with the token shards, which `tokenizer.model` made.
{copy}

<details><summary>Settings</summary>

```
{settings}
```

</details>
"""
