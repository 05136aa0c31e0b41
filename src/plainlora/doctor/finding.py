"""What was checked and what came of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, ParamSpec, TypeVar

from plainlora.errors import UserError, first_line, one_line
from plainlora.lora.errors import LoRAError

Level = Literal["ok", "note", "warning", "error"]
LEVELS: tuple[Level, ...] = ("ok", "note", "warning", "error")
P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Finding:
    """One check and its result.

    Attributes:
        level: `error` stops training; a `warning` trains something that was probably not meant.
        subject: What was looked at: `settings`, `base`, `tokenizer`, `train rows`, ...
        check: Name of the check; it does not change.
        message: One line: what is, and where something is wrong, what to do.
        figures: Numbers behind the message.
    """

    level: Level
    subject: str
    check: str
    message: str
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass
class Examination:
    """All findings, in the order in which they were made."""

    findings: list[Finding] = field(default_factory=list)

    def add(self, level: Level, subject: str, check: str, message: str, **figures: Any) -> None:
        """Writes a finding down; a message is one line whatever it quotes."""
        self.findings.append(Finding(level, subject, check, one_line(message), figures))

    def ask(self, subject: str, check: str, question: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """Calls what refuses by raising; its one line is an error found here, and the result is then `None`.

        So is whatever else a library raises: what was found before it, and what can be found after, is not lost.
        """
        try:
            return question(*args, **kwargs)
        except (UserError, LoRAError) as error:
            self.add("error", subject, check, str(error))
        except Exception as error:  # of any library
            self.add("error", subject, check, f"it could not be examined: {type(error).__name__}: {first_line(error)}")
        return None

    def passes(
        self, subject: str, check: str, question: Callable[P, object], *args: P.args, **kwargs: P.kwargs
    ) -> bool:
        """Whether what `ask` calls raised nothing, for questions that have no answer."""
        before = len(self.findings)
        self.ask(subject, check, question, *args, **kwargs)
        return len(self.findings) == before

    def at(self, level: Level) -> list[Finding]:
        """The findings of one level."""
        return [finding for finding in self.findings if finding.level == level]

    def counts(self) -> dict[Level, int]:
        """How many findings there are of each level."""
        return {level: len(self.at(level)) for level in LEVELS}

    def summary(self) -> str:
        """How many checks were made, and what came of them, in one line."""
        parts = [f"{len(self.findings)} checks"]
        for level in ("error", "warning"):
            count = len(self.at(level))
            parts += [f"{count} {level}{'s' * (count > 1)}"] if count else []
        return "doctor: " + ", ".join(parts if len(parts) > 1 else [*parts, "nothing wrong"])

    def stop(self) -> None:
        """Raises `UserError` with the first error, if there is one, and how many more there are."""
        errors = self.at("error")
        if errors:
            more = f" ({len(errors) - 1} more: see `plainlora doctor`)" if len(errors) > 1 else ""
            raise UserError(errors[0].message + more)

    def stop_or_log(self, log: Callable[[str], None]) -> None:
        """What a program does before it trains: an error stops it, warnings are logged, and the sum.

        Raises:
            UserError: As `stop`.
        """
        self.stop()
        for warning in self.at("warning"):
            log(f"warning: {warning.subject}: {warning.message}")
        log(self.summary())
