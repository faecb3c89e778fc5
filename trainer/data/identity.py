"""Which token shards a run reads: their names, lengths and content, for a run that resumes."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from trainer.data.manifest import Manifest
from trainer.data.shards import HEADER_BYTES
from trainer.data.source import PreparedText
from trainer.errors import UserError
from trainer.files import sha256_of

Identity = dict[str, list[tuple[str, int, str]]]  # of each split: name, tokens and sha256 of its shards in order


def fingerprint(identity: Identity) -> str:
    """A short hash of an identity."""
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]


def identify(text: PreparedText, reads_all: bool = False) -> Identity:
    """Identity of prepared text; shards without a manifest are read for it.

    Args:
        text: The shards.
        reads_all: Read all shards instead of believing their manifest.

    Raises:
        UserError: If a training shard is a validation shard, too.
    """
    known: dict[Path, str] = {}
    for folder in {path.parent for path in (*text.train, *text.val)}:
        manifest = None if reads_all else Manifest.read(folder)
        known |= {folder / shard.file: shard.sha256 for shard in manifest.shards} if manifest else {}
    others = [path for path in (*text.train, *text.val) if path not in known]
    with ThreadPoolExecutor(min(len(others), os.cpu_count() or 1) or 1) as pool:
        known |= dict(zip(others, pool.map(sha256_of, others), strict=True))
    validation = {known[path]: path for path in text.val}
    for path in text.train:
        if known[path] in validation:
            raise UserError(f"{path}: is the validation shard {validation[known[path]]}, too; remove one of them")
    return {
        split: [(path.name, (path.stat().st_size - HEADER_BYTES) // 2, known[path]) for path in paths]
        for split, paths in (("train", text.train), ("val", text.val))
    }


def difference(before: Identity, now: Identity) -> str | None:
    """What distinguishes two identities, in a few words; None if nothing does."""
    for split, shards in before.items():
        old, new = [tuple(shard) for shard in shards], [tuple(shard) for shard in now[split]]
        if old == new:
            continue
        names, others = [shard[0] for shard in old], [shard[0] for shard in new]
        missing, added = [n for n in names if n not in others], [n for n in others if n not in names]
        if missing or added:
            changes = [f"{name} is missing" for name in missing[:1]] + [f"{name} is new" for name in added[:1]]
            return f"the {split} shards differ: {' and '.join(changes)}"
        changed = next((a[0] for a, b in zip(old, new, strict=True) if a != b), names[0])
        return f"the {split} shard {changed} has another content"
    return None
