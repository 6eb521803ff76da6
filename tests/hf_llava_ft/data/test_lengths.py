"""Tokens counted for a whole set are those that training sees, row by row, and are counted once."""

import json
import multiprocessing
import os
import time
from copy import deepcopy
from functools import cache

import datasets
import numpy as np
import pytest
from PIL import Image

from hf_llava_ft.data import lengths
from hf_llava_ft.data.builder import load_llava_json
from hf_llava_ft.data.collator import open_picture
from hf_llava_ft.data.lengths import token_counts, token_lengths
from hf_llava_ft.errors import UserError
from hf_llava_ft.processing.chat_templates_llava import CHAT_TEMPLATES
from hf_llava_ft.processing.conversation_llava import IGNORE_INDEX
from hf_llava_ft.processing.processing_llava import LlavaProcessor
from hf_llava_ft.processing.tokenizer_llava import load_tokenizer

ANSWERS = ["A cat.", " two  spaces\tand\nlines ", "</s> <s> [INST] <unk>", "Ein Bär \U0001f431\u2028。", "word " * 60]


def conversations(count):
    """Rows with 0, 1 or 2 images of different shapes, one to three rounds, and text that looks like special tokens."""
    for number in range(count):
        turns = []
        for place in range(number % 3 + 1):
            answer = ANSWERS[(number + place) % len(ANSWERS)]
            turns += [{"from": "human", "value": f"Question {place}?"}, {"from": "gpt", "value": answer}]
        images = [f"{number % 7}.png", "0.png"][: number % 3]
        if images:
            turns[0]["value"] = " ".join(["<image>"] * len(images)) + "\nWhat is it?</s>"
        yield {"id": f"r{number}", "image": images, "conversations": turns}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lengths")
    (folder / "images").mkdir()
    for number in range(7):
        size = (30 + 60 * number, 200 - 25 * number)
        exif = Image.Exif()
        exif[0x0112] = 6  # a quarter turn, which training makes or does not make
        Image.new("RGB", size, (number * 30, 90, 200)).save(folder / "images" / f"{number}.png", exif=exif)
    return folder


def load(folder, rows, name="data.json"):
    (folder / name).write_text(json.dumps(list(rows)))
    return load_llava_json(folder / name, folder / "images", cache_dir=folder / "cache")


def plainly(dataset, processor):
    """Tokens and supervised tokens of every row, encoded as in training."""
    encoded = [
        processor.encode_conversation(
            row["messages"], [open_picture(image, processor.picture_opening) for image in row["images"]]
        )
        for row in dataset
    ]
    supervised = [int((row["labels"] != IGNORE_INDEX).sum()) for row in encoded]
    return [len(row["input_ids"]) for row in encoded], supervised


@cache
def tokenizer_of(folder):
    tokenizer = load_tokenizer(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|eot_id|>"]})
    return tokenizer


def processor_of(golden, tiny, version, kind="tiny", **options):
    tokenizer = deepcopy(tokenizer_of(golden / f"tokenizer_{kind}"))
    return LlavaProcessor.build(tokenizer, tiny.config().vision_config, version=version, **options)


@pytest.mark.parametrize("version", [name for name in CHAT_TEMPLATES if "plain" not in name])
def test_counts_are_those_of_training_under_every_template(golden, tiny, folder, version):
    dataset, processor = load(folder, conversations(24)), processor_of(golden, tiny, version)
    counts = token_counts(dataset, processor, num_proc=2)
    assert (counts.num_tokens.tolist(), counts.num_supervised.tolist()) == plainly(dataset, processor)
    assert counts.num_tokens.dtype == np.int64 and not counts.refused
    assert counts.num_tokens.tolist() == [processor.num_tokens(row["messages"]) for row in dataset]


def test_a_caption_template_and_processes_whose_rows_end_anywhere(golden, tiny, folder, monkeypatch):
    monkeypatch.setattr(lengths, "_ROWS_AT_ONCE", 3)
    rows = [
        {"image": "1.png", "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": answer}]}
        for answer in ANSWERS * 2
    ]
    dataset, processor = load(folder, rows, "captions.json"), processor_of(golden, tiny, "plain", "llama")
    expected = plainly(dataset, processor)
    for num_proc in (1, 2, 3):
        counts = lengths._count(dataset, processor, num_proc)
        assert (counts.num_tokens.tolist(), counts.num_supervised.tolist()) == expected


@pytest.mark.parametrize("opening", ["upright", "original"])
def test_the_size_of_a_picture_counts_where_it_is_cut_into_crops(golden, tiny, folder, opening):
    grid = [[56, 112], [112, 56], [112, 112]]
    processor = processor_of(golden, tiny, "v1", image_aspect_ratio="anyres", image_grid_pinpoints=grid)
    processor.picture_opening = opening
    dataset = load(folder, conversations(24))
    counts = token_counts(dataset, processor)
    assert (counts.num_tokens.tolist(), counts.num_supervised.tolist()) == plainly(dataset, processor)
    images = [row["images"][0] for row in dataset if row["images"]]
    turned = [open_picture(image).size[::-1] for image in images]
    assert {processor.num_image_tokens_at(*size) for size in turned} != {processor.num_image_tokens_at(1, 1)}


def test_a_shuffled_part_of_the_set_has_its_own_counts(golden, tiny, folder):
    processor = processor_of(golden, tiny, "v1")
    whole = load(folder, conversations(24))
    order = np.random.default_rng(0).permutation(24)[:10]
    lengths_of_all = token_lengths(whole, processor)
    assert token_lengths(whole.select(order), processor).tolist() == lengths_of_all[order].tolist()
    in_memory = datasets.Dataset.from_list(whole.select(order).to_list(), features=whole.features)
    assert not in_memory.cache_files
    assert token_lengths(in_memory, processor).tolist() == lengths_of_all[order].tolist()


def test_they_are_counted_once_for_the_same_rows_and_settings(golden, tiny, folder, monkeypatch):
    counted = []
    count = lengths._count
    monkeypatch.setattr(lengths, "_count", lambda *args: counted.append(1) or count(*args))

    def lengths_of(rows=20, version="v1", kind="tiny"):
        before = len(counted)
        dataset = load(folder, conversations(rows), "once.json")
        found = token_lengths(dataset, processor_of(golden, tiny, version, kind))
        return found, len(counted) - before

    first, times = lengths_of()
    again, times_again = lengths_of()
    assert (times, times_again) == (1, 0) and again.tolist() == first.tolist() and again.dtype == np.int64
    other_template, times = lengths_of(version="llava_llama_2")
    assert times == 1 and other_template.tolist() != first.tolist()
    other_tokenizer, times = lengths_of(kind="llama")
    assert times == 1 and other_tokenizer.tolist() != first.tolist()
    fewer, times = lengths_of(rows=19)
    assert times == 1 and len(fewer) == 19
    assert lengths_of()[1] == 0

    processor = processor_of(golden, tiny, "v1")
    processor.tokenizer(["a", "b c"], padding=True, truncation=True, max_length=2)  # leaves its settings behind
    assert token_lengths(load(folder, conversations(20), "once.json"), processor).tolist() == first.tolist()
    assert len(counted) == 4
    processor.patch_size = 28
    assert token_lengths(load(folder, conversations(20), "once.json"), processor).tolist() != first.tolist()
    assert len(counted) == 5


def counted_by_three(dataset, processor, folder, monkeypatch, **environment):
    """What three processes that ask at once get, and how many rows each counting counted, in order of their start."""
    count = lengths._count

    def slowly(rows, *args):
        (folder / f"{time.time_ns()}.{len(rows)}.{os.getpid()}.counted").touch()
        time.sleep(0.3)
        return count(rows, *args)

    monkeypatch.setattr(lengths, "_count", slowly)

    context = multiprocessing.get_context("fork")
    together = context.Barrier(3)

    def rank(number):
        os.environ |= {"RANK": str(number), **environment}
        together.wait()
        np.save(folder / f"{number}.npy", token_lengths(dataset, processor, num_proc=1))

    processes = [context.Process(target=rank, args=(number,)) for number in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    counted = [path.name.split(".")[1:3] for path in sorted(folder.glob("*.counted"))]
    return [np.load(folder / f"{number}.npy").tolist() for number in range(3)], counted


def test_several_processes_count_once_between_them(golden, tiny, folder, tmp_path, monkeypatch):
    dataset, processor = load(folder, conversations(21), "ranks.json"), processor_of(golden, tiny, "v1")
    (first, *others), counted = counted_by_three(dataset, processor, tmp_path, monkeypatch)
    assert [rows for rows, _ in counted] == ["21"]
    assert others == [first, first] and first == plainly(dataset, processor)[0]


def test_processes_of_a_launcher_count_a_large_set_in_parts(golden, tiny, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(lengths, "_ROWS_IN_PART", 7)
    dataset, processor = load(folder, conversations(20), "parts.json"), processor_of(golden, tiny, "v1")
    (first, *others), counted = counted_by_three(dataset, processor, tmp_path, monkeypatch, WORLD_SIZE="3")
    assert sorted(rows for rows, _ in counted) == ["6", "7", "7"] and len({process for _, process in counted}) == 3
    assert others == [first, first] and first == plainly(dataset, processor)[0]
    # All of it is there for who comes later, but for a part that was lost.
    [kept] = {path.name.rsplit("-", 1)[0] for path in (folder / "cache").rglob("token-counts-*-7.npy")}
    [lost] = (folder / "cache").rglob(f"{kept}-7.npy")
    lost.unlink()
    monkeypatch.undo()
    monkeypatch.setattr(lengths, "_ROWS_IN_PART", 7)
    again, count = [], lengths._count
    monkeypatch.setattr(lengths, "_count", lambda rows, *args: again.append(len(rows)) or count(rows, *args))
    assert token_lengths(dataset, processor).tolist() == first and again == [7]


def test_refused_rows_of_parts_are_named_by_their_place_in_the_set(golden, tiny, folder, monkeypatch):
    monkeypatch.setattr(lengths, "_ROWS_IN_PART", 10)
    processor = processor_of(golden, tiny, "v1")
    processor.chat_template += "{{ raise_exception('no cats') if 'r9' in messages[0]['content'] | string }}"
    rows = [{**row} for row in conversations(24)]
    for number in (3, 18):
        rows[number]["conversations"][0]["value"] += " r9"
    counts = token_counts(load(folder, rows, "refused-parts.json"), processor, num_proc=1)
    assert sorted(counts.refused) == [3, 18] and not counts.num_tokens[[3, 18]].any()
    whole = lengths._count(load(folder, rows, "refused-parts.json"), processor, 1)
    known = token_counts(load(folder, rows, "refused-parts.json"), processor, 1, known=lambda: whole)
    assert known.refused == counts.refused and known.num_tokens.tolist() == counts.num_tokens.tolist()


def test_the_first_row_that_the_template_refuses_is_named(golden, tiny, folder, monkeypatch):
    monkeypatch.setattr(lengths, "_ROWS_AT_ONCE", 4)
    processor = processor_of(golden, tiny, "v1")
    processor.chat_template += "{{ raise_exception('no cats') if 'r9' in messages[0]['content'] | string }}"
    rows = [{**row} for row in conversations(24)]
    for number in (18, 9, 10):
        rows[number]["conversations"][0]["value"] += " r9"
    dataset = load(folder, rows, "refused.json")
    assert sorted(token_counts(dataset, processor, num_proc=2).refused) == [9, 10, 18]
    with pytest.raises(UserError, match=r"refused\.json: row 10 \(id 'r9'\): the chat template does not .*no cats"):
        token_lengths(dataset, processor, "refused.json")
    assert not list((folder / "cache").rglob("*.incomplete"))


def test_an_image_place_that_has_no_image_is_refused(golden, tiny):
    turns = [
        {"role": "user", "content": [{"type": "image", "text": None}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    ]
    dataset = datasets.Dataset.from_list([{"id": "r", "messages": turns, "images": []}])
    with pytest.raises(UserError, match="row 1 .* has 1 <image> and there are 0 images"):
        token_lengths(dataset, processor_of(golden, tiny, "v1"))


@pytest.fixture(autouse=True, scope="module")
def quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()
