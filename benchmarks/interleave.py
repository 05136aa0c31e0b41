"""Interleaved timing: each variant in a process of its own, one iteration of each a round, A B C D A B C D."""

import math
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.case import Case
from benchmarks.worker import Failure, Job, run_job
from plainlora.errors import UserError

PRELOADED = ("plainlora.quiet", "benchmarks.suites")
GRACE = 30.0  # seconds: what is left of a round may take so much longer than the time there is for it


@dataclass
class Outcome:
    """What one case gave.

    Attributes:
        case: What was measured.
        seconds: Of every iteration, by variant; iteration i of each variant belongs to the same round.
        facts: Peak memory, and what was counted, by variant.
    """

    case: Case
    seconds: dict[str, list[float]] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)


def _ask(pipe: Connection, what: str, request: str, deadline: float) -> Any:
    """Sends a request and waits for the answer, if need be a little beyond the deadline."""
    try:
        with suppress(BrokenPipeError):  # it has stopped; what it sent last says why
            pipe.send(request)
        left = deadline + GRACE - time.monotonic()
        if not pipe.poll(max(0.0, left) if math.isfinite(left) else None):
            raise UserError(f"bench: {what} did not answer in time")
        message = pipe.recv()
    except (EOFError, ConnectionError) as error:
        raise UserError(
            f"bench: {what} was killed; most likely there is too little memory for all variants at once"
        ) from error
    if isinstance(message, Failure):
        stopped = UserError(f"bench: {what} stopped ({message.reason})")
        stopped.add_note(message.where)
        raise stopped
    return message


@contextmanager
def _worker(job: Job) -> Iterator[Connection]:
    """A fresh process; without a GPU a copy of one that has imported everything and computed nothing."""
    context: Any = multiprocessing.get_context("spawn" if job.device == "cuda" else "forkserver")
    if job.device != "cuda":
        context.set_forkserver_preload(list(PRELOADED))
    pipe, theirs = context.Pipe()
    process = context.Process(target=run_job, args=(job, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        yield pipe
    except UserError:
        process.kill()  # it may be at work for long, or hang
        raise
    finally:
        pipe.close()
        process.join(timeout=30)
        process.kill()
        process.join()


def time_interleaved(
    module: str,
    case: Case,
    device: str,
    repeats: int,
    profile: bool = False,
    progress: Callable[[str], None] = lambda _: None,
    seconds: float = math.inf,
) -> Outcome:
    """Times the variants of a case, one iteration of each in every round.

    Variants load one after the other, so that what one takes to load is free again before the next one does.

    Args:
        module: Of `benchmarks`, with `run_variant(variant, options, timer)`.
        case: What to measure.
        device: `cpu` or `cuda`.
        repeats: How many rounds are counted; one more comes first, in which everything warms up.
        profile: Whether each variant has one more iteration at the end, whose operations are timed by kind.
        progress: Told what happens.
        seconds: The time there is: a round that would end later does not start.

    Raises:
        UserError: A variant stopped, or did not answer in time.
    """
    deadline = time.monotonic() + seconds
    repeats = min(repeats, case.rounds or repeats)
    outcome = Outcome(case, {variant: [] for variant in case.variants})
    name = f"{case.suite}, {case.name}"
    with ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory())
        progress(f"{name}: {len(case.variants)} processes start")
        pipes = {
            variant: stack.enter_context(_worker(Job(module, variant, case.options | options, device, scratch)))
            for variant, options in case.variants.items()
        }
        for variant, pipe in pipes.items():
            progress(f"{name}: loads, {variant}")
            _ask(pipe, f"{name}, {variant}", "load", deadline)  # it answers when it is ready
        longest = 0.0
        for number in range(repeats + 1):
            started = time.monotonic()
            if number > 1 and started + longest > deadline:
                break
            for variant, pipe in pipes.items():
                progress(f"{name}: round {number} of {repeats}, {variant}")
                elapsed = _ask(pipe, f"{name}, {variant}", "time", deadline)
                if number:
                    outcome.seconds[variant].append(elapsed)
            longest = max(longest, time.monotonic() - started)
        for variant, pipe in pipes.items():
            if profile:
                progress(f"{name}: profile, {variant}")
                _ask(pipe, f"{name}, {variant}", "profile", deadline)
            outcome.facts[variant] = _ask(pipe, f"{name}, {variant}", "stop", deadline)
    return outcome
