"""Scores of single documents against sums made by hand, and their comparison against the normal approximation."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import make_documents
from tests.helpers import RUNS, small, trainer_here
from trainer.data.shards import open_shard
from trainer.data.tokenizer import BOS
from trainer.errors import UserError
from trainer.evaluation.per_document import document_of_targets, write_csv
from trainer.evaluation.windows import EvaluationConfig
from trainer.loading import load_artifact
from trainer.paired import compare_documents, read_table, sentences
from trainer.run_folder import RunFolder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, shard_folder: Path) -> list[RunFolder]:
    folder = tmp_path_factory.mktemp("documents")
    for steps in (4, 12):
        args = small(shard_folder, f"--trainer.max_steps={steps}", f"--run_name=of-{steps}")
        result = trainer_here(*args, cwd=folder)
        assert result.returncode == 0, result.stderr
    return [RunFolder(folder / RUNS / f"of-{steps}") for steps in (4, 12)]


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("first", [BOS, 7])
def test_a_document_has_the_tokens_from_its_bos_on(first: int):
    tokens = [first, 5, 6, BOS, BOS, 9, 5, BOS, 4]
    assert document_of_targets(torch.tensor(tokens)).tolist() == [0, 0, 1, 2, 2, 2, 3, 3]


def test_documents_have_the_sums_of_their_tokens_and_add_up_to_the_score(runs: list[RunFolder], tmp_path: Path):
    path = tmp_path / "scores.csv"
    args = ["validate", "--ckpt", str(runs[0].artifact), "--eval.stride=null", f"--per_document={path}"]
    result = trainer_here(*args, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    rows = rows_of(path)
    # The same by hand: windows of the training length, one after the other, the last one at the end of the text.
    model, tokenizer = load_artifact(runs[0].artifact)
    config = runs[0].read().config
    folder, window, count = config["data.source.init_args.folder"], config["eval.window"], config["eval.max_tokens"]
    ids = open_shard(next(Path(folder).glob("*_val_*.bin")))[: count + 1].astype(int).tolist()
    nats: dict[int, float] = {}
    tokens: dict[int, int] = {}
    document = 0
    done = 0
    while done < count:
        start = min(done, count - window)
        with torch.no_grad():
            logits = model(torch.tensor([ids[start : start + window]])).double().log_softmax(-1)[0]
        for position in range(done, start + window):
            target = ids[position + 1]
            document += target == BOS
            nats[document] = nats.get(document, 0.0) - float(logits[position - start, target])
            tokens[document] = tokens.get(document, 0) + 1
        done = start + window
    assert [int(row["document"]) for row in rows] == [number + 1 for number in nats]
    assert [int(row["tokens"]) for row in rows] == list(tokens.values())
    assert [float(row["nats"]) for row in rows] == pytest.approx(list(nats.values()), rel=1e-5)
    texts = tokenizer.decode([ids[0], *ids[1:]])
    assert sum(int(row["bytes"]) for row in rows) == pytest.approx(len(texts.encode()), abs=len(rows))
    total = math.fsum(float(row["nats"]) for row in rows) / math.log(2) / sum(int(row["bytes"]) for row in rows)
    assert result.stdout.splitlines()[-1].startswith(f"val_bpb={total:.8f} ")


def test_any_text_is_scored_and_grouped_by_its_source(runs: list[RunFolder], tmp_path: Path):
    documents = make_documents(6, 3)
    lines = [json.dumps({"text": text, "origin": "ab"[n % 2]}) for n, text in enumerate(documents)]
    (tmp_path / "mixed.jsonl").write_text("\n".join(lines))
    args = ["validate", "--ckpt", str(runs[0].artifact), "--text=mixed.jsonl", "--source_field=origin"]
    result = trainer_here(*args, "--per_document=out.csv", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    rows = rows_of(tmp_path / "out.csv")
    assert [row["source"] for row in rows] == ["a", "b"] * 3
    assert [int(row["bytes"]) for row in rows] == [len(text.encode()) for text in documents]
    for source in "ab":
        chosen = [row for row in rows if row["source"] == source]
        num_bytes = sum(int(row["bytes"]) for row in chosen)
        bpb = math.fsum(float(row["nats"]) for row in chosen) / math.log(2) / num_bytes
        assert f"{bpb:.4f} bpb  3 documents, {num_bytes:,} bytes  {source}\n" in result.stdout
    (tmp_path / "texts").mkdir()
    for n, text in enumerate(documents):
        (tmp_path / f"texts/{n}.txt").write_text(text)
    whole = trainer_here(*args[:3], "--text=mixed.jsonl", f"--config={runs[0].config}", cwd=tmp_path)
    assert whole.stdout.splitlines()[-1] == result.stdout.splitlines()[-1]  # not cut as the run's own split
    folder = trainer_here(*args[:3], "--text=texts", cwd=tmp_path)
    assert folder.stdout.splitlines()[-1] == result.stdout.splitlines()[-1]
    assert "1 document, " in folder.stdout
    alone, tokenizer = tmp_path / "alone/artifact.zst", tmp_path / "spm.model"
    alone.parent.mkdir()
    alone.write_bytes(runs[0].artifact.read_bytes())
    tokenizer.write_bytes(runs[0].tokenizer.read_bytes())
    lone = ["validate", "--ckpt=alone/artifact.zst", "--text=texts", f"--config={runs[0].config}"]
    assert "name that of the model with --tokenizer" in trainer_here(*lone, cwd=tmp_path).stderr
    moved = trainer_here(*lone, "--tokenizer=spm.model", cwd=tmp_path)
    assert moved.stdout.splitlines()[-1] == result.stdout.splitlines()[-1]
    train = trainer_here(*args[:3], "--split=train", "--eval.max_tokens=200", cwd=tmp_path)
    assert " tokens=200 " in train.stdout.splitlines()[-1]
    assert train.stdout.splitlines()[-1] != trainer_here(*args[:3], "--eval.max_tokens=200", cwd=tmp_path).stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--text=nowhere"], "nowhere: there is no such text file; check --text"),
        (["--text=a.jsonl", "--text_field=words"], "`words` field; it has text: name one with --text_field"),
        (["--text=[]"], "--text: names no file; give one, a folder or a pattern"),
        (["--text=empty.txt"], "empty.txt: holds no document; remove it from --text"),
        (["--text_field=words"], "--text_field belongs to --text"),
        (["--tokenizer=a.model"], "--tokenizer belongs to --text"),
        (["--text=a.jsonl", "--tokenizer=a.model"], "a.model: there is no tokenizer"),
        (["--weights=averaged"], "is an artifact, which holds one set of weights; leave it out"),
        (["--text=a.jsonl", "--split=train"], "--split and --text both say what is scored"),
        (["--source_field=origin"], "--source_field belongs to --text"),
        (["--text=a.jsonl", "--source_field=orign"], "--source_field orign: no document has it"),
        (["--per_document=scores"], "choose a name that ends in .csv"),
    ],
)
def test_what_cannot_be_scored_is_refused_in_one_line(
    args: list[str], message: str, runs: list[RunFolder], tmp_path: Path
):
    (tmp_path / "a.jsonl").write_text('{"text": "words"}')
    (tmp_path / "empty.txt").touch()
    result = trainer_here("validate", "--ckpt", str(runs[0].artifact), *args, cwd=tmp_path)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1), result.stderr
    assert message in result.stderr


def write(path: Path, num_bytes: list[int], nats: list[float]) -> Path:
    rows = [f"{n + 1},,{size},{size},{each!r},x" for n, (size, each) in enumerate(zip(num_bytes, nats, strict=True))]
    path.write_text("\n".join(["document,source,tokens,bytes,nats,evaluation", *rows, ""]))
    return path


def test_missing_and_repeated_documents_are_refused_and_other_sources_are_mentioned(tmp_path: Path):
    path = write(tmp_path / "a.csv", [9, 8, 7], [3.0, 2.0, 1.0])
    lines = path.read_text().splitlines()
    for kept in ([0, 1, 3], [0, 1, 2, 2, 3]):
        (tmp_path / "b.csv").write_text("\n".join(lines[n] for n in kept))
        with pytest.raises(UserError, match=f"its documents are not numbered from 1 to {len(kept) - 1}"):
            read_table(tmp_path / "b.csv")
    assert len(sentences(compare_documents(read_table(path), read_table(path)))) == 2
    for name, source in (("b.csv", "web"), ("c.csv", "books")):
        (tmp_path / name).write_text(path.read_text().replace("2,,", f"2,{source},"))
    for first, count in ((path, 2), (tmp_path / "b.csv", 3)):  # a source that is not known differs from none
        words = sentences(compare_documents(read_table(first), read_table(tmp_path / "c.csv")))
        assert len(words) == count
    assert words[2].startswith("warning: document 2 comes from web in the first file and from books in the second")


def test_the_interval_is_that_of_the_normal_approximation_for_many_documents_of_equal_size(tmp_path: Path):
    random = np.random.default_rng(5)
    size, count = 1000, 2000
    before = random.normal(700, 30, count)
    changes = random.normal(-2, 10, count)
    files = [
        write(tmp_path / f"{name}.csv", [size] * count, nats.tolist())
        for name, nats in (("a", before), ("b", before + changes))
    ]
    paired = compare_documents(*map(read_table, files))
    per_byte = changes / math.log(2) / size
    error = 1.96 * per_byte.std(ddof=1) / math.sqrt(count)
    assert paired.change == pytest.approx(per_byte.mean(), rel=1e-9)
    assert paired.low == pytest.approx(per_byte.mean() - error, abs=0.05 * error)
    assert paired.high == pytest.approx(per_byte.mean() + error, abs=0.05 * error)
    assert (paired.wins, paired.losses) == ((changes < 0).sum(), (changes > 0).sum())
    assert paired.moved() == sorted(range(count), key=lambda n: -abs(changes[n]))[:10]


def test_a_source_may_be_any_text(tmp_path: Path):
    sources = ["a,b", 'quo"te', "line\rend", "two\nlines", "\ud800", ""]
    write_csv(tmp_path / "a.csv", sources, "window 8", [1] * 6, [10] * 6, [0.5] * 6)
    assert read_table(tmp_path / "a.csv").sources == [*sources[:4], "\\ud800", ""]


def test_scores_of_two_kinds_are_compared_with_a_warning(tmp_path: Path):
    ways = [EvaluationConfig(128, 32), EvaluationConfig(128, None), EvaluationConfig(128, 32, canonical=True)]
    ways.append(EvaluationConfig(128, 32, 4, attention_window=96, adapt_rate=0.1))
    for index, way in enumerate(ways):
        write_csv(tmp_path / f"{index}.csv", [], way.description, [1], [10], [0.5])
    tables = [read_table(tmp_path / f"{index}.csv") for index in range(len(ways))]
    assert len({table.evaluation for table in tables}) == len(ways)
    assert len(sentences(compare_documents(tables[0], tables[0]))) == 2
    warning = sentences(compare_documents(tables[1], tables[3]))[2]
    assert warning == (
        "warning: scored in two ways, window 128 and window 128, stride 32, attention_window 96, adapt_rate 0.1, "
        "batch_windows 4: the change is not that of the models alone"
    )


def test_large_documents_count_for_their_bytes(tmp_path: Path):
    files = [write(tmp_path / f"{n}.csv", [900, 100], nats) for n, nats in enumerate(([600.0, 70.0], [591.0, 72.0]))]
    paired = compare_documents(*map(read_table, files))
    assert paired.change == pytest.approx(-7 / math.log(2) / 1000)
    assert (paired.wins, paired.losses) == (1, 1)


def test_only_the_same_documents_are_compared(tmp_path: Path):
    first = read_table(write(tmp_path / "a.csv", [10, 20], [7.0, 9.0]))
    for num_bytes, message in (([10, 21], "document 2 has 21 bytes, but 20"), ([10], "has 1 documents, but .* has 2")):
        other = read_table(write(tmp_path / "b.csv", num_bytes, [1.0] * len(num_bytes)))
        with pytest.raises(UserError, match=message):
            compare_documents(first, other)
    for text in (
        "",
        "a,b\n1,2\n",
        "document,source,tokens,bytes,nats,evaluation\n1,,3\n",
        "document,source,tokens,bytes,nats,evaluation\n1,,2,3,nan,x\n",
        "\udcff",
    ):
        (tmp_path / "c.csv").write_text(text, errors="surrogateescape")
        with pytest.raises(UserError):
            read_table(tmp_path / "c.csv")


def test_the_command_and_the_report_show_the_documents_that_moved(runs: list[RunFolder], tmp_path: Path):
    for run in runs:
        args = ["validate", "--ckpt", str(run.artifact), f"--per_document={run.documents}", "--eval.stride=null"]
        assert trainer_here(*args, cwd=tmp_path).returncode == 0
    result = trainer_here("compare", str(runs[0].documents), str(runs[1].documents), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    scores = [run.read().summary["stages"]["artifact_plain"]["bpb"] for run in runs]
    change = f"change {scores[1] - scores[0]:+.5f} bpb, 95 % interval"
    assert change in result.stdout
    report = trainer_here("report", str(runs[0]), str(runs[1]), "--out=both.html", cwd=tmp_path)
    assert report.returncode == 0, report.stderr
    page = (tmp_path / "both.html").read_text()
    assert "<h2>Document by document</h2>" in page
    assert change in page
