"""Real files, good and hostile: rows come out whole, or one sentence says which file, row or line to mend."""

import json
import os
import signal

import datasets
import multiprocess.pool
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hf_llava_ft.data import builder
from hf_llava_ft.data.builder import LlavaConversations, load_llava_json, modality_lengths
from hf_llava_ft.data.collator import open_picture
from hf_llava_ft.data.image_folder import ImageFolder
from hf_llava_ft.data.json import parts as json_parts
from hf_llava_ft.data.json import rows as json_rows
from hf_llava_ft.data.json.llava_json import iter_llava_json
from hf_llava_ft.data.json.parts import index_json, iter_part
from hf_llava_ft.data.json.rows import iter_json_rows
from hf_llava_ft.data.pictures import unreadable_images
from hf_llava_ft.data.worker_pool import results_in_order
from hf_llava_ft.errors import UserError
from tests.examples import examples


def row(number=0, image=None, answer="A cat."):
    question = "What is it?" if image is None else "<image>\nWhat is it?"
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": f"r{number}", **({} if image is None else {"image": image}), "conversations": turns}


@pytest.fixture
def folder(tmp_path):
    """The folder of a dataset: `data.json` with three rows, and `images` with two pictures, in it and in `sub`."""
    (tmp_path / "images" / "sub").mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "images" / "a.jpg")
    Image.fromarray(noise).save(tmp_path / "images" / "sub" / "b.png")
    write(tmp_path, [row(1, "a.jpg"), row(2), row(3, "sub/b.png")])
    return tmp_path


def write(folder, rows, name="data.json"):
    (folder / name).write_text(json.dumps(rows), encoding="utf-8")
    return str(folder / name)


def load(folder, **kwargs):
    return load_llava_json(folder / "data.json", folder / "images", cache_dir=folder / "cache", **kwargs)


def sentence(call, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        result = call(*args, **kwargs)
        list(result)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")
    return message


def finished_caches(folder):
    return [path for path in (folder / "cache").rglob("*") if path.suffix == ".arrow" or "incomplete" in path.name]


# Files


@pytest.mark.parametrize("form", ["list", "indented", "lines", "lines with blanks"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_lists_and_lines_with_any_ending_and_bom(tmp_path, form, newline, bom):
    rows = [row(i, answer=f"Das Bild {i} \u2028 \U0001f431") for i in range(3)]
    text = {
        "list": json.dumps(rows),
        "indented": json.dumps(rows, indent=1, ensure_ascii=False) + "\n\n",
        "lines": "\n".join(json.dumps(item, ensure_ascii=False) for item in rows),
        "lines with blanks": "\n".join(json.dumps(item) + "\n" for item in rows) + "\n",
    }[form]
    (tmp_path / "data.txt").write_bytes((bom + text.replace("\n", newline)).encode())
    assert list(iter_json_rows(str(tmp_path / "data.txt"))) == list(enumerate(rows, start=1))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=40),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=4), children, max_size=4),
)


@examples(100)
@given(st.lists(json_values, min_size=1, max_size=6), st.booleans(), st.sampled_from([None, 1]), st.integers(1, 60))
def test_a_buffer_that_cuts_anywhere_changes_nothing(tmp_path_factory, rows, ascii_only, indent, chunk):
    path = tmp_path_factory.getbasetemp() / "cut.json"
    text = json.dumps(rows, ensure_ascii=ascii_only, indent=indent)
    path.write_bytes(text.encode("utf-8", "replace"))
    expected = json.loads(path.read_text(encoding="utf-8"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_rows, "_CHUNK_CHARS", chunk)
        assert [value for _, value in iter_json_rows(str(path))] == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "data.json has no rows; "),
        (" \n", "data.json has no rows; "),
        ("[]", "data.json has no rows; "),
        ('[{"id": 1}\n {"id": 2}]', "data.json: not valid JSON at line 2, column 2 (expected ',' or ']' after a row)"),
        ('[{"id": 1},\n {"id" 2}]', "data.json: not valid JSON at line 2, column 8 (expecting ':' delimiter)"),
        ('[{"id": 1},\n', "data.json: not valid JSON at line 2, column 1 (expecting value)"),
        ('[{"id": "ab', "data.json: not valid JSON at line 1, column 9 (unterminated string starting at)"),
        ('[{"id": 1}', "data.json: not valid JSON at line 1, column 11"),
        ('[{"id": 1}] x', "data.json: not valid JSON at line 1, column 13 (there is text after"),
        ('{"conversations": []}\n\n{"id": }', "data.json: not valid JSON at line 3, column 8 (expecting value)"),
        ("hello", "data.json: not valid JSON at line 1, column 1"),
        ('{"data": [], "version": 1}', "data.json: the top level is an object, not a list of rows; "),
        ('"text"', "data.json: the top level is text, not a list of rows; "),
        ("[" * 100_000, "data.json: not valid JSON at line 1, column 2 (brackets are nested too deeply)"),
        ("[" + "9" * 5000 + "]", "data.json: not valid JSON at line 1, column 2 (a number in this row is too long)"),
        ('["a\tb"]', "data.json: not valid JSON at line 1, column 4 (invalid control character at)"),
    ],
)
def test_broken_files_are_placed(tmp_path, text, says):
    (tmp_path / "data.json").write_text(text)
    assert says in sentence(iter_json_rows, str(tmp_path / "data.json"))


def test_a_broken_row_far_into_a_file_is_placed_at_its_line(tmp_path):
    lines = [json.dumps(row(i)) for i in range(30_000)]  # several buffers
    lines[25_000] = lines[25_000].replace('"id":', '"id"')
    (tmp_path / "data.json").write_text("\n".join(lines))
    assert "not valid JSON at line 25001, column 7" in sentence(iter_json_rows, str(tmp_path / "data.json"))


def test_files_that_are_no_text_or_no_files(tmp_path):
    (tmp_path / "data.json").write_bytes(json.dumps([row()]).encode("utf-16"))
    assert "data.json is not UTF-8 text" in sentence(iter_json_rows, str(tmp_path / "data.json"))
    assert "no.json can't be read (No such file" in sentence(iter_json_rows, str(tmp_path / "no.json"))
    assert "is not a file" in sentence(iter_json_rows, str(tmp_path))
    os.mkfifo(tmp_path / "pipe.json")
    assert "is not a file" in sentence(iter_json_rows, str(tmp_path / "pipe.json"))


def test_a_row_longer_than_any_conversation_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(json_rows, "MAX_ROW_CHARS", 2**21)
    path = write(tmp_path, [row(), row(answer="a" * 2**23)])
    assert "a row is longer than 2097152 characters" in sentence(iter_json_rows, path)


# Parts


def many_rows(count=400):
    """Rows of a kilobyte, with text that looks like the beginning of a row."""
    for number in range(count):
        answer = f'Bär {number}: }}, {{"id": 3}}\n{{"id": "r0"}} ' + "word " * (number % 300)
        yield row(number, ["a.jpg", None, "sub/b.png"][number % 3], answer)


FORMS = {
    "list": lambda rows: json.dumps(rows),
    "indented": lambda rows: json.dumps(rows, indent=2, ensure_ascii=False) + "\n",
    "lines": lambda rows: "\n".join(json.dumps(item) for item in rows),
    "lines with blanks": lambda rows: "\ufeff \n" + "\r\n \n".join(json.dumps(item) for item in rows) + "\n\n",
}


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(json_parts, "_PART_BYTES", 16 * 2**10)


@pytest.mark.parametrize("form", FORMS)
def test_parts_hold_the_rows_of_the_whole(folder, small_parts, form):
    path = folder / "many.json"
    path.write_text(FORMS[form](list(many_rows())))
    parts = index_json(str(path), num_proc=2)
    assert len(parts.parts) > 10 and parts.images == ["a.jpg", "sub/b.png"]
    expected = list(iter_json_rows(str(path)))
    assert [numbered for part in parts.parts for numbered in iter_part(part)] == expected
    assert [part.first_row for part in parts.parts][1:] == [
        list(iter_part(part))[-1][0] + 1 for part in parts.parts[:-1]
    ]


@pytest.mark.parametrize("rows", [[{"id": {"id": number}, "more": [{"id": {}}] * 400} for number in range(60)]])
@pytest.mark.parametrize("form", FORMS)
def test_a_cut_that_is_not_between_rows_is_noticed(folder, small_parts, rows, form):
    """Here nearly everything that looks like a row is inside one."""
    path = folder / "nested.json"
    path.write_text(FORMS[form](rows))
    parts = index_json(str(path), num_proc=2).parts
    assert [numbered for part in parts for numbered in iter_part(part)] == list(enumerate(rows, start=1))
    if form == "list":
        assert len(json_parts._guessed_parts(str(path))) > 5 and len(parts) == 1


def test_several_processes_write_what_one_writes(folder, small_parts, monkeypatch):
    (folder / "data.json").write_text(json.dumps(list(many_rows())))
    parallel = load(folder)
    monkeypatch.setattr(json_parts, "num_workers", lambda: 1)
    monkeypatch.setattr(builder, "num_workers", lambda: 1)
    serial = load_llava_json(folder / "data.json", folder / "images", cache_dir=folder / "other cache")
    assert len(LlavaConversations(str(folder / "cache"), str(folder / "data.json"), str(folder / "images")).parts) > 10
    assert len(parallel.cache_files) > 1 and len(serial.cache_files) == 1
    assert parallel._fingerprint == serial._fingerprint and parallel.features == serial.features
    assert parallel.data.to_pylist() == serial.data.to_pylist()
    assert parallel["id"][:] == [f"r{number}" for number in range(400)]


def break_row(rows, number, how):
    rows[number] = {
        "empty answer": row(number, answer=" "),
        "missing image": row(number, "no.jpg"),
        "not a row": 7,
        "no id": {"conversations": [{"from": "cat", "value": "meow"}]},
    }[how]


@pytest.mark.parametrize("first", ["empty answer", "missing image", "not a row", "no id"])
@pytest.mark.parametrize("later", ["empty answer", "missing image"])
def test_the_first_wrong_row_is_named_however_many_processes_read(folder, small_parts, monkeypatch, first, later):
    rows = list(many_rows())
    break_row(rows, 150, first)
    for number in (151, 210, 399):
        break_row(rows, number, later)
    write(folder, rows)
    message = sentence(load, folder)
    assert "data.json: row 151" in message
    assert finished_caches(folder) == []
    monkeypatch.setattr(json_parts, "num_workers", lambda: 1)
    monkeypatch.setattr(builder, "num_workers", lambda: 1)
    assert sentence(load_llava_json, folder / "data.json", folder / "images", folder / "other cache") == message


def test_the_row_is_named_when_the_pool_fails_while_it_is_torn_down(folder, small_parts, monkeypatch):
    """The standard library's pool now and then raises on its way out, and hides what it was left for."""
    terminate = multiprocess.pool.Pool.terminate

    def terminate_and_raise(self):
        terminate(self)
        raise AssertionError("Cannot have cache with result_handler not alive")

    monkeypatch.setattr(multiprocess.pool.Pool, "terminate", terminate_and_raise)
    rows = list(many_rows())
    break_row(rows, 150, "empty answer")
    write(folder, rows)
    assert "data.json: row 151" in sentence(load, folder)
    assert finished_caches(folder) == []
    write(folder, list(many_rows()))
    with pytest.raises(AssertionError, match="result_handler"):  # not swallowed where no row is wrong
        load(folder)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"id": "r150"', '"id" "r150"'),
        ('"id": "r399"', '"id": "r399'),
        ('}, {"id": "r150"', '}  {"id": "r150"'),
        ('}, {"id": "r150"', '},, {"id": "r150"'),
        ('}, {"id": "r150"', '}], {"id": "r150"'),
        ('}, {"id": "r150"', '}\u00a0, {"id": "r150"'),
        ('"id": "r150"', '"id": ' + "9" * 5000),
    ],
)
def test_broken_json_is_placed_however_many_processes_read(folder, small_parts, monkeypatch, old, new):
    text = json.dumps(list(many_rows()))
    assert text.count(old) == 1
    (folder / "data.json").write_text(text.replace(old, new))
    message = sentence(load, folder)
    assert "not valid JSON at line 1, column " in message
    assert message == sentence(iter_json_rows, str(folder / "data.json"))


def test_a_file_that_grows_while_it_is_read(folder, small_parts):
    (folder / "data.json").write_text(json.dumps(list(many_rows())))
    parts = index_json(str(folder / "data.json"), num_proc=2).parts
    (folder / "data.json").write_text(json.dumps(list(many_rows()), indent=1))
    assert "data.json changed while it was read" in sentence(iter_part, parts[3])


def test_a_process_that_is_killed_ends_with_a_sentence():
    killed = results_in_order(lambda item: os.kill(os.getpid(), signal.SIGKILL) if item == 3 else item, range(9), 2)
    assert "a process that read the data was killed" in sentence(lambda: killed)


# Image paths


def test_rows_come_with_real_paths_and_lengths(folder):
    rows = list(iter_llava_json(str(folder / "data.json"), ImageFolder(str(folder / "images"))))
    assert [item["images"] for item in rows] == [
        [os.path.realpath(folder / "images" / "a.jpg")],
        [],
        [os.path.realpath(folder / "images" / "sub" / "b.png")],
    ]
    assert [(item["num_words"], item["num_images"]) for item in rows] == [(6, 1), (5, 0), (6, 1)]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("no.jpg", "is missing from"),
        ("sub/no/no.jpg", "is missing from"),
        ("../secret.png", "leaves the image folder"),
        ("../no-such-file.png", "leaves the image folder"),
        ("sub/../../secret.png", "leaves the image folder"),
        ("../images2/secret.png", "leaves the image folder"),
        ("..", "leaves the image folder"),
        ("link.png", "leaves the image folder"),
        ("linked/secret.png", "leaves the image folder"),
        ("/etc/passwd", "is an absolute path"),
        ("sub", "is not a file"),
        ("pipe.jpg", "is not a file"),
        ("a.jpg/b.jpg", "can't be opened"),
        ("loop.jpg", "can't be opened"),
        ("x" * 5000, "can't be opened"),
        ("https://example.com/a.jpg", "is an address"),
        ("data:image/png;base64,AAAA", "is an address"),
    ],
)
def test_paths_that_are_missing_or_leave_the_folder(folder, name, says):
    (folder / "images2").mkdir()
    for secret in (folder / "secret.png", folder / "images2" / "secret.png"):
        Image.new("RGB", (4, 4)).save(secret)
    (folder / "images" / "link.png").symlink_to(folder / "secret.png")
    (folder / "images" / "linked").symlink_to(folder / "images2")
    (folder / "images" / "loop.jpg").symlink_to("loop.jpg")
    os.mkfifo(folder / "images" / "pipe.jpg")
    path = write(folder, [row(), row(9, name)])
    message = sentence(iter_llava_json, path, ImageFolder(str(folder / "images")))
    assert "data.json: row 2 (id 'r9'): image '" in message and says in message


def test_links_and_dots_that_stay_inside_are_followed(folder):
    (folder / "images" / "inside.png").symlink_to("sub/b.png")
    (folder / "link").symlink_to("images")
    images = ImageFolder(str(folder / "link"))
    for name in ("inside.png", "sub/../sub/b.png", "./sub/b.png"):
        assert images.resolve(name, "") == os.path.realpath(folder / "images" / "sub" / "b.png")


def test_a_folder_is_needed_for_images_only(folder):
    assert "no-folder is not a folder" in sentence(ImageFolder, str(folder / "no-folder"))
    assert "row 1 (id 'r1'): image 'a.jpg' has no folder" in sentence(
        iter_llava_json, str(folder / "data.json"), ImageFolder(None)
    )
    assert len(list(iter_llava_json(write(folder, [row()]), ImageFolder(None)))) == 1


# Decoding


def test_damaged_images_are_told_from_sound_ones(folder):
    whole = (folder / "images" / "a.jpg").read_bytes()
    png = (folder / "images" / "sub" / "b.png").read_bytes()
    bomb = bytearray(png)
    bomb[16:24] = (50_000).to_bytes(4, "big") * 2  # width and height in the header; its checksum no longer matters
    damaged = {
        "cut.jpg": whole[: len(whole) // 2],
        "cut.png": png[: len(png) // 2],
        "header.jpg": whole[:20],
        "empty.jpg": b"",
        "text.jpg": b"<html>404</html>",
        "bomb.png": bytes(bomb),
    }
    for name, contents in damaged.items():
        (folder / name).write_bytes(contents)
    sound = {
        "gray16.png": Image.new("I;16", (3, 3)),
        "cmyk.jpg": Image.new("CMYK", (3, 3)),
        "palette.gif": Image.new("P", (3, 3)),
        "thin.webp": Image.new("RGB", (300, 1)),
    }
    for name, image in sound.items():
        image.save(folder / name)
    reasons = unreadable_images(str(folder / name) for name in [*damaged, *sound, *damaged])
    assert [os.path.basename(path) for path in reasons] == list(damaged)
    assert reasons[str(folder / "empty.jpg")] == "the file is empty"
    assert all(reason and "\n" not in reason for reason in reasons.values())


def test_a_decompression_bomb_is_not_decoded(folder):
    Image.new("1", (10_000, 10_000)).save(folder / "big.png")  # 12 kB; Pillow itself only warns
    assert "10000 x 10000 pixels" in unreadable_images([str(folder / "big.png")])[str(folder / "big.png")]


# The dataset


def test_a_data_set_holds_paths_and_comes_from_the_disk(folder):
    data = load(folder)
    assert data["id"][:] == ["r1", "r2", "r3"]
    assert data[0]["messages"][0] == {
        "role": "user",
        "content": [{"type": "image", "text": None}, {"type": "text", "text": "\nWhat is it?"}],
    }
    assert open_picture(data[0]["images"][0]).size == (56, 40)
    assert data.cache_files and "llava_conversations" in data.cache_files[0]["filename"]
    stored = data[2]["images"]
    assert stored == [{"bytes": None, "path": os.path.realpath(folder / "images" / "sub" / "b.png")}]
    assert modality_lengths(data).tolist() == [6, -5, 6]


def test_the_cache_is_used_again_until_something_changes(folder):
    def cache():
        return load(folder).cache_files[0]["filename"]

    first = cache()
    written = os.stat(first).st_mtime_ns
    assert cache() == first and os.stat(first).st_mtime_ns == written

    (folder / "unrelated.txt").write_text("x")
    (folder / "data.json").touch()  # the same contents, read again
    assert cache() == first and os.stat(first).st_mtime_ns == written

    before = os.stat(folder / "data.json")
    write(folder, [row(1, "a.jpg", answer="A dog."), row(2), row(3, "sub/b.png")])
    os.utime(folder / "data.json", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert os.stat(folder / "data.json").st_size == before.st_size
    changed = cache()  # as `cp -p` would change it: size and time are the same
    assert changed != first
    assert load(folder)[0]["messages"][1]["content"][0]["text"] == "A dog."

    os.utime(folder / "images" / "a.jpg", ns=(0, 0))
    touched = cache()
    assert touched not in (first, changed)
    os.rename(folder / "images", folder / "moved")
    moved = load_llava_json(folder / "data.json", folder / "moved", folder / "cache")
    assert open_picture(moved[0]["images"][0]).size == (56, 40)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("cut.jpg", "data.json: row 2 (id 'r2'): image 'cut.jpg' can't be decoded"),
        ("no.jpg", "data.json: row 2 (id 'r2'): image 'no.jpg' is missing"),
    ],
)
def test_a_bad_image_leaves_no_cache(folder, name, says):
    (folder / "images" / "cut.jpg").write_bytes((folder / "images" / "a.jpg").read_bytes()[:500])
    write(folder, [row(1, "a.jpg"), row(2, name)])
    assert says in sentence(load, folder)
    assert finished_caches(folder) == []
    write(folder, [row(1, "a.jpg"), row(2, "a.jpg")])
    assert len(load(folder)) == 2


def test_a_bad_row_arrives_as_the_user_error_itself(folder):
    write(folder, [row(1, "a.jpg"), row(2, answer="")])
    builder = LlavaConversations(str(folder / "cache"), str(folder / "data.json"), str(folder / "images"))
    with pytest.raises(UserError, match=r"data\.json: row 2 \(id 'r2'\): turn 2 is an empty answer") as caught:
        builder.download_and_prepare()
    assert caught.value.__cause__ is None and caught.value.__suppress_context__
    assert finished_caches(folder) == []


def test_the_first_bad_image_names_the_others(folder):
    names = [f"bad{i}.jpg" for i in range(6)]
    for name in names:
        (folder / "images" / name).write_bytes(b"no picture")
    write(folder, [row(0, "a.jpg"), *(row(i, name) for i, name in enumerate(names, start=1))])
    message = sentence(load, folder)
    assert "row 2 (id 'r1'): image 'bad0.jpg' can't be decoded" in message
    assert "nor can bad1.jpg, bad2.jpg, bad3.jpg and 2 more;" in message


def test_several_files_one_after_another_under_any_name(folder):
    other = write(folder, [{"conversations": row()["conversations"]}], name="more [1] *.json")
    data = load_llava_json([folder / "data.json", other], folder / "images", folder / "cache")
    assert data["id"][:] == ["r1", "r2", "r3", "1"]
    assert "no data file is given" in sentence(load_llava_json, [])


def test_the_builder_streams_too(folder):
    builder = LlavaConversations(str(folder / "cache"), str(folder / "data.json"), str(folder / "images"))
    assert [item["id"] for item in builder.as_streaming_dataset(split="train")] == ["r1", "r2", "r3"]


def test_the_cache_of_datasets_is_the_default(folder, monkeypatch):
    monkeypatch.setattr(
        datasets.config, "HF_DATASETS_CACHE", folder / "elsewhere"
    )  # where HF_HOME and the like end up
    load_llava_json(folder / "data.json", folder / "images")
    assert list((folder / "elsewhere" / "llava_conversations").rglob("*.arrow"))


@pytest.fixture(autouse=True, scope="module")
def quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()
