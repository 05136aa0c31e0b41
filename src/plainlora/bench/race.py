"""The race: every arm in a process of its own, one turn each, A B C D A B C D."""

import multiprocessing
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from plainlora.bench.case import Case
from plainlora.bench.worker import Failure, Job, work
from plainlora.errors import UserError

PRELOADED = ("plainlora.quiet", "plainlora.bench.suites")


@dataclass
class Outcome:
    """What one case gave.

    Attributes:
        case: What was measured.
        seconds: Of every turn, by arm; turn number i of each arm belongs to the same round.
        facts: Peak memory, and what was counted, by arm.
    """

    case: Case
    seconds: dict[str, list[float]] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)


def _hear(pipe: Connection, what: str, word: str = "") -> Any:
    """Gives the word, if there is one, and waits for the answer."""
    try:
        if word:
            pipe.send(word)
        message = pipe.recv()
    except (EOFError, ConnectionError) as error:
        raise UserError(f"bench: {what} was killed; most likely there is too little memory for its arms") from error
    if isinstance(message, Failure):
        raise UserError(f"bench: {what} stopped ({message.reason})")
    return message


@contextmanager
def _worker(job: Job) -> Iterator[Connection]:
    """A fresh process; without a GPU a copy of one that has imported everything and computed nothing."""
    context: Any = multiprocessing.get_context("spawn" if job.device == "cuda" else "forkserver")
    if job.device != "cuda":
        context.set_forkserver_preload(list(PRELOADED))
    pipe, theirs = context.Pipe()
    process = context.Process(target=work, args=(job, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        yield pipe
    finally:
        pipe.close()
        process.join(timeout=30)
        process.kill()
        process.join()


def race(
    module: str,
    case: Case,
    device: str,
    repeats: int,
    profile: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> Outcome:
    """Runs every arm of a case in turn.

    Args:
        module: Of `plainlora.bench`, with `take_part(arm, options, turns)`.
        case: What to measure.
        device: `cpu` or `cuda`.
        repeats: How many rounds are counted; one more comes first, in which everything warms up.
        profile: Whether each arm has one more turn at the end, whose operations are timed by kind.
        progress: Told what happens.

    Raises:
        UserError: An arm stopped.
    """
    outcome = Outcome(case, {arm: [] for arm in case.arms})
    name = f"{case.suite}, {case.name}"
    with ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory())
        progress(f"{name}: {len(case.arms)} processes start")
        pipes = {
            arm: stack.enter_context(_worker(Job(module, arm, case.options | options, device, scratch)))
            for arm, options in case.arms.items()
        }
        for arm, pipe in pipes.items():
            _hear(pipe, f"{name}, {arm}")  # it is ready
        for number in range(repeats + 1):
            for arm, pipe in pipes.items():
                progress(f"{name}: round {number} of {repeats}, {arm}")
                seconds = _hear(pipe, f"{name}, {arm}", "go")
                if number:
                    outcome.seconds[arm].append(seconds)
        for arm, pipe in pipes.items():
            if profile:
                progress(f"{name}: profile, {arm}")
                _hear(pipe, f"{name}, {arm}", "profile")
            outcome.facts[arm] = _hear(pipe, f"{name}, {arm}", "stop")
    return outcome
