"""A Hub on this computer, for as much of its API as pushing to a data set repository and loading from it needs.

    with LoopbackHub() as hub:
        subprocess.run(..., env={**os.environ, **hub.environment(home)})

Repositories are dictionaries of file name to bytes, one branch, in memory. What is asked for and not answered here is
a 404, and in `hub.unknown`. The environment has to name it before huggingface_hub is imported, hence a subprocess.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

REPO = r"(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)"


class LoopbackHub:
    """
    Attributes:
        repos (`dict[str, dict[str, bytes]]`): the files of each, by "datasets/user/name" or "models/user/name".
        commits (`dict[str, list[list[str]]]`): the files that each commit of a repository brought.
        private (`dict[str, bool]`): as they were created.
        unknown (`list[str]`): requests that got no answer.
    """

    def __init__(self):
        self.repos, self.commits, self.private = {}, {}, {}
        self.unknown: list[str] = []
        self._blobs: dict[str, bytes] = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _handle(self):
                length = int(self.headers.get("Content-Length") or 0)
                if self.headers.get("Transfer-Encoding") == "chunked":
                    body = b"".join(self._chunks())
                else:
                    body = self.rfile.read(length)
                path = unquote(urlsplit(self.path).path)
                status, headers, content = hub._answer(self.command, path, body, self.headers)
                self.send_response(status)
                for key, value in headers.items():
                    self.send_header(key, value)
                if "Content-Length" not in headers:
                    self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            def _chunks(self):
                while size := int(self.rfile.readline(), 16):
                    yield self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()

            do_GET = do_POST = do_PUT = do_HEAD = _handle

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc):
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home) -> dict[str, str]:
        """What makes huggingface_hub and datasets ask this Hub and nobody else, with their caches under `home`."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(home),
            "HF_TOKEN": "hf_loopback",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def _answer(self, method, path, body, headers):
        for verb, pattern, answer in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and (method == verb or (method, verb) == ("HEAD", "GET")):
                return answer(self, body, headers, **match.groupdict())
        self.unknown.append(f"{method} {path}")
        return _error(404, "EntryNotFound")

    def _sha(self, repo) -> str:
        return hashlib.sha1(f"{repo}{len(self.commits[repo])}".encode()).hexdigest()

    def create(self, body, headers):
        asked = json.loads(body)
        name = asked["name"] if not asked.get("organization") else f"{asked['organization']}/{asked['name']}"
        name = name if "/" in name else f"user/{name}"
        repo = f"{asked.get('type') or 'model'}s/{name}"
        prefix = "" if repo.startswith("models/") else "datasets/"
        answer = {"url": f"{self.endpoint}/{prefix}{name}", "name": name, "id": "0"}
        if repo in self.repos:
            return _json(answer | {"error": "You already created this repo"}, 409)
        self.repos[repo], self.commits[repo], self.private[repo] = (
            {},
            [],
            asked.get("visibility") == "private" or bool(asked.get("private")),
        )
        return _json(answer)

    def preupload(self, body, headers, kind, name, revision):
        files = json.loads(body)["files"]
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith((".parquet", ".safetensors")) else "regular",
                "shouldIgnore": False,
            }
            for file in files
        ]
        return _json({"files": modes})

    def batch(self, body, headers, kind=None, name=None):
        objects = [
            {**item, "actions": {"upload": {"href": f"{self.endpoint}/blob/{item['oid']}", "header": {}}}}
            for item in json.loads(body)["objects"]
        ]
        return _json({"transfer": "basic", "objects": objects})

    def store(self, body, headers, oid):
        assert hashlib.sha256(body).hexdigest() == oid
        self._blobs[oid] = body
        return 200, {}, b""

    def commit(self, body, headers, kind, name, revision):
        repo, brought = f"{kind}/{name}", []
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                self.repos[repo][value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                self.repos[repo][value["path"]] = self._blobs[value["oid"]]
            elif item["key"] == "deletedFile":
                del self.repos[repo][value["path"]]
            else:
                continue
            brought.append(value["path"])
        self.commits[repo].append(brought)
        sha = self._sha(repo)
        url = f"{self.endpoint}/{'' if kind == 'models' else 'datasets/'}{name}/commit/{sha}"
        return _json({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    def info(self, body, headers, kind, name, revision=None):
        repo = f"{kind}/{name}"
        if repo not in self.repos:
            return _error(404, "RepoNotFound")
        sha = self._sha(repo)
        if revision not in (None, "main", sha):
            return _error(404, "RevisionNotFound")
        siblings = [{"rfilename": path} for path in self.repos[repo]]
        about = {"id": name, "sha": sha, "private": self.private[repo], "tags": [], "downloads": 0, "likes": 0}
        return _json(about | {"siblings": siblings, "lastModified": "2026-01-01T00:00:00.000Z"})

    def refs(self, body, headers, kind, name):
        main = {"name": "main", "ref": "refs/heads/main", "targetCommit": self._sha(f"{kind}/{name}")}
        return _json({"branches": [main], "tags": [], "converts": []})

    def _entry(self, repo, path):
        content = self.repos[repo].get(path)
        if content is not None:
            return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        if any(name.startswith(f"{path}/") for name in self.repos[repo]):
            return {"type": "directory", "path": path, "size": 0, "oid": "0" * 40}
        return None

    def tree(self, body, headers, kind, name, revision, path=""):
        repo = f"{kind}/{name}"
        if repo not in self.repos:
            return _error(404, "RepoNotFound")
        inside = f"{path.strip('/')}/" if path and path.strip("/") else ""
        names = [name for name in self.repos[repo] if name.startswith(inside)]
        if not names and inside:
            return _error(404, "EntryNotFound")
        folders = {inside + name[len(inside) :].split("/")[0] for name in names if "/" in name[len(inside) :]}
        return _json([self._entry(repo, path) for path in sorted({*names, *folders})])

    def paths_info(self, body, headers, kind, name, revision):
        try:
            paths = json.loads(body)["paths"]
        except ValueError:
            paths = [unquote(item.partition("=")[2]) for item in body.decode().split("&") if item.startswith("paths=")]
        entries = [self._entry(f"{kind}/{name}", path) for path in ([paths] if isinstance(paths, str) else paths)]
        return _json([entry for entry in entries if entry is not None])

    def resolve(self, body, headers, name, revision, path, kind="models"):
        repo = f"{(kind or 'models').strip('/')}/{name}"
        if repo not in self.repos:
            return _error(404, "RepoNotFound")
        content = self.repos[repo].get(path)
        if content is None:
            return _error(404, "EntryNotFound")
        etag = hashlib.sha256(content).hexdigest()
        answer = {"X-Repo-Commit": self._sha(repo), "ETag": f'"{etag}"', "X-Linked-Size": str(len(content))}
        answer["Accept-Ranges"] = "bytes"
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", headers.get("Range") or "")
        if asked:
            start, stop = int(asked[1]), min(int(asked[2] or len(content) - 1), len(content) - 1)
            piece = content[start : stop + 1]
            answer["Content-Range"] = f"bytes {start}-{stop}/{len(content)}"
            return 206, answer | {"Content-Length": str(len(piece))}, piece
        return 200, answer | {"Content-Length": str(len(content))}, content

    def whoami(self, body, headers):
        if headers.get("Authorization") != "Bearer hf_loopback":
            return _error(401, "Unauthorized")
        return _json({"type": "user", "name": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def validate_yaml(self, body, headers):
        return _json({"errors": [], "warnings": []})


def _json(content, status=200):
    return status, {"Content-Type": "application/json"}, json.dumps(content).encode()


def _error(status, code):
    return status, {"X-Error-Code": code, "X-Error-Message": code}, b"{}"


_ROUTES = [
    ("POST", r"/api/repos/create", LoopbackHub.create),
    ("POST", r"/api/validate-yaml", LoopbackHub.validate_yaml),
    ("GET", r"/api/whoami-v2", LoopbackHub.whoami),
    ("POST", rf"/api/{REPO}/preupload/(?P<revision>.+)", LoopbackHub.preupload),
    ("POST", r"/((?P<kind>datasets)/)?(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch", LoopbackHub.batch),
    ("PUT", r"/blob/(?P<oid>\w+)", LoopbackHub.store),
    ("POST", rf"/api/{REPO}/commit/(?P<revision>.+)", LoopbackHub.commit),
    ("GET", rf"/api/{REPO}", LoopbackHub.info),
    ("GET", rf"/api/{REPO}/revision/(?P<revision>.+)", LoopbackHub.info),
    ("GET", rf"/api/{REPO}/refs", LoopbackHub.refs),
    ("GET", rf"/api/{REPO}/tree/(?P<revision>[^/]+)(?P<path>/.*)?", LoopbackHub.tree),
    ("POST", rf"/api/{REPO}/paths-info/(?P<revision>.+)", LoopbackHub.paths_info),
    (
        "GET",
        r"/(?P<kind>datasets/)?(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)",
        LoopbackHub.resolve,
    ),
]
