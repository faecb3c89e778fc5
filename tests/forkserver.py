"""Start programs from a process that has imported the libraries already: importing them takes most of a small run.

`python -m tests.forkserver` imports what every command needs, then reads one request a line. For each it forks; the
child runs a module as `python -m` does, or a script, and ends as any interpreter ends. Nothing of `trainer` is imported
before the fork.
"""

import atexit
import json
import os
import runpy
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

LIBRARIES = ("lightning.pytorch.cli", "torch._dynamo", "torch.distributed.run", "torchmetrics", "sentencepiece")
SECONDS = 300  # no program of the tests takes longer


class ForkServer:
    """A process with the libraries in memory, one per test worker."""

    def __init__(self, env: dict[str, str]) -> None:
        command = [sys.executable, "-m", "tests.forkserver"]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(command, env=env, **pipes)
        atexit.register(self._process.kill)

    def run(self, args: list[str], cwd: Path, env: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
        """Run a module or a script, the first of the arguments, to its end, with its output in files of a folder."""
        files = [folder / "stdout", folder / "stderr"]
        request = {"args": args, "cwd": str(cwd), "env": env, "files": [str(file) for file in files]}
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        print(json.dumps(request), file=stdin, flush=True)
        code = int(stdout.readline())
        return subprocess.CompletedProcess(args, code, *(file.read_text() for file in files))


def serve() -> list[str]:
    """Fork for each request; returns the arguments in the child, and ends the server at the end of its input."""
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            signal.alarm(SECONDS)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a server in the background ignores it
            os.chdir(request["cwd"])
            os.environ.clear()
            os.environ.update(request["env"])
            for name, number in zip((os.devnull, *request["files"]), range(3), strict=True):
                os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666), number)
            return request["args"]
        status = os.waitpid(pid, 0)[1]
        print(os.waitstatus_to_exitcode(status), flush=True)
    raise SystemExit


if __name__ == "__main__":
    for library in LIBRARIES:
        import_module(library)
    program, *sys.argv[1:] = serve()
    sys.path[:1] = [os.getcwd(), *os.environ["PYTHONPATH"].split(os.pathsep)]
    if program.endswith(".py"):
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
