"""What the loopback Hub answers to who makes and changes repositories."""

import base64
import hashlib
import json

from tests.loopback.cards import problems
from tests.loopback.repositories import Refused, Repository, StoredFile
from tests.loopback.requests import Answer, answer_json, check_may_write, check_no_token


def whoami(request) -> Answer:
    user = request.user()
    if user is None:
        raise Refused(401, "", "Invalid username or password.")
    orgs = [{"type": "org", "name": org, "roleInOrg": "write"} for org in user.orgs]
    token = {"type": "access_token", "accessToken": {"displayName": "test", "role": user.role}}
    return answer_json({"type": "user", "name": user.name, "orgs": orgs, "auth": token})


def validate_yaml(request) -> Answer:
    errors, warnings = problems(request.json["content"], request.json.get("repoType", "model"))
    told = {"errors": [{"message": text} for text in errors], "warnings": [{"message": text} for text in warnings]}
    return answer_json(told, 400 if errors else 200)


def create(request) -> Answer:
    asked, user = request.json, request.user()
    if user is None:
        raise Refused(401, "", "Invalid username or password.")
    kind, name = f"{asked.get('type') or 'model'}s", asked["name"]
    name = name if "/" in name else f"{asked.get('organization') or user.name}/{name}"
    if name.split("/")[0] not in (user.name, *user.orgs):
        raise Refused(403, "", f"You don't have the rights to create a {kind[:-1]} under this namespace")
    check_may_write(True, user)
    told = {"url": f"{request.hub.endpoint}/{'' if kind == 'models' else f'{kind}/'}{name}", "name": name, "id": "0"}
    if f"{kind}/{name}" in request.hub.repositories:
        return answer_json(told | {"error": "You already created this repo"}, 409)
    private = asked.get("visibility") == "private" or bool(asked.get("private"))
    request.hub.repositories[f"{kind}/{name}"] = Repository(kind, name, private)
    return answer_json(told)


def delete(request) -> Answer:
    asked, user = request.json, request.user()
    kind = f"{asked.get('type') or 'model'}s"
    name = f"{asked.get('organization') or (user and user.name)}/{asked['name']}"
    request.repository(kind, name, write=True)
    del request.hub.repositories[f"{kind}/{name}"]
    return answer_json({})


def preupload(request, kind, name, revision) -> Answer:
    repository = request.repository(kind, name, write=not request.query.get("create_pr"))
    files, there = [], repository.at(revision).files
    for file in request.json["files"]:
        mode = repository.upload_mode(file["path"], file["size"], base64.b64decode(file["sample"]))
        known = there.get(file["path"])
        # git's name of a regular file, the SHA-256 of a large one: what the client compares its own with.
        files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": known and known.etag})
    return answer_json({"files": files})


def batch(request, kind, name) -> Answer:
    request.repository(kind or "models", name)
    if request.user() is None:
        raise Refused(401, "RepoNotFound", "Invalid username or password.")
    objects = []
    for item in request.json["objects"]:
        upload = {"href": f"{request.hub.storage}/blob/{item['oid']}", "header": {}}
        verify = {"href": f"{request.hub.endpoint}/{name}.git/info/lfs/verify", "header": {}}
        there = item["oid"] in request.hub.stored
        objects.append(item if there else {**item, "actions": {"upload": upload, "verify": verify}})
    return answer_json({"transfer": "basic", "objects": objects})


def store(request, oid) -> Answer:
    check_no_token(request)
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise Refused(400, "", "BadDigest")
    request.hub.stored[oid] = request.body
    request.hub.uploaded.append(oid)
    return 200, {"ETag": f'"{oid}"'}, b""


def verify(request, kind, name) -> Answer:
    asked = request.json
    if len(request.hub.stored.get(asked["oid"], b"")) != asked["size"]:
        raise Refused(404, "", "the object is not there")
    return answer_json({})


def commit(request, kind, name, revision) -> Answer:
    create_pr = bool(request.query.get("create_pr"))
    repository = request.repository(kind, name, write=not create_pr)
    header, changes = {}, {}
    for line in request.body.splitlines():
        item = json.loads(line)
        value = item["value"]
        if item["key"] == "header":
            header = value
        elif item["key"] == "file":
            changes[value["path"]] = StoredFile(base64.b64decode(value["content"]))
        elif item["key"] == "lfsFile":
            if value["oid"] not in request.hub.stored:
                raise Refused(400, "", f"LFS pointer pointed to a file that does not exist: {value['path']}")
            changes[value["path"]] = StoredFile(request.hub.stored[value["oid"]], lfs=True)
        elif item["key"] == "deletedFile":
            changes[value["path"]] = None
        elif item["key"] == "deletedFolder":
            inside = f"{value['path'].rstrip('/')}/"
            changes |= {path: None for path in repository.at(revision).files if path.startswith(inside)}
        else:
            raise Refused(400, "", f"unknown operation {item['key']}")
    readme = changes.get("README.md")
    errors = problems(readme.content.decode(), kind[:-1])[0] if readme else []
    if errors:
        raise Refused(400, "", f"Invalid metadata in README.md: {errors[0]}")
    made, number = repository.commit(revision, header["summary"], changes, header.get("parentCommit"), create_pr)
    address = f"{request.hub.endpoint}/{'' if kind == 'models' else f'{kind}/'}{name}"
    told = {"success": True, "commitOid": made.sha, "commitUrl": f"{address}/commit/{made.sha}", "hookOutput": ""}
    return answer_json(told | ({"pullRequestUrl": f"{address}/discussions/{number}"} if number else {}))


def branch(request, kind, name, branch) -> Answer:
    request.repository(kind, name, write=True).create_branch(branch, request.json.get("startingPoint"))
    return answer_json({})


def delete_branch(request, kind, name, branch) -> Answer:
    heads = request.repository(kind, name, write=True).heads
    if f"refs/heads/{branch}" not in heads or branch == "main":
        raise Refused(404, "RevisionNotFound", f"Invalid rev id: {branch}")
    del heads[f"refs/heads/{branch}"]
    return answer_json({})


def tag(request, kind, name, revision) -> Answer:
    request.repository(kind, name, write=True).create_tag(request.json["tag"], revision)
    return answer_json({})


def delete_tag(request, kind, name, revision) -> Answer:
    request.repository(kind, name, write=True).tags.pop(revision, None)
    return answer_json({})


def merge(request, kind, name, number) -> Answer:
    request.repository(kind, name, write=True).merge(int(number))
    return answer_json({})
