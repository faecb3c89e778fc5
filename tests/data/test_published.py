"""The published export from a server with the Hub's protocol, and with the faults of networks."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from huggingface_hub import constants

from trainer.data.case_markup import has_case_markup
from trainer.data.published import PublishedFineWeb
from trainer.data.shards import TokenFiles, write_shard
from trainer.data.tokenizer import BOS, load_tokenizer, train_tokenizer
from trainer.errors import UserError

REPO = "someone/golf"
COMMIT = "c0ffee" * 6 + "abcd"
MODEL = "tokenizers/tiny.model"


class Hub:
    """Files of one dataset, and their faults."""

    def __init__(self, files: dict[str, bytes]):
        self.files = files
        self.cut: set[str] = set()  # paths whose first answer ends half-way
        self.announced_longer: set[str] = set()  # paths that the metadata gives another size
        self.missing: set[str] = set()  # paths that are listed but not served
        self.stalled: set[str] = set()  # paths whose first answer stops half-way and keeps the connection
        self.altered: dict[str, bytes] = {}  # what is served instead of what is published
        self.served: list[tuple[str, str | None]] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def answer(self, status, body=b"", headers=(), promised=None):
                self.send_response(status)
                self.send_header("Content-Length", str(len(body) if promised is None else promised))
                for name, value in headers:
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def refuse(self, code):
                self.answer(404, b"", [("X-Error-Code", code), ("X-Repo-Commit", COMMIT)])

            def do_HEAD(self):
                self.do_GET()

            def do_GET(self):
                path = self.path.partition("?")[0]
                api, resolve = f"/api/datasets/{REPO}/", f"/datasets/{REPO}/resolve/{COMMIT}/"
                if path.startswith(f"{api}revision/"):
                    if path.endswith("/nowhere"):
                        return self.refuse("RevisionNotFound")
                    return self.answer(200, json.dumps({"id": REPO, "sha": COMMIT, "siblings": []}).encode())
                if path.startswith(f"{api}tree/{COMMIT}"):
                    return self.answer(200, json.dumps([hub.entry(name) for name in hub.files]).encode())
                if not path.startswith(resolve):
                    return self.refuse("RepoNotFound")
                name = path.removeprefix(resolve)
                if name not in hub.files or name in hub.missing:
                    return self.refuse("EntryNotFound")
                body = hub.files[name]
                etag = [("ETag", f'"{hashlib.sha256(body).hexdigest()}"'), ("X-Repo-Commit", COMMIT)]
                if name in hub.announced_longer:
                    etag.append(("X-Linked-Size", str(len(body) + 100)))
                body = hub.altered.get(name, body)
                start = self.headers.get("Range")
                if self.command == "GET" and name in hub.stalled:
                    hub.stalled.remove(name)
                    self.answer(200, body[: len(body) // 2], etag, promised=len(body))
                    self.wfile.flush()
                    time.sleep(5)
                    self.close_connection = True
                    return None
                if self.command == "GET":
                    hub.served.append((name, start))
                if self.command == "GET" and name in hub.cut:
                    hub.cut.remove(name)
                    self.answer(200, body[: len(body) // 2], etag, promised=len(body))
                    self.close_connection = True
                    return None
                if start:
                    first = int(start.removeprefix("bytes=").partition("-")[0])
                    content_range = ("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
                    return self.answer(206, body[first:], [*etag, content_range])
                return self.answer(200, body, etag)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def entry(self, name):
        body = self.files[name]
        oid = hashlib.sha256(body).hexdigest()
        lfs = {"lfs": {"oid": oid, "size": len(body), "pointerSize": 100}} if name.endswith(".bin") else {}
        return {"type": "file", "path": name, "size": len(body), "oid": oid[:40], **lfs}

    def stop(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """Files of an export: two training shards, one validation shard, a tokenizer."""
    folder = tmp_path_factory.mktemp("export")
    text = ("the golf ball rolls over the green and into the water " * 20).split()
    lines = (" ".join(text[n % 50 : n % 50 + 9]) for n in range(400))
    train_tokenizer(lines, 280, folder / "tiny.model", 1)
    rng = np.random.default_rng(0)
    files = {f"datasets/{MODEL}": (folder / "tiny.model").read_bytes()}
    for name in ("fineweb_train_000000", "fineweb_train_000001", "fineweb_val_000000"):
        write_shard(folder / name, rng.integers(4, 280, 5_000).astype(np.uint16))
        files[f"datasets/datasets/tiny_sp280/{name}.bin"] = (folder / name).read_bytes()
    files["datasets/manifest.json"] = json.dumps(
        {
            "datasets": [
                {"name": "tiny_sp280", "tokenizer_name": "sp280", "stats": {"files_train": 2, "files_val": 1}},
                {"name": "other", "tokenizer_name": "sp280", "stats": {"files_train": 1, "files_val": 1}},
            ],
            "tokenizers": [{"name": "sp280", "model_path": MODEL, "vocab_path": "tokenizers/tiny.vocab"}],
        }
    ).encode()
    return files


@pytest.fixture
def hub(export, tmp_path, monkeypatch):
    hub = Hub(dict(export))
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield hub
    hub.stop()


def source(**changes):
    return PublishedFineWeb(**{"variant": "tiny_sp280", "train_shards": 2, "repo_id": REPO, **changes})


def shard(name):
    return f"datasets/datasets/tiny_sp280/fineweb_{name}.bin"


def tokens_of(body):
    return np.frombuffer(body, dtype="<u2", offset=1024)


def assert_whole(hub, text, train_shards=2):
    expected = np.concatenate([tokens_of(hub.files[shard(f"train_{n:06d}")]) for n in range(train_shards)])
    files = TokenFiles(text.train)
    np.testing.assert_array_equal(files.read(0, len(files)), expected)
    np.testing.assert_array_equal(TokenFiles(text.val).read(0, 5_000), tokens_of(hub.files[shard("val_000000")]))
    assert text.tokenizer.read_bytes() == hub.files[f"datasets/{MODEL}"]


def test_downloads_once_and_then_needs_no_network(hub):
    source().prepare()
    assert_whole(hub, source().prepared())
    served = len(hub.served)
    source().prepare()
    assert len(hub.served) == served
    hub.stop()
    source().prepare()
    assert_whole(hub, source().prepared())


def test_only_the_wanted_training_shards_but_the_whole_validation(hub):
    source(train_shards=1).prepare()
    assert_whole(hub, source(train_shards=1).prepared(), train_shards=1)
    assert shard("train_000001") not in [name for name, _ in hub.served]
    source(train_shards=None).prepare()
    assert_whole(hub, source(train_shards=None).prepared())
    assert len(hub.served) == len({name for name, _ in hub.served})


def test_a_cut_connection_is_resumed_where_it_broke(hub, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # only whole chunks of a broken answer are kept
    hub.cut = {shard("train_000001")}
    source().prepare()
    assert_whole(hub, source().prepared())
    half = len(hub.files[shard("train_000001")]) // 2
    starts = [start for name, start in hub.served if name == shard("train_000001")]
    assert starts == [None, f"bytes={half // 1000 * 1000}-"]


def test_a_server_that_stalls_is_left_and_asked_again(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.stalled = {shard("val_000000")}
    source().prepare()
    assert_whole(hub, source().prepared())


def test_another_content_than_the_published_one_is_removed(hub):
    name = shard("train_000001")
    body = bytearray(hub.files[name])
    body[-2] ^= 1
    hub.altered = {name: bytes(body)}
    with pytest.raises(UserError, match=r"fineweb_train_000001\.bin: what was downloaded is not what someone/golf pub"):
        source().prepare()
    hub.altered = {}
    source().prepare()
    assert_whole(hub, source().prepared())


def test_the_download_is_announced_and_refused_without_space(hub, monkeypatch, capsys, tmp_path):
    size = sum(len(body) for name, body in hub.files.items() if name.endswith((".bin", ".model")))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=size - 1))
    with pytest.raises(UserError, match=r"GB free, and .* are to be downloaded; set HF_HOME"):
        source().prepare()
    assert not list(tmp_path.rglob("*.bin"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=size))
    source(train_shards=1).prepare()
    source().prepare()
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("downloading")]
    assert [line.partition(" of tiny")[0] for line in told[1:]] == [
        "downloading 3 of 3 files",
        "downloading 1 of 4 files",
    ]
    source().prepare()
    assert "downloading" not in capsys.readouterr().out


def test_a_copy_with_case_markup_has_the_text_that_was_downloaded(hub, tmp_path, monkeypatch):
    (tmp_path / "tiny.model").write_bytes(hub.files[f"datasets/{MODEL}"])
    tokenizer = load_tokenizer(tmp_path / "tiny.model")
    texts = {
        "train_000000": "The golf Ball rolls",
        "train_000001": "Into the Water and Over it",
        "val_000000": "A Green",
    }
    for name, text in texts.items():
        tokens = [BOS, *tokenizer.encode(text)] * 200
        write_shard(tmp_path / name, np.array(tokens, dtype=np.uint16))
        hub.files[shard(name)] = (tmp_path / name).read_bytes()
    monkeypatch.chdir(tmp_path)
    marked = source()
    marked.model_vocab_size, marked.case_markup = 290, True
    assert marked.known_vocab_size() is None
    marked.check()
    marked.prepare()
    hub.stop()  # the copy needs no network, and no cache either
    shutil.rmtree(tmp_path / "cache")
    marked.prepare()
    prepared = marked.prepared()
    assert prepared.tokenizer.parent == Path("data/tiny_sp280-case-markup-290")
    copied = load_tokenizer(prepared.tokenizer)
    assert has_case_markup(copied)
    for shards, names in ((prepared.train, ["train_000000", "train_000001"]), (prepared.val, ["val_000000"])):
        files = TokenFiles(shards)
        assert copied.decode(files.read(0, len(files)).tolist()) == "".join(200 * texts[name] for name in names)


def test_each_variant_has_its_publisher():
    assert PublishedFineWeb().repo_id == "willdepueoai/parameter-golf"
    assert PublishedFineWeb("fineweb10B_sp8192").repo_id == "kevclark/parameter-golf"
    assert PublishedFineWeb("fineweb10B_sp8192", repo_id="mine/own").repo_id == "mine/own"


def test_a_file_damaged_in_the_cache_is_fetched_again(hub, capsys):
    source().prepare()
    damaged = source().prepared().train[1]
    damaged.write_bytes(damaged.read_bytes()[:-500])
    source().prepare()
    assert_whole(hub, source().prepared())
    assert "downloaded again" in capsys.readouterr().out


def test_a_shard_truncated_at_the_server_is_refused(hub):
    hub.files[shard("train_000001")] = hub.files[shard("train_000001")][:-500]
    with pytest.raises(UserError, match=r"fineweb_train_000001\.bin.*header promises 5,000 tokens"):
        source().prepare()


def test_a_size_that_differs_from_the_announced_one_is_refused(hub):
    hub.announced_longer = {shard("train_000000")}
    with pytest.raises(UserError, match="the download failed.*size"):
        source().prepare()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variant": "tiny_sp9"}, r"variant 'tiny_sp9' is not in someone/golf; there are: other, tiny_sp280"),
        ({"train_shards": 3}, r"train_shards is 3, but tiny_sp280 in someone/golf has 2"),
        ({"train_shards": 0}, r"train_shards must be at least 1, or null for all, not 0"),
        (
            {"variant": "other", "train_shards": 1},
            "promises other/fineweb_train_000000.bin, but .* has 0 such",
        ),
        ({"repo_id": "nobody/nothing"}, r"nobody/nothing: there is no such dataset"),
        ({"revision": "nowhere"}, r"has no revision nowhere"),
    ],
)
def test_what_does_not_exist_is_named(hub, changes, message):
    with pytest.raises(UserError, match=message):
        source(**changes).prepare()


def test_a_file_that_is_not_served_is_named(hub):
    hub.missing = {shard("val_000000")}
    with pytest.raises(UserError, match="the download failed"):
        source().prepare()


def test_a_dataset_without_a_manifest_is_refused(hub):
    del hub.files["datasets/manifest.json"]
    with pytest.raises(UserError, match=r"someone/golf: has no datasets/manifest\.json"):
        source().prepare()


def test_without_a_network_the_error_says_so(hub):
    hub.stop()
    with pytest.raises(UserError, match="cannot be reached; go online once"):
        source().prepare()


def test_prepare_on_the_command_line_uses_the_hubs_settings(hub, tmp_path):
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    args = ["--data.source", "PublishedFineWeb", "--data.source.variant", "tiny_sp280", "--data.source.repo_id", REPO]
    command = [sys.executable, "-m", "trainer", "prepare", *args, "--data.source.train_shards"]
    done = subprocess.run([*command, "2"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(list(Path(tmp_path / "home").rglob("fineweb_train_*.bin"))) == 2
    done = subprocess.run([*command, "7"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "train_shards is 7" in done.stderr
    assert "Traceback" not in done.stderr
