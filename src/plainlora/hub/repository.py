"""A model repository on the Hub: opened before training, and given its files in one commit.

huggingface_hub does the work. Here stands what it leaves to its caller: that what fails is one line, and that the
token is in neither that line nor the files.
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import logging, validate_repo_id

from plainlora.errors import UserError

# What huggingface_hub raises over an answer of a shape that it does not expect: it looks into answers unchecked.
NO_HUB = (AttributeError, LookupError, TypeError, RecursionError, UnicodeDecodeError, json.JSONDecodeError)
TENSORS = ".safetensors"
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"

Log = Callable[[str], object]
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
    if isinstance(error, NO_HUB) or re.search("improperly formatted|Malformed response", text):
        return (
            f"the server at {constants.ENDPOINT} gave an answer that is none of a Hub's; is HF_ENDPOINT right, and "
            "does no network's log-in page stand between?"
        )
    if isinstance(error, OSError | ValueError):  # of a file; of what the Hub says about the card
        return text
    return f"the connection to {constants.ENDPOINT} broke: {text}"


@contextmanager
def _one_line(failed: str, token: str, advice: str = "") -> Iterator[None]:
    """Turns what huggingface_hub raises, of several libraries and many kinds, into one line without the token.

    Args:
        failed: What to say has failed.
        token: Left out of the line.
        advice: What to do then.

    Raises:
        UserError: That line.
    """
    try:
        yield
    except Exception as error:
        text = f"{failed}: {_reason(error)}{advice and f'; {advice}'}"
        raise UserError(" ".join(text.split()).replace(token, "...")) from error


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
    head: str | None
    files: tuple[str, ...]
    _api: HfApi
    _token: str

    def commit(self, files: Files, message: str) -> Commit:
        """Uploads the files and adds them to the branch in one commit; other files there stay.

        Until the commit the branch is as it was. Where only the commit's answer was lost, the same call again finds
        that no file differs.

        Args:
            files: What each file is called in the repository, and where it lies or what it holds.
            message: The commit's.

        Raises:
            UserError: A file holds the token, or the Hub cannot be reached or refuses.
        """
        for name, content in files.items():
            if self._token.encode() in words_of(name, content):
                raise UserError(f"{name} holds your Hub token; take it out before it is published")
        additions = [CommitOperationAdd(name, content) for name, content in sorted(files.items())]
        advice = "the branch holds all of it or nothing of it; run the same command again"
        with _one_line(f"the push to {self.name} failed", self._token, advice):
            made = self._api.create_commit(self.name, additions, commit_message=message, revision=self.revision)
        return Commit(made.commit_url, made.oid != self.head)


def open_repository(
    name: str, token: str | None = None, private: bool = False, revision: str | None = None, log: Log = print
) -> Repository:
    """Logs in and finds or makes a repository, before anything is trained or sent.

    Args:
        name: `USER/NAME`, or `NAME` for the token's own user.
        token: As for `find_token`.
        private: Whether a new repository is private.
        revision: Branch to write to, made if it is missing; the main one if left out.
        log: Prints a line of progress.

    Raises:
        UserError: There is no such name, no token, or none that may write there; the repository is public and was to
            be private; or the Hub cannot be reached.
    """
    check_repository_name(name)
    token = find_token(token)
    api = HfApi(token=token, library_name="plainlora")
    logging.set_verbosity_error()  # its warnings about an upload hold the upload's whole address, which is signed

    with _one_line("the Hub cannot be logged in to", token):
        account = api.whoami()
        user, role = account["name"], account.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise UserError(
            f"the Hub's token of {user} may only read; make one that may write at "
            f"{constants.ENDPOINT}/settings/tokens, and {LOG_IN}"
        )
    name = name if "/" in name else f"{user}/{name}"
    url = f"{constants.ENDPOINT}/{name}"

    with _one_line(f"the repository {name} cannot be had", token):
        found = api.repo_exists(name)
        api.create_repo(name, private=private or None, exist_ok=True)
        api.auth_check(name, write=True)
        public = not api.model_info(name).private
    if found and private and public:
        raise UserError(f"{name} is there already, and is public; leave --private out, or give another name")
    log(f"{url} is there already; the files go to it as a new commit" if found else f"made {url}")
    with _one_line(f"the branch {revision or 'main'} of {name} cannot be had", token):
        if revision and not revision.startswith("refs/"):
            api.create_branch(name, branch=revision, exist_ok=True)
        info = api.model_info(name, revision=revision)
    files = tuple(each.rfilename for each in info.siblings or () if each.rfilename != ".gitattributes")
    return Repository(name, revision, info.sha, files, api, token)
