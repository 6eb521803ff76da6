"""A Hub on this computer, for as much of its API as pushing and loading models and datasets needs.

    with LoopbackHub() as hub:
        hub.upload("models/org/base", folder)
        hub.fail(CutRequest(after=1000), "PUT /blob", nth=2)
        subprocess.run(..., env={**os.environ, **hub.environment(home)})
        hub.repos["models/user/name"]["config.json"]

It speaks HTTP to the real client: branches, tags, pull requests and commits with their checks, large storage behind a
redirect to another host, ranges, pages, and the errors with the codes that the client knows them by. What is asked for
and not answered is a 404, and in `hub.unknown`. The environment has to name it before huggingface_hub is imported,
hence a subprocess.
"""

import contextlib
import re
import socket
import struct
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from tests.loopback.faults import CutAnswer, CutRequest, Fault, Faults, Slow, Status
from tests.loopback.repositories import Refused, Repository, StoredFile
from tests.loopback.requests import Request, refusal
from tests.loopback.routes import ROUTES


@dataclass(frozen=True)
class User:
    """
    Args:
        name (`str`): whose repositories they may change.
        orgs (`tuple[str, ...]`): whose, too.
        role (`str`): "write", or "read" for a token that changes nothing.
    """

    name: str
    orgs: tuple[str, ...] = ()
    role: str = "write"


class LoopbackHub:
    """
    Attributes:
        repositories (`dict[str, Repository]`): by "datasets/user/name" or "models/user/name".
        requests (`list[str]`): `METHOD /path?query` of each, in order.
        unknown (`list[str]`): those that got no answer.
        tokens (`dict[str, User]`): who holds which; take one out and it has expired.
        page_size (`int`): files that `tree` tells of at a time.
        stored (`dict[str, bytes]`): large storage, by SHA-256.
        faults (`Faults`): what was planned to fail, and how often it did.
        uploaded (`list[str]`): SHA-256 of each file that came into large storage, as often as it came.
    """

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.unknown: list[str] = []
        self.tokens = {
            "hf_loopback": User("user", orgs=("org",)),
            "hf_reading": User("user", orgs=("org",), role="read"),
            "hf_stranger": User("stranger"),
        }
        self.page_size = 1000
        self.stored: dict[str, bytes] = {}
        self.uploaded: list[str] = []
        self.faults, self._lock = Faults(), threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        # Where large files come from: another host for the client, so that a token must not reach it.
        self.storage = f"http://localhost:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exc):
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home, token: str | None = "hf_loopback") -> dict[str, str]:
        """What makes huggingface_hub and datasets ask this Hub and nobody else, with their caches under `home`."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(home),
            "HF_TOKEN": token or "",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def fail(self, fault: Fault, pattern: str = "", nth: int = 1, times: int = 1) -> None:
        """
        Lets requests fail whose `METHOD /path?query` holds the regular expression `pattern`: `times` of them, from the
        `nth` on that comes from now on (1 is the first).
        """
        self.faults.add(fault, pattern, nth, times)

    def heal(self) -> None:
        """Nothing fails any more."""
        self.faults.clear()

    def upload(self, repo: str, folder: Path | dict[str, bytes], revision: str = "main", title: str = "Upload") -> str:
        """Commits all files of `folder`, without a client; makes repository and branch. Returns the commit."""
        kind, _, name = repo.partition("/")
        if not isinstance(folder, dict):
            paths = [path for path in Path(folder).rglob("*") if path.is_file()]
            folder = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        repository = self.repositories.setdefault(repo, Repository(kind, name))
        if revision not in repository.branches:
            repository.create_branch(revision, None)
        changes: dict[str, StoredFile | None] = {}
        for path, content in folder.items():
            file = StoredFile(content, repository.upload_mode(path, len(content), content[:512]) == "lfs")
            if file.lfs:
                self.stored[file.sha256] = content
            changes[path] = file
        commit, _ = repository.commit(revision, title, changes, None, create_pr=False)
        return commit.sha

    @property
    def repos(self) -> dict[str, dict[str, bytes]]:
        """The files on the main branch of each repository."""
        return {
            key: {path: file.content for path, file in repository.at("main").files.items()}
            for key, repository in self.repositories.items()
        }

    @property
    def commits(self) -> dict[str, list[list[str]]]:
        """The paths that each commit on the main branch brought, oldest first, without the one that a new one has."""
        return {
            key: [commit.brought for commit in reversed(repository.at("main").history())][1:]
            for key, repository in self.repositories.items()
        }

    @property
    def private(self) -> dict[str, bool]:
        return {key: repository.private for key, repository in self.repositories.items()}

    def answer(self, method: str, target: str, headers, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and content for a request that meets no fault."""
        split = urlsplit(target)
        for verb, pattern, route in ROUTES:
            match = re.fullmatch(pattern, split.path)
            if match and (method == verb or (method, verb) == ("HEAD", "GET")):
                parts = {key: None if part is None else unquote(part) for key, part in match.groupdict().items()}
                try:
                    with self._lock:
                        return route(Request(self, headers, body, parse_qs(split.query), split.path), **parts)
                except Refused as error:
                    return refusal(error)
        self.unknown.append(f"{method} {split.path}")
        return refusal(Refused(404, "EntryNotFound", "there is nothing here"))

    def fault_of(self, request: str) -> Fault | None:
        with self._lock:
            self.requests.append(request)
            return self.faults.of(request)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: LoopbackHub

    def handle_error(self, request, client_address):
        """Silent: a client that goes away is what some tests are about. Anything else is a defect of this file."""
        import sys
        import traceback

        if not isinstance(sys.exc_info()[1], ConnectionError):
            traceback.print_exc()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # A head and a body are two packets; without this, the second waits for the acknowledgement of the first.
    disable_nagle_algorithm = True
    server: _Server

    def _handle(self):
        hub = self.server.hub
        fault = hub.fault_of(f"{self.command} {unquote(self.path)}")
        if isinstance(fault, CutRequest):
            self._body(fault.after)
            return self._cut()
        body = self._body()
        if isinstance(fault, Slow):
            time.sleep(fault.seconds)
        if isinstance(fault, Status):
            status, headers, content = refusal(Refused(fault.code, "", "not now"))
            headers = headers | fault.headers
        else:
            status, headers, content = hub.answer(self.command, self.path, self.headers, body)
        if isinstance(fault, CutAnswer) and fault.after is None:
            return self._cut()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return None
        if isinstance(fault, CutAnswer):
            self.wfile.write(content[: fault.after])
            return self._cut()
        self.wfile.write(content)

    def _body(self, limit: int | None = None) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            length = int(self.headers.get("Content-Length") or 0)
            return self.rfile.read(length if limit is None else min(length, limit))
        content = b""
        while (limit is None or len(content) < limit) and (size := int(self.rfile.readline(), 16)):
            content += self.rfile.read(size)
            self.rfile.readline()
        if limit is None:
            self.rfile.readline()
        return content

    def _cut(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            # Closing resets the connection, as a router that loses it does.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = _handle

    def log_message(self, *args):
        pass
