"""A model repository on the Hub: opened before training, and filled in one commit.

huggingface_hub does the work. This module turns its errors into one line each, and keeps the token out of errors and
files.
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

# What huggingface_hub raises for an unexpected answer, because it does not check answers.
NO_HUB = (AttributeError, LookupError, TypeError, RecursionError, UnicodeDecodeError, json.JSONDecodeError)
TENSORS = ".safetensors"
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"

Log = Callable[[str], object]
Files = Mapping[str, Path | bytes]


def check_repository_name(name: str) -> None:
    """Raises `UserError` if a name is not a valid `USER/NAME` or `NAME`."""
    if not name:
        raise UserError("the repository's name is empty; give USER/NAME")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"{name!r} is not a name of a repository ({error}); give USER/NAME") from error


def find_token(given: str | None = None) -> str:
    """The token given, or the one that huggingface_hub finds in HF_TOKEN or from `hf auth login`.

    Raises:
        UserError: There is none, or it is not valid. The message does not contain it.
    """
    token = given or get_token()
    if not token:
        raise UserError(f"the Hub needs a token, and there is none; {LOG_IN}")
    # The libraries would quote an invalid token in their errors. huggingface_hub joins the lines of HF_TOKEN.
    written = given or os.environ.get("HF_TOKEN", "").strip() or token
    if not re.fullmatch("[!-~]+", written):
        raise UserError(f"the Hub's token holds characters that no token has; {LOG_IN}")
    return token


def words_of(name: str, content: Path | bytes) -> bytes:
    """The part of a file that may contain text: all of it, or the header of a tensor file, with its metadata.

    Args:
        name: The file's name in the repository.
        content: The file's path or content. A tensor file is given by its path.
    """
    if isinstance(content, bytes):
        return content
    if not name.endswith(TENSORS):
        return content.read_bytes()
    with content.open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))


def _refusal(error: HfHubHTTPError) -> str:
    """Why the Hub refused a request, and what to do if that is known."""
    status = error.response.status_code
    page = f"{constants.ENDPOINT}/settings/tokens"
    if status == 401:
        return f"the Hub does not accept the token; make one that may write at {page}, and {LOG_IN}"
    if status == 403:
        return f"the token may not write there; make one that may at {page}, and {LOG_IN}"
    return f"the Hub answered {status}: {error.server_message or str(error) or type(error).__name__}"


def _reason(error: BaseException) -> str:
    """What went wrong, and what to do if that is known."""
    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # huggingface_hub wraps a failed upload so
        return _reason(error.__cause__)
    if isinstance(error, OfflineModeIsEnabled):
        return "the Hub is switched off (HF_HUB_OFFLINE); unset that"
    if isinstance(error, HfHubHTTPError):
        return _refusal(error)
    text = str(error) or type(error).__name__
    if isinstance(error, NO_HUB) or re.search("improperly formatted|Malformed response", text):
        return (
            f"the server at {constants.ENDPOINT} does not answer as a Hub; check HF_ENDPOINT, and whether the network "
            "shows a log-in page"
        )
    if isinstance(error, OSError | ValueError):  # about a file, or the Hub's answer about the card
        return text
    return f"the connection to {constants.ENDPOINT} broke: {text}"


@contextmanager
def _one_line(failed: str, token: str, advice: str = "") -> Iterator[None]:
    """Turns whatever huggingface_hub raises into a `UserError` of one line without the token.

    Args:
        failed: The beginning of the message.
        token: The token, which is replaced by dots.
        advice: What to do.
    """
    try:
        yield
    except Exception as error:
        text = f"{failed}: {_reason(error)}{advice and f'; {advice}'}"
        raise UserError(" ".join(text.split()).replace(token, "...")) from error


@dataclass(frozen=True)
class Commit:
    """The result of `Repository.commit`.

    Attributes:
        url: The commit's page.
        changed: Whether there is a new commit; there is none if the branch holds the same files already.
    """

    url: str
    changed: bool


@dataclass(frozen=True)
class Repository:
    """A model repository on the Hub to which the token may write; from `open_repository`.

    Attributes:
        name: `USER/NAME`.
        revision: Branch; `None` for the main one.
        head: The branch's newest commit.
        files: The names of its files, without those that the Hub adds.
    """

    name: str
    revision: str | None
    head: str | None
    files: tuple[str, ...]
    _api: HfApi
    _token: str

    def commit(self, files: Files, message: str) -> Commit:
        """Uploads the files and adds them to the branch in one commit; other files in the branch stay.

        Until the commit the branch is unchanged. If only the answer to the commit is lost, a second call finds that no
        file differs.

        Args:
            files: The path or content of each file, by its name in the repository.
            message: The commit message.

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
    """Logs in, and finds or creates a repository.

    Args:
        name: `USER/NAME`, or `NAME` for the token's own user.
        token: See `find_token`.
        private: Whether a new repository is private.
        revision: Branch to write to, created if it is missing; the main one if left out.
        log: Prints a line of progress.

    Raises:
        UserError: The name is not valid, there is no token that may write there, the repository is public and
            `private` is set, or the Hub cannot be reached.
    """
    check_repository_name(name)
    token = find_token(token)
    api = HfApi(token=token, library_name="plainlora")
    logging.set_verbosity_error()  # its warnings contain signed upload addresses

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

    with _one_line(f"the repository {name} cannot be used", token):
        found = api.repo_exists(name)
        api.create_repo(name, private=private or None, exist_ok=True)
        api.auth_check(name, write=True)
        public = not api.model_info(name).private
    if found and private and public:
        raise UserError(f"{name} is there already, and is public; leave --private out, or give another name")
    log(f"{url} is there already; the files go to it as a new commit" if found else f"made {url}")
    with _one_line(f"the branch {revision or 'main'} of {name} cannot be used", token):
        if revision and not revision.startswith("refs/"):
            api.create_branch(name, branch=revision, exist_ok=True)
        info = api.model_info(name, revision=revision)
    files = tuple(each.rfilename for each in info.siblings or () if each.rfilename != ".gitattributes")
    return Repository(name, revision, info.sha, files, api, token)
