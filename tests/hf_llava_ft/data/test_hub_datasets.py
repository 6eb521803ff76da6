"""Datasets to a Hub and back: by `push_dataset.py`, `push_to_hub` and `load_dataset`, and by id as `--data_path`."""

import json
import os
from pathlib import Path

import numpy as np
from PIL import Image

from tests import warm_python
from tests.loopback_hub import LoopbackHub

ROOT = Path(__file__).resolve().parents[3]

# In one process, since each pays for importing datasets.
PUSH_AND_LOAD = """
import runpy
import sys
from pathlib import Path
import datasets
from datasets import Image, List
from hf_llava_ft.data.builder import LlavaConversations
from hf_llava_ft.data.features import FEATURES
from hf_llava_ft.data.formats import load_data, open_source
from hf_llava_ft.errors import UserError

folder = Path(sys.argv[1])
data, images = str(folder / "data.json"), str(folder / "images")

def with_bytes(rows):
    shown = []
    for row in rows.cast_column("images", List(Image(decode=False))):
        row["images"] = [image["bytes"] or Path(image["path"]).read_bytes() for image in row["images"]]
        shown.append(row)
    return shown

sys.argv = ["", "--data_path", data, "--image_folder", images, "--repo_id", "user/ours", "--private"]
try:
    runpy.run_path("hub_scripts/push_dataset.py", run_name="__main__")
except SystemExit as stop:
    assert not stop.code, stop.code
builder = LlavaConversations(str(folder / "cache"), data, images)
builder.download_and_prepare()
rows = builder.as_dataset(split="train")
rows.push_to_hub("user/theirs")
expected = with_bytes(rows)
assert len(expected) == 6
(folder / "images").rename(folder / "gone")

for name in ("user/ours", "user/theirs"):
    loaded = datasets.load_dataset(name, split="train")
    assert loaded.features == FEATURES, loaded.features
    assert with_bytes(loaded) == expected, name
    assert with_bytes(datasets.load_dataset(name, split="train", streaming=True)) == expected, name
    (source,) = open_source(name + ":train")
    assert source.describe() == f"{name}:train: detected messages Hub data set, 6 rows", source.describe()
    assert with_bytes(load_data(name)) == expected, name
    assert load_data(name + ":train[:3]:0.7")["id"][:] in (["0", "1"], ["0", "2"], ["1", "2"])

for name, says in (("user/none", "can't be loaded from the Hub"), ("user/ours:test", "can't be loaded from the Hub")):
    try:
        load_data(name)
    except UserError as error:
        assert says in str(error) and chr(10) not in str(error), error
        print(error)
    else:
        raise AssertionError(name)
"""


def test_pushed_and_loaded_again(tmp_path):
    (tmp_path / "images").mkdir()
    rows = []
    for index in range(6):
        noise = np.random.default_rng(index).integers(0, 256, (40, 56, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "images" / f"{index}.png")
        names = [[f"{index}.png"], [f"{index}.png", "0.png"], []][index % 3]
        turns = [{"from": "human", "value": "<image>\n" * len(names) + "What?"}, {"from": "gpt", "value": f"{index}."}]
        rows.append({"id": index, "image": names, "conversations": turns})
    (tmp_path / "data.json").write_text(json.dumps(rows))

    with LoopbackHub() as hub:
        environment = {**os.environ, **hub.environment(tmp_path / "home")}
        done = warm_python.run(["-c", PUSH_AND_LOAD, str(tmp_path)], cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr + str(hub.unknown)
    assert f"Uploaded: {hub.endpoint}/datasets/user/ours" in done.stderr
    assert hub.unknown == []
    # One commit, of everything; nothing of this computer in it.
    (files,) = hub.commits["datasets/user/ours"]
    assert sorted(files) == ["README.md", "data/train-00000-of-00001.parquet"]
    assert hub.private == {"datasets/user/ours": True, "datasets/user/theirs": False}
    pushed = b"".join(hub.repos["datasets/user/ours"].values())
    assert str(tmp_path).encode() not in pushed and b"hf_loopback" not in pushed
