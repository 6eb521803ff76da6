"""`llava-ft check`: every kind of problem is told with its row, the numbers are those of a plain recomputation, and
hostile files end in sentences."""

import json
import struct
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hf_llava_ft.checking.check import check_data
from hf_llava_ft.checking.images import image_facts
from hf_llava_ft.checking.statistics import length_statistics, padding_waste
from hf_llava_ft.data.collator import open_picture
from hf_llava_ft.data.formats import open_source
from hf_llava_ft.data.pictures import decode_failure
from hf_llava_ft.processing.processing_llava import LlavaProcessor


def row(row_id, question, answer, image=None):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": row_id, "conversations": turns} | ({} if image is None else {"image": image})


def write_bomb(path):
    """A PNG of 50,000 x 50,000 pixels in some hundred bytes."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


@pytest.fixture
def folder(tmp_path):
    """`images/` with sound pictures of all kinds, and others."""
    images = tmp_path / "images"
    images.mkdir()
    for index in range(3):
        Image.new("RGB", (60 + index, 40), (40 * index, 90, 200)).save(images / f"{index}.png")
    noise = np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8)
    Image.fromarray(noise).save(images / "cut.jpg")
    (images / "cut.jpg").write_bytes((images / "cut.jpg").read_bytes()[:-2000])
    (images / "text.png").write_text("no picture")
    (images / "empty.png").touch()
    write_bomb(images / "bomb.png")
    Image.new("RGB", (300, 1)).save(images / "thin.png")
    Image.new("RGB", (30, 630)).save(images / "tall.png")
    Image.new("RGB", (30, 600)).save(images / "just.png")  # 1 to 20, and not more
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (50, 40)).save(images / "turned.jpg", exif=exif)
    return tmp_path


def write(folder, rows, name="data.json"):
    (folder / name).write_text(json.dumps(rows), encoding="utf-8")
    return folder / name


SOUND = [row(f"ok{index}", "<image>\nWhat is it?", f"It is number {index}.", f"{index}.png") for index in range(3)]

# kind -> (row, part of what is said)
WRONG = {
    "missing_image": (row("x", "<image>\nq", "a", "no.png"), "'no.png' is missing from images"),
    "refused_image": (row("x", "<image>\nq", "a", "../0.png"), "leaves the image folder"),
    "unreadable_image": (
        row("x", "<image>\nq", "a", "cut.jpg"),
        "'cut.jpg' can't be decoded (image file is truncated",
    ),
    "decompression_bomb": (row("x", "<image>\nq", "a", "bomb.png"), "'bomb.png' can't be decoded"),
    "placeholder_mismatch": (row("x", "<image><image>\nq", "a", "0.png"), "2 <image> placeholders and 1 image"),
    "turn_order": ({"id": "x", "conversations": row("", "q", "a")["conversations"][::-1]}, "begins with an assistant"),
    "empty_answer": (row("x", "q", " \n"), "turn 2 is an empty answer"),
    "image_in_answer": (row("x", "q", "see <image>"), "turn 2, an answer, holds <image>"),
    "unreadable_row": ({"id": "x", "conversations": [{"from": "robot", "value": "q"}]}, "unknown role 'robot'"),
    "too_long": (row("x", "q", "word " * 300), "tokens and the limit is 200"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_each_problem_is_told_with_its_row(llava_ft, folder, tiny_checkpoint, kind):
    bad, expected = WRONG[kind]
    data = write(folder, [*SOUND, bad, row("text", "Hello", "Hi.")])
    flags = ["--image_folder", folder / "images", "--model", tiny_checkpoint, "--model_max_length", 200]
    code, out, _ = llava_ft("check", data, *flags, "--json", folder / "out.json")
    result = json.loads((folder / "out.json").read_text())
    assert code == 1 and result["trainable"] is False
    [problem] = result["problems"]
    assert (problem["row"], problem["id"], problem["kind"], problem["file"]) == (4, "x", kind, str(data))
    assert expected in problem["what"] and problem["what_to_do"].endswith(".") and str(folder) not in problem["what"]
    assert "row 4 (id 'x')" in out and problem["what"] in out and "1 of 5 rows has problems" in out
    # Without the row, nothing is wrong.
    data = write(folder, [*SOUND, row("text", "Hello", "Hi.")])
    code, out, _ = llava_ft("check", data, *flags, "--json", folder / "out.json")
    assert code == 0 and json.loads((folder / "out.json").read_text())["problems"] == []
    assert "Every row can be trained on" in out


def test_all_at_once_are_counted(llava_ft, folder, tiny_checkpoint):
    data = write(folder, [*SOUND, *(bad for bad, _ in WRONG.values())])
    flags = ["--image_folder", folder / "images", "--model", tiny_checkpoint, "--model_max_length", 200]
    assert llava_ft("check", data, *flags, "--json", folder / "out.json")[0] == 1
    result = json.loads((folder / "out.json").read_text())
    assert [problem["kind"] for problem in result["problems"]] == list(WRONG)
    assert [problem["row"] for problem in result["problems"]] == list(range(4, 4 + len(WRONG)))
    expected = {
        "rows": 13,
        "images": 5,
        "missing_images": 1,
        "unreadable_images": 2,
        "decompression_bombs": 1,
        "placeholder_mismatches": 1,
        "turn_order": 1,
        "empty_answers": 1,
        "images_in_answers": 1,
        "over_length_rows": 1,
        "unsupervised_rows": 0,
        "rows_by_kind": {"text": 1, "image": 7, "multi_image": 0},
    }
    assert {name: result[name] for name in expected} == expected


def test_a_template_that_learns_nothing_is_told(folder, tiny_processor, tmp_path):
    tiny_processor.save_pretrained(tmp_path / "p")
    processor = LlavaProcessor.from_pretrained(tmp_path / "p")
    _ = processor.stop_token_id
    processor.chat_template = (
        "{% for message in messages %}{{ message['content'][-1]['text'] }}"
        "{% if 'learn' in message['content'][-1]['text'] %}{% generation %}{{ eos_token }}{% endgeneration %}"
        "{% endif %}{% endfor %}"
    )
    data = write(folder, [row("a", "q", "learn"), row("b", "q", "not")])
    result = check_data(open_source(data), processor, longest=100, num_proc=1)
    assert [(problem.kind, problem.row) for problem in result.problems] == [("unsupervised", 2)]
    assert result.to_json()["unsupervised_rows"] == 1


def test_warnings_do_not_stop_training(llava_ft, folder, tiny_checkpoint):
    rows = [
        *SOUND,
        row("thin", "<image>\nq", "a", "thin.png"),
        row("tall", "<image>\nq", "a", "tall.png"),
        row("just", "<image>\nq", "a", "just.png"),
        row("turned", "<image>\nq", "a", "turned.jpg"),
        row("stop", "what is <s>?", "It ends </s> here."),
        {**SOUND[1], "id": "again"},
    ]
    flags = ["--image_folder", folder / "images", "--model", tiny_checkpoint, "--json", folder / "out.json"]
    code, out, _ = llava_ft("check", write(folder, rows), *flags)
    result = json.loads((folder / "out.json").read_text())
    assert code == 0 and result["problems"] == []
    found = [(warning["row"], warning["kind"]) for warning in result["warnings"]]
    assert found == [
        (4, "extreme_shape"),
        (5, "extreme_shape"),
        (8, "control_text"),
        (8, "control_text"),
        (9, "duplicate_row"),
    ]
    texts = [warning["what"] for warning in result["warnings"]]
    assert "300 x 1 pixels" in texts[0] and "row 2" in texts[4]
    assert "'<s>'" in texts[2] and "stop there" not in texts[2] and "stop there" in texts[3]
    assert result["turned_images"] == 1 and "1; trained upright, as transformers'" in " ".join(out.split())
    assert (result["images"], result["image_places"], result["reused_images"]) == (7, 8, 1)
    assert result["duplicate_rows"] == 1 and result["image_formats"] == {"PNG": 6, "JPEG": 1}


def test_it_is_told_how_training_will_open_pictures(llava_ft, tiny_checkpoint, folder):
    data = write(folder, [row("turned", "<image>\nq", "a", "turned.jpg")])
    flags = ["--image_folder", folder / "images", "--json", folder / "out.json", "--picture_opening"]
    code, out, _ = llava_ft("check", data, *flags, "original", "--model", tiny_checkpoint)
    assert code == 0 and "1; trained upright" not in " ".join(out.split())
    assert json.loads((folder / "out.json").read_text())["picture_opening"] == "original"
    for more, said in ((["original"], "give it with --model"), (["sideways", "--model", tiny_checkpoint], "sideways")):
        code, _, err = llava_ft("check", data, *flags, *more)
        assert code == 2 and said in " ".join(err.split())


def test_control_text_is_what_the_tokenizer_reads_as_such(tiny_processor, folder):
    data = write(folder, [row("a", "q", "</s>"), row("b", "q", "<|im_end|>"), row("c", "q", "< /s>")])
    with_model = check_data(open_source(data), tiny_processor, num_proc=1)
    assert [warning.row for warning in with_model.warnings] == [1]  # this tokenizer has no <|im_end|>
    without = check_data(open_source(data), num_proc=1)
    assert [warning.row for warning in without.warnings] == [1, 2]
    ids = tiny_processor.tokenizer("x</s>", add_special_tokens=False).input_ids
    assert tiny_processor.tokenizer.eos_token_id in ids


def test_only_what_ends_an_answer_teaches_to_stop(tiny_processor, folder):
    data = write(folder, [row("a", "q", "an <unk> and a </s> too")])
    warnings = check_data(open_source(data), tiny_processor, num_proc=1).warnings
    says = {warning.what.split("'")[1]: warning.what.rpartition("the model learns to ")[2] for warning in warnings}
    assert says == {"<unk>": "write it", "</s>": "stop there"}


@pytest.mark.parametrize("num_proc", [1, 2])
def test_numbers_are_those_of_encoding_every_row(folder, tiny_processor, num_proc):
    words = "a cat sits on the mat and looks at me".split()
    rows = []
    for index in range(150):
        question, answer = " ".join(words[: index % 9 + 1]), " ".join(words * (index % 7 + 1))
        images = [f"{index % 3}.png", "0.png"][: index % 3]
        rows.append(row(f"r{index}", "<image>\n" * len(images) + question, answer, images or None))
    data = write(folder, rows)
    sources = open_source(data, folder / "images")
    result = check_data(sources, tiny_processor, longest=100, batch_size=8, num_proc=num_proc)
    lengths, learned, num_images = [], [], []
    for number, raw in sources[0].iter_raw():
        parsed = sources[0].row(raw, number)
        encoded = tiny_processor.encode_conversation(parsed["messages"], list(map(open_picture, parsed["images"])))
        lengths.append(len(encoded["input_ids"]))
        learned.append(int((encoded["labels"] != -100).sum()))
        num_images.append(len(parsed["images"]))
    report = result.to_json()
    assert report["rows_by_kind"] == {
        name: num_images.count(n) for n, name in enumerate(("text", "image", "multi_image"))
    }
    assert report["tokens"] == sum(lengths) and report["supervised_tokens"] == sum(learned)
    assert report["supervised_share"] == round(sum(learned) / sum(lengths), 4)
    assert report["image_tokens"] == 16 * sum(num_images)
    assert report["token_lengths"]["min"] == min(lengths) and report["token_lengths"]["max"] == max(lengths)
    too_long = [index + 1 for index, length in enumerate(lengths) if length > 100]
    assert too_long and report["over_length_rows"] == len(too_long)
    assert [problem.row for problem in result.problems] == too_long
    assert f"has {lengths[too_long[0] - 1]} tokens and the limit is 100" in result.problems[0].what
    # Those that can be cut take part in an epoch, as under --on_bad_row skip: all here, since the answers come early.
    assert report["cut"] == {
        "rows": len(too_long),
        "tokens": sum(max(0, length - 100) for length in lengths),
        "rows_left_out": 0,
    }
    num_rows = 150
    num_steps = -(-num_rows // 8)
    expected = {"batch_size": 8, "accumulation": 1, "rows_per_epoch": num_rows, "steps_per_epoch": num_steps}
    assert report["steps"] == expected


def test_rows_that_no_cut_can_help_are_counted(folder, tiny_processor):
    rows = [row("early", "q", "word " * 100), row("late", "word " * 100, "a")]
    result = check_data(open_source(write(folder, rows)), tiny_processor, longest=80, num_proc=1)
    [early, late] = [problem.what for problem in result.problems]
    assert (
        "skip cuts off the last" in early and "leaves the row out, since the cut would leave nothing to learn" in late
    )
    cut = result.to_json()["cut"]
    assert (cut["rows"], cut["rows_left_out"]) == (1, 1) and f"the last {cut['tokens']})" in early
    # As training has it that is told of no batch (`settings/defaults.py`).
    steps = {"batch_size": 4, "accumulation": 1, "rows_per_epoch": 1, "steps_per_epoch": 1}
    assert result.to_json()["steps"] == steps


def test_llava_next_counts_by_the_size_of_each_picture(folder, tiny, golden):
    from hf_llava_ft.processing.tokenizer_llava import load_tokenizer

    processor = LlavaProcessor.build(
        load_tokenizer(golden / "tokenizer_tiny"),
        tiny.config().vision_config,
        version="v1",
        image_aspect_ratio="anyres",
        image_grid_pinpoints=[[56, 112], [112, 56], [112, 112]],
    )
    names = ["0.png", "just.png", "turned.jpg", "cut.jpg"]
    data = write(folder, [row(name, "<image>\nq", "a", name) for name in names])
    sources = open_source(data, folder / "images")
    result = check_data(sources, processor, longest=1000, num_proc=2)
    assert [(problem.row, problem.kind) for problem in result.problems] == [(4, "unreadable_image")]
    lengths = []
    for number, raw in sources[0].iter_raw():
        parsed = sources[0].row(raw, number)
        if number != 4:
            encoded = processor.encode_conversation(parsed["messages"], list(map(open_picture, parsed["images"])))
            lengths.append(len(encoded["input_ids"]))
        else:
            lengths.append(processor.num_tokens(parsed["messages"], [(120, 160)]))  # by its header
    assert len(set(lengths)) > 1 and result.tokens["tokens"] == sum(lengths)


# ---------------------------------------------------------------------- statistics


def test_percentiles_and_histogram_by_hand():
    lengths = np.array([5, 1, 2, 3, 4, 9, 6, 7, 8, 10])
    found = length_statistics(lengths)
    assert found["percentiles"] == {"1": 1, "5": 1, "25": 3, "50": 5, "75": 8, "95": 10, "99": 10}
    assert (found["min"], found["mean"], found["max"]) == (1, 5.5, 10)
    assert sum(found["histogram"]["counts"]) == 10 and len(found["histogram"]["edges"]) == 11
    same = length_statistics(np.array([7, 7, 7]))
    assert same["histogram"]["counts"] == [3] and same["percentiles"]["50"] == 7
    wide = length_statistics(np.array([1, 100_000]))["histogram"]
    assert sum(wide["counts"]) == 2 and wide["edges"][0] <= 1 and wide["edges"][-1] > 100_000


def test_padding_waste_is_that_of_batches_padded_one_by_one():
    from hf_llava_ft.data.sampler import modality_length_grouped_indices

    random = np.random.default_rng(0)
    lengths, has_images = random.integers(10, 500, 103), random.choice([True, False], 103)
    signed = np.where(has_images, lengths, -lengths)
    import torch

    generator = torch.Generator().manual_seed(0)
    orders = {"random": torch.randperm(103, generator=generator).tolist()}
    orders["group_by_modality_length"] = modality_length_grouped_indices(
        signed, 4, 1, generator, mixing=0.1, accumulation_steps=1
    )
    for name, order in orders.items():
        batches = [lengths[order[start : start + 4]] for start in range(0, 103, 4)]
        padded = sum(len(batch) * batch.max() for batch in batches)
        assert padding_waste(lengths, has_images, 4)[name] == pytest.approx(1 - lengths.sum() / padded, abs=1e-4)
    assert padding_waste(lengths, has_images, 1) == {"random": 0.0, "group_by_modality_length": 0.0}


def test_a_jpeg_is_judged_at_an_eighth_as_it_is_whole(folder):
    whole = (folder / "images/cut.jpg").read_bytes()
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (90, 130, 3), dtype=np.uint8)).save(folder / "w.jpg")
    whole, verdicts = (folder / "w.jpg").read_bytes(), set()
    for size in [*range(0, len(whole), 97), *range(len(whole) - 30, len(whole) + 1)]:
        (folder / "some.jpg").write_bytes(whole[:size])
        try:
            with Image.open(folder / "some.jpg") as image:
                image.load()
            is_sound = True
        except Exception:
            is_sound = False
        verdicts.add(is_sound)
        assert (decode_failure(whole[:size]) is None) == is_sound
        assert (image_facts(str(folder / "some.jpg")).failure is None) == is_sound
    assert verdicts == {True, False}


# ---------------------------------------------------------------------- formats, and what is hostile


def test_embedded_pictures_of_a_parquet_file(llava_ft, folder):
    good, cut = ((folder / "images" / name).read_bytes() for name in ("0.png", "cut.jpg"))
    turns = row("", "<image>\nq", "a")["conversations"]
    images = [{"bytes": content, "path": None} for content in (good, cut, good)]
    table = pa.table({"id": ["a", "b", "c"], "image": images, "conversations": [turns] * 3})
    pq.write_table(table, folder / "data.parquet")
    code, out, _ = llava_ft("check", folder / "data.parquet", "--json", folder / "out.json")
    result = json.loads((folder / "out.json").read_text())
    assert code == 1 and [(p["row"], p["id"], p["kind"]) for p in result["problems"]] == [(2, "b", "unreadable_image")]
    assert result["images"] == 3 and result["duplicate_rows"] == 1


def test_several_sets_with_weights(llava_ft, folder, tiny_checkpoint):
    write(folder, SOUND, "a.json")
    write(folder, [row(f"t{index}", "q", "a" * index) for index in range(1, 11)] + [row("bad", "q", "")], "b.json")
    mixture = f"{folder / 'a.json'}:2,{folder / 'b.json'}:0.5"
    flags = ["--image_folder", folder / "images", "--model", tiny_checkpoint, "--batch_size", 4]
    code, out, _ = llava_ft("check", mixture, *flags, "--json", folder / "out.json")
    result = json.loads((folder / "out.json").read_text())
    assert code == 1 and result["rows"] == 14 and result["steps"]["rows_per_epoch"] == 6 + 5
    [problem] = result["problems"]
    assert problem["file"].endswith("b.json") and problem["row"] == 11


def test_a_file_that_breaks_off_is_a_problem_and_what_was_read_is_told(llava_ft, folder):
    text = json.dumps(SOUND * 20)
    (folder / "data.json").write_text(text[: len(text) - 100])
    code, out, _ = llava_ft("check", folder / "data.json", "--image_folder", folder / "images", "--json", folder / "o")
    result = json.loads((folder / "o").read_text())
    assert code == 1 and result["rows"] == 59 and result["problems"][-1]["kind"] == "broken_file"
    assert "not valid JSON at line 1" in result["problems"][-1]["what"]


@pytest.mark.timeout(120)
def test_hostile_rows_end_in_sentences(llava_ft, folder, tiny_checkpoint):
    deep = "x"
    for _ in range(900):
        deep = [deep]
    rows = [
        {"id": "deep", "conversations": deep},
        row("nul", "q", "a\x00b"),
        row("surrogate", "q", "\ud800"),
        row("huge", "q", "spam" * 100_000),
        row(["list"], "q", "a"),
        row("path", "<image>\nq", "a", "/etc/passwd"),
        row("web", "<image>\nq", "a", "http://127.0.0.1:9/x.png"),
        row("empty", "<image>\nq", "a", "empty.png"),
        row("long name", "<image>\nq", "a", "n" * 5000),
        row("id \ud800", "q", "a"),
        10**400,
        "text",
        None,
        row("<script>", "\x1b[2J", "fine"),
    ]
    data = write(folder, rows)
    flags = ["--image_folder", folder / "images", "--model", tiny_checkpoint, "--report", folder / "r.html"]
    code, out, _ = llava_ft("check", data, *flags, "--preview", 12, "--json", folder / "out.json")
    result = json.loads((folder / "out.json").read_text())
    assert code == 1 and [problem["row"] for problem in result["problems"]] == list(range(1, 14))
    assert "\x1b" not in out and (folder / "r.html").is_file()
    assert max(len(problem["what"]) for problem in result["problems"]) < 600
    assert not [
        text
        for problem in result["problems"]
        for text in (problem["what"], problem["what_to_do"])
        if str(folder) in text
    ]
    assert "400,178 characters" in result["problems"][3]["what"] and result["problems"][3]["kind"] == "too_long"


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["nowhere.json"], "nowhere.json"),
        (["DATA", "--model", "nowhere/model"], "nowhere/model"),
        (["DATA", "--model", "MODEL", "--version", "v9"], "unknown chat template 'v9'"),
        (["DATA", "--image_folder", "nowhere"], "nowhere is not a folder"),
        (["DATA", "--preview", "1"], "--model"),
        (["DATA", "--batch_size", "0"], "batch_size"),
        (["DATA", "--report", "images"], "images cannot be written"),
        (["DATA", "--json", "images"], "images cannot be written"),
        ([], "data"),  # typer's own sentence, or ours where an older typer gives an empty list
    ],
)
def test_bad_usage_ends_with_2(llava_ft, folder, tiny_checkpoint, args, expected, monkeypatch):
    monkeypatch.chdir(folder)
    data = write(folder, SOUND)
    args = [{"DATA": data, "MODEL": tiny_checkpoint}.get(arg, arg) for arg in args]
    code, out, err = llava_ft("check", *args)
    assert code == 2 and expected.lower() in err.lower() and not out


def test_the_terminal_shows_what_it_knows_and_says_what_it_does_not(llava_ft, folder, tiny_checkpoint):
    data = write(folder, SOUND)
    _, out, _ = llava_ft("check", data, "--image_folder", folder / "images")
    assert "not counted; --model counts them" in out
    flags = ["--image_folder", folder / "images", "--model", tiny_checkpoint]
    _, out, _ = llava_ft("check", data, *flags)
    assert "time not known" in out
    _, out, _ = llava_ft("check", data, *flags, "--samples_per_second", 0.5, "--preview", 1)
    assert "about 6 seconds at 0.5 samples/s" in " ".join(out.split())
    assert "[[ It is number 0.</s>]]" in out and "row 1 (id 'ok0')" in out
