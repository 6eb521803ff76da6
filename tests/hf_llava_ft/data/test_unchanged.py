"""Files that change while a run reads them are seen, by size and time alone."""

import json
import os
import time

import pytest
from PIL import Image

from hf_llava_ft.checking.sound_rows import sound_rows
from hf_llava_ft.data.collator import LlavaCollator
from hf_llava_ft.data.formats import open_source
from hf_llava_ft.data.streaming import LlavaStream
from hf_llava_ft.data.unchanged import FileChanged, FilesAsTheyWere, RowsAsTheyWere, refuse_younger
from hf_llava_ft.errors import UserError


def test_what_was_changed_is_named_and_the_rest_is_let_be(tmp_path):
    paths = [str(tmp_path / f"{index}.png") for index in range(100)]
    for path in paths:
        with open(path, "w") as file:
            file.write("1234")
    before = FilesAsTheyWere([*paths, *paths])
    assert len(before) == 100
    for path in paths:
        before.check(path, "row 1")
    before.check(str(tmp_path / "another.png"), "row 1")  # was not asked about
    moved = [tmp_path / "copy" / os.path.basename(path) for path in paths]
    (tmp_path / "copy").mkdir()
    for path, copy in zip(paths, moved, strict=True):
        copy.write_text("1234")
        os.utime(copy, ns=(0, os.stat(path).st_mtime_ns))
    assert FilesAsTheyWere(map(str, moved)).digest == before.digest
    os.utime(paths[3], ns=(0, 10**18))  # the same size
    (tmp_path / "4.png").write_text("12345")
    os.unlink(paths[5])
    for path, how in ((paths[3], "4 bytes of 2001"), (paths[4], "5 bytes of"), (paths[5], "not there")):
        with pytest.raises(FileChanged, match=f"^row 7: {path} was changed while the run was going on .*and {how}"):
            before.check(path, "row 7")
    before.check(paths[6], "row 7")
    assert FilesAsTheyWere(paths).digest != before.digest


def test_a_stream_refuses_what_is_younger_than_the_run(tmp_path):
    path = tmp_path / "1.png"
    path.touch()
    refuse_younger(str(path), time.time_ns(), "row 1")
    with pytest.raises(FileChanged, match="row 1: .*1.png was changed .*and the run began 20"):
        refuse_younger(str(path), os.stat(path).st_mtime_ns - 1, "row 1")
    os.utime(path, ns=(0, time.time_ns() + 10**15))  # a clock that was wrong says nothing
    refuse_younger(str(path), 0, "row 1")


@pytest.fixture
def rows(llava_json):
    path, folder = llava_json(6)
    return path, folder


def _rewritten(path):
    data = json.loads(path.read_text())
    path.write_text(json.dumps(data[::-1]) + " ")


def test_rows_in_memory(rows, tiny_processor):
    path, folder = rows
    part = sound_rows(path, folder).parts[0]
    collator = LlavaCollator(tiny_processor, as_they_were=RowsAsTheyWere("data.json", [path], [part.dataset]))
    collator([part.dataset[0], part.dataset[1]])
    image = part.dataset[1]["images"][0]["path"]
    Image.new("RGB", (50, 50), "red").save(image)
    collator([part.dataset[0]])
    with pytest.raises(FileChanged, match=f"data.json: row with id 'row1': {image} was changed while"):
        collator([part.dataset[1]])
    _rewritten(path)
    with pytest.raises(FileChanged, match=f"data.json: row with id 'row2': {path} was changed while"):
        collator([part.dataset[2]])


@pytest.mark.parametrize("on_bad_row", ["raise", "skip"])
def test_rows_of_a_stream(rows, on_bad_row):
    path, folder = rows
    stream = LlavaStream(open_source(path, folder), shuffle_buffer_size=0, on_bad_row=on_bad_row)
    assert len(list(stream)) == 6
    image = folder / json.loads(path.read_text())[2]["image"]
    was = image.read_bytes()
    time.sleep(0.05)  # file systems take their time from a clock that ticks
    Image.new("RGB", (50, 50), "red").save(image)
    with pytest.raises(FileChanged, match=f"data.json: row 3 .*: {image} was changed while"):
        list(stream)
    image.write_bytes(was)
    os.utime(image, ns=(0, 0))
    assert len(list(stream)) == 6
    _rewritten(path)
    with pytest.raises(UserError, match=f"data.json: row 1: {path} was changed while"):
        list(stream)
