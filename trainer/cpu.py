"""Sharing a CPU: how OpenMP's idle threads wait, and whether other processes keep the machine busy."""

import os
import sys

# How often an idle thread of GNU's OpenMP looks for work before it sleeps. Its default of 300,000 keeps a core busy
# that another process could use, and then waits for that process; benchmarks/cpu_sharing.py measures it.
SPIN_COUNT = "1000"
USERS_OWN = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")
BUSY = 0.75  # more runnable threads than cores


def share_cpu() -> None:
    """Let idle threads sleep soon, unless the user has decided; no effect once torch, with its OpenMP, is loaded."""
    if "torch" not in sys.modules and not any(name in os.environ for name in USERS_OWN):
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT


def busy_message() -> str | None:
    """What to say if more threads want to run than there are cores, by the load of the last minute; else None."""
    cores = os.cpu_count() or 1
    load = os.getloadavg()[0]
    if load < cores + BUSY:
        return None
    return f"{load:.1f} threads share {cores} cores: other processes slow the training down"
