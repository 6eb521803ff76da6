"""A dataset written for the Hub gives back the rows it was made of, pictures byte for byte."""

import ast
import html
import json
import os
import re
import shlex
import tracemalloc
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from datasets import Image as ImageFeature
from datasets import List
from datasets.table import embed_table_storage
from huggingface_hub import DatasetCard
from markdown_it import MarkdownIt
from PIL import Image
from typer.testing import CliRunner

from hf_llava_ft.data import export
from hf_llava_ft.data.builder import LlavaConversations, load_llava_json
from hf_llava_ft.data.export import export_dataset
from hf_llava_ft.data.features import FEATURES
from hf_llava_ft.data.formats import load_data, open_source
from hf_llava_ft.errors import UserError
from hf_llava_ft.hub.dataset_card import dataset_card
from hf_llava_ft.hub.push_dataset import app


@pytest.fixture
def folder(tmp_path):
    """`data.json` with 12 rows: of one image, of two, of text alone; and `images`, in a folder of their own."""
    (tmp_path / "images" / "sub").mkdir(parents=True)
    rows = []
    for index in range(12):
        noise = np.random.default_rng(index).integers(0, 256, (40, 56, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "images" / "sub" / f"{index}.png")
        names = [[f"sub/{index}.png"], [f"sub/{index}.png", "sub/0.png"], []][index % 3]
        question = "<image>\n" * len(names) + "What is it?"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": f"Number {index}: \U0001f431"}]
        rows.append({"id": index, "image": names, "conversations": turns})
    (tmp_path / "data.json").write_text(json.dumps(rows))
    return tmp_path


def write(folder, output="out", **kwargs):
    return export_dataset(open_source(str(folder / "data.json"), folder / "images"), folder / output, **kwargs)


def with_bytes(rows):
    """Rows as (all but the images, name and bytes of each image)."""
    shown = []
    for row in rows.cast_column("images", List(ImageFeature(decode=False))):
        images = []
        for image in row.pop("images"):
            content = Path(image["path"]).read_bytes() if image["bytes"] is None else image["bytes"]
            images.append((os.path.basename(image["path"]), content))
        shown.append((row, images))
    return shown


def test_load_dataset_gives_the_rows_of_the_builder(folder):
    exported = write(folder)
    assert (exported.num_rows, exported.num_images, exported.num_shards) == (12, 12, 1)
    loaded = datasets.load_dataset(str(folder / "out"), split="train", cache_dir=str(folder / "cache"))
    assert loaded.features == FEATURES
    expected = with_bytes(load_llava_json(folder / "data.json", folder / "images", folder / "cache"))
    assert with_bytes(loaded) == expected
    streamed = datasets.load_dataset(str(folder / "out"), split="train", streaming=True)
    assert with_bytes(streamed) == expected
    assert loaded[0]["images"][0].size == (56, 40)
    # Sound without the folder of images, and without a path of this computer anywhere.
    for path in (folder / "out").rglob("*"):
        assert path.is_dir() or str(folder).encode() not in path.read_bytes()


def test_training_reads_the_same_rows_from_it(folder):
    write(folder)
    expected = load_data(folder / "data.json", folder / "images", cache_dir=folder / "cache")
    (source,) = open_source(str(folder / "out"))
    assert source.format == "messages Parquet" and source.num_rows == 12
    assert with_bytes(load_data(folder / "out", cache_dir=folder / "cache")) == with_bytes(expected)


def test_what_push_to_hub_writes_gives_the_same_rows(folder):
    """Shards as `Dataset.push_to_hub` makes them, of what the builder prepared: embedded, then as Parquet."""
    builder = LlavaConversations(str(folder / "cache"), str(folder / "data.json"), str(folder / "images"))
    builder.download_and_prepare()
    prepared = builder.as_dataset(split="train")
    (folder / "pushed" / "data").mkdir(parents=True)
    for index in range(2):
        shard = prepared.shard(2, index, contiguous=True).with_format("arrow")
        shard = shard.map(embed_table_storage, batched=True, batch_size=5)
        shard.to_parquet(folder / "pushed" / "data" / f"train-{index:05d}-of-00002.parquet")
    loaded = datasets.load_dataset(str(folder / "pushed"), split="train", cache_dir=str(folder / "cache"))
    assert loaded.features == FEATURES
    os.rename(folder / "images", folder / "gone")
    assert all(image["bytes"] for images in loaded.with_format("arrow")[:]["images"].to_pylist() for image in images)
    os.rename(folder / "gone", folder / "images")
    assert with_bytes(loaded) == with_bytes(prepared)


def test_files_and_row_groups_are_of_the_size_asked_for(folder):
    exported = write(folder, max_shard_size=20_000)
    files = sorted((folder / "out" / "data").iterdir())
    assert [path.name for path in files] == [f"train-{i:05d}-of-{len(files):05d}.parquet" for i in range(len(files))]
    assert exported.num_shards == len(files) > 3
    assert all(path.stat().st_size < 30_000 for path in files)
    expected = load_llava_json(folder / "data.json", folder / "images", folder / "cache")
    loaded = datasets.load_dataset(str(folder / "out"), split="train", cache_dir=str(folder / "cache"))
    assert with_bytes(loaded) == with_bytes(expected)
    assert all(pq.ParquetFile(path).metadata.num_row_groups >= 1 for path in files)


def test_memory_is_that_of_a_row_group(folder, monkeypatch):
    """400 pictures of 200 kB are 80 MB; a tenth of it is held at once. The control holds all of them."""
    noise = np.random.default_rng(0).integers(0, 256, (260, 256, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "images" / "big.png")
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "Noise."}]
    rows = [{"image": "big.png", "conversations": turns}] * 400
    (folder / "data.json").write_text(json.dumps(rows))

    def peak(output, group_bytes):
        monkeypatch.setattr(export, "_GROUP_BYTES", group_bytes)
        monkeypatch.setattr(export, "_GROUP_ROWS", group_bytes // 100)
        tracemalloc.start()
        write(folder, output, max_shard_size="10MB")
        _, highest = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return highest

    monkeypatch.setattr(export, "_read_back", lambda *args: None)  # which reads row by row, and has a test of its own
    assert peak("bounded", 2**22) < 16 * 2**20
    monkeypatch.setattr(export, "_shard_bytes", lambda size: 2**30)
    assert peak("control", 2**30) > 64 * 2**20


def test_the_card_tells_the_hub_and_a_reader(folder):
    exported = write(folder, card=partial(dataset_card, name="user/cats"))
    card = DatasetCard.load(folder / "out" / "README.md")
    assert card.data.configs == [
        {"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*"}]}
    ]
    (split,) = card.data.dataset_info["splits"]
    assert split == {"name": "train", "num_bytes": exported.num_bytes, "num_examples": 12}
    assert card.data.dataset_info["download_size"] == exported.download_bytes
    assert "# cats" in card.text and "12 rows with 12 images" in card.text
    assert 'load_dataset("user/cats"' in card.text and "--data_path user/cats" in card.text


def test_the_card_says_license_and_language_or_that_it_does_not_know(folder):
    exported = write(folder)
    unknown, known = (
        dataset_card(exported, "user/cats"),
        dataset_card(exported, "user/cats", "cc-by-4.0", ["en", "no"]),
    )
    assert "- License: not stated. Ask" in unknown and "- Language: not stated." in unknown
    assert DatasetCard(unknown).data.license is None and "not recorded here" in unknown
    page = html.unescape(known)
    assert "- License: cc-by-4.0, as stated" in page and "- Language: en, no." in page
    assert DatasetCard(known).data.license == "cc-by-4.0" and "not stated" not in page


OF_YAML = ["no", "on", "1.0", "1_0", "0x1", "12:30", "2026-11-28", "null", "~", "a: b", "- a"]


def test_text_that_yaml_takes_for_something_else_stays_text_on_the_card(folder):
    """Norwegian is `no`, which YAML takes for false."""
    exported = write(folder)
    for text in OF_YAML:
        assert yaml.safe_load(f"language:\n- {text}")["language"] != [text], "or it would need no care"
        header = re.match(r"---\n(.*?)\n---\n", dataset_card(exported, "user/cats", text, [text]), re.DOTALL)
        read = yaml.safe_load(header[1])
        assert (read["license"], read["language"]) == (text, [text])


@pytest.mark.parametrize("change", ["an answer", "a byte of a picture", "a row too few", "two rows swapped"])
def test_a_difference_is_noticed_when_it_is_read_back(folder, monkeypatch, change):
    add, rows = export._Shards.add, []

    def damaged(shards, row):
        rows.append(row)
        if len(rows) == 4:
            if change == "a row too few":
                return
            if change == "an answer":
                row = {**row, "messages": [row["messages"][0], *rows[0]["messages"][1:]]}
            elif change == "a byte of a picture":
                content = bytearray(row["images"][0]["bytes"])
                content[100] ^= 1
                row = {**row, "images": [{**row["images"][0], "bytes": bytes(content)}]}
            elif change == "two rows swapped":
                return
        add(shards, row)
        if len(rows) == 5 and change == "two rows swapped":
            add(shards, rows[3])

    monkeypatch.setattr(export._Shards, "add", damaged)
    with pytest.raises(RuntimeError, match="reads other rows from it than were written"):
        write(folder)
    assert not (folder / "out").exists()


def test_a_bad_row_leaves_nothing(folder):
    (folder / "images" / "sub" / "9.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"row 10 \(id 9\): image '9\.png' can't be decoded"):
        write(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["data.json", "images"]


def test_what_cannot_be_exported_is_said(folder):
    sources = open_source(f"{folder}/data.json:0.5", folder / "images")
    with pytest.raises(UserError, match="has a weight, and a dataset is written whole"):
        export_dataset(sources, folder / "out")
    for size in ("much", "0MB", -1):
        with pytest.raises(UserError, match="is no size; write 500MB or 1GB"):
            write(folder, max_shard_size=size)
    write(folder)
    with pytest.raises(UserError, match="is not empty"):
        write(folder)


def test_the_command(folder):
    arguments = ("--data_path", folder / "data.json", "--image_folder", folder / "images")
    done = CliRunner().invoke(app, [*map(str, arguments), "--output_dir", str(folder / "out")])
    assert done.exit_code == 0, done.stderr
    assert "data.json: detected LLaVA JSON, 12 rows" in done.stderr
    assert "Written and read back: 12 rows and 12 images in 1 file of " in done.stderr
    loaded = datasets.load_dataset(str(folder / "out"), split="train", cache_dir=str(folder / "cache"))
    assert loaded["id"][:] == [str(index) for index in range(12)]
    for options, says in (
        ([], "error: nowhere to write to"),
        (["--output_dir", str(folder / "out")], "is not empty"),
        (["--repo_id", "no name"], "error: --repo_id no name is not a repository name: write user/name"),
        (["--repo_id", "user/name"], "error: HF_HUB_OFFLINE is set, and pushing needs the Hub"),
    ):
        refused = CliRunner().invoke(app, [*map(str, arguments), *options])
        assert refused.exit_code == 2 and says in refused.stderr


@pytest.fixture(autouse=True, scope="module")
def quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.mark.parametrize("name", ['x"; import os', "a b", "# c\n```\nd", "<b>e</b>"])
def test_a_folders_name_stays_text_on_the_card(folder, name):
    exported = write(folder)
    (folder / "README.md").write_text(dataset_card(exported, name), encoding="utf-8")
    page = MarkdownIt("commonmark", {"html": True}).render(DatasetCard.load(folder / "README.md").text)
    program, command = (html.unescape(each) for each in re.findall(r"<code class[^>]*>(.*?)</code>", page, re.DOTALL))
    assert f"load_dataset({json.dumps(name)}, " in program and ast.parse(program)
    assert shlex.split(command)[:4] == ["llava-ft", "train", "--data_path", name]
    assert page.count("<h1>") == 1 and "<b>" not in page
