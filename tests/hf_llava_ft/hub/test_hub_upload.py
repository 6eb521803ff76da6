"""A broken connection leaves no half of a push, costs nothing that was uploaded, and is got over where it can be."""

import pytest
from huggingface_hub import get_session
from safetensors.torch import load_file, save_file

from hf_llava_ft.hub.upload import TIMEOUTS, patiently
from tests.hub_client import MODEL_FILES, files, push
from tests.loopback.faults import CutAnswer, CutRequest, Slow, Status
from tests.loopback.repositories import StoredFile


def test_what_was_uploaded_is_not_sent_again(hub, client, trained):
    """The connection breaks for good between the weights and the commit."""
    weights = load_file(trained / "model.safetensors")
    save_file({name: weight + 1 for name, weight in weights.items()}, trained / "model.safetensors", {"format": "pt"})
    hub.uploaded.clear()
    hub.fail(CutRequest(), "POST .*/commit/", times=100)
    done = push(client, trained, "user/resumed")
    assert done.code == 2 and "push user/resumed again" in done.err, done.err
    assert done.waited == [1, 2, 4, 8]
    assert hub.commits["models/user/resumed"] == [] and len(hub.uploaded) == 1
    hub.heal()
    assert push(client, trained, "user/resumed").code == 0
    assert len(hub.commits["models/user/resumed"]) == 1 and len(hub.uploaded) == 1


def test_a_lost_answer_is_no_second_commit(hub, client, trained):
    hub.upload("models/user/lost", {"README.md": b""})
    hub.fail(CutAnswer(), "POST .*/commit/")
    done = push(client, trained, "user/lost")
    assert done.code == 0 and "Uploaded: " in done.err, done.err
    assert len(hub.commits["models/user/lost"]) == 2
    hub.upload("models/user/lost", {"config.json": b"{}"})
    hub.fail(CutAnswer(), "POST .*/commit/")
    done = push(client, trained, "user/lost", "--create_pr")
    assert done.code == 0 and "/discussions/1" in done.err, done.err
    assert list(hub.repositories["models/user/lost"].pull_requests) == [1]


def test_a_commit_in_between_is_not_overwritten(hub, client, trained):
    """Somebody else pushes while the weights go up: their file stays."""
    hub.upload("models/user/both", {"README.md": b""})
    commit, answer = hub.repositories["models/user/both"].commit, []

    def after_another(*arguments, **kwargs):
        if not answer:
            answer.append(hub.repositories["models/user/both"].commit)
            hub.repositories["models/user/both"].commit = commit
            commit("main", "theirs", {"theirs.md": StoredFile(b"1")}, None, False)
        return commit(*arguments, **kwargs)

    hub.repositories["models/user/both"].commit = after_another
    assert push(client, trained, "user/both").code == 0
    assert set(files(hub, "models/user/both")) == {*MODEL_FILES, "theirs.md"}
    assert len(hub.commits["models/user/both"]) == 3


def test_the_hub_is_waited_for(hub, client, trained):
    hub.fail(Status(429, {"Retry-After": "7"}), "POST .*/commit/")
    hub.fail(Slow(0.3), "POST .*/preupload/")
    done = push(client, trained, "user/patience")
    assert done.code == 0 and done.waited == [7], done
    hub.fail(Status(503), "GET /api/whoami", times=100)
    done = push(client, trained, "user/patience")
    assert done.code == 2 and "the Hub fails with 503" in done.err and done.waited == [1, 2, 4, 8]
    hub.heal()
    hub.fail(Status(429, {"Retry-After": "86400"}), "GET /api/whoami", times=100)
    done = push(client, trained, "user/patience")
    assert done.code == 2 and "too many requests" in done.err and done.waited == []


def test_no_request_waits_for_ever():
    """As the client's own would, on a server that takes the connection and never answers."""
    assert patiently(lambda: get_session().timeout.read) == TIMEOUTS[1] > 0


FAULTS = {
    "cut": CutRequest(),
    "cut within": CutRequest(after=700),
    "answer lost": CutAnswer(),
    "answer cut": CutAnswer(after=20),
    "limit": Status(429, {"Retry-After": "1"}),
    "failure": Status(500),
}


def requests_of(hub, run):
    hub.requests.clear()
    hub.stored.clear()
    assert run().code == 0
    return list(hub.requests)


def sweep(hub, key, run, faults, places):
    """Breaks one request of a push after the other; each time it must succeed, or say in one sentence why not."""
    stopped = []
    for fault in faults:
        for place in places:
            for name in list(hub.repositories):
                if name == key:
                    del hub.repositories[name]
            hub.stored.clear()
            hub.heal()
            hub.fail(fault, nth=place)
            met = hub.faults.met
            done = run()
            assert hub.faults.met == met + 1
            commits = hub.commits.get(key, [])
            assert done.code in (0, 2), (fault, place, done)
            if done.code == 2:
                stopped.append((fault, place, done.err))
                assert len([line for line in done.err.splitlines() if line.startswith("error: ")]) == 1
                hub.heal()
                assert run().code == 0, (fault, place)
            assert len(hub.commits[key]) == 1, (fault, place, commits)
    return stopped


def test_a_fault_at_any_request(hub, client, trained):
    def run():
        return push(client, trained, "user/sweep")

    asked = requests_of(hub, run)
    kinds = (
        "whoami",
        "repos/create",
        "/tree/",
        "validate-yaml",
        "preupload",
        "objects/batch",
        "PUT /blob",
        "/verify",
        "/commit/",
    )
    assert all(any(kind in request for request in asked) for kind in kinds)
    assert sweep(hub, "models/user/sweep", run, [CutAnswer()], range(1, len(asked) + 1)) == []


def test_other_bytes_on_the_hub_are_noticed(hub, client, llava_json):
    path, images = llava_json(4)
    hub.upload("datasets/user/bytes", {"README.md": b""})
    commit = hub.repositories["datasets/user/bytes"].commit

    def damaged(revision, title, changes, *rest):
        (name,) = [name for name in changes if name.endswith(".parquet")]
        content = bytearray(changes[name].content)
        content[100] ^= 1
        changes[name] = StoredFile(bytes(content), lfs=True)
        hub.stored[changes[name].sha256] = bytes(content)
        return commit(revision, title, changes, *rest)

    hub.repositories["datasets/user/bytes"].commit = damaged
    done = client.run("push", path, "--image_folder", images, "--repo_id", "user/bytes")
    assert done.code == 2 and "data/train-00000-of-00001.parquet is not what was sent" in done.err, done.err


@pytest.mark.slow
def test_every_fault_at_every_request_of_a_model(hub, client, trained):
    def run():
        return push(client, trained, "user/sweep")

    places = range(1, len(requests_of(hub, run)) + 1)
    assert sweep(hub, "models/user/sweep", run, FAULTS.values(), places) == []


@pytest.mark.slow
def test_every_fault_at_every_request_of_data(hub, client, llava_json):
    """Which is downloaded again, too."""
    path, images = llava_json(4)

    def run():
        return client.run("push", path, "--image_folder", images, "--repo_id", "user/sweep")

    asked = requests_of(hub, run)
    assert any("GET /storage/" in request for request in asked)
    assert sweep(hub, "datasets/user/sweep", run, FAULTS.values(), range(1, len(asked) + 1)) == []
