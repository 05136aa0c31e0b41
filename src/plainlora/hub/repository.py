"""The Hub: whose token, which repository, and files that appear in it in one commit or not at all.

huggingface_hub does the work. Here stands what it leaves to its caller: that the token goes nowhere else, that what
fails in passing is tried again, and that what fails for good is one line.
"""

import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from httpx2 import Client, HTTPError, InvalidURL, NetworkError, RemoteProtocolError, Request, TimeoutException
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    HfApi,
    ModelInfo,
    constants,
    get_token,
    set_client_factory,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from huggingface_hub.utils._http import default_client_factory

from plainlora.errors import UserError

# What huggingface_hub itself tries again, and how often, where it does (`http_backoff`): in uploads, not in commits.
WAITS = (1, 2, 4, 8, 8)  # seconds
BUSY = (408, 429, 500, 502, 503, 504)
BROKEN = (TimeoutException, NetworkError, RemoteProtocolError)
SILENCE = 60.0  # seconds without a byte after which a connection is given up

# What huggingface_hub raises over an answer of a shape that it does not expect: it looks into answers unchecked.
NO_HUB = (AttributeError, KeyError, TypeError, IndexError, RecursionError, UnicodeDecodeError, json.JSONDecodeError)
FAILURES = (OSError, ValueError, RuntimeError, HTTPError, InvalidURL, *NO_HUB)  # httpx's and hf_xet's as well

TENSORS = ".safetensors"
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"

Answer = TypeVar("Answer")
Say = Callable[[str], object]
Files = Mapping[str, Path | bytes]


def check_repository_name(name: str) -> None:
    """Raises `UserError` if no model repository can have this name, `USER/NAME` or `NAME`."""
    if not name:
        raise UserError("the repository's name is empty; give USER/NAME")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"{name!r} is no name of a repository ({error}); give USER/NAME") from error


def find_token(given: str | None = None) -> str:
    """The token given, or the one that huggingface_hub finds: in HF_TOKEN, or where `hf auth login` put it.

    Raises:
        UserError: There is none, or it cannot be sent. The message does not hold it.
    """
    token = given or get_token()
    if not token:
        raise UserError(f"the Hub needs a token, and there is none; {LOG_IN}")
    # Sent as it is, it would be quoted in the libraries' own errors. huggingface_hub joins the lines of HF_TOKEN.
    written = given or os.environ.get("HF_TOKEN", "").strip() or token
    if not re.fullmatch("[!-~]+", written):
        raise UserError(f"the Hub's token holds characters that no token has; {LOG_IN}")
    return token


def _limit_silence(request: Request) -> None:
    """Gives up on a server that takes a request and says nothing, while an upload may last as long as bytes move.

    huggingface_hub sets no limit, and some of its calls (`model_info`) ask for none, so it stands in the request.
    https://github.com/huggingface/huggingface_hub/blob/v2.4.0/src/huggingface_hub/utils/_http.py
    """
    asked = request.extensions.get("timeout", {})
    request.extensions["timeout"] = {
        phase: SILENCE if asked.get(phase) is None else asked[phase] for phase in ("connect", "read", "write")
    }


def _make_client() -> Client:
    client = default_client_factory()
    client.event_hooks["request"].append(_limit_silence)
    return client


def words_of(name: str, content: Path | bytes) -> bytes:
    """What of a file can hold words: all of it, or a tensor file's header, in which metadata stand.

    Args:
        name: What it is called in the repository.
        content: Where it lies, or what it holds. A tensor file is one that can be opened.
    """
    if isinstance(content, bytes):
        return content
    if not name.endswith(TENSORS):
        return content.read_bytes()
    with content.open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))


class _LibraryLog(logging.Filter):
    """Says in one line of its own that huggingface_hub tries an upload again, and counts.

    The library says it in two lines, one with the whole address of the upload, which is signed. That nothing differs
    from the newest commit it says as well, and so does the caller of `Repository.commit`.
    https://github.com/huggingface/huggingface_hub/blob/v2.4.0/src/huggingface_hub/utils/_http.py (`http_backoff`)
    """

    LOGGERS = ("huggingface_hub.utils._http", "huggingface_hub.hf_api")

    def __init__(self, say: Say) -> None:
        super().__init__()
        self.say, self.retries = say, 0

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if wait := re.search(r"(?:Retrying in|Waiting) ([\d.]+)s", text):
            self.retries += 1
            self.say(f"the upload was interrupted; trying again in {float(wait[1]):g} s")
        return not re.search("thrown while requesting|Retrying in|Rate limited|No files have been modified", text)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Between the library and its log."""
        for name in self.LOGGERS:
            logging.getLogger(name).addFilter(self)
        try:
            yield
        finally:
            for name in self.LOGGERS:
                logging.getLogger(name).removeFilter(self)


def _passes(error: Exception) -> bool:
    """Whether to try again may help."""
    return isinstance(error, BROKEN) or (isinstance(error, HfHubHTTPError) and error.response.status_code in BUSY)


def _refusal(error: HfHubHTTPError) -> str:
    """Why the Hub did not do it, and what to do where that is known."""
    status = error.response.status_code
    page = f"{constants.ENDPOINT}/settings/tokens"
    if status == 401:
        return f"the Hub does not accept the token; make one that may write at {page}, and {LOG_IN}"
    if status == 403:
        return f"the token may not write there; make one that may at {page}, and {LOG_IN}"
    return f"the Hub answered {status}: {error.server_message or str(error) or type(error).__name__}"


def _reason(error: BaseException) -> str:
    """What went wrong, and what to do about it where that is known."""
    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # huggingface_hub's around a failed upload
        return _reason(error.__cause__)
    if isinstance(error, OfflineModeIsEnabled):
        return "the Hub is switched off (HF_HUB_OFFLINE); unset that"
    if isinstance(error, HfHubHTTPError):
        return _refusal(error)
    text = str(error) or type(error).__name__
    if isinstance(error, HTTPError | InvalidURL):
        silent = f"{constants.ENDPOINT} said nothing for {SILENCE:g} s"
        broken = f"the connection to {constants.ENDPOINT} broke: {text}"
        return silent if isinstance(error, TimeoutException) else broken
    if isinstance(error, NO_HUB) or re.search("improperly formatted|Malformed response", text):
        return (
            f"the server at {constants.ENDPOINT} gave an answer that is none of a Hub's; is HF_ENDPOINT right, and "
            "does no network's log-in page stand between?"
        )
    return text


class _Conversation:
    """Calls to the Hub with one token. Each is tried again where that helps, and fails in one line without the token.

    Attributes:
        token: Whose repositories.
        api: The client.
        say: Prints a line of progress.
    """

    def __init__(self, token: str, say: Say) -> None:
        self.token, self.say = token, say
        self.api = HfApi(token=token, library_name="plainlora")
        set_client_factory(_make_client)

    def error(self, failed: str, error: Exception, retries: int, advice: str) -> UserError:
        """The one line: what failed, why, how often it was tried again, what now."""
        tried = f"; tried {retries + 1} times" if retries else ""
        text = " ".join(f"{failed}: {_reason(error)}{tried}{advice and f'; {advice}'}".split())
        return UserError(text.replace(self.token, "..."))

    def ask(self, failed: str, request: Callable[[], Answer], advice: str = "") -> Answer:
        """The answer to a request that huggingface_hub makes once.

        Args:
            failed: What to say has failed.
            request: Makes it. It may be made again.
            advice: What to do then.

        Raises:
            UserError: It failed, for good or six times.
        """
        for retries, wait in enumerate((*WAITS, None)):
            try:
                return request()
            except FAILURES as error:
                if wait is None or not _passes(error):
                    raise self.error(failed, error, retries, advice) from error
                self.say(f"the Hub could not be reached or was busy; trying again in {wait} s")
                time.sleep(wait)
        raise AssertionError  # the last wait is None


@dataclass(frozen=True)
class Commit:
    """What `Repository.commit` left on the Hub.

    Attributes:
        url: The commit's page.
        changed: Whether there is a new commit; none is made of files that the branch already holds.
    """

    url: str
    changed: bool


@dataclass(frozen=True)
class Repository:
    """A model repository on the Hub that the token may write to; from `open_repository`.

    Attributes:
        name: `USER/NAME`.
        revision: Branch; `None` for the main one.
        head: The branch's newest commit.
        files: What that holds, without what the Hub puts there itself.
    """

    name: str
    revision: str | None
    head: str
    files: tuple[str, ...]
    _hub: _Conversation

    def commit(self, files: Files, message: str) -> Commit:
        """Uploads the files and adds them to the branch in one commit; other files there stay.

        Until the commit the branch is as it was. Where only the commit's answer was lost, the next try finds that no
        file differs, and takes the commit for what it is.

        Args:
            files: What each file is called in the repository, and where it lies or what it holds.
            message: The commit's.

        Raises:
            UserError: A file holds the token, or the Hub cannot be reached or refuses.
        """
        for name, content in files.items():
            if self._hub.token.encode() in words_of(name, content):
                raise UserError(f"{name} holds your Hub token; take it out before it is published")

        api, log = self._hub.api, _LibraryLog(self._hub.say)

        def send() -> CommitInfo:
            additions = [CommitOperationAdd(name, content) for name, content in sorted(files.items())]
            log.retries = 0
            try:  # the library itself tries again
                api.preupload_lfs_files(self.name, additions, revision=self.revision, free_memory=False)
            except FAILURES as error:
                unchanged = "nothing was published; run the same command again"
                raise self._hub.error(f"the upload to {self.name} failed", error, log.retries, unchanged) from error
            return api.create_commit(self.name, additions, commit_message=message, revision=self.revision)

        advice = "the branch holds all of it or nothing of it; run the same command again"
        with log.installed():
            made = self._hub.ask(f"the commit to {self.name} failed", send, advice)
        return Commit(made.commit_url, made.oid != self.head)


def _text(answer: object) -> str:
    """A text of an answer; `TypeError` if it is none."""
    if not isinstance(answer, str):
        raise TypeError
    return answer


def open_repository(
    name: str, token: str | None = None, private: bool = False, revision: str | None = None, say: Say = print
) -> Repository:
    """Logs in and finds or makes a repository, before anything is trained or sent.

    Args:
        name: `USER/NAME`, or `NAME` for the token's own user.
        token: As for `find_token`.
        private: Whether a new repository is private.
        revision: Branch to write to, made if it is missing; the main one if left out.
        say: Prints a line of progress.

    Raises:
        UserError: There is no such name, no token, or none that may write there; the repository is public and was to
            be private; or the Hub cannot be reached.
    """
    check_repository_name(name)
    hub = _Conversation(find_token(token), say)

    def log_in() -> tuple[str, object]:
        answer = hub.api.whoami()
        return _text(answer["name"]), answer.get("auth", {}).get("accessToken", {}).get("role")

    user, role = hub.ask("the Hub cannot be logged in to", log_in)
    if role == "read":
        raise UserError(
            f"the Hub's token of {user} may only read; make one that may write at "
            f"{constants.ENDPOINT}/settings/tokens, and {LOG_IN}"
        )
    name = name if "/" in name else f"{user}/{name}"
    url = f"{constants.ENDPOINT}/{name}"

    def look(branch: str | None = None) -> tuple[str, ModelInfo]:
        found = hub.api.model_info(name, revision=branch)
        return _text(found.sha), found

    def find() -> ModelInfo | None:
        try:
            return look()[1]
        except RepositoryNotFoundError:
            return None

    failed = f"the repository {name} cannot be had"
    found = hub.ask(failed, find)
    if found is None:
        hub.ask(failed, lambda: hub.api.create_repo(name, private=private or None, exist_ok=True))
        say(f"made {url}")
    else:
        if private and not found.private:
            raise UserError(f"{name} is there already, and is public; leave --private out, or give another name")
        hub.ask(failed, lambda: hub.api.auth_check(name, write=True))
        say(f"{url} is there already; the files go to it as a new commit")
    if revision and not revision.startswith("refs/"):
        hub.ask(
            f"the branch {revision} of {name} cannot be had",
            lambda: hub.api.create_branch(name, branch=revision, exist_ok=True),
        )
    head, found = hub.ask(failed, lambda: look(revision))
    files = tuple(each.rfilename for each in found.siblings or () if each.rfilename != ".gitattributes")
    return Repository(name, revision, head, files, hub)
