"""Coverage-guided fuzzing of the two readers of foreign files.

    pip install -e '.[fuzz]'
    python -m tests.fuzz.readers artifact -max_total_time=600 corpus/
    python -m tests.fuzz.readers shard -max_total_time=600 corpus/

Only a UserError is allowed to come out. The fuzzer writes what makes another error into a file; make it a test.
"""

import hashlib
import struct
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import atheris
import zstandard

with atheris.instrument_imports(include=["trainer"]):
    from trainer.data.shards import open_shard
    from trainer.errors import UserError
    from trainer.quantize.container import MAGIC, VERSION, read_container

FOLDER = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))


def artifact(data: bytes) -> None:
    """The bytes as a file, and as header, zero byte and payload under a length, frame and checksum that are right."""
    header, _, payload = data.partition(b"\0")
    content = struct.pack("<I", len(header)) + header + payload
    frame = zstandard.ZstdCompressor(level=1, write_checksum=True).compress(content)
    for file in (data, MAGIC + VERSION + hashlib.sha256(frame).digest() + frame):
        (FOLDER / "a").write_bytes(file)
        with suppress(UserError):
            for tensor in read_container(FOLDER / "a")[1].values():
                tensor.floats()


def shard(data: bytes) -> None:
    """The file as it is."""
    (FOLDER / "s").write_bytes(data)
    with suppress(UserError):
        assert len(open_shard(FOLDER / "s")) * 2 + 1024 == len(data)


if __name__ == "__main__":
    target = {"artifact": artifact, "shard": shard}[sys.argv.pop(1)]
    atheris.Setup(sys.argv, target)
    atheris.Fuzz()
