"""A real Slurm of two nodes on this machine, for one test session: munge, MariaDB, slurmdbd, slurmctld, two slurmd.

Everything lies in one temporary folder and ends with the session, or with the process that runs it; no
service of the system is used or touched. Where the programs are missing, or this is not root, the tests
that ask for it skip; with MAMA_REQUIRE_SLURM=1 they fail instead.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from submitit.core.core import Job
from submitit.slurm.slurm import SlurmJob

PATH = f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin"
PROGRAMS = (
    *("munged", "munge", "mariadbd", "mariadb-install-db", "mariadb-admin", "setpriv"),
    *("slurmdbd", "slurmctld", "slurmd", "sacctmgr", "sinfo", "squeue", "scancel", "sbatch", "srun"),
)
PATIENCE = 90.0  # seconds for each daemon to start, and for the jobs to end
HOST = socket.gethostname().partition(".")[0]
# CPUs of each node. The tasks of a job look their first node's name up: this machine's own is known everywhere.
NODES = {HOST: 2, f"{HOST}-2": 1}  # the first of a job is the alphabetically first

LARGEST_ARRAY = 6  # jobs; most clusters have 1,001

SLURM_CONF = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld}
MaxArraySize={array}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SlurmdParameters=config_overrides
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=1000
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={dbd}
AccountingStoragePass={folder}/munge.socket
JobAcctGatherType=jobacct_gather/linux
ReturnToService=2
JobRequeue=1
KillWait=5
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=cpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP PreemptMode=OFF
PartitionName=preempted Nodes=ALL MaxTime=INFINITE State=UP PreemptMode=CANCEL GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} State=UNKNOWN"
SLURMDBD_CONF = """\
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={dbd}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=accounting
PidFile={folder}/slurmdbd.pid
LogFile={folder}/slurmdbd.log
"""


@dataclass
class Cluster:
    """The running cluster: its commands, and what finds it."""

    folder: Path
    environment: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.environment = {
            **os.environ,
            "PATH": PATH,
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "MYSQL_UNIX_PORT": str(self.folder / "mariadb.socket"),
            "TMPDIR": str(self.folder),  # where two MariaDB that start at once would take the same names
        }

    def run(self, *command: str) -> str:
        """What a command prints; its failure is an error."""
        done = self.call(*command)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout

    def succeeds(self, *command: str) -> bool:
        return self.call(*command).returncode == 0

    def call(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=PATIENCE)

    def jobs(self) -> list[str]:
        """The jobs and array tasks that wait or run."""
        return self.run("squeue", "--noheader", "--array", "--format=%i").split()


def missing() -> str | None:
    """Why no cluster can be started here, if so."""
    if os.geteuid() != 0:
        return "a Slurm of its own needs root"
    programs = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    return f"no Slurm here: {', '.join(programs)} not found" if programs else None


@pytest.fixture(scope="session")
def running_cluster() -> Iterator[Cluster]:
    reason = missing()
    if reason and os.environ.get("MAMA_REQUIRE_SLURM") == "1":
        pytest.fail(f"MAMA_REQUIRE_SLURM=1, but {reason}")
    if reason:
        pytest.skip(reason)
    with started() as cluster:
        yield cluster


@pytest.fixture
def slurm_cluster(running_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """The cluster, found by this process's own sbatch; jobs that a test leaves behind end with it."""
    for name in ("PATH", "SLURM_CONF"):
        monkeypatch.setenv(name, running_cluster.environment[name])
    monkeypatch.setattr(Job, "_results_timeout_s", 0)  # 15 s otherwise, for slow shared file systems
    monkeypatch.setattr(SlurmJob.watcher, "_delay_s", 1)  # between two calls of sacct; 600 otherwise
    yield running_cluster
    tell(running_cluster)
    end_jobs(running_cluster)


def tell(cluster: Cluster) -> None:
    """Print what Slurm says of itself: pytest shows it with a test that fails."""
    for command in (("scontrol", "--oneliner", "show", "job"), ("scontrol", "--oneliner", "show", "node")):
        print(cluster.call(*command).stdout[-20_000:])
    for log in sorted(cluster.folder.glob("slurm[cd]*.log")):
        print(f"{log.name}:\n{log.read_text(errors='replace')[-10_000:]}")


@pytest.fixture
def closed(slurm_cluster: Cluster) -> Iterator[Cluster]:
    """The cluster, which takes jobs but starts none."""
    slurm_cluster.run("scontrol", "update", "PartitionName=cpu", "State=DOWN")
    yield slurm_cluster
    slurm_cluster.run("scancel", "--partition=cpu")
    slurm_cluster.run("scontrol", "update", "PartitionName=cpu", "State=UP")


@contextmanager
def started() -> Iterator[Cluster]:
    """The daemons, in the order of their needs; they end in the opposite order."""
    folder = Path(tempfile.mkdtemp(prefix="mama-slurm-"))
    cluster = Cluster(folder)
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        stack.callback(end_strays, folder)
        write_configuration(folder)

        def start(*command: str, ready: Callable[[], object]) -> None:
            stack.enter_context(daemon(cluster, command, ready))

        munge = folder / "munge"
        start(
            *("munged", "--foreground", f"--socket={munge}.socket", f"--key-file={munge}.key"),
            *(f"--pid-file={munge}.pid", f"--seed-file={munge}.seed", f"--log-file={munge}.log"),
            ready=lambda: cluster.succeeds("munge", f"--socket={munge}.socket", "--no-input"),
        )
        data = f"--datadir={folder}/database"
        cluster.run(
            *("mariadb-install-db", "--no-defaults", data, "--user=root", "--skip-test-db", "--skip-name-resolve"),
            "--auth-root-authentication-method=socket",
        )
        start(
            *(
                "mariadbd",
                "--no-defaults",
                data,
                "--user=root",
                "--skip-networking",
                f"--pid-file={folder}/mariadb.pid",
            ),
            *(f"--socket={folder}/mariadb.socket", "--innodb-flush-log-at-trx-commit=0"),
            ready=lambda: cluster.succeeds("mariadb-admin", "--no-defaults", "ping"),
        )
        start("slurmdbd", "-D", ready=lambda: cluster.succeeds("sacctmgr", "list", "cluster"))
        cluster.run("sacctmgr", "--immediate", "add", "cluster", "tests")
        start("slurmctld", "-D", "-c", ready=lambda: cluster.succeeds("sinfo"))
        stack.callback(end_jobs, cluster)
        for node in NODES:
            start("slurmd", "-D", "-N", node, ready=lambda: True)
        wait_until(lambda: cluster.run("sinfo", "--noheader", "--format=%T %D") == f"idle {len(NODES)}\n", folder)
        yield cluster


def write_configuration(folder: Path) -> None:
    ctld, dbd, *ports = free_ports(2 + len(NODES))
    nodes = "\n".join(
        NODE.format(name=name, host=HOST, port=port, cpus=cpus)
        for (name, cpus), port in zip(NODES.items(), ports, strict=True)
    )
    slurm = SLURM_CONF.format(array=LARGEST_ARRAY, folder=folder, host=HOST, ctld=ctld, dbd=dbd, nodes=nodes)
    (folder / "slurm.conf").write_text(slurm)
    for name, content in (
        ("slurmdbd.conf", SLURMDBD_CONF.format(folder=folder, dbd=dbd).encode()),
        ("munge.key", secrets.token_bytes(1024)),
    ):
        (folder / name).touch(mode=0o600)
        (folder / name).write_bytes(content)
    folder.chmod(0o711)  # munge asks that everybody can reach its socket
    for name in ("state", *(f"spool-{node}" for node in NODES)):
        (folder / name).mkdir()


def free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextmanager
def daemon(cluster: Cluster, command: Sequence[str], ready: Callable[[], object]) -> Iterator[None]:
    """A program that runs from when it is ready to the end of the block, or to the death of this process."""
    log = cluster.folder / f"{command[0]}.out"
    with log.open("ab") as output:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *command],
            env=cluster.environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=cluster.folder,
            start_new_session=True,  # Ctrl-C is for the tests, which then end it in its turn
        )
    try:
        wait_until(ready, cluster.folder, process)
        yield
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until(ready: Callable[[], object], folder: Path, process: subprocess.Popen[bytes] | None = None) -> None:
    deadline = time.monotonic() + PATIENCE
    while not ready():
        ended = process is not None and process.poll() is not None
        if ended or time.monotonic() > deadline:
            logs = {
                path.name: path.read_text(errors="replace")[-2000:]
                for path in (*folder.glob("*.log"), *folder.glob("*.out"))
            }
            raise RuntimeError(
                "\n".join(["the cluster is not as it should be; its logs:", *(f"== {n}\n{t}" for n, t in logs.items())])
            )
        time.sleep(0.05)


def end_jobs(cluster: Cluster) -> None:
    if jobs := cluster.jobs():
        cluster.call("scancel", *jobs)
        wait_until(lambda: not cluster.jobs(), cluster.folder)


def end_strays(folder: Path) -> None:
    """Kill what outlived its daemon: steps of jobs are processes of their own, and carry the folder's name."""
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            if f"SLURM_CONF={folder}/".encode() in (entry / "environ").read_bytes():
                os.kill(int(entry.name), signal.SIGKILL)
