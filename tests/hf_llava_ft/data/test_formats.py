"""Files as other tools write them: each is named for what it is, and gives the rows that were meant."""

import base64
import csv
import json
import pickle
import re
from pathlib import Path

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Features, Image, List, Value
from datasets.table import embed_table_storage
from PIL import Image as PILImage

from hf_llava_ft.data.collator import open_picture
from hf_llava_ft.data.formats import load_data, open_source
from hf_llava_ft.data.formats.dialects import detect_dialect
from hf_llava_ft.errors import UserError

COLOURS = [(200, 30, 30), (30, 200, 30), (30, 30, 200)]


@pytest.fixture
def folder(tmp_path):
    """A folder with `images/0.png`, `1.png` and `2.png` in three colours and sizes."""
    (tmp_path / "images").mkdir()
    for index, colour in enumerate(COLOURS):
        PILImage.new("RGB", (30 + index, 20), colour).save(tmp_path / "images" / f"{index}.png")
    return tmp_path


def png(folder, index):
    return (folder / "images" / f"{index}.png").read_bytes()


def load(folder, name, **kwargs):
    return load_data(str(folder / name), folder / "images", cache_dir=folder / "cache", **kwargs)


def shown(row):
    """A row of the dataset as (role, text with [colour number] for an image) pairs."""
    pictures = iter(row["images"])
    turns = []
    for message in row["messages"]:
        parts = []
        for part in message["content"]:
            if part["type"] == "image":
                parts.append(f"[{COLOURS.index(open_picture(next(pictures)).getpixel((0, 0)))}]")
            else:
                parts.append(part["text"])
        turns.append((message["role"], "".join(parts)))
    assert next(pictures, None) is None
    return turns


def read(folder, name, **kwargs):
    """(format in words, ids, shown rows), from the sources read row by row and from the dataset alike."""
    (source,) = open_source(str(folder / name), folder / "images", **kwargs)
    streamed = [source.row(raw, number) for number, raw in source.iter_raw()]
    dataset = load(folder, name, **kwargs)
    assert [shown(row) for row in streamed] == [shown(row) for row in dataset]
    assert [row["num_images"] for row in dataset] == [len(row["images"]) for row in streamed]
    return source.format, dataset["id"][:], [shown(row) for row in dataset]


def write_json(folder, rows, name="data", lines=False):
    # No ending: contents decide.
    text = "".join(f"{json.dumps(row)}\n" for row in rows) if lines else json.dumps(rows)
    (folder / name).write_text(text, encoding="utf-8")
    return name


def sentence(call, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")
    return message


ASKED = [("user", "[0]\nWhat is it?"), ("assistant", "A red one.")]


# JSON


@pytest.mark.parametrize("lines", [False, True])
def test_llava_as_released(folder, lines):
    pretrain = {
        "id": "004539375",
        "image": "0.png",
        "conversations": [{"from": "human", "value": "Describe it.\n<image>"}, {"from": "gpt", "value": "red square"}],
    }
    mix = {
        "id": 33471,
        "model": "llava",
        "conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}],
    }
    science = {
        "id": "12",
        "image": "2.png",
        "conversations": [
            {"from": "human", "value": "<image>\nContext: N/A\nQuestion: which?\nOptions: (A) red (B) blue"},
            {"from": "gpt", "value": "LECTURE: ...\nSOLUTION: ...\n###\nANSWER: B."},
        ],
    }
    kind, ids, rows = read(folder, write_json(folder, [pretrain, mix, science], lines=lines))
    assert kind == ("LLaVA JSON Lines" if lines else "LLaVA JSON")
    assert ids == ["004539375", "33471", "12"]
    assert rows == [
        [("user", "[0]\nDescribe it."), ("assistant", "red square")],
        [("user", "Hello"), ("assistant", "Hi")],
        [
            ("user", "[2]\nContext: N/A\nQuestion: which?\nOptions: (A) red (B) blue"),
            ("assistant", "LECTURE: ...\nSOLUTION: ...\n###\nANSWER: B."),
        ],
    ]


def test_sharegpt_with_roles_of_either_kind_and_a_system_key(folder):
    rows = [
        {
            "system": "Be brief.",
            "images": ["0.png", "2.png"],
            "conversations": [
                {"from": "human", "value": "Compare <image> with <image>."},
                {"from": "gpt", "value": "Red, blue."},
            ],
        },
        {
            "images": [],
            "system": "",
            "conversations": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}],
        },
    ]
    kind, ids, read_rows = read(folder, write_json(folder, rows))
    assert (kind, ids) == ("ShareGPT JSON", ["1", "2"])
    assert read_rows == [
        [("system", "Be brief."), ("user", "Compare [0] with [2]."), ("assistant", "Red, blue.")],
        [("user", "Hello"), ("assistant", "Hi")],
    ]


def typed(*parts):
    return [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]


@pytest.mark.parametrize(
    ("content", "images", "expected"),
    [
        ("<image>\nWhat is it?", ["0.png"], "[0]\nWhat is it?"),
        (typed(None, "What is it?"), ["0.png"], "[0]\nWhat is it?"),
        (typed("What is it?", None), ["0.png"], "[0]\nWhat is it?"),
        (typed("<image>\nWhat is it?"), ["0.png"], "[0]\nWhat is it?"),
        (typed("From ", None, " to ", None, "?"), ["0.png", "1.png"], "From [0] to [1]?"),
        (typed(None, None, "Which?"), ["2.png", "1.png"], "[2][1]Which?"),
        ("No place for it?", ["1.png"], "[1]\nNo place for it?"),
        ("None for these?", ["1.png", "2.png"], "[1]\n[2]\nNone for these?"),
        ([{"type": "image", "image": "1.png"}, {"type": "text", "text": "One"}], None, "[1]\nOne"),
        ([{"type": "image", "path": "1.png", "text": None}, {"type": "text", "text": "One"}], [], "[1]\nOne"),
        (
            [{"type": "image", "index": 1}, {"type": "text", "text": "or"}, {"type": "image", "index": 0}],
            ["0.png", "1.png"],
            "[1]or[0]",
        ),
    ],
)
def test_messages_with_text_or_parts(folder, content, images, expected):
    row = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "Yes."}]}
    if images is not None:
        row["images"] = images
    kind, _, rows = read(folder, write_json(folder, [row]))
    assert kind == "messages JSON"
    assert rows == [[("user", expected), ("assistant", "Yes.")]]


@pytest.mark.parametrize("header", ["data:image/png;base64,", "data:image/png;charset=utf-8;base64,"])
def test_openai_style_parts_with_the_picture_in_an_address(folder, header):
    url = header + base64.b64encode(png(folder, 1)).decode()
    row = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "This "},
                    {"type": "image_url", "image_url": {"url": url, "detail": "low"}},
                    {"type": "text", "text": " or that "},
                    {"type": "image_url", "image_url": {"url": "2.png"}},
                    {"type": "text", "text": "?"},
                ],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "That."}]},
        ]
    }
    _, _, rows = read(folder, write_json(folder, [row], lines=True))
    assert rows == [[("system", "Be brief."), ("user", "This [1] or that [2]?"), ("assistant", "That.")]]


def test_a_picture_in_an_address_anywhere_in_a_llava_json(folder):
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A red one."}]
    rows = [{"id": index, "image": "0.png", "conversations": turns} for index in range(40)]
    rows.append({**rows[0], "image": "data:image/png;base64," + base64.b64encode(png(folder, 0)).decode()})
    for name in (write_json(folder, rows, "last"), write_json(folder, rows[::-1], "first")):
        _, _, shown_rows = read(folder, name)
        assert shown_rows == [ASKED] * 41


@pytest.mark.parametrize("key", ["image", "images"])
def test_prompt_and_completion_as_text_or_messages(folder, key):
    image = "0.png" if key == "image" else ["0.png"]
    rows = [
        {"prompt": "<image>\nWhat is it?", "completion": "A red one.", key: image},
        {
            "prompt": [{"role": "user", "content": "What is it?"}],
            "completion": [{"role": "assistant", "content": "A red one."}],
            key: image,
        },
    ]
    kind, _, read_rows = read(folder, write_json(folder, rows))
    assert kind == "prompt/completion JSON"
    assert read_rows == [ASKED, ASKED]


# Tables


def test_llava_columns_in_parquet_by_pandas(folder):
    """As datasets of LLaVA are put on the Hub: an `image` of path and bytes, null for text alone."""
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A red one."}]
    frame = pd.DataFrame(
        {
            "id": [7, 8],
            "image": [{"bytes": png(folder, 0), "path": "gone.png"}, None],
            "conversations": [turns, [{"from": "human", "value": "Hello"}, turns[1]]],
            "data_source": ["a", "b"],
        }
    )
    frame.to_parquet(folder / "data")
    kind, ids, rows = read(folder, "data")
    assert (kind, ids) == ("LLaVA Parquet", ["7", "8"])
    assert rows == [ASKED, [("user", "Hello"), ("assistant", "A red one.")]]


def test_plain_bytes_in_parquet_by_pyarrow(folder):
    table = pa.table({"image": [png(folder, 0), png(folder, 1)], "caption": ["Red.", "Green."]})
    pq.write_table(table, folder / "data", row_group_size=1)
    kind, _, rows = read(folder, "data")
    assert kind == "image-caption Parquet"
    assert rows == [[("user", "[0]"), ("assistant", "Red.")], [("user", "[1]"), ("assistant", "Green.")]]


def trl_dataset(folder):
    """Images and typed messages in the columns that TRL reads, with null for a part's missing keys."""
    part = {"type": Value("string"), "text": Value("string")}
    features = Features(
        {
            "messages": List({"role": Value("string"), "content": List(part)}),
            "images": List(Image()),
        }
    )
    rows = [
        {
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "A red one."}]},
            ],
            "images": [PILImage.open(folder / "images" / "0.png")],
        }
    ]
    for row in rows:
        for message in row["messages"]:
            message["content"] = [{"type": None, "text": None, **item} for item in message["content"]]
    return datasets.Dataset.from_list(rows, features=features)


def test_a_folder_of_save_to_disk(folder):
    trl_dataset(folder).save_to_disk(folder / "saved")
    assert read(folder, "saved") == ("messages save_to_disk folder", ["1"], [ASKED])


def test_splits_of_a_saved_dictionary(folder):
    both = datasets.DatasetDict({"train": trl_dataset(folder), "test": trl_dataset(folder)})
    both.save_to_disk(folder / "saved")
    assert read(folder, "saved")[2] == [ASKED]
    assert read(folder, "saved:test")[2] == [ASKED]
    assert "has the splits train, test, not 'val'; write " in sentence(read, folder, "saved:val")


def test_a_folder_of_parquet_by_datasets(folder):
    (folder / "set" / "data").mkdir(parents=True)
    embedded = trl_dataset(folder).with_format("arrow").map(embed_table_storage, batched=True).with_format(None)
    for split in ("train", "test"):  # as push_to_hub does it
        embedded.to_parquet(folder / "set" / "data" / f"{split}-00000-of-00001.parquet")
    assert read(folder, "set") == ("messages Parquet", ["1"], [ASKED])
    assert read(folder, "set:test") == ("messages Parquet", ["1"], [ASKED])


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("inside", ["", "train"])
def test_an_imagefolder_with_metadata(folder, kind, inside):
    place = folder / "captioned" / inside
    (place / "sub").mkdir(parents=True)
    (place / "sub" / "red.png").write_bytes(png(folder, 0))
    (place / "blue.png").write_bytes(png(folder, 2))
    frame = pd.DataFrame({"file_name": ["sub/red.png", "blue.png"], "text": ["Red, very.", 'A "blue" one\nof two.']})
    if kind == "csv":
        frame.to_csv(place / "metadata.csv", index=False, quoting=csv.QUOTE_MINIMAL)
    elif kind == "jsonl":
        frame.to_json(place / "metadata.jsonl", orient="records", lines=True)
    else:
        frame.to_parquet(place / "metadata.parquet", index=False)
    # What datasets makes of the same folder is the reference.
    reference = datasets.load_dataset("imagefolder", data_dir=str(folder / "captioned"), cache_dir=str(folder / "c"))
    reference = reference["train"].sort("text")
    name, _, rows = read(folder, "captioned")
    assert name == f"image-caption folder (metadata.{kind})"
    assert sorted(rows, key=lambda row: row[1][1]) == [
        [("user", f"[{COLOURS.index(row['image'].convert('RGB').getpixel((0, 0)))}]"), ("assistant", row["text"])]
        for row in reference
    ]


def test_one_caption_in_an_imagefolder(folder):
    (folder / "images" / "metadata.jsonl").write_text('{"file_name": "1.png", "caption": "Green."}\n')
    assert read(folder, "images")[2] == [[("user", "[1]"), ("assistant", "Green.")]]


def test_a_csv_of_captions(folder):
    (folder / "data").write_bytes(b'\xef\xbb\xbfimage,caption\r\n0.png,"Red, very."\r\n1.png,Green.\r\n')
    kind, _, rows = read(folder, "data")
    assert kind == "image-caption CSV"
    assert rows == [[("user", "[0]"), ("assistant", "Red, very.")], [("user", "[1]"), ("assistant", "Green.")]]


def test_a_folder_with_one_json(folder):
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A red one."}]
    write_json(folder, [{"id": "1", "image": "0.png", "conversations": turns}], "chat.json")
    assert read(folder, ".") == ("LLaVA JSON", ["1"], [ASKED])


# Mixtures


def numbered(folder, name, count):
    turns = [[{"from": "human", "value": "?"}, {"from": "gpt", "value": str(i)}] for i in range(count)]
    return str(
        folder / write_json(folder, [{"id": f"{name}{i}", "conversations": t} for i, t in enumerate(turns)], name)
    )


def mixed(folder, data_path, **kwargs):
    return load_data(data_path, cache_dir=folder / "cache", **kwargs)["id"][:]


def test_a_weight_draws_a_share_of_the_rows(folder):
    a, b = numbered(folder, "a", 100), numbered(folder, "b", 3)
    ids = mixed(folder, f"{a}:0.3,{b}")
    drawn = ids[:30]
    assert ids[30:] == ["b0", "b1", "b2"]
    assert len(set(drawn)) == 30 and drawn == sorted(drawn, key=lambda name: int(name[1:]))
    assert drawn != [f"a{i}" for i in range(30)]
    assert mixed(folder, f"{a}:0.3,{b}") == ids
    assert mixed(folder, f"{a}:0.3,{b}", seed=43)[:30] != drawn
    assert mixed(folder, [f"{a}:0.3", b]) == ids
    # The very rows, so that a library which drew others would be noticed.
    assert drawn[:5] == DRAWN


DRAWN = ["a0", "a1", "a3", "a7", "a8"]


def test_a_weight_above_one_repeats_whole_sets_first(folder):
    ids = mixed(folder, f"{numbered(folder, 'a', 4)}:2.5")
    counts = sorted(ids.count(f"a{i}") for i in range(4))
    assert len(ids) == 10 and counts == [2, 2, 3, 3]


def test_two_equal_sets_draw_different_rows(folder):
    a = numbered(folder, "a", 1000)
    ids = mixed(folder, f"{a}:0.1,{a}:0.1")
    assert ids[:100] != ids[100:]


def test_a_name_that_looks_like_a_mixture_is_a_name(folder):
    for name in ("a,b:0.5", "c:train", "d 1"):
        assert len(mixed(folder, numbered(folder, name, 2))) == 2
    assert len(mixed(folder, f"{folder}/c:train:0.5")) == 1


@pytest.mark.parametrize(
    ("data_path", "says"),
    [
        ("a:0", "the weight 0 is not above 0 and up to 1000"),
        ("a:1001", "the weight 1001 is not above 0"),
        ("a:", "nothing follows the colon"),
        ("a,no.json", "no.json can't be read (No such file or directory)"),
        ("some/where.json", "some/where.json can't be read"),
        ("a:validation", "a is a file and has no split 'validation'"),
        ("", "no data is given"),
        (",", "no data is given"),
    ],
)
def test_data_paths_that_lead_nowhere(folder, monkeypatch, data_path, says):
    numbered(folder, "a", 2)
    monkeypatch.chdir(folder)
    assert says in sentence(load_data, data_path, cache_dir=folder / "cache")


def test_a_hub_id_is_asked_for_at_the_hub(folder, monkeypatch):
    """Without a network: what is asked for, and that a failure is a sentence."""
    monkeypatch.chdir(folder)
    asked = []

    def refuse(name):
        asked.append(name)
        raise ConnectionError("no network\nhere")

    monkeypatch.setattr(datasets, "load_dataset_builder", refuse)
    says = sentence(load_data, "user/name:train[:10%]:0.5", cache_dir=folder / "cache")
    assert asked == ["user/name"]
    assert says.startswith("user/name is no file here and can't be loaded from the Hub (no network here); ")


# The cache


def test_the_cache_is_used_until_files_images_or_options_change(folder):
    row = {"messages": [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "Red."}]}
    write_json(folder, [{**row, "images": ["0.png"]}])

    def cache(**kwargs):
        return load(folder, "data", **kwargs).cache_files[0]["filename"]

    first = cache()
    assert cache() == first
    (folder / "images" / "0.png").write_bytes(png(folder, 1))
    second = cache()
    assert second != first and cache() == second
    assert [turn[1] for turn in shown(load(folder, "data")[0])] == ["[1]", "Red."]
    write_json(folder, [{**row, "images": ["2.png"]}])
    third = cache()
    assert third not in (first, second)
    assert cache(allow_outside=True) not in (first, second, third)


def test_sources_travel_to_other_processes(folder):
    trl_dataset(folder).save_to_disk(folder / "saved")
    (source,) = pickle.loads(pickle.dumps(open_source(str(folder / "saved"))))
    assert [shown(source.row(raw, number)) for number, raw in source.iter_raw()] == [ASKED]


def test_every_example_of_the_documentation_is_a_row(folder):
    page = (Path(__file__).resolve().parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
    examples = re.findall(r"\| `(\{.*\})` \|", page)
    assert len(examples) == 6
    for example in examples:
        row = json.loads(example)
        assert detect_dialect(row).parse(row, "data.md", 1)["messages"][-1]["content"][0]["text"]


def test_what_was_found_is_said(folder):
    (source,) = open_source(numbered(folder, "a", 2))
    assert source.describe().endswith("a: detected LLaVA JSON")
    assert source.describe(1203).endswith("a: detected LLaVA JSON, 1,203 rows")


@pytest.fixture(autouse=True, scope="module")
def quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()
