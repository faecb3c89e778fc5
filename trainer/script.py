"""A user's own script that patches the trainer and then runs one of its commands, as docs/extending.md shows."""

import hashlib
import sys
from pathlib import Path


def user_script(*commands: str) -> Path | None:
    """The script that this process was started with, if it is not the trainer's own.

    Args:
        commands: Commands of the trainer that it may have been given as its first argument. A script without one
            calls the Python API, and its settings are in the run's config.
    """
    main = sys.modules["__main__"]
    path = getattr(main, "__file__", None)
    is_script = getattr(main, "__spec__", None) is None and str(path).endswith(".py") and sys.argv[1:2] != []
    return Path(str(path)) if is_script and sys.argv[1] in commands else None


def script_record(code: bytes) -> dict[str, str] | None:
    """Name and sha256 of the user's script, for `summary.json`.

    Args:
        code: The trainer's own sources as one script, which is nobody's patch.
    """
    script = user_script("fit", "rerun")
    if script is None or not script.is_file() or script.read_bytes() == code:
        return None
    return {"name": script.name, "sha256": hashlib.sha256(script.read_bytes()).hexdigest()}
