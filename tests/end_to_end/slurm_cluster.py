"""A real Slurm of four virtual nodes on this machine, all of it in one folder.

The daemons run in the foreground as children of the test; nothing outside of the folder is
written, ports are free ones, and when the test is over or killed every process of the cluster ends.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
PATIENCE_SECONDS = 600.0  # for anything that is waited for; a loaded machine is slow

# Partition `low` can be preempted by `high`: its jobs get SIGTERM, then GraceTime to save.
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=60
FirstJobId={first_job}
SlurmdParameters=config_overrides
GresTypes=gpu
MinJobAge=86400
{nodes}
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=120
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=2
"""
NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=64 RealMemory=4096 "
    "Gres=gpu:8 State=UNKNOWN"
)


def missing_programs() -> list[str]:
    """Programs of Debian's packages that this machine lacks."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    return [name for name in PROGRAMS if shutil.which(name, path=path) is None]


def wait_until(condition: Callable[[], object], what: str, seconds: float = PATIENCE_SECONDS):
    """Polls until the condition gives something true, and returns it."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.03)
    return value


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def _first_job() -> int:
    """A number from which the rendezvous ports of the first jobs are free (launch.sh)."""
    while True:
        first = random.randrange(1000, 100_000)
        if all(_is_free(20000 + job % 12000) for job in range(first, first + 10)):
            return first


def _parent(process: int) -> int:
    with contextlib.suppress(OSError):
        status = Path(f"/proc/{process}/status").read_text()
        return int(re.findall(r"^PPid:\s*(\d+)$", status, re.MULTILINE)[0])
    return 0


class Cluster:
    """Munge, a controller and four node daemons.

    Args:
        folder: where everything lives; its path must be short (it holds a socket).
    """

    def __init__(self, folder: Path) -> None:
        try:
            self._set_up(folder)
        except BaseException:
            self.stop()
            raise

    def _set_up(self, folder: Path) -> None:
        self.folder = folder
        self.conf = folder / "slurm.conf"
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))},
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
            "SLURM_CONF": str(self.conf),
        }
        self.daemons: dict[str, subprocess.Popen] = {}
        # Its input ends when this process does, however it ends: nothing is ever left running.
        self.reaper = subprocess.Popen(
            [sys.executable, __file__, str(self.conf)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        for name in ("state", "spool", "log"):
            (folder / name).mkdir()
        host, names = socket.gethostname().split(".")[0], [f"n{i}" for i in range(4)]
        nodes = [NODE.format(name=name, host=host, port=_free_port()) for name in names]
        self.conf.write_text(
            CONFIGURATION.format(
                host=host,
                controller_port=_free_port(),
                folder=folder,
                user=pwd.getpwuid(os.getuid()).pw_name,
                first_job=_first_job(),
                nodes="\n".join(nodes),
            )
        )
        for index in range(8):  # Slurm wants to see eight files, whatever they are
            (folder / f"gpu{index}").touch()
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-7]\n")
        key = folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(1024))
        munge = ["--force", f"--key-file={key}", f"--socket={folder}/munge.socket"]
        munge += [f"--{kind}-file={folder}/munge.{kind}" for kind in ("pid", "log", "seed")]
        self._start("munged", "munged", "--foreground", *munge)
        wait_until((folder / "munge.socket").exists, "munge")
        self._start("slurmctld", "slurmctld", "-D", "-c")
        for name in names:
            self.start_node(name)
        wait_until(lambda: self._idle() == 4, "four idle nodes", 60)

    def _start(self, name: str, *command: str) -> None:
        with open(self.folder / "log" / f"{name}.out", "ab") as out:
            self.daemons[name] = subprocess.Popen(
                command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, env=self.environment
            )

    def start_node(self, name: str) -> None:
        """Starts the daemon of a node."""
        self._start(name, "slurmd", "-D", "-N", name)

    def _idle(self) -> int:
        nodes = self.run("scontrol", "--oneliner", "show", "node", check=False).stdout
        return len(re.findall(r" State=IDLE ", nodes))

    def run(self, *command: str, check: bool = True, **options) -> subprocess.CompletedProcess:
        """Runs a command of Slurm's against this cluster."""
        environment = {**self.environment, **options.pop("environment", {})}
        result = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=120, **options
        )
        if check and result.returncode:
            raise RuntimeError(f"{' '.join(command)}: {result.stderr}")
        return result

    def update(self, what: str, **values: object) -> None:
        """`scontrol update WHAT KEY=VALUE ...`."""
        self.run("scontrol", "update", what, *(f"{k}={v}" for k, v in values.items()))

    def job(self, number: str) -> dict[str, str]:
        """What Slurm knows of a job."""
        text = self.run("scontrol", "--oneliner", "show", "job", number).stdout
        return dict(word.partition("=")[::2] for word in text.split() if "=" in word)

    def crash(self, name: str) -> None:
        """A node dies with all that runs on it, and Slurm is informed."""
        ranks = self.processes(SLURMD_NODENAME=name)
        parents = {_parent(rank) for rank in ranks} - {0, 1, os.getpid()}
        self.daemons[name].kill()
        kill(set(self.processes()) & parents)  # slurmstepd first: it must not tell
        kill(ranks)
        self.update(f"NodeName={name}", State="DOWN", Reason="died")

    def repair(self, name: str) -> None:
        """Starts a node that died; Slurm takes it back."""
        self.start_node(name)
        wait_until(lambda: self._idle() == 4, "four idle nodes")

    def processes(self, **environment: str) -> list[int]:
        """Processes of this cluster by their environment, also those that lost their parents."""
        return find_processes(SLURM_CONF=str(self.conf), **environment)

    def stop(self) -> None:
        """Ends every process of the cluster."""
        self.reaper.communicate(timeout=120)
        for daemon in self.daemons.values():
            daemon.wait(60)


def find_processes(**environment: str) -> list[int]:
    """Processes whose environment has all of these."""
    wanted = {f"{key}={value}" for key, value in environment.items()}
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if wanted <= set(path.read_text(errors="replace").split("\0")):
                found.append(int(path.parent.name))
    return found


def kill(processes: Iterable[int], number: signal.Signals = signal.SIGKILL) -> None:
    """Signals processes, of which some may be gone."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


def reap(conf: str) -> None:
    """Waits for the end of standard input, then ends every process of a cluster."""
    sys.stdin.read()
    while processes := find_processes(SLURM_CONF=conf):
        kill(processes)
        time.sleep(0.1)


if __name__ == "__main__":
    reap(sys.argv[1])
