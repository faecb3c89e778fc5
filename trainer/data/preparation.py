"""Makes a folder of shards: in a folder of its own that takes the name when it is whole, one process at a time.

Nothing is ever removed but files that a manifest of ours names, and a folder that an ended preparation left behind.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.data.manifest import MANIFEST, TOKENIZER, Manifest
from trainer.data.shards import HEADER_BYTES
from trainer.errors import UserError
from trainer.files import cannot_read, check_can_make, sha256_of
from trainer.lock import exclusive
from trainer.logging import logger

HINT = "choose another data.source.folder"
MARKER = "preparing"  # a file in a folder that is being prepared


def prepare_folder(
    folder: Path,
    source: dict[str, Any],
    make: Callable[[Path], None],
    only_if_missing: bool = False,
    hint: str = HINT,
) -> None:
    """Make a folder of shards, unless its manifest says that this was done.

    Args:
        folder: The folder.
        source: Class and settings of the source.
        make: Writes shards and manifest into the folder it is given.
        only_if_missing: Leave a folder as it is that was prepared from other files or settings.
        hint: What to do about a folder that cannot be used, for the error.

    Raises:
        UserError: If the folder holds anything that this trainer did not make, or cannot be written.
    """
    if is_prepared(folder, source) or (only_if_missing and _keeps(folder)):
        return
    folder = folder.resolve()
    if folder == Path.cwd() or folder in Path.cwd().parents:
        raise UserError(f"{folder}: is the current folder, or holds it; {hint}")
    refuse_foreign(folder, hint)
    refuse_other_source(folder, source)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(_beside(folder, "lock"), f"preparing {folder}"):
            if is_prepared(folder, source):
                return
            refuse_foreign(folder, hint)
            refuse_other_source(folder, source)
            temporary = _beside(folder, "preparing")
            if temporary.exists() and not (temporary / MARKER).exists() and any(temporary.iterdir()):
                raise UserError(f"{temporary}: was not made by this trainer, but it needs that name; {hint}")
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            (temporary / MARKER).touch()
            try:
                make(temporary)
                refuse_foreign(folder, hint)  # somebody may have put a file there meanwhile
                (temporary / MARKER).unlink()
                _replace(folder, temporary)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error}); {hint}") from error


def check_folder(folder: Path, source: dict[str, Any], hint: str = HINT) -> None:
    """Refuse a folder that `prepare_folder` would refuse or fail to make.

    Args:
        folder: The folder.
        source: Class and settings of the source.
        hint: What to do about it, for the error.

    Raises:
        UserError: If it holds anything that this trainer did not make, or the shards of another source, or cannot be
            written.
    """
    if not is_prepared(folder, source):
        check_can_make(folder.resolve().parent, hint)
        refuse_foreign(folder, hint)
        refuse_other_source(folder, source)


def is_prepared(folder: Path, source: dict[str, Any]) -> bool:
    """Whether a folder's manifest names this source, and its shards and its tokenizer are there."""
    try:
        manifest = Manifest.read(folder)
    except UserError:  # a damaged manifest counts as none
        return False
    if manifest is None or manifest.source != source:
        return False
    tokenizer = folder / TOKENIZER
    return (tokenizer.is_file() and sha256_of(tokenizer) == manifest.tokenizer_sha256) and all(
        (folder / shard.file).is_file() and (folder / shard.file).stat().st_size == HEADER_BYTES + 2 * shard.tokens
        for shard in manifest.shards
    )


def refuse_foreign(folder: Path, hint: str = HINT) -> None:
    """Refuse a folder that holds anything but what a manifest of ours names.

    Raises:
        UserError: With the name of one such file, or of one that may not be read.
    """
    hint = f"{hint}, or remove it"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file, not a folder; {hint}")
    try:
        present = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror}); {hint}") from error
    our_files = _own_files(folder)
    foreign = [name for name in present if name not in our_files]
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise UserError(f"{folder}: holds {foreign[0]}{more}, which this trainer did not make; {hint}")


def refuse_other_source(folder: Path, source: dict[str, Any]) -> None:
    """Refuse to replace shards that a source of another class made: the folder was probably meant for them.

    Raises:
        UserError: With the name of that class, or if the manifest may not be read.
    """
    try:
        made_by = json.loads((folder / MANIFEST).read_text())["source"]["class"]
    except PermissionError as error:
        raise cannot_read(error) from error
    except (OSError, ValueError, KeyError, TypeError):
        return
    if made_by != source["class"]:
        raise UserError(
            f"{folder}: holds the shards of the source {made_by}, not {source['class']}; to read them, use "
            f"--data.source Shards --data.source.folder {folder}, else choose another data.source.folder"
        )


def _own_files(folder: Path) -> set[str]:
    """The files that a manifest of ours, of any version, names; none without one."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        names = {str(shard["file"]) for shard in manifest["shards"]}
        int(manifest["format"])
        tokenizer = folder / TOKENIZER
        if tokenizer.is_file() and sha256_of(tokenizer) == manifest["tokenizer_sha256"]:
            names.add(TOKENIZER)
    except PermissionError as error:
        raise cannot_read(error) from error
    except (OSError, ValueError, KeyError, TypeError):
        return set()
    return names | {MANIFEST}


def _keeps(folder: Path) -> bool:
    if Manifest.read(folder) is None:
        return False
    logger.warning(
        f"{folder}: its files or settings have changed since it was prepared; its shards are used as they are"
    )
    return True


def _beside(folder: Path, purpose: str) -> Path:
    return folder.with_name(f".{folder.name}.{purpose}")


def _replace(folder: Path, new: Path) -> None:
    """Give a new folder its name; what had the name before consists of our own files."""
    old = _beside(folder, "old")
    if old.exists():  # left by a process that was killed here
        refuse_foreign(old)
        shutil.rmtree(old)
    if folder.exists():
        os.rename(folder, old)
    try:
        os.rename(new, folder)
    except OSError:
        if old.exists():
            os.rename(old, folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
