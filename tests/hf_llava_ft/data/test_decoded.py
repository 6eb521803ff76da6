"""A picture is decoded once, under whatever names and by whatever command, as long as its file is what it was."""

import os
import time

import datasets
import pytest
from PIL import Image

from hf_llava_ft.data import decoded, pictures
from hf_llava_ft.data.decoded import DecodedPictures
from hf_llava_ft.data.pictures import unreadable_images


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Three pictures, a broken one and another name for two of the four; all older than what follows."""
    for name in "abc":
        Image.new("RGB", (8, 8), name == "a" and "red" or "blue").save(tmp_path / f"{name}.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    os.link(tmp_path / "a.png", tmp_path / "again.png")
    os.link(tmp_path / "broken.png", tmp_path / "broken again.png")
    time.sleep(0.02)
    return tmp_path


@pytest.fixture
def looked_at(monkeypatch):
    """Names of the files that are decoded, in this process."""
    found = []
    decode = pictures.decode_failure
    monkeypatch.setattr(pictures, "decode_failure", lambda path: found.append(os.path.basename(path)) or decode(path))
    monkeypatch.setattr(pictures, "results_in_order", map)
    return found


def unreadable(folder, names):
    paths = [str(folder / name) for name in names]
    return [os.path.basename(path) for path in unreadable_images(paths, DecodedPictures(folder / "cache"))]


def test_each_file_is_decoded_once(folder, looked_at):
    names = ["a.png", "again.png", "broken.png", "b.png", "broken again.png", "none.png"]
    assert unreadable(folder, names) == ["broken.png", "broken again.png", "none.png"]
    assert looked_at == ["a.png", "broken.png", "b.png", "none.png"]
    del looked_at[:]
    assert unreadable(folder, [*names, "c.png"]) == ["broken.png", "broken again.png", "none.png"]
    assert looked_at == ["broken.png", "none.png", "c.png"]  # a broken one is looked at again: it may be mended


@pytest.mark.parametrize("change", ["written", "replaced", "touched", "another limit", "damaged record"])
def test_what_has_changed_is_decoded_again(folder, looked_at, monkeypatch, change):
    assert unreadable(folder, ["a.png", "b.png"]) == []
    status = os.stat(folder / "b.png")
    if change == "written":
        (folder / "b.png").write_bytes((folder / "b.png").read_bytes()[:-20] + b"x" * 20)
        os.utime(folder / "b.png", ns=(0, status.st_mtime_ns))
    elif change == "replaced":
        (folder / "broken.png").replace(folder / "b.png")
    elif change == "touched":
        os.utime(folder / "b.png")
    elif change == "another limit":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    else:
        [record] = (folder / "cache").rglob("*.npy")
        record.write_bytes(b"no numbers")
    del looked_at[:]
    failed = unreadable(folder, ["a.png", "b.png"])
    of_all = change in ("another limit", "damaged record")
    assert looked_at == (["a.png", "b.png"] if of_all else ["b.png"])
    assert failed == {"another limit": ["a.png", "b.png"], "written": ["b.png"], "replaced": ["b.png"]}.get(change, [])


def test_a_file_of_this_moment_is_not_remembered(folder, looked_at):
    record = DecodedPictures(folder / "cache")
    Image.new("RGB", (9, 9)).save(folder / "new.png")
    paths = [str(folder / "new.png"), str(folder / "a.png")]
    record.remember(paths, record.keys(paths))
    known = DecodedPictures(folder / "cache")
    assert known.are_known(known.keys(paths)).tolist() == [False, True]


def test_records_of_two_runs_are_joined_and_stay_small(folder, monkeypatch):
    first, second = DecodedPictures(folder / "cache"), DecodedPictures(folder / "cache")
    for record, name in ((first, "a.png"), (second, "b.png")):
        record.remember([str(folder / name)], record.keys([str(folder / name)]))
    both = DecodedPictures(folder / "cache")
    assert both.are_known(both.keys([str(folder / name) for name in ("a.png", "b.png", "c.png")])).tolist() == [
        True,
        True,
        False,
    ]
    monkeypatch.setattr(decoded, "_MAX_KNOWN", 2)
    both.remember([str(folder / "c.png")], both.keys([str(folder / "c.png")]))
    assert len(DecodedPictures(folder / "cache")._known) == 2


def test_a_cache_that_cannot_be_written_is_no_error(folder):
    (folder / "file").write_text("")
    paths = [str(folder / "a.png")]
    assert unreadable_images(paths, DecodedPictures(folder / "file")) == {}


@pytest.fixture(autouse=True, scope="module")
def quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()
