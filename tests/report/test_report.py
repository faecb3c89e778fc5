"""The report shows what the files say, needs no other file, and draws any series."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.__main__ import main
from trainer.quantize.container import StoredTensor
from trainer.report.byte_use import byte_use
from trainer.report.charts import line_chart

SUMMARY = {
    "val_bpb": 1.23456,
    "val_loss": 2.1,
    "val_tokens": 1000,
    "val_bytes": 2400,
    "bytes_total": 15_900_000,
    "bytes_model": 15_800_000,
    "bytes_code": 100_000,
    "bytes_cap": 16_000_000,
    "steps": 500,
    "epochs": 1.5,
    "train_tokens": 65_536_000,
    "train_seconds": 300.5,
    "parameters": 25_000_000,
    "weights": "averaged",
    "text_fingerprint": "a",
    "shards_fingerprint": "b",
    "tokenizer_sha256": "c",
    "stages": {"artifact_sliding": {"bpb": 1.23456, "loss": 2.1, "tokens": 1000, "bytes": 2400}},
    "versions": {"torch": "9.9", "device": "<b>a card</b>"},
}


def make_run(folder: Path, **changes: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps({**SUMMARY, **changes}))
    (folder / "config.yaml").write_text(f"seed_everything: 42\ndata:\n  order: {changes.get('order', 'sequential')}\n")
    (folder / "metrics.csv").write_text("epoch,step,train/loss,val/bpb\n0,9,5.5,\n0,19,4.5,\n0,19,,1.9\n0,29,nan,\n")
    return folder


class Tags(HTMLParser):
    """Collects tags and checks that they are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "line", "circle", "polyline") or not self.rawdata:
            self.open += [] if tag == "meta" else [tag]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            assert self.open.pop() == tag


def test_a_report_needs_no_other_file_and_shows_the_summary(tmp_path: Path, capsys):
    run = make_run(tmp_path / "recipe/1")
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    text = (run / "report.html").read_text()
    for value in ("1.2346", "15,900,000", "100,000 left", "65.5 M", "5.0 min", "1.23456", "data.order: sequential"):
        assert value in text
    assert "<b>a card</b>" not in text  # escaped
    assert f"trainer fit --config {run}/config.yaml" in text
    assert not re.search(r"https?://|src=|<link|<script|url\(|@import", text)
    foreign = make_run(tmp_path / "recipe/2", weights="<script>")
    assert main(["report", str(foreign)]) == 0
    assert "<script" not in (foreign / "report.html").read_text()
    tags = Tags()
    tags.feed(text)
    assert sum(tag == "figure" for tag, _ in tags.seen) == 2


def test_several_runs_are_laid_over_each_other_with_their_differences(tmp_path: Path):
    other = {"loss": 2.0, "tokens": 1000, "bytes": 2400}
    stages = {"live_plain": {"bpb": 1.3, **other}, "artifact_sliding": {"bpb": 1.25, **other}}
    runs = [make_run(tmp_path / "recipe/1"), make_run(tmp_path / "recipe/2", stages=stages, order="shuffled")]
    assert main(["report", *map(str, runs), "--out", str(tmp_path / "both.html")]) == 0
    text = (tmp_path / "both.html").read_text()
    assert "<td>bits per byte: artifact, sliding window</td><td>1.23456</td><td>1.25000 (+0.01544)</td>" in text
    assert "<td>bits per byte: live weights, plain</td><td>-</td><td>1.30000</td>" in text  # the first has none
    assert "averaged weights, plain" not in text  # neither has
    assert "<td>data.order</td><td>sequential</td><td>shuffled</td>" in text
    assert "seed_everything</td>" not in text
    assert text.count('<polyline class="line c1"') == 1
    assert not (runs[0] / "report.html").exists()


def test_a_run_too_short_to_log_anything_has_a_report_without_curves(tmp_path: Path):
    run = make_run(tmp_path / "recipe/1")
    (run / "metrics.csv").unlink()
    assert main(["report", str(run)]) == 0
    text = (run / "report.html").read_text()
    assert "1.2346" in text
    assert "<figure>" not in text
    assert "Nothing was logged" in text


def test_a_folder_without_a_finished_run_is_one_line(tmp_path: Path, capsys):
    assert main(["report", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "holds no finished run" in error
    assert error.count("\n") == 1


@given(
    values=st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=1200),
    log=st.booleans(),
)
def test_any_series_is_drawn_inside_its_frame(values: list[float], log: bool):
    chart = line_chart("a < b", [("one & two", (list(map(float, range(len(values)))), values))], log)
    if not chart:
        return
    figure = ElementTree.fromstring(chart)
    for line in figure.iter("polyline"):
        for pair in line.attrib["points"].split():
            x, y = map(float, pair.split(","))
            assert 0 <= x <= 640
            assert 0 <= y <= 250


def test_bytes_and_rounding_are_those_of_the_tensors():
    rng = np.random.default_rng(0)
    symbols = rng.binomial(31, 0.5, (2, 400, 300)).astype(np.int8) - np.int8(16)
    scale = np.full(400, 0.5, np.float16)
    gains = rng.normal(size=40).astype(np.float32)
    tensors = {
        "blocks.0.mlp.up.weight": StoredTensor("int5", symbols[0], scale),
        "blocks.1.mlp.up.weight": StoredTensor("int5", symbols[1], scale),
        "skip_weights": StoredTensor("float32", gains),
    }
    weights = {name: tensor.floats() + (0.1 if "mlp" in name else 0) for name, tensor in tensors.items()}
    up, rest = byte_use(tensors, weights, "zstd-22")
    assert (up.group, up.kinds, up.parameters) == ("mlp up", "int5", 240_000)
    assert (rest.group, rest.parameters, rest.error) == ("gains, gates, mixes", 40, 0.0)
    shares = np.unique(symbols, return_counts=True)[1] / symbols.size
    entropy = -(shares * np.log2(shares)).sum() * 240_000 / 8
    assert up.entropy_bytes == pytest.approx(entropy, rel=1e-3)  # of each tensor by itself, without scales
    assert entropy < up.bytes < 1.05 * entropy
    mean_square = np.mean([np.square(weights[name]).mean() for name in tensors if "mlp" in name])
    assert up.error == pytest.approx(0.1 / math.sqrt(mean_square), rel=1e-4)
    assert byte_use(tensors, None, "zstd-22")[0].error is None
