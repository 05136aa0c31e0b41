"""Checks and their results."""

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
        subject: What was checked: `settings`, `base`, `tokenizer`, `train rows`, ...
        check: Name of the check; it stays the same between versions.
        message: The result in one line and, if something is wrong, what to do.
        figures: The numbers of the message.
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
        """Adds a finding; its message is made one line."""
        self.findings.append(Finding(level, subject, check, one_line(message), figures))

    def ask(self, subject: str, check: str, question: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """Calls a function; if it raises, adds an error and returns `None`.

        This holds for any exception, so that the examination goes on after an error of a library.
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
        """Calls a function by `ask`, and returns whether it added no finding."""
        before = len(self.findings)
        self.ask(subject, check, question, *args, **kwargs)
        return len(self.findings) == before

    def at(self, level: Level) -> list[Finding]:
        """The findings of one level."""
        return [finding for finding in self.findings if finding.level == level]

    def counts(self) -> dict[Level, int]:
        """The number of findings of each level."""
        return {level: len(self.at(level)) for level in LEVELS}

    def summary(self) -> str:
        """The numbers of checks, errors and warnings in one line."""
        parts = [f"{len(self.findings)} checks"]
        for level in ("error", "warning"):
            count = len(self.at(level))
            parts += [f"{count} {level}{'s' * (count > 1)}"] if count else []
        return "doctor: " + ", ".join(parts if len(parts) > 1 else [*parts, "nothing wrong"])

    def stop(self) -> None:
        """Raises `UserError` with the first error, if there is one, and the number of others."""
        errors = self.at("error")
        if errors:
            more = f" ({len(errors) - 1} more: see `plainlora doctor`)" if len(errors) > 1 else ""
            raise UserError(errors[0].message + more)

    def stop_or_log(self, log: Callable[[str], None]) -> None:
        """Raises for an error; logs warnings and the summary. Programs call it before they train.

        Raises:
            UserError: There is an error; see `stop`.
        """
        self.stop()
        for warning in self.at("warning"):
            log(f"warning: {warning.subject}: {warning.message}")
        log(self.summary())
