"""Training on a CPU that others use too, for each way in which OpenMP's idle threads may wait.

`python -m benchmarks.cpu_sharing` trains quickstart for a few seconds under several values of GOMP_SPINCOUNT: how often
a thread of GNU's OpenMP, which torch uses on Linux, looks for work before it sleeps. Each is run alone, beside a
process that keeps one core busy, and beside a second training. It prints the steps, and their share of the default's.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

BUSY = [sys.executable, "-c", "while True: pass"]


def start(spin_count: str, seconds: float, data: Path, runs: Path) -> "subprocess.Popen[str]":
    """Start a training; its `summary.json` will hold the steps."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("GOMP_", "OMP_"))}
    env |= {"GOMP_SPINCOUNT": "300000" if spin_count == "default" else spin_count}  # the default of libgomp
    words = [f"--wallclock.seconds={seconds}", f"--data.source.folder={data}", f"--trainer.default_root_dir={runs}"]
    words += ["--trainer.val_check_interval=1000000", "--eval.stride=null", "--eval.max_tokens=4096"]
    words += ["--data.source.max_bytes=3000000", "--export.enabled=false", "--report.enabled=false"]
    command = [sys.executable, "-m", "trainer", "fit", "--config=quickstart", *words]
    return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def steps(process: "subprocess.Popen[str]", runs: Path) -> int:
    """Wait for a training and read its steps."""
    _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(errors)
    return int(json.loads((runs / "quickstart" / "1" / "summary.json").read_text())["steps"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--seconds", type=float, default=15, help="Training time of each run, in seconds.")
    text = "Values of GOMP_SPINCOUNT; default leaves it to OpenMP."
    parser.add_argument("--spin_counts", nargs="+", default=["default", "0", "1000", "10000", "100000"], help=text)
    options = parser.parse_args()
    print(f"{'spin count':>12} {'alone':>14} {'busy core':>14} {'two trainings':>22}", flush=True)
    first = None
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"

        def new_folder() -> Path:
            return Path(tempfile.mkdtemp(dir=folder))

        def run(spin_count: str, seconds: float = options.seconds) -> int:
            runs = new_folder()
            return steps(start(spin_count, seconds, data, runs), runs)

        run("default", 1)  # prepares the text
        for spin_count in options.spin_counts:
            alone = run(spin_count)
            first = first or alone
            with subprocess.Popen(BUSY) as busy:
                try:
                    beside = run(spin_count)
                finally:
                    busy.kill()
            folders = [new_folder(), new_folder()]
            pair = [start(spin_count, options.seconds, data, each) for each in folders]
            two = [steps(process, each) for process, each in zip(pair, folders, strict=True)]
            shares = "".join(f"{count:>8,} {count / first:>5.0%}" for count in (alone, beside, *two))
            print(f"{spin_count:>12} {shares}", flush=True)


if __name__ == "__main__":
    main()
