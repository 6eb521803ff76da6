"""`LlavaConversations` as any builder of `datasets` is used: by processes, streamed, built again when need be."""

import json
import os

import datasets
import numpy as np
import pytest
from PIL import Image

from hf_llava_ft.data.builder import LlavaConversations
from hf_llava_ft.data.features import FEATURES


@pytest.fixture
def folder(tmp_path):
    """Two data files of 30 rows each, in `a.json` and `b.json`, and ten pictures in `images`."""
    (tmp_path / "images").mkdir()
    for index in range(10):
        Image.new("RGB", (20 + index, 10), (index, 0, 0)).save(tmp_path / "images" / f"{index}.png")
    for name in "ab":
        rows = []
        for index in range(30):
            turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"{name}{index}"}]
            rows.append({"id": f"{name}{index}", "image": f"{index % 10}.png", "conversations": turns})
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    return tmp_path


def builder(folder, cache="cache", images="images"):
    files = [str(folder / "a.json"), str(folder / "b.json")]
    return LlavaConversations(str(folder / cache), files, str(folder / images))


def prepared(folder, cache="cache", images="images", **kwargs):
    made = builder(folder, cache, images)
    made.download_and_prepare(**kwargs)
    return made.as_dataset(split="train")


def plain(rows):
    """The rows with sizes in the place of pictures."""
    return [{**row, "images": [image.size for image in row["images"]]} for row in rows]


def test_processes_and_streams_give_the_rows_of_one_process(folder):
    alone = prepared(folder)
    assert alone.features == FEATURES and len(alone) == 60
    assert plain(prepared(folder, "cache2", num_proc=2)) == plain(alone)
    assert plain(builder(folder, "cache3").as_streaming_dataset(split="train")) == plain(alone)


def test_pictures_are_decoded_when_a_row_is_read(folder, monkeypatch):
    rows = prepared(folder)
    decoded = []
    decode = datasets.Image.decode_example

    def counted(self, value, *args, **kwargs):
        decoded.append(os.path.basename(value["path"]))
        return decode(self, value, *args, **kwargs)

    monkeypatch.setattr(datasets.Image, "decode_example", counted)
    assert rows["id"][3] == "a3" and decoded == []
    assert rows[3]["images"][0].size == (23, 10) and set(decoded) == {"3.png"}


@pytest.mark.parametrize("change", ["a row", "a picture", "the folder", "nothing"])
def test_it_is_built_again_when_something_changes(folder, change):
    first = prepared(folder)
    if change == "a row":
        text = (folder / "b.json").read_text().replace('"b29"', '"new"')
        (folder / "b.json").write_text(text)
    elif change == "a picture":
        Image.new("RGB", (99, 9)).save(folder / "images" / "9.png")
    elif change == "the folder":
        (folder / "images").rename(folder / "moved")
        Image.new("RGB", (99, 9)).save(folder / "moved" / "9.png")
    second = prepared(folder, images="moved" if change == "the folder" else "images")
    assert (first.cache_files == second.cache_files) == (change == "nothing")
    last = {"a row": ("new", (29, 10)), "nothing": ("b29", (29, 10))}.get(change, ("b29", (99, 9)))
    assert (second[59]["id"], second[59]["images"][0].size) == last
    pixel = np.asarray(second[58]["images"][0])[0, 0]
    assert pixel.tolist() == [8, 0, 0]


@pytest.fixture(autouse=True, scope="module")
def quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()
