"""A lock between processes, also of several machines that share a folder: a directory, which only one of them can make.

Its owner touches a file in it every few seconds. A lock whose owner has stopped doing so is taken over.
"""

import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from trainer.errors import UserError
from trainer.files import cannot_write
from trainer.logging import logger

HEARTBEAT = 5.0  # seconds between two signs of life
STALE = 60.0  # seconds without one, after which the owner counts as dead
POLL = 0.5  # seconds between two tries
OWNER = "owner.json"


@contextmanager
def exclusive(path: Path, purpose: str, waits: bool = True) -> Iterator[None]:
    """Hold a lock while the block runs.

    Args:
        path: The lock's directory; its parent must exist.
        purpose: What the lock is for, for the message of a process that meets another one's.
        waits: Whether to wait until another owner has finished. One that gives no sign of life is waited for in any
            case, until it counts as dead.

    Raises:
        UserError: If the lock cannot be made, or if its owner is alive and `waits` is false.
    """
    owner = _acquire(path, purpose, waits)
    ended = threading.Event()
    heart = threading.Thread(target=_beat, args=(path / OWNER, ended), daemon=True)
    heart.start()
    try:
        yield
    finally:
        ended.set()
        heart.join()
        if _state(path)[0] == owner:  # not of a process that took it over because this one gave no sign of life
            shutil.rmtree(path, ignore_errors=True)


def _acquire(path: Path, purpose: str, waits: bool) -> str:
    """Wait for the lock and make it; returns the content of its owner file."""
    started = datetime.now().isoformat()
    me = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": started})
    seen: tuple[str, int] = ("", 0)
    since = time.monotonic()
    is_waiting = False
    while True:
        try:
            path.mkdir()
            (path / OWNER).write_text(me)
            if _state(path)[0] == me:
                return me
        except FileExistsError:
            pass
        except OSError as error:
            raise cannot_write(path.parent, error) from error
        if (state := _state(path)) != seen:
            if not waits and seen[0] == state[0] != "":  # a sign of life
                raise UserError(f"{purpose}: another process does that now ({_named(state[0])}); wait for it or end it")
            seen, since = state, time.monotonic()
        if _is_dead(seen[0]) or time.monotonic() - since > STALE:
            dead = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}")
            with suppress(OSError):  # another process was faster
                os.rename(path, dead)
                if _state(dead)[0] != seen[0]:  # it even made the lock its own: give it back
                    os.rename(dead, path)
            shutil.rmtree(dead, ignore_errors=True)
            continue
        if not is_waiting:
            is_waiting = True
            owner = f"{'does' if waits else 'did'} it ({seen[0] or 'unknown'})"
            logger.info(f"{purpose}: waiting for another process that {owner}")
        time.sleep(POLL)


def _state(path: Path) -> tuple[str, int]:
    """The owner and the time of its last sign of life, by the clock of the file system."""
    try:
        return (path / OWNER).read_text(), (path / OWNER).stat().st_mtime_ns
    except OSError:
        return "", 0


def is_held(path: Path) -> bool:
    """Whether a process holds a lock; one of another machine counts as alive."""
    owner = _state(path)[0]
    return bool(owner) and not _is_dead(owner)


def _named(owner: str) -> str:
    """The owner in words."""
    try:
        values = json.loads(owner)
        return f"PID {values['pid']} on {values['host']}"
    except (ValueError, KeyError, TypeError):
        return owner


def _is_dead(owner: str) -> bool:
    """Whether the owner ran on this machine and is gone."""
    try:
        values = json.loads(owner)
        if values["host"] != socket.gethostname():
            return False
        os.kill(values["pid"], 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return False
    return False


def _beat(path: Path, ended: threading.Event) -> None:
    while not ended.wait(HEARTBEAT):
        with suppress(OSError):
            os.utime(path)
