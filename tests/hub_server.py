"""A small Hub on loopback, for the real huggingface_hub client over real HTTP, and a process that talks to it.

The paths and answers are those that the client of https://github.com/huggingface/huggingface_hub/tree/v2.4.0 asks for
and reads. Xet storage is not offered.
"""

import base64
import hashlib
import json
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from os import environ
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.conftest import ROOT

TOKEN = "hf_" + "k7Q2" * 8  # may write
READER = "hf_" + "r3aD" * 8  # may only read
LARGE = 4096  # bytes, from which a file goes to the large storage
PART = 16384  # bytes of an upload's part; a larger file is sent in several
Commit = dict[str, str]  # path -> sha256 of the content


@dataclass
class Fault:
    """What goes wrong with the next requests of a method to a path.

    Attributes:
        method: Of the requests.
        path: A regular expression that is searched in the path.
        times: How many requests.
        status: The answer; 0 to hang up, in the middle of the request's body.
        after: Whether the request is served all the same, so that only its answer is lost.
        body: The answer's.
    """

    method: str
    path: str
    times: int = 1
    status: int = 0
    after: bool = False
    body: bytes = b"{}"


@dataclass
class Repo:
    """A repository: its branches' commits, each a map of paths, oldest first."""

    private: bool
    branches: dict[str, list[str]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)


@dataclass
class HubState:
    """All that the server holds. Tests read it, and put repositories and faults into it."""

    users: dict[str, tuple[str, str]] = field(
        default_factory=lambda: {TOKEN: ("ann", "write"), READER: ("ann", "read")}
    )
    repos: dict[str, Repo] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    contents: dict[str, bytes] = field(default_factory=dict)
    stored_large: set[str] = field(default_factory=set)
    parts: dict[tuple[str, int], bytes] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def make_repo(self, name: str, private: bool = False) -> Repo:
        """A repository as the Hub makes it, with one commit."""
        repo = self.repos[name] = Repo(private)
        self.commit(name, "main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        return repo

    def commit(self, name: str, branch: str, files: dict[str, bytes], message: str) -> str:
        """Adds files to a branch."""
        repo = self.repos[name]
        before = repo.branches.setdefault(branch, [])
        tree = dict(self.commits[before[-1]]) if before else {}
        for path, content in files.items():
            tree[path] = hashlib.sha256(content).hexdigest()
            self.contents[tree[path]] = content
        commit = hashlib.sha1(f"{name} {branch} {len(before)} {sorted(tree.items())}".encode()).hexdigest()
        self.commits[commit] = tree
        before.append(commit)
        repo.messages.append(message)
        return commit

    def head(self, name: str, branch: str = "main") -> str:
        """A branch's newest commit."""
        return self.repos[name].branches[branch][-1]

    def files(self, name: str, branch: str = "main") -> dict[str, bytes]:
        """What a branch holds, without what the Hub puts there itself."""
        tree = self.commits[self.head(name, branch)]
        return {path: self.contents[digest] for path, digest in tree.items() if path != ".gitattributes"}

    def git_oid(self, digest: str) -> str:
        """The name that git gives a content."""
        content = self.contents[digest]
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def next_fault(self, method: str, path: str) -> Fault | None:
        """The fault that is due, which is then one fewer."""
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None


class _Refused(Exception):
    """An answer that is no success."""

    def __init__(self, status: int, code: str = "", message: str = "", **details: str) -> None:
        self.status, self.code, self.message = status, code, message
        self.content = json.dumps({"error": message, **details}).encode()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: HubState

    def log_message(self, *_: object) -> None:
        """The requests are in the state."""

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.state.requests.append(f"{self.command} {path}")
        fault = self.state.next_fault(self.command, path)
        length = int(self.headers.get("Content-Length") or 0)
        if fault and not fault.status and not fault.after:
            self.rfile.read(length // 2)
            self._hang_up()
            return
        body = self._chunks() if "chunked" in self.headers.get("Transfer-Encoding", "") else self.rfile.read(length)
        if fault and fault.status:
            self._answer(fault.status, fault.body)
            return
        try:
            with self.state.lock:
                status, headers, content = self._route(path, body)
        except _Refused as refused:
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            status, content = refused.status, refused.content
        if fault:
            self._hang_up()
        else:
            self._answer(status, content, headers)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _answer(self, status: int, content: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _user(self, writes: bool = False) -> str:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in self.state.users:
            raise _Refused(401, message="Invalid credentials in Authorization header")
        name, role = self.state.users[token]
        if writes and role != "write":
            raise _Refused(403, message="You have read-only access")
        return name

    def _repo(self, name: str, writes: bool = False) -> Repo:
        owner = name.split("/", maxsplit=1)[0]
        repo = self.state.repos.get(name)
        if repo is None or (repo.private and self._user() != owner):
            raise _Refused(404, "RepoNotFound", "Repository not found")
        if writes and self._user(writes=True) != owner:
            raise _Refused(403, message="You don't have the required permissions")
        return repo

    def _commit_of(self, name: str, revision: str) -> str:
        if revision in self.state.commits:
            return revision
        branch = self._repo(name).branches.get(revision)
        if branch is None:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return branch[-1]

    def _route(self, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        for pattern, method, serve in (
            (r"/api/whoami-v2", "GET", self._whoami),
            (r"/api/repos/create", "POST", self._create),
            (r"/api/validate-yaml", "POST", self._validate),
            (r"/api/models/([^/]+/[^/]+)", "GET", self._info),
            (r"/api/models/([^/]+/[^/]+)/revision/(.+)", "GET", self._info),
            (r"/api/models/([^/]+/[^/]+)/auth-check/write", "GET", self._auth_check),
            (r"/api/models/([^/]+/[^/]+)/branch/(.+)", "POST", self._branch),
            (r"/api/models/([^/]+/[^/]+)/preupload/(.+)", "POST", self._preupload),
            (r"/api/models/([^/]+/[^/]+)/commit/(.+)", "POST", self._take_commit),
            (r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", "GET", self._tree),
            (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", "POST", self._batch),
            (r"/storage/([^/]+/[^/]+)/([0-9a-f]{64})", "PUT", self._store),
            (r"/storage/([^/]+/[^/]+)/([0-9a-f]{64})/complete", "POST", self._complete),
            (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "GET", self._resolve),
            (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "HEAD", self._resolve),
        ):
            if self.command == method and (match := re.fullmatch(pattern, path)):
                answer: Any = serve(*match.groups(), *([body] if method in ("POST", "PUT") else []))
                return answer if isinstance(answer, tuple) else (200, {}, json.dumps(answer).encode())
        raise _Refused(404, message=f"no {self.command} {path}")

    def _whoami(self) -> Any:
        user = self._user()
        role = self.state.users[self.headers["Authorization"].removeprefix("Bearer ")][1]
        return {"name": user, "type": "user", "orgs": [], "auth": {"accessToken": {"role": role}}}

    def _create(self, body: bytes) -> Any:
        asked = json.loads(body)
        user = self._user(writes=True)
        if (asked.get("organization") or user) != user:
            raise _Refused(403, message="You don't have the rights to create a model under this namespace")
        name = f"{user}/{asked['name']}"
        if name in self.state.repos:
            raise _Refused(409, message="You already created this model repo", url=f"{self._address()}/{name}")
        self.state.make_repo(name, private=asked.get("visibility") == "private")
        return {"url": f"{self._address()}/{name}"}

    def _address(self) -> str:
        return f"http://{self.headers['Host']}"

    def _validate(self, body: bytes) -> Any:
        return {"errors": [], "warnings": []}

    def _info(self, name: str, revision: str = "main") -> Any:
        commit = self._commit_of(name, revision)
        siblings = [{"rfilename": path} for path in self.state.commits[commit]]
        return {"id": name, "sha": commit, "private": self._repo(name).private, "siblings": siblings}

    def _auth_check(self, name: str) -> Any:
        self._repo(name, writes=True)
        return {}

    def _branch(self, name: str, branch: str, body: bytes) -> Any:
        repo = self._repo(name, writes=True)
        if branch in repo.branches:
            raise _Refused(409, message="Reference already exists")
        repo.branches[branch] = list(repo.branches["main"])
        return {}

    def _preupload(self, name: str, revision: str, body: bytes) -> Any:
        self._repo(name, writes=True)
        tree = self.state.commits[self._commit_of(name, revision)]
        files = []
        for asked in json.loads(body)["files"]:
            large = asked["size"] >= LARGE and asked["path"].endswith(".safetensors")
            digest = tree.get(asked["path"])
            oid = digest if digest is None or large else self.state.git_oid(digest)
            mode = "lfs" if large else "regular"
            files.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": files}

    def _batch(self, name: str, body: bytes) -> Any:
        self._repo(name, writes=True)
        objects = []
        for asked in json.loads(body)["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.state.stored_large:
                address = f"{self._address()}/storage/{name}/{asked['oid']}"
                upload: dict[str, Any] = {"href": address}
                if asked["size"] > PART:
                    count = -(-asked["size"] // PART)
                    upload["header"] = {str(number): f"{address}?part={number}" for number in range(1, count + 1)}
                    upload["header"]["chunk_size"] = str(PART)
                    upload["href"] += "/complete"
                answer["actions"] = {"upload": upload}
            objects.append(answer)
        return {"transfer": "basic", "objects": objects}

    def _store(self, name: str, oid: str, body: bytes) -> Any:
        part = parse_qs(urlsplit(self.path).query).get("part")
        if part:
            self.state.parts[oid, int(part[0])] = body
            return 200, {"ETag": f'"{hashlib.md5(body).hexdigest()}"'}, b""  # as S3 does
        return self._keep(oid, body)

    def _complete(self, name: str, oid: str, body: bytes) -> Any:
        parts = [self.state.parts[oid, part["partNumber"]] for part in json.loads(body)["parts"]]
        return self._keep(oid, b"".join(parts))

    def _keep(self, oid: str, content: bytes) -> Any:
        if hashlib.sha256(content).hexdigest() != oid:
            raise _Refused(400, message="the content is not what was announced")
        self.state.contents[oid] = content
        self.state.stored_large.add(oid)
        return {}

    def _take_commit(self, name: str, branch: str, body: bytes) -> Any:
        self._repo(name, writes=True)
        lines = [json.loads(line) for line in body.splitlines()]
        files = {}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "lfsFile":
                if value["oid"] not in self.state.stored_large:
                    raise _Refused(400, message=f"{value['path']} was not uploaded")
                files[value["path"]] = self.state.contents[value["oid"]]
            else:
                files[value["path"]] = base64.b64decode(value["content"])
        commit = self.state.commit(name, branch, files, lines[0]["value"]["summary"])
        return {"commitUrl": f"{self._address()}/{name}/commit/{commit}", "commitOid": commit}

    def _tree(self, name: str, revision: str) -> Any:
        listed = []
        for path, digest in self.state.commits[self._commit_of(name, revision)].items():
            size = len(self.state.contents[digest])
            entry: dict[str, Any] = {"type": "file", "path": path, "size": size, "oid": self.state.git_oid(digest)}
            if digest in self.state.stored_large:
                entry["lfs"] = {"oid": digest, "size": size, "pointerSize": 130}
            listed.append(entry)
        return listed

    def _resolve(self, name: str, revision: str, path: str) -> Any:
        commit = self._commit_of(name, revision)
        digest = self.state.commits[commit].get(path)
        if digest is None:
            raise _Refused(404, "EntryNotFound", "Entry not found")
        etag = digest if digest in self.state.stored_large else self.state.git_oid(digest)
        return 200, {"X-Repo-Commit": commit, "ETag": f'"{etag}"'}, self.state.contents[digest]


@contextmanager
def serve_hub() -> Iterator[tuple[str, HubState]]:
    """The server's address, and what it holds."""
    state = HubState()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"state": state}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@dataclass
class Outcome:
    """What a command left: its exit code, and what it printed."""

    code: int
    out: str
    err: str


# Reads one command a line, runs it as the shell would, and writes its outcome on a line of the stream it was given.
# The client reads HF_ENDPOINT when it is imported, and the import takes seconds, so one process serves many commands.
# Its clock runs fifty times as fast while it waits: the waits between the library's own tries add up to half a minute.
_WORKER = """
import json, os, runpy, sys, tempfile, time
answers = os.fdopen(int(sys.argv[1]), "w")
real_sleep = time.sleep
time.sleep = lambda seconds: real_sleep(seconds / 50)
for line in sys.stdin:
    task = json.loads(line)
    for name, value in task["environment"].items():
        os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        sys.stdout.flush(); sys.stderr.flush()
        kept = os.dup(1), os.dup(2)
        os.dup2(out.fileno(), 1); os.dup2(err.fileno(), 2)
        code = 0
        try:
            program, *sys.argv = task["command"][0], *task["command"]
            if program == "plainlora":
                from plainlora.commands import main
                main(task["command"][1:])
            elif program == "download":
                from huggingface_hub import snapshot_download
                snapshot_download(task["command"][1], local_dir=task["command"][2])
            else:
                runpy.run_path(program, run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:
            import traceback
            traceback.print_exc()
            code = 1
        sys.stdout.flush(); sys.stderr.flush()
        os.dup2(kept[0], 1); os.dup2(kept[1], 2)
        texts = []
        for stream in (out, err):
            stream.seek(0)
            texts.append(stream.read().decode())
    print(json.dumps([code, *texts]), file=answers, flush=True)
"""


class HubUser:
    """A person at a terminal whose Hub is the one on loopback.

    Args:
        address: The server's.
        home: Their home, with no token in it.
    """

    def __init__(self, address: str, home: Path) -> None:
        ours, theirs = socket.socketpair()
        removed = ("HF_HUB_OFFLINE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "TRANSFORMERS_OFFLINE")
        inherited = {name: value for name, value in environ.items() if name not in removed}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _WORKER, str(theirs.fileno())],
            cwd=ROOT,
            env=inherited
            | {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
            | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"},
            stdin=subprocess.PIPE,
            text=True,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        self.answers = ours.makefile("r")

    def run(self, *command: str | Path, **environment: str | None) -> Outcome:
        """Runs `plainlora VERB ...`, `PROGRAM.py ...` or `download REPO FOLDER`, logged in unless told otherwise."""
        task = {"command": [str(word) for word in command], "environment": {"HF_TOKEN": TOKEN, **environment}}
        assert self.process.stdin is not None
        print(json.dumps(task), file=self.process.stdin, flush=True)
        return Outcome(*json.loads(self.answers.readline()))

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.answers.close()
