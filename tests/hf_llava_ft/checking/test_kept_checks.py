"""A check that is asked for again gives the same result without reading a row, and never an old one."""

import io
import json
import os
import time

import datasets
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from rich.console import Console

from hf_llava_ft.checking import check as checking
from hf_llava_ft.checking import kept_checks
from hf_llava_ft.checking.command import run_check
from hf_llava_ft.checking.sound_rows import sound_rows
from hf_llava_ft.data import lengths, pictures
from hf_llava_ft.data.builder import load_llava_json
from hf_llava_ft.processing.processing_llava import LlavaProcessor

TOLD = "Nothing has changed since the last check"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """`data.json`: rows of every kind, one repeated, one in the wrong order, and a picture that can't be decoded."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "images").mkdir()
    for index in range(3):
        Image.new("RGB", (8 + 40 * index, 30), (80 * index, 0, 0)).save(tmp_path / "images" / f"{index}.png")
    (tmp_path / "images" / "bad.png").write_bytes(b"no picture")
    rows = [
        llava(index, f"Question {index}?", f"Answer {index}, at some length.", f"{index % 3}.png")
        for index in range(6)
    ]
    rows += [llava("text", "Q", "A"), llava("text", "Q", "A"), llava("bad", "Q", "A", "bad.png")]
    rows.append({"id": "order", "conversations": rows[0]["conversations"][::-1]})
    write(tmp_path, rows)
    return tmp_path


def llava(row_id, question, answer, image=None):
    turns = [
        {"from": "human", "value": f"<image>\n{question}" if image else question},
        {"from": "gpt", "value": answer},
    ]
    return {"id": str(row_id), **({"image": image} if image else {}), "conversations": turns}


def write(folder, rows, name="data.json"):
    (folder / name).write_text(json.dumps(rows), encoding="utf-8")
    settle()


def settle():
    """A file of the same moment as the check is too young for it."""
    time.sleep(0.03)


def check(folder, model=None, name="data.json", **options):
    """(result, what was printed, whether it was read from the disk)."""
    printed = io.StringIO()
    console = Console(file=printed, width=120)
    result = run_check(str(folder / name), str(folder / "images"), model, num_proc=1, console=console, **options)
    return result, printed.getvalue(), TOLD in printed.getvalue()


def same(first, second):
    return (
        first.to_json() == second.to_json()
        and first.samples == second.samples
        and vars(first).keys() == vars(second).keys()
    )


@pytest.mark.parametrize("has_model", [False, True])
def test_the_second_time_no_row_is_read_and_all_is_the_same(folder, tiny_checkpoint, has_model, monkeypatch):
    model = str(tiny_checkpoint) if has_model else None
    first, printed, was_kept = check(folder, model, model_max_length=200, report=folder / "1.html")
    assert not was_kept and len(first.problems) >= 2 and first.warnings and first.samples
    monkeypatch.setattr(checking.RowChecker, "__call__", lambda *args: pytest.fail("a row was read"))
    second, again, was_kept = check(folder, model, model_max_length=200, report=folder / "2.html")
    assert was_kept and same(first, second)
    assert again.partition("\n")[2] == printed
    assert (folder / "1.html").read_text() == (folder / "2.html").read_text()


def test_embedded_pictures_of_shown_rows_survive(folder):
    content = (folder / "images" / "0.png").read_bytes()
    pd.DataFrame({"image": [content], "text": ["A"]}).to_parquet(folder / "rows.parquet")
    settle()
    (first, _, _), (second, _, was_kept) = (check(folder, name="rows.parquet") for _ in range(2))
    assert was_kept and same(first, second) and second.samples["image"].images[0]["bytes"] == content


def test_whatever_it_follows_from_makes_it_a_new_check(folder, tiny_checkpoint):
    model = str(tiny_checkpoint)

    def is_kept(**options):
        return check(folder, model, **options)[2]

    assert not is_kept() and is_kept()
    assert not is_kept(recheck=True) and is_kept()
    for options in ({"model_max_length": 30}, {"batch_size": 2}, {"version": "plain"}, {"allow_outside": True}):
        assert not is_kept(**options), options
    assert is_kept(), "that of other settings does not take its place"

    picture = folder / "images" / "0.png"
    status, content = picture.stat(), picture.read_bytes()
    picture.write_bytes(content[:-1] + b"x")
    os.utime(picture, ns=(status.st_atime_ns, status.st_mtime_ns))  # as it looked before, but for its ctime
    settle()
    assert not is_kept() and is_kept()
    data = folder / "data.json"
    status, text = data.stat(), data.read_text()
    data.write_text(text.replace("Question 1", "Question 7"))
    os.utime(data, ns=(status.st_atime_ns, status.st_mtime_ns))
    settle()
    assert not is_kept() and is_kept()
    picture.unlink()
    assert not is_kept()


def test_columns_are_part_of_it(folder):
    (folder / "table.csv").write_text("image,other,question,answer\n0.png,1.png,Q,A\n")
    settle()
    for columns in ("image=image", "image=other"):
        (first, _, was_kept), (_, _, again) = (check(folder, name="table.csv", columns=columns) for _ in range(2))
        assert not was_kept and again


@pytest.mark.parametrize("what", ["missing", "link", "broken", "young"])
def test_what_could_change_unseen_is_not_kept(folder, what, monkeypatch):
    if what == "link":
        (folder / "images" / "link.png").symlink_to(folder / "images" / "0.png")
    rows = [llava(1, "Q", "A", {"missing": "none.png", "link": "link.png"}.get(what, "0.png"))] * 40
    write(folder, rows)
    if what == "broken":
        (folder / "data.json").write_text(json.dumps(rows)[:-1] + ', {"')
        settle()
    if what == "young":
        monkeypatch.setattr(kept_checks, "_clock_of", lambda root: 0)
    assert not check(folder)[2] and not check(folder)[2]


def test_a_cache_that_can_not_be_written_is_no_error(folder, monkeypatch):
    (folder / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "file" / "cache")
    assert not check(folder)[2] and not check(folder)[2]


def test_a_damaged_file_is_no_result(folder):
    check(folder)
    (kept,) = (folder / "cache" / "llava_checks").glob("*.json")
    for content in (b"", b"{}", b"[1]", b'{"files": null}', kept.read_bytes()[:-50]):
        kept.write_bytes(content)
        assert not check(folder)[2]
    assert check(folder)[2]


def test_training_takes_the_token_counts_of_the_check(folder, tiny_checkpoint, tiny_processor, monkeypatch):
    """And gets what it would count itself."""
    rows = [llava(index, f"Question {index}?", "word " * (index + 1), f"{index % 3}.png") for index in range(40)]
    write(folder, rows)
    processor = LlavaProcessor.from_pretrained(tiny_checkpoint)
    count, counted = lengths._count, []
    monkeypatch.setattr(lengths, "_count", lambda *args: counted.append(1) or count(*args))

    def fitting(cache, processor=processor, longest=80):
        opened = sound_rows(str(folder / "data.json"), folder / "images", cache_dir=folder / cache, on_bad_row="skip")
        fit = opened.that_fit(processor, longest)
        return fit["id"][:], [problem.sentence for problem in opened.left_out + opened.cut]

    plain = fitting("other cache")
    assert counted and plain[1] and len(plain[0]) > 10
    counted.clear()
    check(folder, str(tiny_checkpoint))
    assert fitting("cache") == plain and not counted
    # What a check of other rows or another template counted is not taken.
    other = LlavaProcessor.from_pretrained(tiny_checkpoint)
    other.chat_template = other.chat_template + " "
    fitting("cache", other)
    assert len(counted) == 1
    write(folder, [llava(1, "Another question?", "A", "0.png"), *rows[1:]])
    fitting("cache")
    assert len(counted) == 2


def test_training_decodes_no_picture_that_a_check_has_decoded(folder, monkeypatch):
    write(folder, [llava(index, "Q", "A", f"{index}.png") for index in range(2)], "two.json")
    write(folder, [llava(index, "Q", "A", f"{index}.png") for index in range(3)], "three.json")
    check(folder, name="two.json")
    looked_at = []
    decode = pictures.decode_failure
    monkeypatch.setattr(
        pictures, "decode_failure", lambda path: looked_at.append(os.path.basename(path)) or decode(path)
    )
    monkeypatch.setattr(pictures, "results_in_order", map)
    assert len(load_llava_json(folder / "two.json", folder / "images", folder / "cache")) == 2
    assert looked_at == []
    assert len(load_llava_json(folder / "three.json", folder / "images", folder / "cache")) == 3
    assert looked_at == ["2.png"]


def test_counts_are_those_of_the_rows_that_are_left(folder, tiny_checkpoint):
    """A row that is left out has its number still."""
    processor = LlavaProcessor.from_pretrained(tiny_checkpoint)
    check(folder, str(tiny_checkpoint))
    opened = sound_rows(str(folder / "data.json"), folder / "images", cache_dir=folder / "cache", on_bad_row="skip")
    (part,) = opened.parts
    assert part.numbers.tolist() == list(range(1, 9))
    known = kept_checks.known_counts(folder / "cache", part.source, part.numbers, processor)
    plain = lengths.token_counts(part.dataset, processor, 1)
    assert np.array_equal(known.num_tokens, plain.num_tokens)
    assert np.array_equal(known.num_supervised, plain.num_supervised)
    assert kept_checks.known_counts(folder / "cache", part.source, np.arange(1, 11), processor) is None
