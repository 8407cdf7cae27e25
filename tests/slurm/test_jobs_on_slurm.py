"""Jobs, arrays and ranks on a real Slurm: what it answers, and what a job inherits; see `slurm_cluster`."""

from __future__ import annotations

import json
import os
import pty
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import submitit

from mama.cli.options import tell_if_it_never_starts
from slurm.profile import Profile, SlurmError
from slurm.queue import cancel, ended, limits, queue, release, waits_for_ever
from slurm.rendezvous import PORTS
from slurm.snapshot import snapshot
from slurm.submit import Request, submit, submit_calls
from tests.support.checkout import CHECKOUT
from tests.support.jobs import result_of, wait_for
from tests.support.slurm_cluster import LARGEST_ARRAY, NODES

if TYPE_CHECKING:
    from tests.support.slurm_cluster import Cluster

pytestmark = pytest.mark.ranks

pytest_plugins = ("tests.support.slurm_cluster",)
CPU = Profile(cluster="slurm", partition="cpu")


def start_again_soon(cluster: Cluster, job: str) -> None:
    """Wait until a job is back in the queue, and spare it the two minutes that it would wait."""
    wait_for(lambda: [each for each in queue() if each.id == job and each.state == "PENDING" and each.restarts])
    cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now+2")


def test_an_array_of_jobs_of_several_ranks_is_held_released_and_requeued(
    slurm_cluster: Cluster, tmp_path: Path
) -> None:
    def ranks(number: int, folder: str) -> tuple[int, str | None, str, str]:
        import mama
        import slurm.rank_environment as ranks

        ranks.export_distributed_environment()
        start = Path(folder, f"{number}.{os.environ['RANK']}.{os.environ.get('SLURM_RESTART_COUNT', '0')}")
        start.touch()
        if number == 1 and start.name.endswith(".0"):
            time.sleep(60)
        return number, os.environ.get("OF_SETUP"), os.environ["RANK"], str(mama.__file__)

    code = snapshot(tmp_path / "code")
    profile = replace(CPU, tasks_per_node=2, setup=["export OF_SETUP='from the setup'"])
    calls = [(ranks, (number, str(tmp_path))) for number in range(2)]
    jobs = submit_calls(
        calls,
        Request(profile=profile, folder=tmp_path, name="two words", comment="a|b", at_once=1, hold=True, code=code),
    )
    number = jobs[0].job_id.partition("_")[0]
    found = wait_for(lambda: [job for job in queue() if job.reason])
    assert {(j.id, j.state, j.reason, j.node, j.name, j.comment, j.restarts) for j in found} == {
        (f"{number}_{index}", "PENDING", "JobHeldUser", "", "two words", "a|b", 0) for index in range(2)
    }
    assert waits_for_ever(number) is None
    release([number])
    release([number])
    wait_for(lambda: (tmp_path / "1.0.0").exists() and (tmp_path / "1.1.0").exists())
    assert [job.id for job in queue()] == [f"{number}_1"], "one at a time"
    release([number, "99999"])
    slurm_cluster.run("scancel", "--signal=USR2", f"{number}_1")
    start_again_soon(slurm_cluster, f"{number}_1")
    assert [(job.restarts, job.id) for job in queue()] == [(1, f"{number}_1")]
    mine = str(code / "mama" / "__init__.py")
    result_of(jobs[1])
    for index, job in enumerate(jobs):
        assert job.results() == [(index, "from the setup", rank, mine) for rank in "01"]
    wait_for(lambda: not queue())
    done = wait_for(lambda: len(found := ended([job.job_id for job in jobs])) == 2 and found)
    assert {job.id: (job.state, job.exit_code) for job in done.values()} == {
        f"{number}_{index}": ("COMPLETED", 0) for index in range(2)
    }


def test_a_submitter_killed_before_the_release_leaves_nothing_that_runs(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """And what never ran is in the accounting by its array alone."""
    jobs = submit_calls([(print, ())] * 3, Request(profile=CPU, folder=tmp_path, hold=True))
    ids = [job.job_id for job in jobs]
    time.sleep(2)
    assert {job.id: job.reason for job in queue()} == dict.fromkeys(ids, "JobHeldUser")
    cancel([ids[1]])
    cancel([ids[1], "99999"])
    assert [job.id for job in queue()] == [ids[0], ids[2]]
    cancel([ids[0].partition("_")[0]])
    wait_for(lambda: not queue())
    found = wait_for(lambda: len(found := ended(ids)) == 3 and found)
    assert {(job.id, job.state, job.node) for job in found.values()} == {(each, "CANCELLED", "") for each in ids}
    assert ended(["99999", "99999_1"]) == {}


def test_a_job_whose_dependency_fails_leaves_the_queue(slurm_cluster: Cluster, tmp_path: Path) -> None:
    (first,) = submit_calls([(sys.exit, (3,))], Request(profile=CPU, folder=tmp_path, hold=True))
    number = first.job_id.partition("_")[0]
    (after,) = submit_calls([(print, ())], Request(profile=CPU, folder=tmp_path, dependency=f"aftercorr:{number}"))
    release([number])
    wait_for(lambda: not queue())
    states = wait_for(lambda: len(found := ended([first.job_id, after.job_id])) == 2 and found)
    assert {job: states[job].state for job in states} == {first.job_id: "FAILED", after.job_id: "CANCELLED"}
    assert states[first.job_id].exit_code != 0


def test_a_cluster_says_its_limits_and_what_it_will_never_start(
    slurm_cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (limits().array_size, limits().jobs) == (LARGEST_ARRAY, None)
    job = submit(print, profile=replace(CPU, nodes=3), folder=tmp_path)
    why = waits_for_ever(job.job_id)
    assert why is not None
    assert "more nodes than the partition gives" in why
    tell_if_it_never_starts(job.job_id, "my_cluster.yaml")
    (line,) = capsys.readouterr().err.splitlines()
    assert f"job {job.job_id} will wait for ever: more nodes" in line
    assert f"`scancel {job.job_id}`, change the profile my_cluster.yaml" in line
    cancel([job.job_id])


def test_a_slurm_that_does_not_answer_is_one_line(slurm_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """No controller listens there."""
    text = Path(os.environ["SLURM_CONF"]).read_text()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    other = slurm_cluster.folder / "nobody.conf"
    other.write_text(re.sub(r"SlurmctldPort=\d+", f"SlurmctldPort={port}", text) + "MessageTimeout=2\n")
    monkeypatch.setenv("SLURM_CONF", str(other))
    with pytest.raises(SlurmError, match=r"Slurm does not answer: .*Unable to contact slurm controller") as caught:
        queue()
    assert "\n" not in str(caught.value)


def test_a_job_submitted_from_within_a_job_inherits_nothing_of_it(slurm_cluster: Cluster, tmp_path: Path) -> None:
    def environment() -> dict[str, str]:
        return dict(os.environ)

    def submit_from_here(folder: str) -> str:
        os.environ["MASTER_PORT"] = "1"
        return submit(environment, profile=CPU, folder=folder, name="inner").job_id

    (array,) = submit_calls([(submit_from_here, (str(tmp_path / "a"),))], Request(profile=CPU, folder=tmp_path))
    step = replace(CPU, tasks_per_node=2)
    ranks = submit(submit_from_here, str(tmp_path / "b"), profile=step, folder=tmp_path)
    numbers = [(tmp_path / "a", result_of(array)), *((tmp_path / "b", number) for number in ranks.results())]
    for folder, number in numbers:
        job: Any = submitit.SlurmJob(folder=folder / "jobs" / "%j", job_id=number)
        inner = result_of(job)
        assert inner["SLURM_JOB_ID"] == number
        assert inner["SLURM_CONF"] == os.environ["SLURM_CONF"]
        assert inner["SLURM_NTASKS"] == "1"
        inherited = {"SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "RANK", "MASTER_PORT"}
        assert inherited & set(inner) == set()


def test_a_job_to_which_sbatch_exports_nothing_runs(slurm_cluster: Cluster, tmp_path: Path) -> None:
    """As on clusters that set SBATCH_EXPORT=NONE: srun would not export what the script sets either."""
    with_path = replace(CPU, additional={"export": "NONE"}, setup=[f"export PATH={os.environ['PATH']}"])
    assert result_of(submit(max, 3, 4, profile=with_path, folder=tmp_path)) == 4


def test_a_job_submitted_in_a_step_of_srun_runs(slurm_cluster: Cluster, tmp_path: Path) -> None:
    program = (
        "from slurm.profile import Profile; from slurm.submit import Request, submit; "
        f"print(submit(max, 3, 4, profile=Profile(cluster='slurm', partition='cpu'), folder={str(tmp_path)!r}).job_id)"
    )
    command = ["srun", "-n", "1", sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True, cwd=CHECKOUT)
    job: Any = submitit.SlurmJob(folder=tmp_path / "jobs" / "%j", job_id=done.stdout.strip())
    assert result_of(job) == 4


RANKS = """
import json, os, torch, torch.distributed as dist
from slurm.rank_environment import export_distributed_environment
assert export_distributed_environment()
dist.init_process_group("gloo")
value = torch.tensor(10.0 + dist.get_rank())
dist.all_reduce(value)
dist.destroy_process_group()
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURMD_NODENAME")
print(json.dumps([value.item(), *(os.environ[name] for name in names)]))
"""


def test_nodes_with_uneven_tasks_meet_at_a_port_though_the_first_places_are_occupied(slurm_cluster: Cluster) -> None:
    """The next job of this cluster, and its first step: what else the ports would be a function of is known."""
    last = int(slurm_cluster.run("sbatch", "--parsable", "--hold", "--wrap", "true"))
    cancel([str(last)])
    places = random.Random(f"{last + 1}.0.0").sample(range(20_000, 32_768), PORTS)
    servers = [socket.create_server(("", place)) for place in places[:2]]
    command = ["srun", "--nodes=2", "--ntasks=3", sys.executable, "-c", RANKS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=CHECKOUT)
    for server in servers:
        server.close()
    assert done.returncode == 0, done.stderr
    first, second = sorted(NODES)
    assert sorted(json.loads(line) for line in done.stdout.splitlines()) == [
        [33.0, "0", "3", "0", "2", first],
        [33.0, "1", "3", "1", "2", first],
        [33.0, "2", "3", "0", "1", second],
    ]


def test_what_is_typed_in_a_step_is_no_rank_and_what_that_shell_starts_by_srun_is(
    slurm_cluster: Cluster, tmp_path: Path
) -> None:
    (tmp_path / "typed.py").write_text(
        "import os; from slurm.rank_environment import export_distributed_environment as export\n"
        "print('RANKS', export(), os.environ.get('RANK'))\n"
    )
    python = f"{sys.executable} {tmp_path}/typed.py"
    typed = f"{python}\nsrun --overlap -n 2 {python} < /dev/null\nexit\n"
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(CHECKOUT)
        os.execvp("srun", ["srun", "--nodes=1", "--ntasks=2", "--pty", "bash", "--norc", "-i"])
    os.write(terminal, typed.encode())
    guard = threading.Timer(60, os.kill, (child, signal.SIGKILL))
    guard.start()
    shown = b""
    while True:
        try:
            shown += os.read(terminal, 4096)
        except OSError:  # the shell has ended
            break
    os.waitpid(child, 0)
    guard.cancel()
    found = sorted(re.findall(r"RANKS (\w+ \w+)", shown.decode()))
    assert found == ["False None", "True 0", "True 1"], shown.decode()


def test_a_job_excludes_a_node_once_and_starts_on_another(slurm_cluster: Cluster, tmp_path: Path) -> None:
    def exclude() -> tuple[str, bool]:
        import slurm.rank_environment as ranks

        node = os.environ["SLURMD_NODENAME"]
        again = ranks.exclude_node_and_requeue(node)
        if again:
            time.sleep(60)
        return node, again

    jobs = submit_calls([(exclude, ())], Request(profile=CPU, folder=tmp_path))
    first = wait_for(lambda: [job.node for job in queue() if job.state == "RUNNING"])[0]
    start_again_soon(slurm_cluster, jobs[0].job_id)
    (other,) = set(NODES) - {first}
    assert result_of(jobs[0]) == (other, False)


def test_a_job_that_has_saved_puts_itself_back_in_the_queue(slurm_cluster: Cluster, tmp_path: Path) -> None:
    def requeue_once(folder: str) -> str:
        import slurm.rank_environment as ranks

        if "SLURM_RESTART_COUNT" not in os.environ:
            Path(folder, ranks.job_state()).touch()
            if os.environ["SLURM_PROCID"] == "0":
                ranks.requeue()
            time.sleep(60)
        return os.environ["SLURM_RESTART_COUNT"]

    job = submit(requeue_once, str(tmp_path), profile=replace(CPU, tasks_per_node=2), folder=tmp_path)
    start_again_soon(slurm_cluster, job.job_id)
    assert (tmp_path / "running").exists()
    result_of(job)
    assert job.results() == ["1", "1"]


def test_a_task_of_an_array_that_puts_itself_back_leaves_the_others_alone(
    slurm_cluster: Cluster, tmp_path: Path
) -> None:
    """The last task to start has the number of the whole array, and the first has ended by then."""

    def last_requeues_itself(number: int, folder: str) -> str:
        import slurm.rank_environment as ranks

        restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
        Path(folder, f"start-{number}-{restarts}-{os.environ['SLURM_JOB_ID']}").touch()
        if number == 1 and restarts == "0":
            while ranks._described()["JobState"] != "RUNNING" or not Path(folder, "go").exists():
                time.sleep(0.1)
            ranks.requeue()
            time.sleep(60)
        return restarts

    calls = [(last_requeues_itself, (number, str(tmp_path))) for number in range(2)]
    first, last = submit_calls(calls, Request(profile=CPU, folder=tmp_path, at_once=1))
    number = first.job_id.partition("_")[0]
    wait_for(lambda: (tmp_path / f"start-1-0-{number}").exists())
    result_of(first)
    wait_for(lambda: [job.id for job in queue()] == [last.job_id])
    (tmp_path / "go").touch()
    start_again_soon(slurm_cluster, last.job_id)
    assert [job.id for job in queue()] == [last.job_id]
    assert result_of(last) == "1"
    assert len(list(tmp_path.glob("start-0-*"))) == 1
