"""From text files to verified shards: every kind of file, both ways to split, and every way they can be wrong."""

import gzip
import json
import lzma
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
import zstandard

from tests.conftest import make_documents
from trainer.__main__ import main
from trainer.data.documents import TextFiles, find_files
from trainer.data.manifest import Manifest, documents_of, verify
from trainer.data.normalization import DocumentKeys
from trainer.data.shard_writer import split_of
from trainer.data.shards import TokenFiles, open_shard
from trainer.data.sources import LocalText
from trainer.data.stream import TrainStream
from trainer.data.tokenizer import load_tokenizer
from trainer.errors import UserError

TEXTS = ["the model reads", "12 cats: 猫 and 🙂", "another\ttoken  with   spaces"]
BOM = b"\xef\xbb\xbf"
COMPRESS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.compress}


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def table(columns: dict[str, list[Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


def parquet(texts: list[str]) -> bytes:
    return table({"text": texts, "id": list(range(len(texts)))})


RANDOM = random.Random(0).randbytes(300_000)


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize(
    ("kind", "content", "expected"),
    [(".txt", TEXTS[1].encode(), TEXTS[1:2]), (".jsonl", jsonl(TEXTS), TEXTS), (".parquet", parquet(TEXTS), TEXTS)],
)
def test_every_kind_of_file_gives_its_documents(tmp_path: Path, kind, content, expected, compression):
    path = tmp_path / f"a{kind}{compression}"
    path.write_bytes(COMPRESS[compression](content))
    files = TextFiles([path])
    assert list(files) == expected
    assert files.fraction == 1.0


def test_several_frames_a_bom_a_blank_line_and_another_field_are_read(tmp_path: Path):
    for name, content, expected in (
        ("a.txt.zst", zstandard.compress(b"one ") + zstandard.compress(b"") + zstandard.compress(b"two"), ["one two"]),
        ("a.txt", BOM + b"text", ["text"]),
        ("A.JSONL.GZ", gzip.compress(BOM + jsonl(TEXTS) + b"\n \r\n"), TEXTS),
        ("a.md", b"# A title", ["# A title"]),
    ):
        (tmp_path / name).write_bytes(content)
        assert list(TextFiles([tmp_path / name])) == expected
    (tmp_path / "b.jsonl").write_bytes(jsonl(TEXTS).replace(b'"text"', b'"body"'))
    (tmp_path / "b.parquet").write_bytes(table({"body": TEXTS}))
    assert list(TextFiles([tmp_path / "b.jsonl", tmp_path / "b.parquet"], "body")) == TEXTS * 2
    (tmp_path / "c.parquet").write_bytes(table({"body": pa.array([*TEXTS, TEXTS[0]]).dictionary_encode()}))
    assert list(TextFiles([tmp_path / "c.parquet"], "body")) == [*TEXTS, TEXTS[0]]


def test_what_a_folder_holds_and_is_not_read_is_named(tmp_path: Path, capsys):
    (tmp_path / "texts/deep").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for name in ("texts/a.TXT", "texts/deep/b.md", "elsewhere/c.jsonl", "texts/d.pdf", "texts/deep/e"):
        (tmp_path / name).write_text("x")
    (tmp_path / "texts/nothing.txt").touch()
    (tmp_path / "texts/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "texts")  # must not lead around for ever
    files = find_files([str(tmp_path / "texts")])
    assert [str(path.relative_to(tmp_path / "texts")) for path in files] == ["a.TXT", "deep/b.md", "link/c.jsonl"]
    warning = capsys.readouterr().out
    assert f"warning: {tmp_path}/texts: 2 files left out, not named .txt, .md, .jsonl or .parquet: " in warning
    assert f"warning: {tmp_path}/texts: 1 file left out, empty: {tmp_path}/texts/nothing.txt" in warning
    assert "d.pdf" in warning
    assert "deep/e" in warning


def test_an_unreadable_folder_is_named(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.txt").write_text("x")
    original = os.scandir

    def scandir(path: str) -> Any:  # root may read everything
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert find_files([str(tmp_path)]) == [tmp_path / "a.txt"]
    assert f"1 folders in it cannot be read: {tmp_path}/closed" in capsys.readouterr().out


def test_names_are_files_folders_and_patterns_in_the_given_order(tmp_path: Path):
    for name in ("b/2.txt", "b/1.jsonl.gz", "b/c/3.txt", "a.txt", "b/notes.pdf"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    files = find_files([str(tmp_path / "b"), str(tmp_path / "*.txt")])
    assert [str(path.relative_to(tmp_path)) for path in files] == ["b/1.jsonl.gz", "b/2.txt", "b/c/3.txt", "a.txt"]
    (tmp_path / "link.txt").symlink_to(tmp_path / "b/2.txt")
    twice = find_files([str(tmp_path / name) for name in ("b/2.txt", "link.txt", "a.txt", "b", "a.txt")])
    assert [str(path.relative_to(tmp_path)) for path in twice] == ["b/2.txt", "a.txt", "b/1.jsonl.gz", "b/c/3.txt"]
    for name, message in (("none.txt", "no such text file"), ("*.jsonl", "no such text file"), ("b/notes.pdf", "only")):
        with pytest.raises(UserError, match=message):
            find_files([str(tmp_path / name)])
    with pytest.raises(UserError, match=r"--data\.source\.train_files: names no file"):
        LocalText([], str(tmp_path / "out")).check()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "holds no document"),
        ("a.jsonl", b"", "holds no document"),
        ("a.txt", b"caf\xe9", "not UTF-8 at byte 3"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "line 2 is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"body": "b"}\n', "line 2 is not a JSON object with a `text`"),
        ("a.jsonl", b'{"text": 3}\n', "line 1 is not a string"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "lone surrogate"),
        ("a.jsonl.gz", gzip.compress(jsonl(TEXTS * 50))[:-20], "truncated or damaged"),
        ("a.jsonl.xz", lzma.compress(jsonl(TEXTS * 50))[:-20], "truncated or damaged"),
        ("a.jsonl.zst", b"no zstd at all", "truncated or damaged"),
        ("a.txt.zst", zstandard.compress(RANDOM)[:70_000], "truncated or damaged"),
        ("a.txt.zst", zstandard.compress(b"a") + zstandard.compress(RANDOM)[:-1], "truncated or damaged"),
        ("a.txt.gz", gzip.compress(b"a") + gzip.compress(RANDOM)[:-9], "truncated or damaged"),
        ("a.jsonl", b"[1]\n", "line 1 is a list, not a JSON object; repair or remove it"),
        ("a.jsonl", b'{"body": "b", "id": 3}\n', "it has body, id: name one with --data.source.field"),
        ("a.parquet", table({"body": ["a"], "id": [1]}), "has no column `text`, but body, id; name one"),
        ("a.parquet", table({"text": [{"a": 1}]}), "holds struct<a: int64>, not text"),
        ("a.parquet", table({"text": [["a"]]}), "holds list<.*>, not text"),
        ("a.parquet", table({"text": [3]}), "holds int64, not text"),
        ("a.parquet", b"no parquet at all", "is not a parquet file"),
        ("a.parquet", table({"text": ["a", None]}), "the `text` of row 2 is null; repair or remove the row"),
    ],
)
def test_a_bad_file_is_named_with_its_problem(tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        list(TextFiles([tmp_path / name]))
    assert name in str(caught.value)


def test_a_bad_file_is_named_while_a_tokenizer_is_trained_on_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "a.jsonl").write_bytes(jsonl(TEXTS) + b'{"text": 3}\n')
    args = [f"--data.source.train_files=[{tmp_path}/a.jsonl]", f"--data.source.folder={tmp_path}/out"]
    assert main(["prepare", "--data.source=LocalText", *args]) == 1
    problem = f"the `text` of line {len(TEXTS) + 1} is not a string; name another --data.source.field"
    assert capsys.readouterr().err == f"trainer: {tmp_path}/a.jsonl: {problem}\n"


@pytest.fixture
def prepared(tmp_path: Path, shard_folder: Path) -> tuple[Path, list[str]]:
    texts = make_documents(120, 7)
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts[:70]))
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.compress(jsonl(texts[70:])))
    args = [f"--data.source.train_files=[{tmp_path}/a.jsonl,{tmp_path}/b.jsonl.zst]"]
    args += [f"--data.source.folder={tmp_path}/out", f"--data.source.tokenizer={shard_folder}/tokenizer.model"]
    args += ["--data.source.val_every=5", "--data.source.shard_tokens=1500"]
    assert main(["prepare", "--data.source=LocalText", *args]) == 0
    assert main(["prepare", "--data.source=LocalText", *args, "--verify"]) == 0
    return tmp_path / "out", texts


def test_prepared_shards_hold_every_document_once_in_its_split(prepared):
    folder, texts = prepared
    manifest = verify(folder)
    tokenizer = load_tokenizer(folder / "tokenizer.model")
    for split in ("train", "val"):
        expected = [text for text in texts if split_of(DocumentKeys().of(text), 5) == split]
        shards = manifest.of(split)
        decoded = [
            tokenizer.decode(document.tolist())
            for s in shards
            for document in documents_of(open_shard(folder / s.file))
        ]
        assert decoded == expected
        assert sum(shard.documents for shard in shards) == len(expected)
        assert sum(shard.bytes for shard in shards) == sum(len(text.encode()) for text in expected)
        assert all(shard.tokens <= 1500 for shard in shards)
    assert len(manifest.of("train")) > 1


def test_three_shards_two_processes_and_a_restart_give_the_plain_concatenation(prepared):
    folder, _ = prepared
    paths = [folder / shard.file for shard in Manifest.read(folder).of("train")]
    assert len(paths) >= 3
    row = np.concatenate([open_shard(path) for path in paths])
    seen = []
    for steps in (range(4), range(4, 9)):  # killed after four steps; new streams
        streams = [TrainStream(TokenFiles(paths), 256, 32, 9, rank, 2) for rank in range(2)]
        seen += [stream[step][:, :-1].flatten().numpy() for step in steps for stream in streams]
    assert np.array_equal(np.concatenate(seen), row[np.arange(9 * 256) % len(row)])


def test_preparing_again_does_nothing_until_a_setting_changes(prepared, tmp_path: Path, shard_folder: Path):
    folder, _ = prepared
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    source = LocalText(
        [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl.zst")],
        str(folder),
        val_every=5,
        tokenizer=str(shard_folder / "tokenizer.model"),
        shard_tokens=1500,
    )
    source.prepare()
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    source.val_every = 4
    source.prepare()
    assert verify(folder).source["val_every"] == 4


@pytest.mark.parametrize("split", ["train", "val"])
def test_verify_finds_any_changed_byte(prepared, split: str):
    folder, _ = prepared
    path = folder / Manifest.read(folder).of(split)[0].file
    whole = path.read_bytes()
    for position in (*range(0, 12, 3), 500, 1024, 1025, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x41]) + whole[position + 1 :])
        with pytest.raises(UserError, match=path.name):
            verify(folder)
    path.write_bytes(whole[:-2])
    with pytest.raises(UserError, match="truncated or damaged"):
        verify(folder)


def test_training_documents_of_the_validation_files_are_left_out(tmp_path: Path, shard_folder: Path, capsys):
    texts = make_documents(30, 3)
    (tmp_path / "t.jsonl").write_bytes(jsonl(texts))
    (tmp_path / "v.jsonl").write_bytes(jsonl(texts[10:12] + make_documents(5, 4)))
    model = str(shard_folder / "tokenizer.model")
    LocalText([str(tmp_path / "t.jsonl")], str(tmp_path / "o"), [str(tmp_path / "v.jsonl")], tokenizer=model).prepare()
    assert "left out 2 training documents" in capsys.readouterr().out
    manifest = verify(tmp_path / "o")
    assert [sum(s.documents for s in manifest.of(split)) for split in ("train", "val")] == [28, 7]


def test_a_document_longer_than_a_shard_is_refused(tmp_path: Path, shard_folder: Path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(["word " * 300, "b"]))
    model = str(shard_folder / "tokenizer.model")
    with pytest.raises(UserError, match=r"a\.jsonl: a document of .* is longer than a shard"):
        LocalText([str(tmp_path / "a.jsonl")], str(tmp_path / "o"), tokenizer=model, shard_tokens=100).prepare()
    assert not (tmp_path / "o/manifest.json").exists()


def test_a_killed_preparation_leaves_no_manifest_and_the_next_one_is_whole(tmp_path: Path, shard_folder: Path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(make_documents(200, 5)))
    source = (
        f"LocalText(['{tmp_path}/a.jsonl'], '{tmp_path}/o', tokenizer='{shard_folder}/tokenizer.model', "
        "val_every=3, shard_tokens=1500)"
    )
    script = (
        "import os, trainer.data.shard_writer as t\n"
        "from trainer.data.sources import LocalText\n"
        "old = t.sha256_of\n"
        "def die(path):\n"
        "    if '000001' in str(path): os.kill(os.getpid(), 9)\n"
        "    return old(path)\n"
        "t.sha256_of = die\n"
        f"{source}.prepare()\n"
    )
    whole_before = {"tokenizer": f"{shard_folder}/tokenizer.model", "val_every": 4, "shard_tokens": 1500}
    LocalText([f"{tmp_path}/a.jsonl"], f"{tmp_path}/o", **whole_before).prepare()  # other settings, made anew
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert killed.returncode == -9
    assert list((tmp_path / ".o.preparing").glob("*.bin"))
    assert not (tmp_path / ".o.preparing/manifest.json").exists()
    assert verify(tmp_path / "o").source["val_every"] == 4  # what was there before is whole
    LocalText(
        [f"{tmp_path}/a.jsonl"],
        f"{tmp_path}/o",
        tokenizer=f"{shard_folder}/tokenizer.model",
        val_every=3,
        shard_tokens=1500,
    ).prepare()
    assert sum(shard.documents for shard in verify(tmp_path / "o").shards) == 200
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_full_disk_is_named_and_leaves_nothing_that_looks_complete(tmp_path: Path, shard_folder: Path):
    """A limit on the size of files simulates the disk: the first shard exceeds it."""
    (tmp_path / "a.jsonl").write_bytes(jsonl(make_documents(4000, 5)))
    args = ["prepare", "--data.source=LocalText", f"--data.source.train_files=[{tmp_path}/a.jsonl]"]
    args += [f"--data.source.folder={tmp_path}/o", f"--data.source.tokenizer={shard_folder}/tokenizer.model"]
    args += ["--data.source.val_every=3", "--data.source.shard_tokens=150000"]
    script = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (260000, 260000))\n"
        "from trainer.__main__ import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    full = subprocess.run([sys.executable, "-c", script, *args], capture_output=True, text=True, check=False)
    assert full.returncode == 1
    assert "text_train_000000.bin: cannot be written (File too large); free some space" in full.stderr
    assert "Traceback" not in full.stderr
    assert not list((tmp_path / "o").glob("*.bin"))
    assert not (tmp_path / "o/manifest.json").exists()
    assert main(args) == 0
    assert sum(shard.documents for shard in verify(tmp_path / "o").shards) == 4000


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, shard_folder: Path, capsys):
    (tmp_path / "a.jsonl").write_bytes(jsonl(make_documents(20, 5)))
    args = ["--data.source=LocalText", f"--data.source.train_files=[{tmp_path}/a.jsonl]"]
    args += [f"--data.source.folder={tmp_path}/a.jsonl/o", f"--data.source.tokenizer={shard_folder}/tokenizer.model"]
    assert main(["prepare", *args]) == 1
    assert "a.jsonl/o: cannot be written (File exists); choose another data.source.folder" in capsys.readouterr().err


def test_settings_that_a_source_refuses_are_one_line(capsys):
    args = ["--data.source=LocalText", "--data.source.train_files=a.txt", "--data.source.tokenizer=t.model"]
    assert main(["prepare", *args, "--data.source.vocab_size=300"]) == 1
    message = "data.source.tokenizer t.model has its own vocabulary, so data.source.vocab_size 300 cannot be chosen"
    assert capsys.readouterr().err == f"trainer: {message}; leave one of the two out\n"


def test_verify_repairs_nothing_and_prepare_does(prepared, tmp_path: Path, shard_folder: Path, capsys):
    folder, _ = prepared
    args = [
        "prepare",
        "--data.source=LocalText",
        f"--data.source.train_files=[{tmp_path}/a.jsonl,{tmp_path}/b.jsonl.zst]",
    ]
    args += [f"--data.source.folder={folder}", f"--data.source.tokenizer={shard_folder}/tokenizer.model"]
    args += ["--data.source.val_every=5", "--data.source.shard_tokens=1500"]
    shard = folder / "text_train_000000.bin"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-2])
    assert main([*args, "--verify"]) == 1
    assert "text_train_000000.bin: header promises" in capsys.readouterr().err
    assert len(shard.read_bytes()) == len(whole) - 2
    assert main(args) == 0
    assert shard.read_bytes() == whole
    assert main([*args, "--verify"]) == 0
    tokenizer = (folder / "tokenizer.model").read_bytes()
    (folder / "tokenizer.model").unlink()
    assert main(args) == 0  # the manifest says whose the shards are
    assert (folder / "tokenizer.model").read_bytes() == tokenizer
    manifest = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text("{")
    assert main([*args, "--verify"]) == 1
    assert main(args) == 1  # nothing says that the files are ours
    assert "which this trainer did not make" in capsys.readouterr().err
    (folder / "manifest.json").write_text(manifest)
    assert main([*args, "--data.source.val_every=1"]) == 1
    assert "val_every must be at least 2" in capsys.readouterr().err


def test_another_source_of_a_run_inherits_nothing_from_the_recipe(tmp_path: Path, capsys):
    args = ["fit", "--config=quickstart", "--data.source=LocalText", "--data.source.train_files=[x.txt]"]
    with pytest.raises(SystemExit) as ended:
        main([*args, f"--data.source.folder={tmp_path}", "--print_config"])
    assert ended.value.code == 0
    shown = yaml.safe_load(capsys.readouterr().out)["data"]
    assert shown["source"]["init_args"]["folder"] == str(tmp_path)
    assert shown["batch_tokens"] == 2048  # everything else is that of the recipe
    assert main(args) == 1
    assert "x.txt: there is no such text file" in capsys.readouterr().err


def test_another_source_inherits_nothing_from_the_quickstart(tmp_path: Path, shard_folder: Path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(make_documents(400, 9)))
    args = [f"--data.source.train_files=[{tmp_path}/a.jsonl]", f"--data.source.folder={tmp_path}/o"]
    args.append(f"--data.source.tokenizer={shard_folder}/tokenizer.model")
    assert main(["prepare", "--data.source", "LocalText", *args]) == 0
    assert Manifest.read(tmp_path / "o").source["val_every"] == 100  # the quickstart's source says 40


def test_inspect_shows_shards_documents_and_lengths(prepared, capsys):
    folder, texts = prepared
    capsys.readouterr()
    assert main(["inspect", str(folder), "--documents", "1"]) == 0
    shown = capsys.readouterr().out
    first = next(text for text in texts if split_of(DocumentKeys().of(text), 5) == "train")
    assert first[:60] in shown
    assert " tokens  no case markup" in shown
    assert "bytes per token" in shown
    assert "tokens per document" in shown
    assert main(["inspect", str(folder / "none")]) == 1


def test_a_script_that_prepares_at_its_top_level_runs_once(tmp_path: Path):
    (tmp_path / "modules").mkdir()
    for number, text in enumerate(make_documents(200, 5)):
        (tmp_path / f"modules/m{number}.py").write_text(f'"""{text}\n\n{text[::-1]}"""\n')
    (tmp_path / "script.py").write_text(
        "from trainer.data.sources import PythonDocumentation\n"
        "print('begins')\n"
        "PythonDocumentation('out', vocab_size=300, val_every=5, roots=['modules']).prepare()\n"
        "print(__file__, __spec__)\n"
    )
    command = [sys.executable, "script.py"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("begins") == 1
    assert result.stdout.splitlines()[-1].endswith("script.py None")
    assert (tmp_path / "out/manifest.json").is_file()
