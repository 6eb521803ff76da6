"""A Hub data set of JSON files arrives as it was written, whatever mixes in its columns."""

import io
import json
import os
import tarfile
from pathlib import Path

from PIL import Image

from tests import warm_python
from tests.loopback_hub import LoopbackHub

ROOT = Path(__file__).resolve().parents[3]

READ = """
import json
import sys
from pathlib import Path
import datasets
from hf_llava_ft.data.formats import load_data, open_source
from hf_llava_ft.data.formats.hub_datasets import HubJson
from hf_llava_ft.data.streaming import LlavaStream
from hf_llava_ft.errors import UserError

datasets.disable_progress_bars()
folder = Path(sys.argv[1])
found = {}

def answers(rows):
    return [message["content"][-1]["text"] for row in rows for message in row["messages"][1::2]]

for name in json.loads((folder / "names.json").read_text()):
    try:
        [source] = open_source(name)
        kind = type(source.container).__name__
        rows = load_data(name, folder / "images", cache_dir=folder / "cache")
        stream = LlavaStream(open_source(name, folder / "images"), shuffle_buffer_size=0, cache_dir=folder / "cache")
        streamed = list(stream)
        found[name] = {
            "kind": kind,
            "ids": rows["id"][:],
            "answers": answers(rows),
            "num_images": [len(row["images"]) for row in rows],
            "streamed": sorted([row["id"], *answers([row])] for row in streamed),
        }
    except UserError as error:
        found[name] = {"error": str(error)}
(folder / "found.json").write_text(json.dumps(found))
"""


def row(answer, **fields) -> dict:
    turns = [{"from": "human", "value": "Which number?"}, {"from": "gpt", "value": answer}]
    return {**fields, "conversations": turns}


def lines(rows) -> bytes:
    return "".join(json.dumps(each) + "\n" for each in rows).encode()


def read(names: list[str], folder: Path, hub: LoopbackHub, **environment) -> dict:
    (folder / "names.json").write_text(json.dumps(names))
    environment = {**os.environ, **hub.environment(folder / "home"), **environment}
    done = warm_python.run(["-c", READ, str(folder)], cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr + str(hub.unknown)
    return json.loads((folder / "found.json").read_text())


def webdataset() -> bytes:
    buffer, picture = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "JPEG")
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for number in range(8):
            for ending, content in (("jpg" if number < 6 else "JPG", picture.getvalue()), ("txt", b"A square.")):
                member = tarfile.TarInfo(f"{number:04}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def test_texts_stay_texts(tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / f"{name}.png")
    # Of mixed types where the schema allows it: numbers and texts as ids, one image and several.
    shown = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "true"}]
    both = [{"from": "human", "value": "<image><image>\nWhat?"}, {"from": "gpt", "value": "null"}]
    mixed = [row("000123", id="007"), row("1.50", id=8), {"id": "9", "image": "a.png", "conversations": shown}]
    mixed.append({"id": 10, "image": ["a.png", "b.png"], "conversations": both})
    # Behind what datasets reads first, a number among the answers.
    late = [row(f"{index:06}", id=index, note="x" * 1000) for index in range(12_000)]
    with LoopbackHub() as hub:
        hub.upload("datasets/user/mixed", {"train.jsonl": lines(mixed), "test.json": json.dumps(mixed[:1]).encode()})
        hub.upload("datasets/user/parts", {f"data/train-{i}.jsonl": lines(mixed[i : i + 1]) for i in range(2)})
        hub.upload("datasets/user/numbers", {"data.jsonl": lines([*late, row(5, id="n")])})
        hub.upload("datasets/user/tar", {"data.tar": webdataset()})
        names = ["user/mixed", "user/mixed:test", "user/mixed:train[1:3]", "user/mixed:none", "user/parts"]
        found = read([*names, "user/numbers", "user/tar"], tmp_path, hub)
        offline = read(names, tmp_path, hub, HF_HUB_OFFLINE="1")

    whole = found["user/mixed"]
    assert whole["kind"] == "HubJson"
    assert whole["ids"] == ["007", "8", "9", "10"]
    assert whole["answers"] == ["000123", "1.50", "true", "null"]
    assert whole["num_images"] == [0, 0, 1, 2]
    assert whole["streamed"] == sorted([str(i), a] for i, a in zip(whole["ids"], whole["answers"], strict=True))
    assert found["user/mixed:test"]["answers"] == ["000123"]
    assert found["user/mixed:train[1:3]"]["answers"] == ["1.50", "true"]
    assert found["user/mixed:train[1:3]"]["streamed"] == [["8", "1.50"], ["9", "true"]]
    assert "none" in found["user/mixed:none"]["error"]
    assert found["user/parts"]["answers"] == ["000123", "1.50"]
    assert found["user/parts"]["streamed"] == [["007", "000123"], ["8", "1.50"]]
    assert "user/numbers: row 12001" in found["user/numbers"]["error"]
    assert "turn 2" in found["user/numbers"]["error"]
    assert "WebDataset" in found["user/tar"]["error"]
    for name in names:
        assert offline[name].get("answers") == found[name].get("answers"), (name, offline[name])
