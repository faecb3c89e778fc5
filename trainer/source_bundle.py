"""This project's sources as one file that Python runs: what `bytes_code` counts and a submission ships."""

import io
import lzma
import zipfile
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from trainer.recipes import recipe_folder

# One compressed stream over all sources takes half the bytes of a zip, which compresses each file alone. Python cannot
# import from such a stream, so it is unpacked into a folder first.
MAIN = """
import atexit, io, lzma, pathlib, shutil, sys, tempfile, zipfile

if __name__ == "__main__":
    folder = tempfile.mkdtemp(prefix="trainer-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with zipfile.ZipFile(pathlib.Path(__file__).parent) as outer:
        sources = io.BytesIO(lzma.decompress(outer.read("sources.xz")))
    zipfile.ZipFile(sources).extractall(folder)
    sys.path.insert(0, folder)
    from trainer.__main__ import main

    raise SystemExit(main())
"""


def _files(folder: Traversable, prefix: str) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for entry in folder.iterdir():
        if entry.is_dir() and entry.name not in ("__pycache__", "configs"):
            files |= _files(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith(".py"):
            files[prefix + entry.name] = entry.read_bytes()
    return files


def source_bundle() -> bytes:
    """A zip application with the package and its recipes; `python train_gpt.py fit` runs it.

    The same sources give the same bytes: names sorted, no times.
    """
    files = _files(resources.files("trainer"), "trainer/")
    for path in Path(recipe_folder()).glob("*.yaml"):
        files[f"trainer/configs/{path.name}"] = path.read_bytes()
    packed = lzma.compress(_zip(files), preset=9 | lzma.PRESET_EXTREME)
    return _zip({"__main__.py": MAIN.encode(), "sources.xz": packed})


def _zip(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(files):
            archive.writestr(zipfile.ZipInfo(name), files[name])
    return buffer.getvalue()
