"""The loopback Hub is as strict as the real one where our tests lean on it."""

import os
from pathlib import Path

from tests import warm_python
from tests.loopback.faults import CutAnswer, CutRequest, Slow, Status
from tests.loopback_hub import LoopbackHub

ROOT = Path(__file__).resolve().parents[1]

# huggingface_hub reads HF_ENDPOINT when it is imported.
CLIENT = """
import os, sys, time
from pathlib import Path
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCardData
from huggingface_hub.errors import *

api, stranger, nobody = HfApi(), HfApi(token="hf_stranger"), HfApi(token=False)

def refused(error, call, *args, status=None, **kwargs):
    try:
        call(*args, **kwargs)
    except error as said:
        assert type(said) is error, type(said)
        assert status is None or said.response.status_code == status, said
    else:
        raise AssertionError((call, args))

def add(path, content):
    return CommitOperationAdd(path, content)

def commit(name, *operations, api=api, **kwargs):
    return api.create_commit(name, operations, commit_message=kwargs.pop("message", "m"), **kwargs)

large = os.urandom(300_000)
api.create_repo("user/one", private=True)
refused(HfHubHTTPError, api.create_repo, "user/one", status=409)
first = commit("user/one", add("a.txt", b"a"), add("b/w.safetensors", large), message="first")
head = api.repo_info("user/one").sha
assert head == first.oid

# Parents are checked, branches and tags stay where they are.
api.create_branch("user/one", branch="old")
api.create_tag("user/one", tag="v1")
commit("user/one", add("a.txt", b"A"), CommitOperationDelete("b/w.safetensors"), message="2")
refused(HfHubHTTPError, commit, "user/one", add("c", b""), parent_commit=head, status=412)
refused(RevisionNotFoundError, commit, "user/one", add("c", b""), revision="none")
refused(RemoteEntryNotFoundError, commit, "user/one", CommitOperationDelete("no"))
for revision in ("old", "v1", head, head[:8]):
    assert api.repo_info("user/one", revision=revision).sha == head
    assert Path(api.hf_hub_download("user/one", "b/w.safetensors", revision=revision)).read_bytes() == large
    assert Path(api.hf_hub_download("user/one", "a.txt", revision=revision)).read_bytes() == b"a"
assert Path(api.hf_hub_download("user/one", "a.txt")).read_bytes() == b"A"
refused(RemoteEntryNotFoundError, api.hf_hub_download, "user/one", "b/w.safetensors")
refused(RevisionNotFoundError, api.hf_hub_download, "user/one", "a.txt", revision="none")
assert [commit.title for commit in api.list_repo_commits("user/one")] == ["2", "first", "initial commit"]

pull = commit("user/one", add("d", b"d"), create_pr=True)
assert pull.pr_revision == "refs/pr/1" and not api.file_exists("user/one", "d")
assert Path(api.hf_hub_download("user/one", "d", revision="refs/pr/1")).read_bytes() == b"d"
assert [one.name for one in api.list_repo_refs("user/one", include_pull_requests=True).pull_requests] == ["1"]

# Whom what is told.
for other in (stranger, nobody):
    refused(RepositoryNotFoundError, other.repo_info, "user/one")
    refused(RepositoryNotFoundError, other.hf_hub_download, "user/one", ".gitattributes")
refused(HfHubHTTPError, HfApi(token="hf_gone").whoami, status=401)
refused(HfHubHTTPError, HfApi(token="hf_gone").repo_info, "user/one", status=401)
refused(HfHubHTTPError, stranger.create_repo, "user/two", status=403)
refused(HfHubHTTPError, commit, "user/one", add("c", b""), api=HfApi(token="hf_reading"), status=403)
for other, status in ((stranger, 403), (nobody, 401)):
    assert other.repo_info("org/gated").gated
    refused(GatedRepoError, other.hf_hub_download, "org/gated", "config.json", status=status)
assert Path(api.hf_hub_download("org/gated", "config.json")).read_bytes() == b"{}"

# Pages of two, folders among them.
names = ["a.txt", "d1/d2/x", "d1/y", "z"]
api.create_repo("user/tree")
commit("user/tree", *[add(name, b"1") for name in names])
assert sorted(api.list_repo_files("user/tree")) == sorted([".gitattributes", *names])
assert {entry.path for entry in api.list_repo_tree("user/tree")} == {".gitattributes", "a.txt", "d1", "z"}
assert {entry.path for entry in api.list_repo_tree("user/tree", "d1", recursive=True)} == {"d1/d2", "d1/d2/x", "d1/y"}
snapshot = Path(api.snapshot_download("user/tree"))
assert {path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()} >= set(names)

# Not by ModelCard.validate: older clients ask huggingface.co itself there.
def card(**data):
    return add("README.md", f"---\\n{ModelCardData(**data)}\\n---\\n".encode())

commit("user/tree", card(license="mit", base_model="org/gated"))
for wrong in (card(base_model="/home/me/base"), card(license="mine")):
    refused(ValueError, commit, "user/tree", wrong)

# Faults.
for last in (False, True):
    try:
        api.upload_file(path_or_fileobj=large + b"1", path_in_repo="cut.safetensors", repo_id="user/tree")
        break
    except RuntimeError as error:  # older clients do not repeat it
        assert not last, error
refused(HfHubHTTPError, api.repo_info, "user/slow", status=503)
start = time.monotonic()
refused(RepositoryNotFoundError, api.repo_info, "user/slow")
assert time.monotonic() - start > 0.5
try:
    api.create_repo("user/lost")
except Exception as error:
    assert "disconnected" in str(error) or "reset" in str(error), error
else:
    raise AssertionError("the answer came")
assert api.repo_exists("user/lost")
"""


def test_the_client_is_answered_as_by_the_hub(tmp_path):
    with LoopbackHub() as hub:
        hub.page_size = 2
        hub.upload("models/org/gated", {"config.json": b"{}"})
        hub.repositories["models/org/gated"].gated = True
        hub.fail(CutRequest(after=1000), "PUT /blob", nth=2)
        hub.fail(Status(503), "GET /api/models/user/slow")
        hub.fail(Slow(0.6), "GET /api/models/user/slow", nth=2)
        # Of create_repo: the second comes at once.
        hub.fail(CutAnswer(), "POST /api/repos/create", nth=5)
        environment = {**os.environ, **hub.environment(tmp_path / "home")}
        done = warm_python.run(["-c", CLIENT], cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr + str(hub.unknown)
    assert hub.unknown == [] and hub.faults.met == 4
    assert len(hub.uploaded) == 2
