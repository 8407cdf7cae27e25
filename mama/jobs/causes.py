"""Why a job failed, in one line, from its logs and from what Slurm says of it.

A rank that fails takes the others down, and they complain louder: so the errors of a rank whose partner is gone count
only where no log has another, and of several the one that `srun` names first.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from slurm.queue import TAKEN_AWAY

LONGEST = 300  # characters of a cause
KILLED = "killed (SIGKILL), most often for want of memory"
REQUEUED = "it was requeued, and did not come back"
GOES_ON = (*TAKEN_AWAY.values(), REQUEUED)  # causes after which the same work, submitted again, goes on
# A state of Slurm that is a cause by itself; in the others (FAILED, ...) the logs know more.
ENDS = {
    **TAKEN_AWAY,
    "DEADLINE": "deadline of the job",
    "OUT_OF_MEMORY": "out of memory on the node; raise mem_gb",
}
# What slurmstepd writes behind DUE TO when Slurm ends a job.
DUE_TO = {
    "TIME LIMIT": TAKEN_AWAY["TIMEOUT"],
    "PREEMPTION": TAKEN_AWAY["PREEMPTED"],
    "NODE FAILURE": TAKEN_AWAY["NODE_FAIL"],
    "JOB REQUEUE": REQUEUED,
}
_ENDED = re.compile(
    r"^slurmstepd\S*: (?:error: )?\*\*\* JOB .*?CANCELLED AT \S+(?: DUE TO (?P<due>[A-Z]+(?: [A-Z]+)?))?", re.MULTILINE
)
# After these lines the same log goes on with the next start of the job.
_NEXT_START = re.compile(
    r"^slurmstepd\S*: (?:error: )?\*\*\* .*DUE TO (?:JOB REQUEUE|PREEMPTION|NODE FAILURE).*$"
    r"|^submitit WARNING .*Caught signal SIG\w+ on .*$",
    re.MULTILINE,
)
_RANK_PREFIX = re.compile(r"^(?:\[rank\d+\]: ?)", re.MULTILINE)  # torch's, of each line of a traceback
_FIRST_TASKS = re.compile(r"^srun: error: \S+: tasks? (?P<tasks>[\d,-]+): ", re.MULTILINE)
_OWN = re.compile(
    r"^(?:mama\.errors|shards\.errors|slurm\.profile)\.(?!RankError)(?P<kind>\w+): (?P<text>.+)$|^mama: (?P<said>.+)$",
    re.MULTILINE,
)
_OF_RANK = re.compile(r"RankError: (?P<text>rank \d+ failed: .+)$|^mama: (?P<said>rank \d+ failed: .+)$", re.MULTILINE)
_EXCEPTION = re.compile(r"^(?P<text>(?:\w+\.)*\w*(?:Error|Exception|Interrupt|Exit)(?:: .*)?)$", re.MULTILINE)
_AFTER_ANOTHER = re.compile(
    r"waited too long for each other|given no sign of life|has taken over|KeyboardInterrupt|SystemExit"
)
IN_USE = r"port \1 is in use on the first node"
_AN_ERROR = r"^(?:(?:[\w.]*(?:Error|Exception)|slurmstepd\S*|srun|\S*bash|\S*slurm_script)\b.*?)"

# (what a log says, the cause). The first that matches counts: what is certain stands before what only follows from it.
PATTERNS = [
    (r"^srun: error: (\S+): tasks? ([\d,-]+): Out Of Memory", r"out of memory on \1 (rank \2); raise mem_gb"),
    (r"^slurmstepd\S*: error: Detected \d+ oom[-_]kill event", "out of memory on the node; raise mem_gb"),
    (r"(?:CUDA|HIP) out of memory\.? (Tried to allocate [\d.]+ \w+)", r"out of memory on the GPU: \1"),
    (r"(?:CUDA error|Cuda failure).{,12}out of memory|CUBLAS_STATUS_ALLOC_FAILED", "out of memory on the GPU"),
    (r"is killed by signal: Bus error|insufficient shared memory \(shm\)", "out of shared memory (/dev/shm)"),
    (r"DataLoader worker \(pid\S* [\d, ]+\) is killed by signal: Killed", f"a loader process was {KILLED}"),
    (r"^(?:[\w.]*MemoryError\b.*|.*DefaultCPUAllocator: (?:can't allocate|not enough) memory.*)$",
     r"out of memory: \g<0>"),
    (rf"{_AN_ERROR}(?:\[Errno 12\] )?Cannot allocate memory", "out of memory on the node; raise mem_gb"),
    (r"Xid \(PCI:[\w:.]+\): (\d+)(?:, (?:pid=\S+ )?(?:name=\S+ )?([^\n]*))?", r"GPU error: Xid \1, \2"),
    (r"CUDA error: (?!driver shutting down)([^\n]+)|Cuda failure (?:\d+ )?'([^']+)'", r"GPU error: \1\2"),
    (r"(No CUDA GPUs are available|Found no NVIDIA driver on your system|The NVIDIA driver on your system is too old)",
     r"GPU error: \1"),
    (rf"{_AN_ERROR}(?:No space left on device|StorageFull|PytorchStreamWriter failed writing file).*",
     r"disk full: \g<0>"),
    (rf"{_AN_ERROR}Disk quota exceeded.*", r"disk full: \g<0>"),
    (r"failed to listen on any local network address\. port: (\d+).*EADDRINUSE", IN_USE),
    (r"failed to listen on any local network address\..*?:(\d+) \(errno: 98", IN_USE),
    (rf"{_AN_ERROR}\[Errno 98\] Address already in use", "a port is in use"),
    (r"^(?:ModuleNotFoundError|ImportError): (.+)$", r"environment: \1"),
    (r"^slurmstepd\S*: error: execve\(\): (.+)$", r"environment: \1"),
    (r"^\S+: line \d+: (\S+: command not found)$", r"environment: \1"),
    (r"^EnvironmentNameNotFound: (.+)$", r"environment: \1"),
    (r"error while loading shared libraries: (.+)$", r"environment: \1"),
    (r"NCCL error(?: in)?: (?:[^,\n]+, )?(?!remote)([^,(\n]+?)(?: \(run with[^)]*\))?, NCCL version [\d.]+\n"
     r"(?!ncclRemoteError)(nccl\w+):[^\n]*(?:\nLast error: *\n([^\n]+))?", r"NCCL: \1 (\2) \3"),
    (r"^srun: error: (\S+): tasks? ([\d,-]+): Killed", rf"rank \2 on \1 was {KILLED}"),
    (r"^srun: error: (\S+): tasks? ([\d,-]+): (Segmentation fault|Bus error|Aborted|Illegal instruction)",
     r"rank \2 on \1 crashed: \3"),
    (r"rank (\d+) failed: Signal 9 \(SIGKILL\)", rf"rank \1 was {KILLED}"),
    (r"rank (\d+) failed: Signal \d+ \((SIG\w+)\)", r"rank \1 was ended by \2"),
    (r"^\S*slurm_script: line \d+: +\d+ Killed|^Killed$", KILLED),
    (r"^Fatal Python error: (.+)$", r"crashed: \1"),
]  # fmt: skip
# The same, of a rank that only lost its partner.
AFTER_ANOTHER = [
    (r"\nncclRemoteError:[^\n]*(?:\nLast error: *\n([^\n]+))?", r"NCCL: the connection to another rank broke: \1"),
    (r"\[Rank (\d+)\] Watchdog caught collective operation timeout: WorkNCCL\(SeqNum=(\d+), OpType=(\w+),.*"
     r"ran for (\d+)\d{3} milliseconds", r"NCCL: rank \1 waited \4 s in \3 number \2 for another rank"),
    (r"gloo/transport/\S+\] (.+)$", r"gloo: \1"),
    (r"DistStoreError: (.+)$", r"the ranks did not find each other: \1"),
    (r"DistNetworkError: (.+)$", r"the ranks did not find each other: \1"),
]  # fmt: skip


@dataclass(frozen=True)
class _Found:
    rank: int
    cause: str
    follows: bool  # from the failure of another rank


def cause_of(logs: Mapping[int, str], state: str = "") -> str:
    """Why a job failed, in one line; empty if neither its logs nor Slurm say.

    `logs`: rank -> the last part of its stderr, in the order in which they were last written. `state`: how the job
    ended by Slurm's accounting, such as TIMEOUT or FAILED; empty where that is unknown.
    """
    if state in ENDS:
        return ENDS[state]
    plain = {rank: _RANK_PREFIX.sub("", text) for rank, text in logs.items()}
    latest = {rank: text[_latest_start(text) :] for rank, text in plain.items()}
    if ended := _ended_by_slurm(latest):
        return ended
    first = {task for text in latest.values() for task in _first_tasks(text)}
    found = [each for rank, text in latest.items() if (each := _in_log(rank, text))]
    found.sort(key=lambda each: (each.follows, each.rank not in first))  # stable: of equals the earliest log
    if not found:
        return _ended_by_slurm(plain)
    named = len(logs) > 1 and not re.search(r"\brank \d", found[0].cause)
    return _short(f"rank {found[0].rank}: {found[0].cause}" if named else found[0].cause)


def _latest_start(text: str) -> int:
    """Where the text of the latest start of a job begins, in a log to which every start adds."""
    return max((match.end() for match in _NEXT_START.finditer(text)), default=0)


def _ended_by_slurm(logs: Mapping[int, str]) -> str:
    """How Slurm ended the job, by the last line in which slurmstepd says so; empty if it ended by itself."""
    ends = [match["due"] for text in logs.values() for match in _ENDED.finditer(text)]
    return DUE_TO.get(ends[-1], TAKEN_AWAY["CANCELLED"]) if ends else ""


def _first_tasks(text: str) -> Iterator[int]:
    """The tasks that `srun` saw ending with an error before all others."""
    match = _FIRST_TASKS.search(text)
    for part in match["tasks"].split(",") if match else []:
        low, _, high = part.partition("-")
        yield from range(int(low), int(high or low) + 1)


def _in_log(rank: int, text: str) -> _Found | None:
    """What the log of one rank says."""
    own = [match for match in _OWN.finditer(text) if not _OF_RANK.match(match[0])]
    said = [match["text"] or match["said"] for match in own]
    if said and not _AFTER_ANOTHER.search(said[-1]):
        return _Found(rank, f"data: {said[-1]}" if own[-1][0].startswith("shards.") else said[-1], follows=False)
    for patterns, follows in ((PATTERNS, False), (AFTER_ANOTHER, True)):
        for pattern, cause in patterns:
            if match := re.search(pattern, text, re.MULTILINE):
                return _Found(rank, match.expand(cause), follows)
    of_rank = [match["text"] or match["said"] for match in _OF_RANK.finditer(text)]
    other = of_rank or said or [match["text"] for match in _EXCEPTION.finditer(text)]
    return _Found(rank, other[-1], bool(_AFTER_ANOTHER.search(other[-1]))) if other else None


def _short(cause: str) -> str:
    """In one line without control characters, of at most `LONGEST` characters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in cause).split())
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 1]}…"
