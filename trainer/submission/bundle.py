"""This project's own sources as one file that Python can run: what `bytes_code` counts and a submission ships."""

import io
import zipfile
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from trainer.recipes import recipe_folder

MAIN = "from trainer.__main__ import main\nraise SystemExit(main())\n"


def _files(folder: Traversable, prefix: str) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for entry in folder.iterdir():
        if entry.is_dir() and entry.name not in ("__pycache__", "configs"):
            found |= _files(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith(".py"):
            found[prefix + entry.name] = entry.read_bytes()
    return found


def source_bundle() -> bytes:
    """A zip application with the package and its recipes; `python train_gpt.py fit` runs it.

    The same sources give the same bytes: names sorted, no times.
    """
    files = _files(resources.files("trainer"), "trainer/") | {"__main__.py": MAIN.encode()}
    for path in Path(recipe_folder()).glob("*.yaml"):
        files[f"trainer/configs/{path.name}"] = path.read_bytes()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name in sorted(files):
            archive.writestr(zipfile.ZipInfo(name), files[name], zipfile.ZIP_DEFLATED, 9)
    return buffer.getvalue()
