"""Broken and hostile files of each format: one sentence names the file and the row, and nothing hangs or is killed."""

import base64
import json
import os
import struct
import time
import zipfile
import zlib

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hf_llava_ft.data.formats import containers, load_data, open_source
from hf_llava_ft.data.formats import images as images_module
from hf_llava_ft.data.formats.dialects import IMAGE_CAPTION, LLAVA, MESSAGES, PROMPT_COMPLETION
from hf_llava_ft.data.formats.mixture import parse_data_path
from hf_llava_ft.errors import UserError
from tests.examples import examples

QUESTION, ANSWER = "<image>\nWhat is it?", "A cat."


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (30, 20), (200, 30, 30)).save(tmp_path / "images" / "a.png")
    return tmp_path


def llava(image, question=QUESTION, answer=ANSWER, **fields):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"image": image, "conversations": turns, **fields}


def sharegpt(image, question=QUESTION, answer=ANSWER, **fields):
    return {**llava(None, question, answer), "images": [image], "system": "Be brief.", **fields}


def messages(image, question=QUESTION, answer=ANSWER, **fields):
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, "images": [image], **fields}


def prompt(image, question=QUESTION, answer=ANSWER, **fields):
    return {"prompt": question, "completion": answer, "image": image, **fields}


def caption(image, question=QUESTION, answer=ANSWER, **fields):
    return {"image": image, "caption": answer, **fields}


DIALECTS = [llava, sharegpt, messages, prompt, caption]


def write(folder, rows, container):
    """The rows in one of the containers; the path of the data."""
    path = folder / "data"
    if container == "json":
        path.write_text(json.dumps(rows))
    elif container == "lines":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif container == "parquet":
        pd.DataFrame(rows).to_parquet(path)
    elif container == "saved":
        datasets.Dataset.from_pandas(pd.DataFrame(rows)).save_to_disk(path)
    return str(path)


CONTAINERS = ["json", "lines", "parquet", "saved"]


def refusal(folder, path, **kwargs):
    """The sentence of the refusal; the time it takes and what it leaves are checked beside."""
    started = time.monotonic()
    with pytest.raises(UserError) as caught:
        load_data(path, folder / "images", cache_dir=folder / "cache", **kwargs)
    assert time.monotonic() - started < 20
    message = str(caught.value)
    assert "\n" not in message and "\0" not in message and message.endswith(".") and len(message) < 1000
    left = [file for file in (folder / "cache").rglob("*") if file.suffix == ".arrow" or "incomplete" in file.name]
    assert left == []
    return message


# Images, in every dialect and container


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("container", CONTAINERS)
def test_paths_that_leave_the_folder(folder, dialect, container):
    Image.new("RGB", (4, 4)).save(folder / "secret.png")
    (folder / "images" / "link.png").symlink_to(folder / "secret.png")
    for name in ("../secret.png", str(folder / "secret.png"), "link.png", f"file://{folder}/secret.png"):
        path = write(folder, [dialect("a.png", id="one"), dialect(name, id="two")], container)
        says = refusal(folder, path)
        assert "row 2 (id 'two'): image '" in says and "--allow_images_outside" in says
        assert len(load_data(path, folder / "images", cache_dir=folder / "cache2", allow_outside=True)) == 2


def png_header(width, height):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("how", ["path", "address", "bytes"])
def test_a_picture_of_50000_by_50000(folder, dialect, how):
    bomb = png_header(50_000, 50_000)
    (folder / "images" / "bomb.png").write_bytes(bomb)
    a = (folder / "images" / "a.png").read_bytes()
    values = {
        "path": ("a.png", "bomb.png"),
        "address": tuple("data:image/png;base64," + base64.b64encode(content).decode() for content in (a, bomb)),
        "bytes": ({"path": None, "bytes": a}, {"path": "bomb.png", "bytes": bomb}),
    }[how]
    rows = [dialect(value, id=str(number)) for number, value in enumerate(values)]
    says = refusal(folder, write(folder, rows, "parquet" if how == "bytes" else "json"))
    assert "row 2 (id '1'): " in says and "can't be decoded (" in says and "pixels" in says


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "an image holds no bytes"),
        (b"<html>404</html>", "can't be decoded (no image format that Pillow knows)"),
        (png_header(100, 100), "can't be decoded ("),
        (b"x" * 2000, "has 2,000 bytes, and 1,000 are the limit"),
    ],
)
def test_embedded_pictures_that_are_none(folder, monkeypatch, content, says):
    monkeypatch.setattr(images_module, "MAX_IMAGE_BYTES", 1000)
    good = {"path": None, "bytes": (folder / "images" / "a.png").read_bytes()}
    rows = [messages(good), messages({"path": None, "bytes": content})]
    assert f"row 2: {'an image ' if says.startswith(('can', 'has')) else ''}{says}" in refusal(
        folder, write(folder, rows, "parquet")
    )


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("data:image/png;base64,iVBOR!!!", "data address is not valid base64"),
        ("data:image/png,iVBOR", "data address is not base64"),
        ("data:", "data address is not base64"),
        ("data:image/png;base64,", "an image holds no bytes"),
        ("https://example.com/a.png", "is an address; download the file into the image folder and write its path, or"),
        ("ftp://example.com/a.png", "is an address"),
        (5, "holds a number"),
        ({"file": "a.png"}, "holds an object"),
        ({"bytes": "aGk=", "path": None}, 'holds "bytes" that are text'),
        ({"bytes": None, "path": None}, "holds null"),
        ("", "holds an empty path"),
    ],
)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_values_that_are_no_image(folder, dialect, value, says):
    path = write(folder, [dialect("a.png", id="one"), dialect(value, id="two")], "json")
    message = refusal(folder, path)
    assert "data: row 2 (id 'two')" in message and says in message


# Text, in every dialect and container


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("container", CONTAINERS)
def test_nul_characters(folder, dialect, container):
    rows = [dialect("a.png", id="one"), dialect("a.png", answer="a\0b", id="two")]
    assert "row 2 (id 'two')" in (says := refusal(folder, write(folder, rows, container)))
    assert "holds a NUL character" in says


@pytest.mark.parametrize("dialect", DIALECTS)
def test_half_characters_and_empty_answers(folder, dialect):
    for answer, says in (
        ("a\ud800", "half of a surrogate pair"),
        ("", "is an empty answer"),
        (" \n", "is an empty answer"),
    ):
        path = write(folder, [dialect("a.png"), dialect("a.png", answer=answer)], "json")
        assert "row 2: " in (message := refusal(folder, path)) and says in message


@pytest.mark.parametrize("dialect", [llava, sharegpt, messages, prompt])
def test_counts_that_differ(folder, dialect):
    path = write(folder, [dialect("a.png"), dialect("a.png", question="<image><image>")], "lines")
    assert "row 2: 2 <image> placeholders and 1 image; " in refusal(folder, path)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("container", ["json", "lines"])
def test_ids_of_every_type(folder, dialect, container):
    rows = [dialect("a.png", id=value) for value in ("one", 2, None, "4")]
    data = load_data(write(folder, rows, container), folder / "images", cache_dir=folder / "cache2")
    assert data["id"][:] == ["one", "2", "3", "4"]
    for value in (True, 1.5, [1], {"a": 1}):
        path = write(folder, [*rows, dialect("a.png", id=value)], container)
        assert 'row 5: the "id" is ' in refusal(folder, path)


def test_ids_in_columns(folder):
    pd.DataFrame([caption("a.png", id=1), caption("a.png", id=2)]).to_parquet(folder / "data")
    assert load_data(folder / "data", folder / "images", cache_dir=folder / "cache")["id"][:] == ["1", "2"]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_bom_and_crlf(folder, dialect):
    text = "\ufeff" + "".join(json.dumps(dialect("a.png", id=name)) + "\r\n" for name in "ab")
    (folder / "data").write_bytes(text.encode())
    data = load_data(folder / "data", folder / "images", cache_dir=folder / "cache")
    assert data["id"][:] == ["a", "b"]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_of_two_equal_keys_the_last_wins(folder, dialect):
    text = json.dumps(dialect("a.png", id="second"))
    (folder / "data").write_text("[" + text.replace("{", '{"id": "first", ', 1) + "]")
    assert load_data(folder / "data", folder / "images", cache_dir=folder / "cache")["id"][:] == ["second"]


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '[{"messages": ' + "[" * 100_000,
        '{"messages": ' + '{"a":' * 100_000,
        '[{"messages": []}, {"messages": [' + '{"content": [' * 50_000,
    ],
)
def test_nesting_bombs(folder, text):
    (folder / "data").write_text(text)
    assert "brackets are nested too deeply" in refusal(folder, str(folder / "data"))


# Files of 4 GB, of which next to nothing is on the disk


def sparse(path, start, size=4 * 2**30):
    with open(path, "wb") as file:
        file.write(start)
        file.truncate(size)
    return str(path)


def bytes_read():
    with open("/proc/self/io") as file:
        return int(next(line for line in file if line.startswith("rchar")).split()[1])


@pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="counts the bytes that Linux says were read")
@pytest.mark.parametrize(
    ("start", "says"),
    [
        (b'[{"id": "', "not valid JSON at line 1, column 10 (invalid control character at)"),
        (b'{"messages": "', "not valid JSON at line 1"),
        (b"", "not valid JSON at line 1, column 1"),
        (b"file_name,text\n", "has a line longer than 67108864 characters"),
        (b"PAR1", "is not a whole Parquet file"),
    ],
)
def test_files_of_four_gigabytes(folder, start, says):
    path, before = sparse(folder / "data", start), bytes_read()
    assert says in refusal(folder, path)
    assert bytes_read() - before < 200 * 2**20


def test_a_string_of_any_length_is_not_held(folder, monkeypatch):
    """The text of a 4 GB string is real here, as much of it as may be read before it is refused."""
    from hf_llava_ft.data.json import rows as json_rows

    monkeypatch.setattr(json_rows, "MAX_ROW_CHARS", 2**21)
    with open(folder / "data", "wb") as file:
        file.write(b'[{"messages": "' + b"a" * 2**24)
    assert "a row is longer than 2097152 characters" in refusal(folder, str(folder / "data"))


def test_a_picture_of_four_gigabytes(folder):
    sparse(folder / "images" / "big.png", png_header(10, 10)[:40])
    path = write(folder, [messages("a.png"), messages("big.png")], "json")
    assert "row 2: image 'big.png' can't be decoded" in refusal(folder, path)


def test_parquet_that_unpacks_to_gigabytes(folder, monkeypatch):
    monkeypatch.setattr(containers, "_MAX_MEAN_ROW_BYTES", 2**20)
    table = pa.Table.from_pylist([caption("a.png"), caption("a.png", answer="a" * 2**23)])
    pq.write_table(table, folder / "data", row_group_size=1, compression="zstd", use_dictionary=False)
    assert os.path.getsize(folder / "data") < 2**14
    assert "data: rows 2 to 2 unpack to 8,3" in refusal(folder, str(folder / "data"))


# Containers


def test_broken_parquet(folder):
    table = pa.Table.from_pylist([caption("a.png")] * 1000)
    pq.write_table(table, folder / "data", use_dictionary=False, compression="none")
    whole = (folder / "data").read_bytes()
    for content in (whole[:-1], whole[: len(whole) // 2], b"PAR1", b"PAR1PAR1", b"PAR1" + b"\xff" * 100 + b"PAR1"):
        (folder / "data").write_bytes(content)
        assert "data is not a whole Parquet file (" in refusal(folder, str(folder / "data"))
    damaged = bytearray(whole)
    damaged[200:1200] = os.urandom(1000)
    (folder / "data").write_bytes(bytes(damaged))
    with pytest.raises(UserError):
        load_data(folder / "data", folder / "images", cache_dir=folder / "cache")


def test_tables_with_two_columns_of_one_name(folder):
    table = pa.table([["a.png"], ["A"], ["B"]], names=["image", "caption", "caption"])
    pq.write_table(table, folder / "data")
    assert "data has two columns of the same name" in refusal(folder, str(folder / "data"))
    (folder / "data").write_text("image,caption,caption\na.png,A,B\n")
    assert "data has two columns called 'caption'" in refusal(folder, str(folder / "data"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("image,caption\na.png\n", "row 1 has 1 values under 2 names"),
        ("image,caption\na.png,A,B\n", "row 1 has 3 values under 2 names"),
        ('image,caption\na.png,"A\n', "row 1 is not valid CSV (unexpected end of data)"),
        ('image,caption\na.png,"A"B\n', "row 1 is not valid CSV"),
        ("image,caption\na.png," + "a" * 200_000 + "\n", "row 1 is not valid CSV (field larger than field limit"),
        ("image,caption\n", "has no rows"),
        ("image,caption\na.png,\n", "row 1: column 'caption' is empty; write the answer"),
        ("image,caption\na.png,A\na.png,\n", "row 2 has no caption"),
        ("image,caption\na.png,A\n,B\n", "row 2 has 0 images"),
        ("name,size\na,b\n", 'row 1 has name, size; a row needs "conversations"'),
        ("image,caption\na.png,A\0\n", 'row 1: "caption" holds a NUL character'),
    ],
)
def test_broken_csv(folder, text, says):
    (folder / "data").write_text(text)
    assert says in refusal(folder, str(folder / "data"))


def test_csv_in_another_encoding(folder):
    (folder / "data").write_bytes("image,caption\na.png,Käse\n".encode("latin-1"))
    assert "data is not UTF-8 text" in refusal(folder, str(folder / "data"))


def test_files_that_are_not_yet_the_data(folder):
    (folder / "data").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    assert "data is the pointer of Git LFS to a file" in refusal(folder, str(folder / "data"))
    with zipfile.ZipFile(folder / "data", "w") as archive:
        archive.writestr("data.json", "[]")
    assert "data is an archive; unpack it" in refusal(folder, str(folder / "data"))
    (folder / "ov.yaml").write_text("datasets:\n  - json_path: a.json\n    sampling_strategy: first:3\n")
    assert "ov.yaml is YAML, which LLaVA-NeXT lists" in refusal(folder, str(folder / "ov.yaml"))


def test_several_files_in_braces(folder):
    for name in ("a", "b"):
        (folder / f"{name}.json").write_text("[]")
    found = parse_data_path(f"{folder}/{{a, b}}.json")
    assert [each.path for each in found] == [f"{folder}/a.json", f"{folder}/b.json"]
    with pytest.raises(UserError, match="c.json"):
        parse_data_path(f"{folder}/{{a,c}}.json")


def test_folders_without_data(folder):
    assert "images holds no data file, no Parquet, no metadata.csv" in refusal(folder, str(folder / "images"))
    (folder / "two").mkdir()
    for name in ("a.json", "b.json"):
        (folder / "two" / name).write_text("[]")
    assert "two holds 2 JSON files" in refusal(folder, str(folder / "two"))
    (folder / "saved").mkdir()
    (folder / "saved" / "state.json").write_text("{")
    assert "saved can't be loaded from disk (" in refusal(folder, str(folder / "saved"))
    os.mkfifo(folder / "pipe")
    assert "pipe is neither a file nor a folder" in refusal(folder, str(folder / "pipe"))


def test_a_readme_that_names_files_elsewhere(folder):
    table = pa.Table.from_pylist([caption("a.png")])
    (folder / "set").mkdir()
    for place in (folder / "set" / "a.parquet", folder / "other.parquet"):
        pq.write_table(table, place)
    config = "configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: ../other.parquet\n"
    (folder / "set" / "README.md").write_text(f"---\n{config}---\n")
    says = refusal(folder, str(folder / "set"))
    assert "outside the folder" in says or "can't be told" in says


def test_rows_in_no_dialect(folder):
    path = write(folder, [{"what": "?", "why": "!"}], "lines")
    (folder / "data").write_text('[{"what": "?", "why": "!"}]')
    assert 'data: row 1 has what, why; a row needs "conversations", "messages", ' in refusal(folder, path)
    (folder / "data").write_text("[1, 2]")
    assert "data: row 1 is a number; a row needs" in refusal(folder, path)


def test_a_bad_first_row_does_not_hide_the_dialect(folder):
    path = write(folder, [{}, messages("a.png")], "json")
    (source,) = open_source(path)
    assert source.format == "messages JSON"
    assert 'row 1: "messages" is null' in refusal(folder, path)


# Rows that could only train wrongly


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (messages("a.png", answer="<image>"), "turn 2, an answer, holds <image>"),
        (messages("a.png", question=[{"type": "image"}, {"type": "text", "text": "<image>"}]), "beside image parts"),
        (messages("a.png", question=[{"type": "image", "index": 3}]), "has the index 3"),
        (messages("a.png", question=[{"type": "image", "index": "0"}]), 'the "index" of an image part is text'),
        (messages("a.png", question=[{"type": "video", "video": "a"}]), "holds a part of type 'video'"),
        (messages("a.png", question=[{"type": "text", "text": 5}]), "holds a part of type 'text'"),
        (messages("a.png", question=["a"]), "holds a part that is text"),
        (messages("a.png", question=None), '"content" is null'),
        (messages("a.png", question=[{"type": "image_url", "image_url": {}}]), "image_url part has no address"),
        (messages("a.png", videos=["a.mp4"]), 'has "videos"'),
        (sharegpt("a.png", audio="a.wav"), 'has "audio"'),
        (sharegpt("a.png", system=["x"]), '"system" is a list'),
        (sharegpt("a.png", system="<image>"), '"system" holds <image>'),
        (
            {"messages": [{"role": "tool", "content": "x"}, {"role": "assistant", "content": "x"}]},
            "turn 1 has the unknown role 'tool'",
        ),
        ({"messages": [{"content": "x"}]}, 'turn 1: "role" is null'),
        ({"messages": ["x"]}, "turn 1 is text"),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x", "tool_calls": [1]}]},
            "turn 2 calls a tool",
        ),
        (prompt("a.png") | {"completion": None, "messages": None}, "has no"),
        (
            {
                "prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
                "completion": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}],
            },
            '"prompt" holds an answer, and every answer is learned here',
        ),
        (caption(["a.png", "a.png"]), "has 2 images"),
        (caption("a.png", text="Other."), 'has both "text" and "caption", and they differ'),
        (caption("a.png", file_name="b.png"), 'has both "file_name" and "image", and they differ'),
        (caption("a.png", answer=["A", "B"]), '"caption" is a list'),
        (caption("a.png", answer="An <image>."), "turn 2, an answer, holds <image>"),
        (
            {
                **sharegpt("a.png"),
                "conversations": [{"from": "system", "value": "x"}, *sharegpt("a")["conversations"]],
            },
            'has both "system" and a system turn',
        ),
    ],
)
def test_each_wrong_row_has_its_own_sentence(folder, row, says):
    good = next(make for key, make in MAKERS.items() if key in row)
    message = refusal(folder, write(folder, [good("a.png"), row], "json"))
    assert "data: row 2" in message and says in message


# In the order of detection; a row of one dialect may hold the key of a later one.
MAKERS = {"prompt": prompt, "messages": messages, "conversations": sharegpt, "caption": caption}


words = st.sampled_from(
    ["user", "assistant", "system", "human", "gpt", "text", "image", "image_url", "<image>", "", "x", "\0"]
)
keys = st.sampled_from(
    "id messages conversations prompt completion image images file_name text caption system role content from value"
    " type url path bytes index image_url base64 tool_calls videos".split()
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 3) | st.floats() | words | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=5),
    max_leaves=30,
)


@examples(400)
@given(anything | st.dictionaries(keys, anything, max_size=6))
def test_anything_at_all_is_a_row_or_a_sentence(row):
    for dialect in (LLAVA, MESSAGES, PROMPT_COMPLETION, IMAGE_CAPTION):
        try:
            parsed = dialect.parse(row, "data", 1)
        except UserError as error:
            assert str(error).startswith("data: row 1")
        else:
            places = sum(part["type"] == "image" for message in parsed["messages"] for part in message["content"])
            assert places == len(parsed["images"]) and parsed["messages"][-1]["role"] == "assistant"


@pytest.fixture(autouse=True, scope="module")
def quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()
