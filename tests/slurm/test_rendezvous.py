"""Tasks agree on a free port, whatever else listens on their node."""

from __future__ import annotations

import random
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

import slurm.rendezvous
from slurm.profile import SlurmError
from slurm.rendezvous import PORTS, agreed_port

LOCAL = "127.0.0.1"


@pytest.fixture(autouse=True)
def forget() -> None:
    agreed_port.cache_clear()


def places(step: str) -> list[int]:
    return random.Random(step).sample(range(20_000, 32_768), PORTS)


def agree(step: str, tasks: int) -> set[int]:
    with ThreadPoolExecutor(tasks) as pool:
        return set(pool.map(lambda rank: agreed_port(step, rank, tasks, LOCAL), range(tasks)))


def test_all_tasks_learn_the_same_free_port() -> None:
    (port,) = agree("11.0.0", 5)
    with socket.create_server((LOCAL, port)):
        pass


def test_an_occupied_port_is_passed_over() -> None:
    """By a program that answers something else, one that hangs up, and one that says nothing."""
    first, second, third, *_ = places("12.0.0")
    with (
        socket.create_server((LOCAL, first)) as talks,
        socket.create_server((LOCAL, second)) as hangs_up,
        socket.create_server((LOCAL, third)),
    ):

        def answer(server: socket.socket, text: bytes) -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    connection.sendall(text)

        for server, text in ((talks, b"HTTP/1.1 400 Bad Request\n"), (hangs_up, b"")):
            threading.Thread(target=answer, args=(server, text), daemon=True).start()
        assert len(agree("12.0.0", 2)) == 1
        for server in (talks, hangs_up):
            server.shutdown(socket.SHUT_RDWR)


def test_two_steps_at_the_same_places_do_not_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    class Same(random.Random):
        def __init__(self, step: str) -> None:
            super().__init__(1)

    monkeypatch.setattr(slurm.rendezvous.random, "Random", Same)
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda step: agree(step, 3), ("13.0.0", "14.0.0"))
    assert len(one) == len(other) == 1
    assert one != other


def test_a_task_that_was_told_too_late_asks_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Task 0 has told it, and goes on to its work."""
    answers = iter([""])
    ask = slurm.rendezvous._answer_at

    def lost(host: str, place: int, question: str) -> str:
        answer = ask(host, place, question)
        return next(answers, answer) if answer else ""

    monkeypatch.setattr(slurm.rendezvous, "_answer_at", lost)
    assert len(agree("17.0.0", 2)) == 1
    assert next(answers, None) is None


def test_the_port_is_none_that_outgoing_connections_take() -> None:
    first, last = map(int, slurm.rendezvous.EPHEMERAL.read_text().split())
    assert not first <= slurm.rendezvous._free_port() <= last


@pytest.mark.parametrize("rank", [0, 1])
def test_tasks_that_do_not_come_are_one_line(
    rank: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A task 0, or another, that waits alone says so, and ends."""
    monkeypatch.setattr(slurm.rendezvous, "PATIENCE", 1.5)
    monkeypatch.setattr(slurm.rendezvous, "FIRST_WORD", 0.1)
    message = "1 of the 2 tasks of this step did not start" if rank == 0 else "task 0 on 127.0.0.1 did not answer"
    with pytest.raises(SlurmError, match=message) as caught:
        agreed_port("15.0.0", rank, 2, LOCAL)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().err.count("mama: waiting for ") == 1


def test_a_node_without_an_address_is_one_line() -> None:
    with pytest.raises(SlurmError, match=r"gpu07\.invalid: the job's first node has no address on") as caught:
        agreed_port("16.0.0", 1, 2, "gpu07.invalid")
    assert "\n" not in str(caught.value)
