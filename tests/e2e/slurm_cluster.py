"""Starts a real Slurm cluster of two nodes on this machine, over loopback, while a test module runs.

One slurmctld, two slurmd with names and ports of their own, and munge keep their files in a temporary folder; each is
ended by its process id. Cgroups, which need the whole machine, and accounting are left out.
"""

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "squeue", "scancel", "scontrol")
MISSING = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None]
WHY_NOT = f"no {MISSING[0]} here; install Slurm: apt-get install slurm-wlm munge" if MISSING else ""
NODES = ("n1", "n2")
WAIT_SECONDS = 150

CONF = """
ClusterName=trivium-test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,batch_sched_delay=0
MinJobAge=300
KillWait=10
InactiveLimit=0
ReturnToService=2
MailProg=/bin/true
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=2 RealMemory=4000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=2 RealMemory=4000
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


@contextmanager
def cluster(folder: Path) -> Iterator[Path]:
    """Yields the slurm.conf of a cluster whose two nodes are idle; SLURM_CONF must be set to it."""
    controller, first, second = _free_ports(3)
    host = socket.gethostname().split(".")[0]
    conf = folder / "slurm.conf"
    conf.write_text(CONF.format(host=host, controller=controller, first=first, second=second, folder=folder))
    (folder / "state").mkdir()
    with ExitStack() as stack:
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        munge = [f"--key-file={key}", f"--socket={folder}/munge.socket", f"--pid-file={folder}/munged.pid"]
        seed = [f"--log-file={folder}/munged.log", f"--seed-file={folder}/munged.seed"]
        stack.enter_context(_daemon(folder, ["munged", "--foreground", "--force", *munge, *seed]))
        _wait(lambda: (folder / "munge.socket").exists(), folder)
        stack.enter_context(_daemon(folder, ["slurmctld", "-D", "-f", str(conf)]))
        for name in NODES:
            stack.enter_context(_daemon(folder, ["slurmd", "-D", "-N", name, "-f", str(conf)]))
        _wait(lambda: _idle(conf), folder)
        try:
            yield conf
        finally:  # else jobs of a failed test would outlive the daemons
            _asked(conf, "scancel", f"--user={getpass.getuser()}")
            _wait(lambda: not _asked(conf, "squeue", "--noheader"), folder)


@contextmanager
def _daemon(folder: Path, command: Sequence[str]) -> Iterator[None]:
    program = shutil.which(command[0], path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    assert program is not None
    with (folder / "daemons.log").open("ab") as log:
        process = subprocess.Popen([program, *command[1:]], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _idle(conf: Path) -> bool:
    return _asked(conf, "sinfo", "--noheader", "--format=%T %D").split() == ["idle", "2"]


def _asked(conf: Path, *command: str) -> str:
    """Returns the output of a Slurm command for the cluster of `conf`."""
    environment = {**os.environ, "SLURM_CONF": str(conf)}
    return subprocess.run(command, env=environment, capture_output=True, text=True).stdout.strip()


def _wait(ready, folder: Path) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not ready():
        log = folder / "daemons.log"
        assert time.monotonic() < deadline, (
            f"Slurm did not get to where it should be:\n{log.read_text(errors='replace')[-3000:]}"
        )
        time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]
