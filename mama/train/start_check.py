"""Before weights are loaded: can every node train, and do all ranks read the same files and run the same code?

The ranks tell what they find through the store of their rendezvous. A collective would wait for ever for a rank whose
device or network is broken; it is tried last. Rank 0 judges, so that all ranks say the same.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from mama.errors import ConfigError, TrainingError
from mama.runtime import preemption
from mama.runtime.collectives import node_name
from mama.settings.schema import Config
from mama.train.capacity import GIB
from mama.train.deepspeed_engine import join_ranks, load_deepspeed
from mama.train.estimate import parameter_count, shape_of
from mama.train.heartbeat import FOLDER, MEETING, Heartbeat
from mama.train.node_facts import Facts, facts_of
from shards.errors import one_line
from slurm.profile import SlurmError

log = logging.getLogger(__name__)

LIMIT = 60.0  # seconds for all ranks to find their facts
SHARE = 0.2  # of a GPU's memory, that may be free on one rank and not on another


class Verdict(NamedTuple):
    """Why the run cannot start, if so, and the node that is to blame: none for a mistake of the user's."""

    message: str = ""
    node: str = ""


def join(config: Config, heartbeat: Heartbeat) -> torch.device:
    """Wait for the other ranks, check every node, and join the process group; returns this rank's device.

    Raises as `meet` and `check_nodes` do, and `TrainingError` if a rank is lost on the way.
    """
    rank, ranks = heartbeat.rank, len(heartbeat.files)
    # The loader and the heartbeats, which know why a rank is late, report it before a collective times out.
    timeout = max(3 * config.train.timeout, 60 * config.train.patience + config.train.timeout)
    if ranks == 1:
        return join_ranks(timeout)
    load_deepspeed()  # takes a while, and the first all-reduce must not wait for it
    heartbeat.doing(MEETING)
    try:
        store = meet(timeout)
        check_nodes(config, store, rank, ranks, heartbeat.met)
        heartbeat.doing("in the first all-reduce", steady=True, patience=LIMIT)
        device = join_ranks(timeout)
        check_sum(store, rank, ranks, device)
    except dist.DistError as error:
        raise TrainingError(f"the ranks have lost each other before the first step: {one_line(error)}") from None
    return device


def meet(timeout: float) -> dist.Store:
    """Wait for the other ranks at MASTER_ADDR and MASTER_PORT. Raises `TrainingError` if they cannot meet there."""
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=timeout)))
    except dist.DistError as error:
        raise TrainingError(f"the ranks cannot meet at {address}: {one_line(error)}") from None
    return dist.PrefixStore(f"mama/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def check_nodes(config: Config, store: dist.Store, rank: int, ranks: int, met: Callable[[], None]) -> None:
    """Compare what the ranks find on their nodes; every rank must call it, and calls `met` when all are here.

    Raises the same error on all ranks: `TrainingError` with a bad node, after its job was requeued without it if it
    can be; `ConfigError` if the settings differ, or no node is to blame.
    """
    if rank == 0:
        nonce = config.run_folder / FOLDER / f"nonce-{uuid.uuid4().hex}"
        nonce.write_text(nonce.name)
        store.set("nonce", nonce.name)
    store.set(f"here/{rank}", node_name())
    nodes = [store.get(f"here/{number}").decode() for number in range(ranks)]
    met()
    facts = facts_of(config, store.get("nonce").decode())
    store.set(f"facts/{rank}", json.dumps(asdict(facts)))
    if rank == 0:
        found, late = _collected(store, ranks)
        nonce.unlink(missing_ok=True)
        judged = _late(late, nodes) if late else verdict([Facts.parsed(text) for text in found])
        store.set("verdict", json.dumps(judged if judged.message else _disk(config)))
    _act(Verdict(*json.loads(store.get("verdict"))), nodes, rank)


def check_sum(store: dist.Store, rank: int, ranks: int, device: torch.device) -> None:
    """Check the sum of a first all-reduce; the process group must be joined. Raises as `check_nodes` does."""
    pattern = torch.arange(2**18, dtype=torch.float32, device=device) % 251
    total = pattern * (rank % 7 + 1)
    dist.all_reduce(total)
    right = torch.equal(total, pattern * sum(number % 7 + 1 for number in range(ranks)))  # exact below 2**24
    store.set(f"sum/{rank}", json.dumps([node_name(), right]))
    found = [json.loads(store.get(f"sum/{number}")) for number in range(ranks)]
    nodes = [node for node, _ in found]
    if wrong := [number for number, (_, fine) in enumerate(found) if not fine]:
        bad = nodes[wrong[0]]
        message = f"rank {wrong[0]} on {bad}: an all-reduce gave a wrong sum; look at its device and network"
        if {nodes[number] for number in wrong} == set(nodes) != {bad}:
            raise TrainingError(f"{message}, and at those of all other nodes: they have it too")
        _act(Verdict(message, bad), nodes, rank)


def verdict(facts: list[Facts]) -> Verdict:
    """What the facts of all ranks, in their order, come to; the first thing that is wrong."""
    nodes = {each.node for each in facts}
    ill = {each.node for each in facts if each.problem}
    for rank, each in enumerate(facts):
        if each.problem:
            everywhere = len(nodes) > 1 and ill == nodes
            return Verdict(f"rank {rank} on {each.node}: {each.problem}", "" if everywhere else each.node)
    most = max(each.free for each in facts)
    for rank, each in enumerate(facts):
        if each.free < most - SHARE:
            return Verdict(
                f"rank {rank} on {each.node}: only {each.free:.0%} of its GPU's memory are free, elsewhere {most:.0%}; "
                "look for a process that was left there",
                each.node,
            )
    return _other_settings(facts) or _other_files(facts) or Verdict()


def _other_settings(facts: list[Facts]) -> Verdict | None:
    for rank, each in enumerate(facts):
        for key in (*facts[0].settings, *each.settings):
            here, there = each.settings.get(key, "nothing"), facts[0].settings.get(key, "nothing")
            if here != there:
                message = f"{key}: rank {rank} on {each.node} has {here}, rank 0 on {facts[0].node} {there}"
                return Verdict(f"{message}; start all ranks with the same settings")
    return None


def _other_files(facts: list[Facts]) -> Verdict | None:
    """The first difference in what the ranks see: right is what can be read, then what most nodes see, then rank 0."""
    for key in facts[0].sees:
        by_value: dict[tuple[str, bool], list[int]] = {}
        for rank, each in enumerate(facts):
            by_value.setdefault(each.sees[key], []).append(rank)
        if len(by_value) == 1:
            continue
        counts = {value: len({facts[rank].node for rank in ranks}) for value, ranks in by_value.items()}
        right = max(by_value, key=lambda value: (value[1], counts[value], 0 in by_value[value]))
        wrong, ranks = next((value, ranks) for value, ranks in by_value.items() if value != right)
        rank, like = ranks[0], by_value[right][0]
        message = (
            f"{key}: rank {rank} on {facts[rank].node} sees {wrong[0]}, rank {like} on {facts[like].node} {right[0]}; "
            "start all ranks with the same shards and the same code, on disks that all machines share"
        )
        nodes = {each.node for each in facts}
        alone = len(nodes) > 2 and counts[right] == 1  # nobody sees what one node has: it is no shared disk
        return Verdict(message, "" if alone or len(nodes) == 1 else facts[rank].node)
    return None


def _disk(config: Config) -> Verdict:
    """Does the next checkpoint fit on the disk of the run folder?"""
    try:
        need = 12 * parameter_count(shape_of(config), trainable=True)  # fp32 weights with Adam's two moments
    except ConfigError as error:
        return Verdict(str(error))
    free = shutil.disk_usage(config.run_folder).free
    if free >= need:
        return Verdict()
    return Verdict(
        f"runs: {config.run_folder} has {free / GIB:.1f} GiB free, and a checkpoint takes {need / GIB:.1f} GiB; free "
        "some, or name another runs=..."
    )


def _collected(store: dist.Store, ranks: int) -> tuple[list[str], list[int]]:
    """The facts that ranks have set within `LIMIT`, and the ranks that have not."""
    deadline, found, late = time.monotonic() + LIMIT, [], []
    for rank in range(ranks):
        try:
            store.wait([f"facts/{rank}"], timedelta(seconds=max(1.0, deadline - time.monotonic())))
            found.append(store.get(f"facts/{rank}").decode())
        except dist.DistStoreError:
            late.append(rank)
    return found, late


def _late(late: list[int], nodes: list[str]) -> Verdict:
    """The verdict on ranks that have not answered: a disk or a GPU hangs there."""
    bad = nodes[late[0]]
    everywhere = {nodes[rank] for rank in late} >= set(nodes) - {nodes[0]} and len(set(nodes)) > 2
    message = f"rank {late[0]} on {bad}: has not looked at its device, run folder and shards within {LIMIT:.0f} s"
    return Verdict(message, "" if everywhere else bad)


def _act(found: Verdict, nodes: list[str], rank: int) -> None:
    """Raise what the verdict asks for; let the job leave the bad node, once, if it is a job."""
    if not found.message:
        return
    if not found.node:
        raise ConfigError(found.message)
    calls = next((number for number, node in enumerate(nodes) if node != found.node), 0)
    if rank != calls and os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
        time.sleep(LIMIT)  # Slurm ends this process meanwhile; its own end would end the other, before it has called
    elif rank == calls and _leave(found.node):
        log.warning("%s; back in the queue, without node %s", found.message, found.node)
        raise SystemExit(preemption.EXIT_CODE)
    raise TrainingError(found.message)


def _leave(node: str) -> bool:
    """Put the job back in the queue without `node`; False if it has left a node before, is none, or Slurm refuses."""
    from slurm.rank_environment import exclude_node_and_requeue  # submitit is slow to import

    try:
        return exclude_node_and_requeue(node)
    except SlurmError as error:
        log.warning("%s", error)
        return False
