"""What a sweep would do, for `--dry-run`, and what it has done."""

from __future__ import annotations

from collections.abc import Iterator

from mama.settings.values import with_settings
from mama.sweep.local import ELSEWHERE, NOT_BEGUN, STOPPED
from mama.sweep.plan import Plan, plan
from mama.sweep.points_table import describe_points
from mama.sweep.resources import cluster_of, profile_of
from mama.sweep.state import states
from mama.sweep.submission import scripts
from mama.sweep.sweep import Evaluation, Point, Sweep


def dry_run(sweep: Sweep, retry: bool) -> Iterator[str]:
    """Lines on every point, every batch script, the number of jobs and the GPU-hours; nothing is submitted or written.

    Raises what `plan` raises.
    """
    yield from describe_points(sweep)
    yield from dict.fromkeys(_measured(point, one) for point in sweep.points for one in sweep.evaluations)
    yield ""
    if cluster_of(sweep) == "local":
        yield from _steps_here(sweep)
        return
    planned = plan(sweep, retry)
    for title, script in scripts(sweep, planned):
        yield f"--- {title}"
        yield script
    jobs = sum(len(chain.units) * len(chain.steps) for chain in planned.chains)
    arrays = sum(len(chain.steps) for chain in planned.chains)
    hours = _gpu_hours(sweep, planned)
    asked = "GPU-hours unknown (additional)" if hours is None else f"at most {hours:.1f} GPU-hours"
    yield f"{jobs} jobs in {arrays} arrays, {asked}; nothing was submitted"
    yield from _not_submitted(planned)


def _measured(point: Point, evaluation: Evaluation) -> str:
    """What an evaluation measures: tasks, protocols, fractions of the labels, fine-tunings."""
    own = with_settings(point.config, evaluation.settings).eval
    shares = ", ".join(f"{100 * fraction:g}" for fraction in own.fractions)
    draws = sum(1 if fraction == 1 else own.draws for fraction in own.fractions)
    text = f"{evaluation.name}: {', '.join(own.tasks)} by {', '.join(own.protocols)}, with {shares} % of the labels"
    if "finetune" in own.protocols:
        text += f"; {len(own.tasks) * draws} fine-tunings a point"
    return text + ("; the paper's protocol" if own.protocol == "paper" else "")


def _steps_here(sweep: Sweep) -> Iterator[str]:
    for name, line in states(sweep).items():
        yield f"{name}: {', '.join(state.step for state in line if state.state != 'done') or 'done'}"
    yield f"on this machine, {sweep.at_once or 1} at a time; nothing was run"


def _not_submitted(planned: Plan) -> Iterator[str]:
    for name, why in planned.broken.items():
        yield f"{name}: {why}; --retry submits it again"


def lacking(outcome: dict[str, str]) -> Iterator[str]:
    """A line for each point that is not done; one for all that were not begun before a signal came."""
    waiting = [name for name, word in outcome.items() if word.endswith(NOT_BEGUN)]
    yield from (f"{name}: {word}" for name, word in outcome.items() if word != "done" and name not in waiting)
    if waiting:
        yield f"{len(waiting)} stopped before their next step; run it again to continue"


def exit_code(outcome: dict[str, str]) -> int:
    """0 if all points are done, 75 if the others were stopped or are at work elsewhere, 1 if one failed."""
    words = [word for word in outcome.values() if word != "done"]
    if not words:
        return 0
    return 75 if all(word.endswith((STOPPED, NOT_BEGUN)) or ELSEWHERE in word for word in words) else 1


def _gpu_hours(sweep: Sweep, planned: Plan) -> float | None:
    """GPUs x time limits of all jobs that would be submitted, in hours: the most that they take without a requeue.

    None if a profile asks for GPUs in another way than by `gpus_per_node`.
    """
    total = 0.0
    for chain in planned.chains:
        for step in chain.steps:
            profile = profile_of(sweep, step)
            if any("gpu" in f"{option} {value}".lower() for option, value in profile.additional.items()):
                return None
            total += len(chain.units) * (profile.nodes or 1) * (profile.gpus_per_node or 0) * profile.timeout_min / 60
    return total
