"""The report: one HTML file that needs no other, for light and dark screens, phones and paper."""

from collections.abc import Sequence
from html import escape
from typing import Any

from trainer.comparison import group_runs, table, why_incomparable
from trainer.errors import UserError
from trainer.paired import Paired, moved_table, sentences
from trainer.report.byte_use import ByteUse
from trainer.report.charts import line_chart
from trainer.run_folder import RunData

BEGINNING = "<!doctype html>"  # of every report
STYLE = """
:root { color-scheme: light dark; --ink: #1d2329; --soft: #59636e; --line: #d9dee3; --paper: #fff; --card: #f5f7f9;
  --c0: #2563ab; --c1: #c2571a; --c2: #2a8055; --c3: #8a4fa3; --c4: #b3283d; --c5: #6b6b1f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --soft: #9aa5b0; --line: #333b44; --paper: #14181c;
  --card: #1d2328; --c0: #6ea8ea; --c1: #ee9560; --c2: #63c296; --c3: #c592dc; --c4: #ee7a8b; --c5: #c9c96a; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  max-width: 1080px; padding: 24px 16px 64px; }
h1 { font-size: 24px; margin: 0 0 4px; } h2 { font-size: 18px; margin: 36px 0 10px; }
p.note, .soft { color: var(--soft); margin: 4px 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 10px; margin: 18px 0; }
.card { background: var(--card); border-radius: 8px; padding: 12px 14px; }
.card b { display: block; font-size: 22px; font-variant-numeric: tabular-nums; }
.meter { height: 6px; border-radius: 3px; background: var(--line); margin-top: 8px; overflow: hidden; }
.meter i { display: block; height: 100%; background: var(--c0); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 18px; }
figure { margin: 0; } figcaption { color: var(--soft); margin-bottom: 4px; }
svg { width: 100%; height: auto; display: block; } svg text { font-size: 12px; fill: var(--soft); }
@media (max-width: 600px) { svg text { font-size: 20px; } }
svg .grid { stroke: var(--line); } svg .line { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
"""
STYLE += "".join(
    f"svg .c{n} {{ stroke: var(--c{n}); }} svg circle.c{n} {{ fill: var(--c{n}); }} "
    f".key.c{n} {{ background: var(--c{n}); }}\n"
    for n in range(6)
)
STYLE += """.key { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 6px; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 10px 5px 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { color: var(--soft); font-weight: 500; }
td .bar { display: inline-block; height: 8px; background: var(--c0); border-radius: 2px; vertical-align: middle; }
pre { background: var(--card); border-radius: 8px; padding: 12px 14px; overflow-x: auto; white-space: pre-wrap;
  overflow-wrap: anywhere; font-size: 13px; } details { margin: 10px 0; } summary { cursor: pointer; }
"""
STAGES = {
    "live_plain": "live weights, plain",
    "averaged_plain": "averaged weights, plain",
    "artifact_plain": "artifact, plain",
    "artifact_sliding": "artifact, sliding window",
}
CURVES = (
    ("train/loss", "Training loss, nats per token", True),
    ("val/bpb", "Validation during training, bits per byte (plain)", False),
    ("train/lr_multiplier", "Learning-rate multiplier", False),
    ("perf/tokens_per_second", "Tokens per second", False),
    ("train/gradient_norm", "Gradient norm before clipping", True),
    ("perf/mfu", "Model FLOPs utilization (MFU)", False),
)


def page(
    runs: list[RunData], uses: list[ByteUse], samples: list[str], command: str, pairs: Sequence[Paired] = ()
) -> str:
    """The report of a run, or of several over each other.

    Args:
        runs: The first one is described in full.
        uses: How the bytes of its artifact are used; empty if the artifact is missing.
        samples: Texts that the model generated.
        command: Command that repeats the run.
        pairs: Other runs against the first, document by document.
    """
    first = runs[0]
    title = ", ".join(run.name for run in runs)
    sections = [f"<h1>{escape(title)}</h1>", _subtitle(first), _cards(first)]
    if len(runs) > 1:
        sections += [*_comparison(runs), *_documents(pairs), "<h2>Differences</h2>", _legend(runs), _differences(runs)]
    charts = "".join(
        line_chart(caption, [(run.name, run.curves.get(name, ([], []))) for run in runs], log)
        for name, caption, log in CURVES
    )
    note = (
        "By step." if charts else "Nothing was logged: no step of this run was a multiple of trainer.log_every_n_steps."
    )
    sections.append(f'<h2>Training</h2><p class="note">{note}</p><div class="charts">{charts}</div>')
    if len(runs) == 1:
        sections += ["<h2>Score at each stage</h2>", _stages(first)]
    if uses:
        sections += ["<h2>Where the bytes went</h2>", _bytes(first, uses)]
    if samples:
        sections += ["<h2>What it writes</h2>", *(f"<pre>{escape(sample)}</pre>" for sample in samples)]
    sections += ["<h2>Repeat it</h2>", f"<pre>{escape(command)}</pre>", _environment(first)]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    return (
        f'{BEGINNING}<html lang="en"><head>{head}<title>{escape(title)}</title><style>{STYLE}</style></head>'
        f"<body>{''.join(sections)}</body></html>\n"
    )


def _subtitle(run: RunData) -> str:
    summary = run.summary
    return (
        f'<p class="soft">{summary["parameters"]:,} parameters, trained on {escape(summary["versions"]["device"])}; '
        f"{summary['steps']:,} steps; {escape(summary['weights'])} weights</p>"
    )


def _cards(run: RunData) -> str:
    summary = run.summary
    seconds = max(summary["train_seconds"], 1e-9)
    what = "artifact" if "bytes_total" in summary else f"{escape(summary['weights'])} weights"
    cards = [
        (f"{summary['val_bpb']:.4f}", f"bits per byte of the {what}, {summary['val_tokens']:,} tokens", ""),
        *_size(summary),
        (_count(summary["train_tokens"]), "training tokens", ""),
        (_time(seconds), f"of training, {summary['train_tokens'] / seconds:,.0f} tokens per second", ""),
    ]
    inside = "".join(
        f'<div class="card"><b>{big}</b><span class="soft">{small}</span>{more}</div>' for big, small, more in cards
    )
    return f'<div class="cards">{inside}</div>'


def _size(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The card with the size, if an artifact was stored."""
    if "bytes_total" not in summary:
        return []
    total, cap = summary["bytes_total"], summary["bytes_cap"]
    left = f"{abs(cap - total):,} {'over the cap by' if total > cap else 'left'}"
    meter = f'<div class="meter"><i style="width:{min(100 * total / cap, 100):.1f}%"></i></div>'
    return [(f"{total:,}", f"of {cap:,} bytes; {left}", meter)]


def _legend(runs: list[RunData]) -> str:
    keys = "&emsp;".join(f'<span class="key c{n % 6}"></span>{escape(run.name)}' for n, run in enumerate(runs))
    return f"<p>{keys}</p>"


def _comparison(runs: list[RunData]) -> list[str]:
    """What `trainer compare` says of the runs, if they compare."""
    try:
        head, *rows = table(group_runs(runs))
    except UserError as error:
        return [f'<p class="note">No comparison: {escape(str(error))}</p>']
    note = "Bits per byte, lower is better; ± is a standard error. Runs of equal seeds are compared pair by pair."
    return ["<h2>Comparison</h2>", _table(head, rows), f'<p class="note">{note}</p>']


def _documents(pairs: Sequence[Paired]) -> list[str]:
    """The changes of single documents: a line of their distribution, and the documents that moved most."""
    if not pairs:
        return []
    series = []
    for pair in pairs:
        changes = sorted(pair.changes.tolist())
        shares = [100 * (index + 1) / len(changes) for index in range(len(changes))]
        series.append((pair.after.path.parent.name, (changes, shares)))
    title = "Percent of the documents (vertical) that changed by at most so many bits per byte (horizontal)"
    parts = ["<h2>Document by document</h2>", f'<div class="charts">{line_chart(title, series)}</div>']
    for pair in pairs:
        head, *rows = moved_table(pair)
        parts += [f'<p class="note">{escape("; ".join(sentences(pair)))}</p>', _table(head, rows)]
    return parts


def _differences(runs: list[RunData]) -> str:
    summaries = [run.summary for run in runs]
    rows = _score_rows(runs)
    for name, key, form in (
        ("total bytes", "bytes_total", "{:,}"),
        ("parameters", "parameters", "{:,}"),
        ("steps", "steps", "{:,}"),
        ("training seconds", "train_seconds", "{:,.0f}"),
    ):
        if not all(key in summary for summary in summaries):  # a run without an artifact has no size
            continue
        signed = form.replace("{:", "{:+")
        first = summaries[0][key]
        changes = [f"{form.format(each[key])} ({signed.format(each[key] - first)})" for each in summaries[1:]]
        rows.append([name, form.format(first), *changes])
    names = dict.fromkeys(name for run in runs for name in run.config)
    for name in names:
        values = [run.config.get(name) for run in runs]
        if any(value != values[0] for value in values):
            rows.append([name, *map(str, values)])
    return _table(["", *(run.name for run in runs)], rows)


def _score_rows(runs: list[RunData]) -> list[list[str]]:
    """Bits per byte of each run at each stage that any of them reached, and the changes to the first run's."""
    rows = []
    for stage, label in STAGES.items():
        scores = [run.summary["stages"].get(stage, {}).get("bpb") for run in runs]
        if all(score is None for score in scores):
            continue
        first = scores[0]
        cells = ["-" if score is None else f"{score:.5f}" for score in scores]
        for n, score in enumerate(scores[1:], 1):
            if first is not None and score is not None:
                cells[n] += f" ({why_incomparable(runs[0], runs[n]) or f'{score - first:+.5f}'})"
        rows.append([f"bits per byte: {label}", *cells])
    return rows


def _stages(run: RunData) -> str:
    rows = []
    for name, stage in run.summary["stages"].items():
        numbers = (f"{stage['bpb']:.5f}", f"{stage['loss']:.5f}", f"{stage['tokens']:,}", f"{stage['bytes']:,}")
        rows.append([STAGES.get(name, name), *numbers])
    return _table(["", "bits per byte", "nats per token", "tokens", "bytes of text"], rows)


def _bytes(run: RunData, uses: list[ByteUse]) -> str:
    largest = max(use.bytes for use in uses)

    def bar(size: int) -> str:
        return f'<span class="bar" style="width:{90 * size / largest:.0f}px"></span>'

    rows = [
        [
            f'{escape(use.group)} <span class="soft">{escape(use.kinds)}</span>',
            f"{use.parameters:,}",
            bar(use.bytes),
            f"{use.bytes:,}",
            f"{use.bits:.2f}",
            f"{8 * use.entropy_bytes / use.parameters:.2f}",
            f"{100 * use.error:.2f} %" if use.error is not None else "-",
        ]
        for use in uses
    ]
    code = run.summary["bytes_code"]
    rows.append(["code", "", bar(code), f"{code:,}", "", "", ""])
    note = (
        '<p class="note">Each group is compressed by itself. Entropy: a coder that knows each byte\'s frequency. '
        "Rounding: root mean square of the change, relative to that of the weights.</p>"
    )
    return (
        _table(["", "parameters", "", "bytes", "bits per parameter", "entropy", "rounding"], rows, escaped=True) + note
    )


def _environment(run: RunData) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in run.summary["versions"].items())
    config = "\n".join(f"{name}: {value}" for name, value in run.config.items())
    settings = f"<details><summary>All settings</summary><pre>{escape(config)}</pre></details>"
    return f'<p class="soft">{escape(versions)}</p>{settings}'


def _table(head: list[str], rows: list[list[str]], escaped: bool = False) -> str:
    def cells(tag: str, values: list[str], safe: bool) -> str:
        return "".join(f"<{tag}>{value if safe else escape(value)}</{tag}>" for value in values)

    body = "".join(f"<tr>{cells('td', row, escaped)}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{cells("th", head, False)}</tr>{body}</table></div>'


def _count(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value:.0f}"


def _time(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 120 else f"{seconds:.0f} s"
