"""What the loopback Hub answers to who looks at repositories and downloads from them."""

import hashlib
import re
from urllib.parse import parse_qs

import yaml

from tests.loopback.repositories import Refused, StoredFile
from tests.loopback.requests import Answer, answer_json, check_no_token, refusal


def info(request, kind, name, revision=None) -> Answer:
    repository = request.repository(kind, name)
    at = repository.at(revision)
    siblings: list[dict] = [{"rfilename": path} for path in at.files]
    if request.query.get("blobs"):
        for sibling in siblings:
            entry = at.files[sibling["rfilename"]].entry(sibling["rfilename"])
            sibling |= {"size": entry["size"], "blobId": entry["oid"]}
            if "lfs" in entry:
                large = entry["lfs"]
                sibling["lfs"] = {"sha256": large["oid"], "size": large["size"], "pointerSize": large["pointerSize"]}
    card = _card_data(at.files.get("README.md"))
    about = {"id": name, "sha": at.sha, "private": repository.private, "gated": "auto" if repository.gated else False}
    about |= {"siblings": siblings, "cardData": card, "tags": card.get("tags") or [], "downloads": 0, "likes": 0}
    about |= {key: card[key] for key in ("pipeline_tag", "library_name") if key in card}
    return answer_json(about | {"lastModified": "2026-01-01T00:00:00.000Z"})


def _card_data(readme: StoredFile | None) -> dict:
    match = re.match(r"---\n(.*?)\n---", readme.content.decode(), re.DOTALL) if readme else None
    return (yaml.safe_load(match[1]) or {}) if match else {}


def refs(request, kind, name) -> Answer:
    repository = request.repository(kind, name)

    def listed(start, names):
        return [{"name": key, "ref": f"{start}{key}", "targetCommit": sha} for key, sha in names.items()]

    pulls = {str(number): repository.heads[f"refs/pr/{number}"] for number in repository.pull_requests}
    told = {"branches": listed("refs/heads/", repository.branches), "tags": listed("refs/tags/", repository.tags)}
    told["converts"] = []
    return answer_json(told | ({"pullRequests": listed("refs/pr/", pulls)} if "include_prs" in request.query else {}))


def history(request, kind, name, revision) -> Answer:
    found = request.repository(kind, name).at(revision).history()
    day = "2026-01-01T00:00:00.000Z"
    return answer_json(
        [
            {"id": one.sha, "title": one.title, "message": "", "date": day, "authors": [{"user": "user"}]}
            for one in found
        ]
    )


def discussions(request, kind, name) -> Answer:
    repository = request.repository(kind, name)
    day, who = "2026-01-01T00:00:00.000Z", {"name": "user"}
    same = {"status": "open", "isPullRequest": True, "repo": {"name": name}, "createdAt": day, "author": who}
    told = [{"num": number, "title": title, **same} for number, title in repository.pull_requests.items()]
    return answer_json({"discussions": told, "count": len(told), "start": 0})


def tree(request, kind, name, revision, path=None) -> Answer:
    files = request.repository(kind, name).at(revision).files
    inside = f"{path.strip('/')}/" if path and path.strip("/") else ""
    names = [name for name in files if name.startswith(inside)]
    if not names and inside:
        raise Refused(404, "EntryNotFound", f"{path} does not exist on {revision}")
    parents = {"/".join(name.split("/")[:depth]) for name in names for depth in range(1, name.count("/") + 1)}
    found = {*names, *(parent for parent in parents if parent.startswith(inside))}
    if request.query.get("recursive", ["false"])[0].lower() != "true":
        found = {entry for entry in found if "/" not in entry[len(inside) :]}
    entries = sorted(found)
    start = int(request.query.get("cursor", ["0"])[0])
    stop = start + request.hub.page_size
    headers = {}
    if stop < len(entries):
        query = "&".join(f"{key}={value[0]}" for key, value in request.query.items() if key != "cursor")
        headers["Link"] = f'<{request.hub.endpoint}{request.path}?{query}&cursor={stop}>; rel="next"'
    return answer_json([_entry(files, entry) for entry in entries[start:stop]], **headers)


def paths_info(request, kind, name, revision) -> Answer:
    files = request.repository(kind, name).at(revision).files
    try:
        paths = request.json["paths"]
    except ValueError:
        paths = parse_qs(request.body.decode()).get("paths", [])
    entries = [_entry(files, path) for path in ([paths] if isinstance(paths, str) else paths)]
    return answer_json([entry for entry in entries if entry is not None])


def _entry(files: dict[str, StoredFile], path: str) -> dict | None:
    if path in files:
        return files[path].entry(path)
    if any(name.startswith(f"{path}/") for name in files):
        return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}
    return None


def resolve(request, name, revision, path, kind=None) -> Answer:
    repository = request.repository((kind or "models").strip("/"), name, files=True)
    at = repository.at(revision)
    headers = {"X-Repo-Commit": at.sha, "Accept-Ranges": "bytes"}
    if path not in at.files:
        status, refused, content = refusal(Refused(404, "EntryNotFound", "Entry not found"))
        return status, refused | headers, content
    file = at.files[path]
    headers["ETag"] = f'"{file.etag}"'
    if not file.lfs:
        return _ranged(request, file.content, headers)
    headers |= {"X-Linked-ETag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.content))}
    return 302, headers | {"Location": f"{request.hub.storage}/storage/{file.sha256}"}, b""


def storage(request, oid) -> Answer:
    check_no_token(request)
    return _ranged(request, request.hub.stored[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})


def _ranged(request, content: bytes, headers: dict[str, str]) -> Answer:
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("Range") or "")
    if not asked or not (asked[1] or asked[2]):
        return 200, headers | {"Content-Length": str(len(content))}, content
    start = int(asked[1]) if asked[1] else max(len(content) - int(asked[2]), 0)
    stop = min(int(asked[2]), len(content) - 1) if asked[1] and asked[2] else len(content) - 1
    if start >= len(content):
        return 416, headers | {"Content-Range": f"bytes */{len(content)}"}, b""
    piece = content[start : stop + 1]
    headers |= {"Content-Range": f"bytes {start}-{stop}/{len(content)}", "Content-Length": str(len(piece))}
    return 206, headers, piece
