"""A stream gives each row once, to all ranks and workers together, and goes on where a checkpoint was."""

import json
import os
import re
import subprocess
import sys
import tracemalloc
from collections import Counter

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import set_seed

import hf_llava_ft
from hf_llava_ft.checkpoints.opening import load_model, load_processor
from hf_llava_ft.data.builder import LlavaConversations
from hf_llava_ft.data.collator import LlavaCollator, open_picture
from hf_llava_ft.data.formats import load_data, open_source
from hf_llava_ft.data.json import parts as json_parts
from hf_llava_ft.data.streaming import PASSED, LlavaStream, loader
from hf_llava_ft.errors import UserError
from hf_llava_ft.settings.arguments import TuningArguments
from hf_llava_ft.settings.training_arguments import LlavaTrainingArguments
from hf_llava_ft.train import main
from hf_llava_ft.training.tuning import with_lora


def text_row(index: int) -> dict:
    turns = [{"from": "human", "value": f"What is {index}?"}, {"from": "gpt", "value": f"It is {index}."}]
    return {"id": f"row{index}", "conversations": turns}


@pytest.fixture
def text_stream(tmp_path):
    """A function that writes rows of text alone and opens them as a stream."""

    def make(count: int = 50, rows: list | None = None, **options) -> LlavaStream:
        path = tmp_path / "text.json"
        content = json.dumps(rows or [text_row(index) for index in range(count)])
        if not path.exists() or path.read_text() != content:  # a stream refuses a file that was written since
            path.write_text(content)
        return LlavaStream(open_source(path), **{"shuffle_buffer_size": 8, "cache_dir": tmp_path / "cache", **options})

    return make


def ids(rows) -> list[str]:
    return [row["id"] for row in rows]


def batches_of_ids(stream: LlavaStream, rank: int = 0, world_size: int = 1, batch_size: int = 1, num_workers: int = 0):
    """Batches as the DataLoader of a rank gives them."""
    own = stream.for_rank(rank, world_size, batch_size)
    loader = DataLoader(own, batch_size=batch_size, num_workers=num_workers, collate_fn=collate_ids)
    batches = list(loader)
    assert len(batches) == len(loader)
    return batches


def collate_ids(rows):
    return [None if row is PASSED else row["id"] for row in rows]


def test_every_row_comes_once_in_an_order_of_seed_and_epoch(text_stream):
    stream = text_stream(50)
    first = ids(stream)
    assert sorted(first) == sorted(ids([text_row(index) for index in range(50)]))
    assert first == ids(stream) == ids(text_stream(50))
    stream.set_epoch(1)
    second = ids(stream)
    assert sorted(second) == sorted(first) and second != first
    assert ids(text_stream(50, seed=43)) != first
    assert ids(text_stream(50, shuffle_buffer_size=0)) == ids([text_row(index) for index in range(50)])


@pytest.mark.parametrize(("world_size", "num_workers", "batch_size"), [(2, 2, 3), (2, 0, 1), (3, 1, 4), (1, 3, 2)])
def test_ranks_and_workers_share_the_rows_out(text_stream, world_size, num_workers, batch_size):
    stream = text_stream(48)
    by_rank = [batches_of_ids(stream, rank, world_size, batch_size, num_workers) for rank in range(world_size)]
    seen = Counter(row_id for batches in by_rank for batch in batches for row_id in batch)
    assert len(seen) == 48 and set(seen.values()) == {1}
    for batches in by_rank:
        assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)


@pytest.mark.parametrize("count", [47, 45, 5, 2, 1])
def test_ranks_take_equally_many_steps_of_an_uneven_number_of_rows(text_stream, count):
    stream = text_stream(count)
    by_rank = [batches_of_ids(stream, rank, 4, 2, 2) for rank in range(4)]
    assert len({tuple(map(len, batches)) for batches in by_rank}) == 1
    seen = Counter(row_id for batches in by_rank for batch in batches for row_id in batch)
    assert len(seen) == count and sum(seen.values()) - count < 4


def test_persistent_workers_see_the_next_epoch(text_stream):
    stream = text_stream(20)
    loader = DataLoader(stream, batch_size=None, num_workers=1, persistent_workers=True, collate_fn=ids_of_row)
    orders = []
    for epoch in range(2):
        stream.set_epoch(epoch)
        orders.append(list(loader))
    assert sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1]


def ids_of_row(row):
    return row["id"]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("passed", [1, 4, 7])
def test_passing_over_goes_on_where_it_was_and_reads_nothing_before(text_stream, num_workers, passed):
    whole = batches_of_ids(text_stream(50), 1, 2, 3, num_workers)
    own = text_stream(50).for_rank(1, 2, 3)
    own.pass_over(0, passed)
    loader = DataLoader(own, batch_size=3, num_workers=num_workers, collate_fn=collate_ids)
    resumed = list(loader)
    assert resumed[:passed] == [[None] * 3] * passed
    assert resumed[passed:] == whole[passed:]
    own.set_epoch(1)
    assert all(None not in batch for batch in loader)


def test_passing_over_reads_one_buffer_again_and_no_more(text_stream, monkeypatch):
    stream = text_stream(50, shuffle_buffer_size=8)
    read = []
    original = stream.sources[0].parse
    stream.sources[0].parse = lambda raw, number: read.append(number) or original(raw, number)
    stream.pass_over(0, 29)  # batches of one row
    rows = [row for row in stream if row is not PASSED]
    assert len(rows) == len(read) == 21


def test_a_wrong_position_is_noticed(text_stream):
    """The negative control of the two tests above: one batch too few, and the rest is another."""
    whole = ids(text_stream(50))
    stream = text_stream(50)
    stream.pass_over(0, 9)
    assert ids(row for row in stream if row is not PASSED) == whole[9:] != whole[10:]


def test_all_formats_give_the_rows_of_the_data_set_on_disk(tmp_path, llava_json):
    path, folder = llava_json(12, with_text_rows=True)
    rows = json.loads(path.read_text())
    lines = tmp_path / "data.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = []
    for row in rows:
        name = row.get("image")
        image = None if name is None else {"path": name, "bytes": (folder / name).read_bytes()}
        table.append({"id": row["id"], "conversations": row["conversations"], "image": image})
    parquet = tmp_path / "data.parquet"
    pq.write_table(pa.Table.from_pylist(table), parquet, row_group_size=5)
    saved = tmp_path / "saved"
    datasets.Dataset.from_list(table).save_to_disk(saved)
    captions = tmp_path / "captions"
    captions.mkdir()
    for name in ("0.png", "1.png"):
        (captions / name).write_bytes((folder / name).read_bytes())
    (captions / "metadata.csv").write_text("file_name,text\n0.png,One.\n1.png,Two.\n")

    for data_path in (path, lines, parquet, saved, captions, f"{path}:0.5,{parquet}:1.5,{captions}:2"):
        on_disk = load_data(data_path, folder, cache_dir=tmp_path / "cache", seed=7)
        expected = [{**row, "images": list(map(open_picture, row["images"]))} for row in on_disk]
        sources = open_source(data_path, folder, cache_dir=tmp_path / "cache")
        options = {"seed": 7, "cache_dir": tmp_path / "cache"}
        assert list(LlavaStream(sources, shuffle_buffer_size=0, **options)) == expected
        shuffled = list(LlavaStream(sources, shuffle_buffer_size=4, **options))
        assert Counter(ids(shuffled)) == Counter(ids(expected)) and ids(shuffled) != ids(expected)


def test_large_files_are_read_in_pieces(text_stream, monkeypatch):
    monkeypatch.setattr(json_parts, "_PART_BYTES", 2000)
    stream = text_stream(300, shuffle_buffer_size=10)
    assert len({piece.block for piece in stream._pieces}) > 5
    order = [int(row["id"].removeprefix("row")) for row in stream]
    assert sorted(order) == list(range(300))
    assert order[:10] != sorted(order[:10]) and max(order[:100]) > 150  # mixed within a buffer, and over the file
    for rank in range(2):
        whole = batches_of_ids(stream, rank, 2, 4)
        own = stream.for_rank(rank, 2, 4)
        own.pass_over(0, 30)
        resumed = list(DataLoader(own, batch_size=4, collate_fn=collate_ids))
        assert resumed[30:] == whole[30:]


def bad_rows() -> tuple[list[dict], str]:
    rows = [text_row(index) for index in range(10)]
    rows[6]["conversations"][1]["value"] = " "
    return rows, "row 7 (id 'row6'): turn 2 is an empty answer"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_row_ends_the_run_with_its_sentence(text_stream, num_workers):
    rows, sentence = bad_rows()
    with pytest.raises(UserError, match=re.escape(sentence)):
        batches_of_ids(text_stream(rows=rows), num_workers=num_workers)


def test_a_bad_row_is_skipped_and_ranks_stay_in_step(text_stream, caplog):
    rows, sentence = bad_rows()
    stream = text_stream(rows=rows, on_bad_row="skip")
    by_rank = []
    for rank in range(2):
        own = stream.for_rank(rank, 2, 2)
        by_rank.append(list(DataLoader(own, batch_size=2, num_workers=2, collate_fn=collate_ids)))
        own.pass_over(0, 1)
        assert list(DataLoader(own, batch_size=2, num_workers=2, collate_fn=collate_ids))[1:] == by_rank[rank][1:]
    assert [list(map(len, batches)) for batches in by_rank] == [[2, 2, 1]] * 2
    seen = Counter(row_id for batches in by_rank for batch in batches for row_id in batch)
    assert len(seen) == 9 and "row6" not in seen and sorted(seen.values()) == [1] * 8 + [2]

    assert len(ids(stream)) == 10 and sentence in caplog.text
    hopeless = [{"id": "x", "conversations": []}, *({"id": "y"} for _ in range(9))]
    with pytest.raises(UserError, match="no row can be trained on"):
        list(text_stream(rows=hopeless, on_bad_row="skip"))


def test_a_picture_that_cannot_be_decoded_is_named(llava_json, tmp_path):
    path, folder = llava_json(4)
    content = (folder / "2.png").read_bytes()
    (folder / "2.png").write_bytes(content[: len(content) // 2])
    stream = LlavaStream(open_source(path, folder), cache_dir=tmp_path / "cache", shuffle_buffer_size=0)
    with pytest.raises(UserError, match=re.escape("data.json: row 3 (id 'row2'): image '2.png' can't be decoded (")):
        list(stream)
    stream.on_bad_row = "skip"
    assert ids(stream) == ["row0", "row1", "row3", "row3"]


def test_memory_does_not_grow_with_the_number_of_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(json_parts, "_PART_BYTES", 2**16)
    peaks = []
    for count in (500, 5_000):
        path = tmp_path / f"{count}.json"
        path.write_text(json.dumps([text_row(index) for index in range(count)]))
        stream = LlavaStream(open_source(path), shuffle_buffer_size=100, cache_dir=tmp_path)
        tracemalloc.start()
        assert sum(1 for _ in stream) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


def test_the_builder_streams_the_rows_it_prepares(llava_json, tmp_path):
    path, folder = llava_json(7, with_text_rows=True)
    builder = LlavaConversations(cache_dir=str(tmp_path / "cache"), data_files=path, image_folder=folder)
    stream = builder.as_streaming_dataset(split="train")
    builder.download_and_prepare()
    assert list(stream) == list(builder.as_dataset(split="train"))


class RecordingCollator(LlavaCollator):
    """Writes down which rows each batch held."""

    def __call__(self, rows):
        with open(self.log, "a") as file:
            file.write(" ".join(row["id"] for row in rows) + "\n")
        return super().__call__(rows)


def make_trainer(checkpoint, stream, output_dir, **arguments):
    set_seed(42)
    processor = load_processor(str(checkpoint))
    model = load_model(str(checkpoint), processor)
    model = with_lora(model, TuningArguments(lora_r=4, lora_alpha=8, lora_dropout=0.1), str(checkpoint))
    defaults = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "save_strategy": "steps",
        "save_steps": 3,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    args = LlavaTrainingArguments(output_dir=str(output_dir), **{**defaults, **arguments})
    collator = RecordingCollator(processor, uint8_pixels=True)
    output_dir.mkdir(exist_ok=True)
    collator.log = output_dir / f"rows-{args.process_index}.txt"
    return hf_llava_ft.LlavaTrainer(
        model=model, args=args, train_dataset=stream, processing_class=processor, data_collator=collator
    )


@pytest.fixture
def mixed_stream(llava_json, tmp_path):
    """A function that opens one set of 17 rows, some of text alone, as a new stream."""
    path, folder = llava_json(17, with_text_rows=True)

    def make(**options) -> LlavaStream:
        sources = open_source(path, folder)
        return LlavaStream(sources, **{"shuffle_buffer_size": 6, "cache_dir": tmp_path / "cache", **options})

    return make


def losses_of(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(("num_workers", "step"), [(0, 3), (0, 5), (2, 3)])
def test_a_resumed_run_is_the_unbroken_run(tiny_checkpoint, mixed_stream, tmp_path, num_workers, step):
    # 17 rows in 9 batches are 5 steps, the last of which is short: step 3 is in the middle of the first epoch.
    settings = {"dataloader_num_workers": num_workers, "save_steps": step}
    unbroken = make_trainer(tiny_checkpoint, mixed_stream(), tmp_path / "unbroken", **settings)
    unbroken.train()
    resumed = make_trainer(tiny_checkpoint, mixed_stream(), tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "unbroken" / f"checkpoint-{step}"))
    assert losses_of(resumed) == losses_of(unbroken) and len(losses_of(unbroken)) == 6
    state = dict(unbroken.model.named_parameters())
    assert all(torch.equal(parameter, state[name]) for name, parameter in resumed.model.named_parameters())
    if not num_workers:  # workers write theirs at once, and prefetch
        whole, rest = ((tmp_path / run / "rows-0.txt").read_text().splitlines() for run in ("unbroken", "resumed"))
        assert sorted(" ".join(whole[:9]).split()) == sorted(f"row{index}" for index in range(17))
        assert rest == whole[min(2 * step, 9) :]  # what was trained is not even decoded


def test_passing_over_is_what_drawing_and_throwing_away_would_be(tiny_checkpoint, mixed_stream, tmp_path, monkeypatch):
    """And the negative control of the test above: another order gives other losses."""
    unbroken = make_trainer(tiny_checkpoint, mixed_stream(), tmp_path / "unbroken")
    unbroken.train()
    checkpoint = str(tmp_path / "unbroken" / "checkpoint-3")
    monkeypatch.setattr(LlavaStream, "pass_over", lambda *args: None)
    monkeypatch.setattr(loader, "_refuse_other_order", lambda *args: None)
    for seed in (42, 43):
        resumed = make_trainer(tiny_checkpoint, mixed_stream(seed=seed), tmp_path / f"{seed}")
        resumed.train(resume_from_checkpoint=checkpoint)
        assert (losses_of(resumed) == losses_of(unbroken)) == (seed == 42)
    assert (tmp_path / "42" / "rows-0.txt").read_text() == (tmp_path / "unbroken" / "rows-0.txt").read_text()


def test_a_resumed_run_in_another_order_is_refused(tiny_checkpoint, mixed_stream, llava_json, tmp_path):
    make_trainer(tiny_checkpoint, mixed_stream(), tmp_path / "out", max_steps=3).train()
    checkpoint = str(tmp_path / "out" / "checkpoint-3")
    for options, arguments, sentence in (
        ({"seed": 7}, {}, "depends on --seed, which was 42 in the checkpoint's run and is 7 now"),
        ({"shuffle_buffer_size": 5}, {}, "--shuffle_buffer_size, which was 6"),
        ({}, {"dataloader_num_workers": 2}, "--dataloader_num_workers, which was 1"),
        ({}, {"gradient_accumulation_steps": 1}, "--gradient_accumulation_steps was 2 and is 1"),
    ):
        trainer = make_trainer(tiny_checkpoint, mixed_stream(**options), tmp_path / "out", **arguments)
        with pytest.raises(UserError, match=sentence):
            trainer.train(resume_from_checkpoint=checkpoint)
    in_memory = hf_llava_ft.load_llava_json(*llava_json(17), tmp_path / "cache")
    with pytest.raises(UserError, match="resume it with --streaming True"):
        make_trainer(tiny_checkpoint, in_memory, tmp_path / "out").train(resume_from_checkpoint=checkpoint)
    trainer = make_trainer(tiny_checkpoint, mixed_stream(seed=7), tmp_path / "out", ignore_data_skip=True, max_steps=4)
    trainer.train(resume_from_checkpoint=checkpoint)  # as the sentence proposes
    assert trainer.state.global_step == 4


def test_epochs_need_no_max_steps(tiny_checkpoint, mixed_stream, tmp_path):
    trainer = make_trainer(tiny_checkpoint, mixed_stream(), tmp_path / "out", max_steps=-1, num_train_epochs=2)
    trainer.train()
    assert trainer.state.global_step == 10 and trainer.state.epoch == 2
    rows = " ".join((tmp_path / "out" / "rows-0.txt").read_text().splitlines()).split()
    assert sorted(Counter(rows).values()) == [2] * 17 and rows[:17] != rows[17:]


@pytest.mark.parametrize(
    "flag", [{"group_by_modality_length": True}, {"sampler_order": "original"}, {"packing": True}]
)
def test_orders_that_only_rows_in_memory_have_are_refused(tiny_checkpoint, mixed_stream, tmp_path, flag):
    with pytest.raises(UserError, match=next(iter(flag))):
        make_trainer(tiny_checkpoint, mixed_stream(), tmp_path / "out", **flag)


def train(*flags) -> None:
    main(
        [*map(str, flags), "--use_cpu", "True", "--save_strategy", "no", "--report_to", "none", "--streaming", "True"]
    )


def test_a_stream_trains_from_the_command_line_and_lists_what_it_left_out(tiny_checkpoint, llava_json, tmp_path):
    path, folder = llava_json(9, with_text_rows=True)
    rows = json.loads(path.read_text())
    rows[4]["conversations"].pop()
    rows[7]["conversations"][1]["value"] = "word " * 600
    path.write_text(json.dumps(rows))
    output_dir = tmp_path / "out"
    flags = ["--model_name_or_path", tiny_checkpoint, "--data_path", path, "--image_folder", folder]
    flags += ["--output_dir", output_dir, "--lora_r", 4, "--num_train_epochs", 2, "--per_device_train_batch_size", 2]
    flags += ["--model_max_length", 100, "--shuffle_buffer_size", 4]
    with pytest.raises(SystemExit) as refused:
        train(*flags)
    assert refused.value.code == 2 and not (output_dir / "adapter_config.json").exists()

    train(*flags, "--on_bad_row", "skip", "--dataloader_num_workers", 2)
    assert (output_dir / "adapter_model.safetensors").is_file()
    assert json.loads((output_dir / "trainer_state.json").read_text())["global_step"] == 2 * 5
    (left_out,) = map(json.loads, (output_dir / "skipped_rows.jsonl").read_text().splitlines())
    assert (left_out["row"], left_out["id"], left_out["kind"]) == (5, "row4", "turn_order")


def test_grouping_is_refused_before_a_model_is_loaded(tmp_path, tiny_checkpoint, llava_json, capsys):
    path, folder = llava_json(3)
    flags = ["--model_name_or_path", tiny_checkpoint, "--data_path", path, "--image_folder", folder]
    with pytest.raises(SystemExit) as refused:
        train(*flags, "--output_dir", tmp_path / "out", "--group_by_modality_length", "True")
    assert refused.value.code == 2
    assert "--group_by_modality_length sorts all rows" in capsys.readouterr().err


def test_a_picture_of_16_bits_is_refused_as_it_is_in_memory(llava_json, tmp_path):
    path, folder = llava_json(2)
    Image.new("I;16", (30, 20), 40_000).save(folder / "1.png")
    stream = LlavaStream(open_source(path, folder), cache_dir=tmp_path / "cache")
    with pytest.raises(UserError, match="would be cut at 255"):
        list(stream)


# Two processes that talk to each other. What each logged, and which rows it had, is left in its output folder.
RUN = """
import json, sys
from pathlib import Path
import torch.distributed
from hf_llava_ft.settings.arguments import TuningArguments
from hf_llava_ft.settings.training_arguments import LlavaTrainingArguments
from hf_llava_ft.checkpoints.opening import load_model, load_processor
from hf_llava_ft.data.collator import LlavaCollator
from hf_llava_ft.data.formats import open_source
from hf_llava_ft.data.streaming import LlavaStream
from hf_llava_ft.training.trainer import LlavaTrainer
from hf_llava_ft.training.tuning import with_lora
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import set_seed

checkpoint, data, folder, cache, output_dir, num_workers, resume = sys.argv[1:]

class RecordingCollator(LlavaCollator):
    def __call__(self, rows):
        with open(self.log, "a") as file:
            file.write(" ".join(row["id"] for row in rows) + "\\n")
        return super().__call__(rows)

args = LlavaTrainingArguments(
    output_dir=output_dir, max_steps=6, save_steps=3, per_device_train_batch_size=1, gradient_accumulation_steps=2,
    learning_rate=1e-2, use_cpu=True, disable_tqdm=True, dataloader_num_workers=int(num_workers), report_to="none",
)
assert args.world_size == 2
set_seed(42)
processor = load_processor(checkpoint)
tuning = TuningArguments(lora_r=4, lora_alpha=8, lora_dropout=0.1)
model = with_lora(load_model(checkpoint, processor), tuning, checkpoint)
collator = RecordingCollator(processor, uint8_pixels=True)
Path(output_dir).mkdir(exist_ok=True)
collator.log = Path(output_dir, f"rows-{args.process_index}.txt")
stream = LlavaStream(open_source(data, folder), shuffle_buffer_size=6, cache_dir=cache)
trainer = LlavaTrainer(
    model=model, args=args, train_dataset=stream, processing_class=processor, data_collator=collator
)
trainer.train(resume_from_checkpoint=resume or None)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def run_two_processes(tmp_path, name, *arguments) -> tuple[list[float], list[list[str]]]:
    """The losses of a run, and the rows of each of its micro-batches by rank."""
    script, output_dir = tmp_path / "run.py", tmp_path / name
    script.write_text(RUN)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", str(script)]
    command = [*launch, *map(str, arguments[:4]), str(output_dir), *map(str, arguments[4:])]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    state = json.loads((output_dir / "checkpoint-6" / "trainer_state.json").read_text())
    rows = [(output_dir / f"rows-{rank}.txt").read_text().splitlines() for rank in range(2)]
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry], rows


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_two_processes_resume_the_run_exactly(tiny_checkpoint, llava_json, tmp_path, num_workers):
    # 17 rows are 9 micro-batches for each rank, so 5 steps to an epoch: step 3 is in the middle of the first.
    path, folder = llava_json(17, with_text_rows=True)
    arguments = (tiny_checkpoint, path, folder, tmp_path / "cache")
    unbroken, whole = run_two_processes(tmp_path, "unbroken", *arguments, num_workers, "")
    checkpoint = tmp_path / "unbroken" / "checkpoint-3"
    resumed, rest = run_two_processes(tmp_path, "resumed", *arguments, num_workers, checkpoint)
    assert resumed == unbroken and len(unbroken) == 6
    weights = [
        load_file(tmp_path / run / "checkpoint-6" / "adapter_model.safetensors") for run in ("unbroken", "resumed")
    ]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    if not num_workers:  # workers write theirs at once, and prefetch
        assert [len(rows) for rows in whole] == [9 + 2 + 1] * 2  # one more is looked at, to see whether there is one
        epoch = Counter(row for rows in whole for row in rows[:9])
        assert len(epoch) == 17 and sorted(epoch.values()) == [1] * 16 + [2]
        assert [rows[6:] for rows in whole] == rest
