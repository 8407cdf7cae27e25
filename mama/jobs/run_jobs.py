"""The jobs of a run that `mama VERB CONFIG --slurm` submitted: folders `jobs/<job id>/` that submitit has filled."""

from __future__ import annotations

import pickletools
import re
import socket
from dataclasses import dataclass
from pathlib import Path

from mama.jobs.causes import GOES_ON, cause_of
from mama.sweep.progress import last_lines
from mama.sweep.state import StepState
from slurm.profile import SlurmError
from slurm.queue import EndedJob, QueuedJob, ended, queue

# A module that the pickle of a job names -> the step.
MODULES = {
    b"shards.pack.pack": "pack",
    b"mama.train.loop": "train",
    b"mama.export.consolidate": "consolidate",
    b"mama.evaluate": "eval",
    b"mama.finetune": "eval",
}
NO_ACCOUNTING = "ended, cause unknown: its log does not say, and there is no accounting"
UNKNOWN = "unknown"  # the state of a job that only Slurm, or another machine, could tell
LOG_BYTES = 2**18  # of each log that is searched for a cause
_STARTED = re.compile(r"Starting with JobEnvironment\(.*?hostname=([^,]+),")
_STOPPED = re.compile(r"^mama\.errors\.StoppedError: (.+)", re.MULTILINE)


@dataclass(frozen=True)
class RunJob:
    """A job folder."""

    folder: Path

    @property
    def id(self) -> str:
        """The number of the job, "123_4" for a task of an array; of a local one that of its process."""
        return self.folder.name

    @property
    def log(self) -> Path:
        """The stderr of its first task."""
        return self.folder / f"{self.id}_0_log.err"

    @property
    def is_local(self) -> bool:
        """Whether it runs on one machine: it is no task of an array, and `sbatch` was given no script for it."""
        return "_" not in self.id and not (self.folder / f"{self.id}_submission.sh").exists()

    @property
    def step(self) -> str:
        """The step that it does; "job" if that is none of ours."""
        pickle = self.folder / f"{self.id}_submitted.pkl"
        content = pickle.read_bytes() if pickle.exists() else b""
        return next((step for module, step in MODULES.items() if module in content), "job")

    def result(self) -> str:
        """How its function ended: "success" or "error"; empty if it did not. Nothing is unpickled."""
        words = [_first_text(path) for path in sorted(self.folder.glob(f"{self.id}_*_result.pkl"))]
        return "error" if "error" in words else next(iter(words), "")

    def nodes(self) -> list[str]:
        """The first node of each of its starts."""
        return _STARTED.findall("\n".join(last_lines(self.log.with_suffix(".out"), LOG_BYTES)))


def run_jobs(run: Path) -> list[RunJob]:
    """The job folders of a run; submitit leaves others beside them."""
    return [RunJob(path) for path in (run / "jobs").glob("*") if re.fullmatch(r"\d+(_\d+)?", path.name)]


def run_states(run: Path) -> tuple[list[StepState], str]:
    """The jobs of a run in the order of submission, and a line that says so if Slurm does not answer.

    Of the jobs of a step that have ended only the newest is listed.
    """
    jobs = sorted(run_jobs(run), key=_submitted)
    on_slurm = [job for job in jobs if not job.is_local]
    try:
        queued = {each.id: each for each in queue()} if on_slurm else {}
        ends, problem = ended(job.id for job in on_slurm if job.id not in queued and not job.result()), ""
    except SlurmError as error:
        queued, ends, problem = {}, {}, f"{error}; this is what the disk says"
    states = [_state(job, queued.get(job.id), ends.get(job.id), problem) for job in jobs]
    newest = {state.step: state for state in states}
    return [each for each in states if each is newest[each.step] or each.state in ("queued", "running")], problem


def read_logs(log: Path, size: int = LOG_BYTES) -> dict[int, str]:
    """The end of the stderr of each task of a job, by task, in the order in which they were last written."""
    paths = sorted(log.parent.glob(log.name.replace("_0_log", "_*_log")), key=lambda path: path.stat().st_mtime)
    tasks = {path: re.search(r"_(\d+)_log\.err$", path.name) for path in paths}
    return {int(found[1]) if found else 0: "\n".join(last_lines(path, size)) for path, found in tasks.items()}


def _state(job: RunJob, queued: QueuedJob | None, end: EndedJob | None, problem: str) -> StepState:
    """The state of a job, given what Slurm says of it."""
    nodes = job.nodes()
    node = queued.node if queued and queued.node else end.node if end and end.node else (nodes or [""])[-1]

    def state(word: str, reason: str = "") -> StepState:
        return StepState(job.step, word, job.id, reason, node or None, len(nodes), job.log)

    if queued and queued.state == "PENDING":
        return state("queued", queued.reason)
    if (queued and queued.state != "COMPLETING") or (not queued and job.is_local and _is_alive(job)):
        return state("running")
    if job.result() == "success" or (end and end.state == "COMPLETED"):
        return state("done")
    logs = read_logs(job.log)
    if stopped := [match[1] for text in logs.values() for match in _STOPPED.finditer(text)]:
        return state("stopped", stopped[-1])
    cause = cause_of(logs, end.state if end else "")
    if cause in GOES_ON:
        return state("stopped", cause)
    if job.result() or end:
        return state("failed", cause or (f"Slurm: {end.state}, exit code {end.exit_code}" if end else "no message"))
    if problem or (job.is_local and node not in ("", socket.gethostname())):
        return state(UNKNOWN, cause or ("" if problem else f"its processes are on {node}"))
    return state("lost", cause or ("its process is gone" if job.is_local else NO_ACCOUNTING))


def _is_alive(job: RunJob) -> bool:
    """Whether the process that submitit started for a local job lives on this machine."""
    try:
        command = Path(f"/proc/{job.id}/cmdline").read_bytes()
    except OSError:
        return False
    return b"submitit" in command and f"{job.folder.parent.parent.name}/jobs/".encode() in command


def _submitted(job: RunJob) -> float:
    """When a job was put in the queue for the last time: submitit then writes its pickle."""
    pickle = job.folder / f"{job.id}_submitted.pkl"
    return (pickle if pickle.exists() else job.folder).stat().st_mtime


def _first_text(pickle: Path) -> str:
    """The first text in a pickle."""
    try:
        with pickle.open("rb") as file:
            return next((value for _, value, _ in pickletools.genops(file) if isinstance(value, str)), "")
    except (OSError, ValueError):
        return ""
