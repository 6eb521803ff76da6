"""A file is parsed once when it is opened for the first time, and each of its images is asked once what it is."""

import json
import os
import pickle
import shutil

import datasets
import pyarrow as pa
import pytest
from PIL import Image

from hf_llava_ft.data import builder
from hf_llava_ft.data.builder import load_llava_json
from hf_llava_ft.data.decoded import MISSING, DecodedPictures
from hf_llava_ft.data.image_folder import ImageFolder
from hf_llava_ft.data.json import parts
from hf_llava_ft.data.json.file_index import columns_folder, file_index
from hf_llava_ft.data.json.named_images import NamedImages
from hf_llava_ft.errors import UserError

NUM_ROWS = 200


def rows():
    for number in range(NUM_ROWS):
        turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"Bär {number} " * 40}]
        yield {"id": f"r{number}", "image": ["a.jpg", "sub/b.png"][number % 2], "conversations": turns}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """`data.json` of many small parts, which are read in this process, and `images`."""
    (tmp_path / "images" / "sub").mkdir(parents=True)
    Image.new("RGB", (30, 20), (90, 0, 0)).save(tmp_path / "images" / "a.jpg")
    Image.new("RGB", (20, 30), (0, 90, 0)).save(tmp_path / "images" / "sub" / "b.png")
    (tmp_path / "data.json").write_text(json.dumps(list(rows())))
    monkeypatch.setattr(parts, "_PART_BYTES", 16 * 2**10)
    monkeypatch.setattr(parts, "num_workers", lambda: 1)
    monkeypatch.setattr(builder, "num_workers", lambda: 1)
    return tmp_path


@pytest.fixture
def parsed(monkeypatch):
    """Lengths of what was parsed since."""
    seen: list[int] = []
    parse = parts.rows_of_part

    def counted(contents, is_list):
        seen.append(len(contents))
        return parse(contents, is_list)

    monkeypatch.setattr(parts, "rows_of_part", counted)
    return seen


def load(folder):
    return load_llava_json(folder / "data.json", folder / "images", folder / "cache")


def columns_of(folder):
    return columns_folder(str(folder / "data.json"), folder / "cache")


def test_json_is_parsed_once_and_nothing_of_it_is_left(folder, parsed):
    data = load(folder)
    size = os.path.getsize(folder / "data.json")
    assert len(parsed) > 5 and size <= sum(parsed) < 1.01 * size
    assert not columns_of(folder).exists()
    assert data["id"][:] == [f"r{number}" for number in range(NUM_ROWS)]
    assert load(folder).cache_files == data.cache_files and sum(parsed) < 1.01 * size


def test_an_index_alone_keeps_no_columns(folder, parsed):
    file_index(str(folder / "data.json"), folder / "cache")
    assert parsed and not columns_of(folder).exists()
    assert len(load(folder)) == NUM_ROWS and not columns_of(folder).exists()


def test_what_a_killed_process_left_is_used_where_it_is_whole(folder, parsed):
    expected = load(folder).data.to_pylist()
    shutil.rmtree(folder / "cache")
    file_index(str(folder / "data.json"), folder / "cache", keep_columns=True)
    kept = sorted(columns_of(folder).iterdir())
    kept[1].unlink()
    kept[2].write_bytes(b"half of it")
    parsed.clear()
    assert load(folder).data.to_pylist() == expected
    assert len(parsed) == 2 and not columns_of(folder).exists()


def test_what_was_left_of_an_unfinished_reading_is_not_used(folder):
    columns_of(folder).mkdir(parents=True)
    (columns_of(folder) / "0.arrow").write_bytes(b"something else")
    assert load(folder)["id"][0] == "r0"


def test_a_disk_without_room_for_columns_is_enough(folder, parsed, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pa, "OSFile", full)
    file_index(str(folder / "data.json"), folder / "cache", keep_columns=True)
    assert not list(columns_of(folder).iterdir())
    monkeypatch.undo()
    assert len(load(folder)) == NUM_ROWS


def test_columns_are_removed_when_a_row_is_wrong(folder):
    wrong = list(rows())
    wrong[150]["conversations"].pop()
    (folder / "data.json").write_text(json.dumps(wrong))
    with pytest.raises(UserError, match=r"row 151 \(id 'r150'\) is a conversation without an answer"):
        load(folder)
    assert not columns_of(folder).exists()


def test_a_number_that_only_one_by_one_is_too_long_is_placed(folder):
    text = json.dumps(list(rows())).replace('"id": "r150"', '"id": "r150", "score": ' + "9" * 5000)
    (folder / "data.json").write_text(text)
    index = file_index(str(folder / "data.json"), folder / "cache")
    assert len(index.parts) > 5
    with pytest.raises(UserError, match="not valid JSON at line 1, column .*a number in this row is too long"):
        for part in index.parts:
            list(parts.iter_part(part))


# Images


def named(folder, *names):
    return NamedImages(names, ImageFolder(str(folder / "images")))


def test_states_are_those_of_the_files(folder):
    found = named(folder, "a.jpg", "no.jpg", "sub/b.png", "\ud800.jpg")
    status = os.stat(folder / "images" / "sub" / "b.png")
    assert found.states[2].tolist() == (
        status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
    )  # fmt: skip
    assert found.states[1].tobytes() == found.states[3].tobytes() == MISSING
    decoded = DecodedPictures(folder / "cache")
    assert decoded.keys_of_states(found.states).tolist() == decoded.keys(found.paths).tolist()


@pytest.mark.parametrize(
    "name",
    ["no.jpg", "sub", "/a.jpg", "sub/../a.jpg", "./a.jpg", "sub//b.png", "sub/.", "", "link.jpg", "linked/b.png"],
)
def test_names_that_are_more_than_a_name_are_looked_up_one_by_one(folder, name):
    images = folder / "images"
    (images / "link.jpg").symlink_to("a.jpg")
    (images / "linked").symlink_to("sub")
    (images / "..b.jpg").write_bytes(b"")
    assert named(folder, "a.jpg", "sub/b.png", "..b.jpg").are_plain
    assert not named(folder, "a.jpg", name, "sub/b.png").are_plain
    assert not NamedImages(["a.jpg"], ImageFolder(None)).are_plain


def test_text_alone_needs_no_folder_and_may_have_one(folder):
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]
    (folder / "data.json").write_text(
        json.dumps([{"id": f"r{number}", "conversations": turns} for number in range(3)])
    )
    for images in (None, folder / "images"):
        assert load_llava_json(folder / "data.json", images, folder / "cache")["images"][:] == [[], [], []]


def test_the_digest_follows_names_sizes_and_times(folder):
    before = named(folder, "a.jpg", "sub/b.png").digest
    assert named(folder, "sub/b.png", "a.jpg").digest != before
    shutil.copytree(folder / "images", folder / "copy")  # with its times
    shutil.rmtree(folder / "images")
    shutil.move(folder / "copy", folder / "images")
    assert named(folder, "a.jpg", "sub/b.png").digest == before
    os.utime(folder / "images" / "a.jpg", ns=(0, 0))
    assert named(folder, "a.jpg", "sub/b.png").digest != before


def test_what_goes_to_a_worker_is_small(folder):
    found = named(folder, *(f"{number}.jpg" for number in range(1000)), "a.jpg")
    copied = pickle.dumps(found)
    assert len(copied) < 1000
    assert pickle.loads(copied).are_plain is found.are_plain and pickle.loads(copied).prefix == found.prefix


@pytest.fixture(autouse=True, scope="module")
def quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()
