"""`--on_bad_row`: refuse the set with the first row's sentence, or train without the bad ones and list them."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from hf_llava_ft.checking import known_problems
from hf_llava_ft.checking.sound_rows import sound_rows, told_of_skipped
from hf_llava_ft.data import lengths
from hf_llava_ft.data.collator import LlavaCollator
from hf_llava_ft.data.formats import load_data
from hf_llava_ft.data.lengths import token_counts
from hf_llava_ft.data.skipped_rows import SKIPPED_FILE
from hf_llava_ft.errors import UserError
from hf_llava_ft.train import main as train
from hf_llava_ft.training.evaluation import held_out


def row(row_id, question, answer, image=None):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": row_id, "conversations": turns} | ({} if image is None else {"image": image})


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for index in range(6):
        Image.new("RGB", (60 + 20 * index, 40), (40 * index, 90, 200)).save(tmp_path / f"images/{index}.png")
    (tmp_path / "images/bad.png").write_text("no picture")
    return tmp_path


def write(folder, rows, name="data.json"):
    (folder / name).write_text(json.dumps(rows))
    return folder / name


SOUND = [row(f"ok{index}", f"<image>\nWhat is {index}?", f"The number {index}.", f"{index}.png") for index in range(6)]
BAD = [row("empty", "q", " "), row("gone", "<image>\nq", "a", "gone.png"), row("broken", "<image>\nq", "a", "bad.png")]
MIXED = [SOUND[0], BAD[0], SOUND[1], BAD[1], SOUND[2], BAD[2], *SOUND[3:]]


def opened(folder, data, on_bad_row="skip", **kwargs):
    cache = folder / "cache"
    return sound_rows(str(data), folder / "images", on_bad_row=on_bad_row, cache_dir=cache, **kwargs)


def test_tokens_are_counted_once_for_all_rows_and_those_held_out(folder, tiny_processor, monkeypatch):
    counted = []
    count = lengths._count
    monkeypatch.setattr(
        lengths, "_count", lambda dataset, *rest: counted.append(len(dataset)) or count(dataset, *rest)
    )
    monkeypatch.setattr(lengths, "_of_parts", {})
    long = row("long", "q", "word " * 300)
    first, second = (
        write(folder, [SOUND[0], long, *SOUND[1:4]]),
        write(folder, [long, SOUND[5], SOUND[4]], "more.json"),
    )
    rows = opened(folder, f"{first},{second}")
    dataset = rows.that_fit(tiny_processor, 200)
    parts = [dataset, *held_out(rows, dataset, 0.4, seed=1)]
    found = [token_counts(part, tiny_processor) for part in parts]
    assert counted == [5, 3] and [len(part) for part in parts] == [8, 5, 3]
    lengths._of_parts.clear()
    for part, counts in zip(parts, found, strict=True):
        plain = count(part, tiny_processor, 1)
        assert counts.num_tokens.tolist() == plain.num_tokens.tolist()
        assert counts.num_supervised.tolist() == plain.num_supervised.tolist()
    token_counts(parts[1], tiny_processor)
    assert counted == [5, 3, 5]  # as it would be without


def test_raise_gives_the_first_sentence_and_skip_all_of_them(folder, tiny_processor):
    data = write(folder, MIXED)
    with pytest.raises(UserError, match=r"row 2 \(id 'empty'\): turn 2 is an empty answer; write the answer"):
        opened(folder, data, "raise")
    rows = opened(folder, data)
    dataset = rows.that_fit(tiny_processor, 500)
    assert dataset["id"][:] == [f"ok{index}" for index in range(6)]
    assert [(p.row, p.id, p.kind) for p in rows.left_out] == [
        (2, "empty", "empty_answer"),
        (4, "gone", "missing_image"),
        (6, "broken", "unreadable_image"),
    ]
    assert rows.cut == []
    # The rows that are left know their numbers in the file.
    assert [place for place, _ in rows.first(4)] == [
        f"{data}: row 1 (id 'ok0')",
        f"{data}: row 3 (id 'ok1')",
        f"{data}: row 5 (id 'ok2')",
        f"{data}: row 7 (id 'ok3')",
    ]


def test_a_sound_set_is_the_same_either_way_and_as_load_data_gives_it(folder, tiny_processor):
    write(folder, SOUND, "a.json")
    write(folder, [row(f"t{index}", "q", f"a{index}") for index in range(20)], "b.json")
    mixture = f"{folder / 'b.json'}:0.3,{folder / 'a.json'}:2,{folder / 'b.json'}:0.5"
    plain = load_data(mixture, folder / "images", seed=7, cache_dir=folder / "cache")
    for on_bad_row in ("raise", "skip"):
        rows = opened(folder, mixture, on_bad_row, seed=7)
        assert rows.that_fit(tiny_processor, 500).to_list() == plain.to_list()
        assert not rows.left_out and not rows.cut
    other = opened(folder, mixture, seed=8).that_fit(tiny_processor, 500)
    assert other["id"][:] != plain["id"][:]


def test_what_is_bad_is_remembered_until_a_file_changes(folder, tiny_processor, monkeypatch):
    data = write(folder, MIXED)
    calls = []
    check = known_problems.check_data
    monkeypatch.setattr(known_problems, "check_data", lambda sources: calls.append(1) or check(sources))
    for _ in range(2):
        assert len(opened(folder, data).that_fit(tiny_processor, 500)) == 6
    assert len(calls) == 1
    Image.new("RGB", (30, 30)).save(folder / "images/bad.png")  # mended
    mended = opened(folder, data)
    assert len(mended.that_fit(tiny_processor, 500)) == 7 and [p.row for p in mended.left_out] == [2, 4]
    (folder / "images/3.png").write_text("broken now")
    assert len(opened(folder, data).that_fit(tiny_processor, 500)) == 6
    write(folder, SOUND[:2])
    assert len(opened(folder, data).that_fit(tiny_processor, 500)) == 2


def test_a_broken_file_or_one_without_a_good_row_is_refused_under_both(folder, tiny_processor):
    text = json.dumps(SOUND * 20)
    (folder / "cut.json").write_text(text[:-50])
    data = write(folder, BAD)
    for on_bad_row in ("raise", "skip"):
        with pytest.raises(UserError, match="not valid JSON"):
            opened(folder, folder / "cut.json", on_bad_row)
    with pytest.raises(UserError, match="no row can be trained on"):
        opened(folder, data).that_fit(tiny_processor, 500)
    with pytest.raises(UserError, match="no row can be trained on"):
        opened(folder, write(folder, SOUND)).that_fit(tiny_processor, 20)


# ---------------------------------------------------------------------- too long


def test_every_limit_trains_a_prefix_or_leaves_the_row_out(folder, processor):
    turns = []
    for index in range(2):
        turns += [{"from": "human", "value": f"<image>\nWhat is {index}?"}, {"from": "gpt", "value": "Just a number."}]
    long = {"id": "long", "image": ["2.png", "5.png"], "conversations": turns}
    data = write(folder, [SOUND[0], long, row("text", "q", "word " * 100)])
    (whole,) = [one for one in opened(folder, data).that_fit(processor, 10_000) if one["id"] == "long"]
    encoded = LlavaCollator(processor)([whole])
    ids, labels = encoded["input_ids"][0], encoded["labels"][0]
    is_image = ids == processor.image_token_id
    seen = set()
    for limit in [*range(40, len(ids), 3), *is_image.nonzero().flatten().tolist(), len(ids) - 1]:
        rows = opened(folder, data)
        inside = bool(is_image[limit - 1] and is_image[limit])
        nothing = not (labels[:limit] != -100).any()
        try:
            dataset = rows.that_fit(processor, limit)
        except UserError:
            assert nothing or inside
            continue
        found = [one for one in dataset if one["id"] == "long"]
        assert bool(found) == (not inside and not nothing), limit
        listed = [problem for problem in (rows.cut if found else rows.left_out) if problem.id == "long"]
        assert len(listed) == 1 and f"has {len(ids)} tokens and the limit is {limit}" in listed[0].what
        seen.add("cut" if found else "image" if inside else "nothing")
        if found:
            batch = LlavaCollator(processor, max_length=limit)(found)
            assert torch.equal(batch["input_ids"][0], ids[:limit]) and torch.equal(batch["labels"][0], labels[:limit])
            num_pixels = processor.num_placeholders(batch)
            assert sum(num_pixels) == is_image[:limit].sum()
        with pytest.raises(UserError, match="tokens and the limit is"):
            opened(folder, data, "raise").that_fit(processor, limit)
    assert seen >= {"cut", "image"}


def test_without_the_rule_a_cut_goes_through_an_image(folder, processor):
    """What the original does: the placeholders that are left are no longer those of a whole picture."""
    data = write(folder, [SOUND[5]])
    (one,) = opened(folder, data).that_fit(processor, 500)
    encoded = LlavaCollator(processor)([one])
    is_image = encoded["input_ids"][0] == processor.image_token_id
    inside = int(is_image.nonzero()[3])
    naive = encoded["input_ids"][0, :inside]
    assert 0 < (naive == processor.image_token_id).sum() < sum(processor.num_placeholders(encoded))
    with pytest.raises(UserError, match="through an image"):
        LlavaCollator(processor, max_length=inside)([one])


# ---------------------------------------------------------------------- the command


def flags(model, data, folder, output_dir, **more):
    settings = {
        "model_name_or_path": model,
        "data_path": data,
        "image_folder": folder / "images",
        "output_dir": output_dir,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "lora_r": 4,
        "save_strategy": "no",
        "use_cpu": True,
    }
    return [str(text) for name, value in (settings | more).items() for text in (f"--{name}", value)]


@pytest.fixture
def cache(folder, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(folder / "cache"))


def test_training_refuses_skips_and_lists(tiny_checkpoint, folder, cache, capfd):
    data = write(folder, [*MIXED, row("long", "q", "word " * 100)])
    with pytest.raises(SystemExit) as exit_info:
        train(flags(tiny_checkpoint, data, folder, folder / "out", model_max_length=120))
    err = capfd.readouterr().err
    assert exit_info.value.code == 2 and "row 2 (id 'empty'): turn 2 is an empty answer" in err
    assert not (folder / "out").exists()

    train(flags(tiny_checkpoint, data, folder, folder / "out", model_max_length=120, on_bad_row="skip", preview=1))
    err = " ".join(capfd.readouterr().err.split())
    assert "rows left out: 3, cut at 120 tokens: 1" in err and SKIPPED_FILE in err
    assert "[[ The number 0.</s>]]" in err and "<image> x 16" in err
    lines = [json.loads(line) for line in (folder / "out" / SKIPPED_FILE).read_text().splitlines()]
    assert [(line["row"], line["id"], line["done"]) for line in lines] == [
        (2, "empty", "left out"),
        (4, "gone", "left out"),
        (6, "broken", "left out"),
        (10, "long", "cut"),
    ]
    assert (folder / "out/adapter_config.json").is_file()


def test_streaming_cuts_and_skips_too(tiny_checkpoint, folder, cache, capfd):
    data = write(folder, [*MIXED, row("long", "q", "word " * 100)])
    more = {"model_max_length": 120, "streaming": True, "shuffle_buffer_size": 0, "max_steps": 5, "preview": 2}
    with pytest.raises(SystemExit):
        train(flags(tiny_checkpoint, data, folder, folder / "out", **more))
    assert "row 2 (id 'empty')" in capfd.readouterr().err
    train(flags(tiny_checkpoint, data, folder, folder / "out", on_bad_row="skip", **more))
    err = capfd.readouterr().err
    assert (folder / "out/adapter_config.json").is_file()
    assert "turn 2 is an empty answer" in err and "[[ The number 0.</s>]]" in err


def test_a_list_of_a_run_before_does_not_stay(folder, tiny_processor):
    rows = opened(folder, write(folder, MIXED))
    rows.that_fit(tiny_processor, 500)
    assert "rows left out: 3" in str(told_of_skipped(rows, 500, folder / "out"))
    assert os.listdir(folder / "out") == [SKIPPED_FILE]
    rows = opened(folder, write(folder, SOUND))
    rows.that_fit(tiny_processor, 500)
    assert told_of_skipped(rows, 500, folder / "out") is None and os.listdir(folder / "out") == []


def test_numbers_of_a_large_set_with_many_bad_rows(folder, tiny_processor):
    good = np.random.default_rng(0).random(300) < 0.8
    data = write(folder, [row(f"r{n}", "q", "a" if is_good else " ") for n, is_good in enumerate(good, start=1)])
    rows = opened(folder, data)
    dataset = rows.that_fit(tiny_processor, 500)
    kept = (np.flatnonzero(good) + 1).tolist()
    assert dataset["id"][:] == [f"r{n}" for n in kept]
    assert [int(place.split("row ")[1].split(" ")[0]) for place, _ in rows.first(1000)] == kept
    assert [problem.row for problem in rows.left_out] == (np.flatnonzero(~good) + 1).tolist()
