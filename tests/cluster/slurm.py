"""A real SLURM with two nodes on this machine: a controller, two slurmd and a munged, all in a folder of their own."""

import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

NODES = ("n1", "n2")
# Short times: a requeued job waits for its credential to expire, and a dead node is noticed after SlurmdTimeout.
CONF = """ClusterName=two
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdTimeout=20
KillWait=20
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
MpiDefault=none
JobRequeue=1
SchedulerType=sched/backfill
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 Gres=gpu:1 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 Gres=gpu:1 State=UNKNOWN
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES
"""


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def wait_for(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Poll a condition until it holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.3)


class Cluster:
    """Two nodes; no daemon, socket, key or port of another cluster is touched."""

    def __init__(self, folder: Path) -> None:
        """Write the configuration; `start` starts the daemons."""
        self.folder = folder
        folder.chmod(0o755)
        (folder / "state").mkdir()
        conf = CONF.format(folder=folder, host=socket.gethostname().split(".")[0], ports=free_ports(3))
        (folder / "slurm.conf").write_text(conf)
        (folder / "gres.conf").write_text("Name=gpu File=/dev/null\n")
        self.env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self._munged: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start munged, the controller and both nodes, and wait until the nodes are idle."""
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        munge_socket = self.folder / "munge.socket"
        options = [f"--{name}-file={self.folder}/munge.{name}" for name in ("pid", "log", "seed")]
        log = (self.folder / "munged.out").open("wb")
        command = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={munge_socket}", *options]
        self._munged = subprocess.Popen(command, stdout=log, stderr=log)
        wait_for(munge_socket.exists, 20, "munged")
        self.run("slurmctld", "-c")
        for node in NODES:
            self.run("slurmd", "-N", node)
        wait_for(lambda: self.run("sinfo", "-h", "-o", "%T %D").split() == ["idle", "2"], 60, "two idle nodes")

    def stop(self) -> None:
        """End all daemons and what they have started."""
        for pid in list(self.processes(f"SLURM_CONF={self.env['SLURM_CONF']}")):
            if pid != os.getpid():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        if self._munged is not None:
            self._munged.kill()
            self._munged.wait()

    def processes(self, variable: str) -> Iterator[int]:
        """Process ids of this cluster's daemons and tasks that have a variable in their environment."""
        ours = f"SLURM_CONF={self.env['SLURM_CONF']}".encode()
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                variables = (entry / "environ").read_bytes().split(b"\0")
                if ours in variables and variable.encode() in variables:
                    yield int(entry.name)
            except OSError:
                continue

    def kill_node(self, node: str) -> None:
        """The node loses its power: its daemon, its steps' daemons and their tasks are killed."""
        os.kill(int((self.folder / f"slurmd-{node}.pid").read_text()), signal.SIGKILL)
        tasks = list(self.processes(f"SLURMD_NODENAME={node}"))
        for pid in tasks:
            with suppress(OSError, ProcessLookupError):
                parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]
                if Path(f"/proc/{parent}/comm").read_text().startswith("slurmstepd"):
                    os.kill(int(parent), signal.SIGKILL)
        for pid in tasks:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def run(self, *command: str, **env: str) -> str:
        """Run a command against this cluster."""
        result = subprocess.run(command, env=self.env | env, capture_output=True, text=True, timeout=60, check=False)
        assert result.returncode == 0, f"{command}: {result.stderr}"
        return result.stdout

    def submit(self, script: Path, cwd: Path, options: list[str], args: list[str], **env: str) -> str:
        """Submit a job script; returns the job's number."""
        files = ["--parsable", f"--chdir={cwd}", f"--output={cwd}/job.out"]
        return self.run("sbatch", *files, *options, str(script), *args, **env).strip().split(";")[0]

    def state(self, job: str) -> str:
        """State of a job, such as RUNNING."""
        return self._field(job, "JobState")

    def restarts(self, job: str) -> int:
        """How often the job was requeued."""
        return int(self._field(job, "Restarts"))

    def _field(self, job: str, name: str) -> str:
        shown = self.run("scontrol", "show", "job", job)
        return next(word.partition("=")[2] for word in shown.split() if word.startswith(f"{name}="))
