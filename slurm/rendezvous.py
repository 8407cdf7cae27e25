"""How the tasks of a job agree on a port that is free on the node of the first one, without a shared folder.

torch.distributed wants one port that every task knows before the first message. A function of the job's number may
name an occupied one, and names it again when the job is put back in the queue. So task 0 picks a port that is free,
and tells the others on one of a few ports that all can compute.
"""

from __future__ import annotations

import random
import socket
import sys
import threading
import time
from functools import cache
from pathlib import Path

from slurm.profile import SlurmError

PATIENCE = 1800.0  # seconds in which all tasks must have started, some after the image of a container has arrived
FIRST_WORD = 60.0  # seconds after which a task that waits says so
ANSWER = 2.0  # seconds for a connection and for an answer
LONGER = 60.0  # seconds for which task 0 answers after it has told all
PORTS = 8  # ports on which task 0 may answer: as many programs would have to occupy them all
EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")  # ports that the kernel gives to outgoing connections


@cache
def agreed_port(step: str, rank: int, tasks: int, host: str) -> int:
    """The port, free a moment ago on the node `host` of task 0, on which the `tasks` tasks of `step` will meet.

    Every task calls it, and returns when it knows the port; task 0 when all of them do. step: names this start of
    this step among all steps of the cluster.

    Raises `SlurmError` if a task does not appear within half an hour, or the nodes cannot reach `host`.
    """
    places = random.Random(step).sample(range(20_000, 32_768), PORTS)
    return _tell(step, tasks, places) if rank == 0 else _ask(step, rank, host, places)


def _tell(step: str, tasks: int, places: list[int]) -> int:
    """Pick a port and tell it to each of the other tasks."""
    port = _free_port()
    deadline = time.monotonic() + PATIENCE
    told: set[str] = set()
    server = _listen(places)
    waiting = _Waiting()
    while len(told) < tasks - 1:
        missing = f"{tasks - 1 - len(told)} of the {tasks} tasks of this step"
        if time.monotonic() > deadline:
            server.close()
            raise SlurmError(f"SLURM_STEP_NUM_TASKS: {missing} did not start within {PATIENCE / 60:.0f} minutes")
        waiting.say(f"waiting for {missing} to start")
        if rank := _tell_one(server, step, port):
            told.add(rank)
    threading.Thread(target=_tell_again, args=(server, step, port), daemon=True).start()
    return port


def _tell_one(server: socket.socket, step: str, port: int) -> str:
    """Answer the next task that asks, and return its rank; "" if nobody calls for a second, or hangs up."""
    server.settimeout(1)
    try:
        connection, _ = server.accept()
        with connection:
            connection.settimeout(ANSWER)
            asked, _, rank = _line(connection).partition(" ")
            if asked == step:
                connection.sendall(f"{step} {port}\n".encode())
                return rank
    except OSError:  # that task will call again
        pass
    return ""


def _tell_again(server: socket.socket, step: str, port: int) -> None:
    """Answer for a while longer: a task whose patience ended before its answer came counts as told, and asks again."""
    deadline = time.monotonic() + LONGER
    with server:
        while time.monotonic() < deadline:
            _tell_one(server, step, port)


def _ask(step: str, rank: int, host: str, places: list[int]) -> int:
    """Ask at every place until task 0 answers; other programs may listen there."""
    deadline = time.monotonic() + PATIENCE
    waiting = _Waiting()
    while True:
        for place in places:
            answered, _, port = _answer_at(host, place, f"{step} {rank}").partition(" ")
            if answered == step:
                return int(port)
        if time.monotonic() > deadline:
            raise SlurmError(f"task 0 on {host} did not answer within {PATIENCE / 60:.0f} minutes")
        waiting.say(f"waiting for task 0 on {host}")
        time.sleep(0.2)


def _answer_at(host: str, place: int, question: str) -> str:
    """What is answered there; "" if nobody listens. Raises `SlurmError` if the host has no address."""
    try:
        with socket.create_connection((host, place), timeout=ANSWER) as connection:
            connection.sendall(f"{question}\n".encode())
            return _line(connection)
    except socket.gaierror as error:
        raise SlurmError(f"{host}: the job's first node has no address on {socket.gethostname()} ({error})") from error
    except OSError:
        return ""


def _line(connection: socket.socket) -> str:
    """The line that is sent there; "" if it does not end."""
    with connection.makefile(errors="replace") as stream:
        line = stream.readline(200)
    return line.strip() if line.endswith("\n") else ""


def _listen(places: list[int]) -> socket.socket:
    """Listen at the first of the ports that is free. Raises `SlurmError` if none is."""
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    for place in places:
        try:
            return socket.create_server(("", place), family=family, dualstack_ipv6=dual, backlog=1024)
        except OSError:
            continue
    raise SlurmError(f"ports {places} are all occupied on {socket.gethostname()}; start the job again")


def _free_port() -> int:
    """A port that is free, if possible one that no outgoing connection can take before it is used."""
    try:
        first, last = map(int, EPHEMERAL.read_text().split())
    except OSError:
        first, last = 32_768, 60_999
    others = [port for port in range(10_000, 65_536) if not first <= port <= last]
    with _listen([*random.SystemRandom().sample(others, min(100, len(others))), 0]) as server:
        return int(server.getsockname()[1])


class _Waiting:
    """Says once that this task waits, after a while."""

    def __init__(self) -> None:
        self.until = time.monotonic() + FIRST_WORD

    def say(self, text: str) -> None:
        if time.monotonic() > self.until:
            self.until = float("inf")
            print(f"mama: {text}", file=sys.stderr, flush=True)
