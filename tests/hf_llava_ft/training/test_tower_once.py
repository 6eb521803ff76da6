"""A frozen tower sees each picture of a batch once, or once for all runs, and the training is what it was."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from datasets import disable_progress_bars
from PIL import Image
from transformers import set_seed

import hf_llava_ft
from hf_llava_ft.checkpoints.opening import load_model, load_processor
from hf_llava_ft.data.collator import LlavaCollator
from hf_llava_ft.data.vision_features import StoredPicture, VisionFeatures
from hf_llava_ft.errors import UserError
from hf_llava_ft.processing.processing_llava import LlavaProcessor
from hf_llava_ft.processing.tokenizer_llava import load_tokenizer
from hf_llava_ft.settings.arguments import TuningArguments
from hf_llava_ft.settings.parsing import resolve
from hf_llava_ft.settings.training_arguments import LlavaTrainingArguments
from hf_llava_ft.train import train
from hf_llava_ft.training.speed import feature_cache
from hf_llava_ft.training.speed.feature_sizes import bytes_of_a_crop
from hf_llava_ft.training.tuning import with_tuning
from tests.ranks import logged, run, saved_weights

disable_progress_bars()

ANYRES = {"image_aspect_ratio": "anyres", "image_grid_pinpoints": [[56, 112], [112, 56]]}
NUM_PICTURES = 4


def write_rows(folder: Path) -> tuple[Path, Path]:
    """Eight rows: four pictures of different shapes, each in several of them, one twice in a row, and text alone."""
    generator = random.Random(0)
    for name, size in zip("abcd", [(60, 40), (40, 90), (56, 56), (90, 40)], strict=True):
        noise = bytes(generator.randrange(256) for _ in range(3 * size[0] * size[1]))
        Image.frombytes("RGB", size, noise).save(folder / f"{name}.png")
    rows = []
    for index, names in enumerate(("a", "b", "a", "", "ba", "aa", "c", "cd")):
        question = "<image>\n" * len(names) + f"What is number {index}?"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": f"It is {'so ' * index}{7 * index}."}]
        image = {"image": [f"{name}.png" for name in names]} if names else {}
        rows.append({"id": str(index), "conversations": turns} | image)
    (folder / "data.json").write_text(json.dumps(rows))
    return folder / "data.json", folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def data(rows):
    return hf_llava_ft.load_llava_json(*rows)


@pytest.fixture
def prepared(tiny_checkpoint, tiny, golden, data, tmp_path):
    """A function that makes a Trainer, whose model counts what its tower sees."""

    def make(train_type="projector", crops=False, cache=None, edit=None, dataset=data, collator=None, **settings):
        processor = load_processor(str(tiny_checkpoint))
        if crops:
            model = tiny.model(patch_merge_type="spatial_unpad", **ANYRES)
            tokenizer = load_tokenizer(golden / "tokenizer_tiny")
            processor = LlavaProcessor.build(tokenizer, model.config.vision_config, version="v1", **ANYRES)
        else:
            model = load_model(str(tiny_checkpoint), processor)
        if edit is not None:
            edit(model, processor)
        set_seed(1)
        dropout = settings.pop("lora_dropout", 0.1)
        model = with_tuning(model, TuningArguments(train_type=train_type, lora_r=4, lora_dropout=dropout), "")
        given = {"max_steps": 2, "learning_rate": 1e-3, "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
        given |= {"per_device_train_batch_size": 8, "cache_vision_features": cache and str(cache)}
        args = LlavaTrainingArguments(output_dir=str(tmp_path / "out"), **(given | settings))
        trainer = hf_llava_ft.LlavaTrainer(
            model=model, args=args, train_dataset=dataset, processing_class=processor, data_collator=collator
        )
        trainer.seen = []
        trainer._unwrapped_model.model.vision_tower.register_forward_pre_hook(
            lambda module, given: trainer.seen.append(len(given[0]))
        )
        return trainer

    return make


def step_of(trainer, batches=None):
    """Loss and gradients of a step of these micro-batches, by default one of all rows."""
    batches = [trainer.data_collator(list(trainer.train_dataset))] if batches is None else batches
    trainer.model.train()
    trainer.model.zero_grad()
    trainer.seen.clear()
    set_seed(3)
    items = sum((batch["labels"] != -100).sum() for batch in batches)
    losses = []
    for batch in batches:
        with trainer.accelerator.autocast():  # as around the model that is prepared for training
            loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch), num_items_in_batch=items)
        loss.backward()
        losses.append(loss.detach())
    weights = trainer.model.named_parameters()
    return sum(losses), {name: each.grad.clone() for name, each in weights if each.grad is not None}


def assert_same(found, expected, exactly=False):
    assert found[1].keys() == expected[1].keys() and any("projector" in name for name in found[1])
    if exactly:
        assert torch.equal(found[0], expected[0])
        assert all(torch.equal(gradient, expected[1][name]) for name, gradient in found[1].items())
        return
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=1e-6)
    for name, gradient in found[1].items():
        scale = float(expected[1][name].abs().max())
        torch.testing.assert_close(gradient, expected[1][name], rtol=1e-4, atol=1e-5 * scale + 1e-9, msg=name)


def as_each_row_has_them(trainer):
    """The batch of all rows in which each picture is as often as it is asked about."""
    return LlavaCollator(trainer.processing_class, uint8_pixels=True)(list(trainer.train_dataset))


# ---------------------------------------------------------------- in a batch


@pytest.mark.parametrize("crops", [False, True])
@pytest.mark.parametrize("train_type", ["projector", "lora"])
def test_each_picture_of_a_batch_is_seen_once_and_nothing_changes(prepared, train_type, crops):
    trainer = prepared(train_type, crops)
    expected = step_of(trainer, [as_each_row_has_them(trainer)])
    seen = sum(trainer.seen)
    found = step_of(trainer)
    # Ten places in LLaVA-1.5; with crops, of which each of these pictures has three.
    assert (seen, sum(trainer.seen)) == ((30, 12) if crops else (10, 4))
    assert_same(found, expected)


def test_so_it_is_in_a_run_and_in_an_evaluation(prepared, data):
    trainer = prepared(max_steps=1, group_by_modality_length=False)
    trainer.train()
    assert trainer.seen == [4]
    trainer.evaluate(data)
    assert trainer.seen == [4, 4]


def test_a_picture_in_the_place_of_another_is_noticed(prepared):
    trainer = prepared()
    batch = trainer.data_collator(list(trainer.train_dataset))
    expected = step_of(trainer, [as_each_row_has_them(trainer)])
    batch["picture_index"][0] = 1 - batch["picture_index"][0]
    with pytest.raises(AssertionError):
        assert_same(step_of(trainer, [batch]), expected)


def test_a_copy_under_another_name_is_another_picture_and_bytes_are_known_by_themselves(tiny_processor, data, rows):
    collator = LlavaCollator(tiny_processor, distinct_pictures=True)
    row = data[0]
    inside = row | {"images": [{"path": None, "bytes": (rows[1] / "a.png").read_bytes()}]}
    assert len(collator([row, row])["pixel_values"]) == 1
    assert len(collator([inside, inside])["pixel_values"]) == 1
    assert len(collator([row, inside])["pixel_values"]) == 2


def test_a_batch_without_repeats_is_as_it_was(tiny_processor, data):
    picked = [data[0], data[1], data[3], data[7]]
    plain = LlavaCollator(tiny_processor)(picked)
    found = LlavaCollator(tiny_processor, distinct_pictures=True)(picked)
    assert found.keys() == plain.keys() and all(torch.equal(found[name], plain[name]) for name in plain)


def test_a_picture_behind_the_cut_is_not_among_them(tiny_processor, data):
    long, other = data[4], data[2]  # b and a; a
    whole = len(LlavaCollator(tiny_processor)([long])["input_ids"][0])
    row = {**long, "messages": [*long["messages"], other["messages"][0], other["messages"][1]]}
    row["images"] = [*long["images"], *data[6]["images"]]  # the third is c, behind the cut
    found = LlavaCollator(tiny_processor, distinct_pictures=True, max_length=whole)([row])
    plain = LlavaCollator(tiny_processor, max_length=whole)([row])
    assert len(found["pixel_values"]) == 2 and found.keys() == plain.keys()
    assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_a_tower_that_trains_or_draws_by_chance_sees_each_place(prepared):
    def with_dropout(model, processor):
        model.model.vision_tower.config.attention_dropout = 0.1

    for trainer in (prepared("full"), prepared(edit=with_dropout)):
        step_of(trainer)
        assert sum(trainer.seen) == 10


def test_packs_share_their_pictures(prepared, data):
    trainer = prepared("lora", packing=True, max_tokens_per_batch=400, per_device_train_batch_size=1)
    pack = [list(range(len(data)))]
    rows = [[data[index] for index in indices] for indices in pack]
    shared = trainer.train_collator()(rows)
    trainer.data_collator = LlavaCollator(trainer.processing_class, uint8_pixels=True)
    expected = step_of(trainer, [trainer.train_collator()(rows)])
    assert sum(trainer.seen) == 10
    assert_same(step_of(trainer, [shared]), expected)
    assert sum(trainer.seen) == 4


# ---------------------------------------------------------------- on disk


def stored(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.safetensors"))


@pytest.mark.parametrize("crops", [False, True])
@pytest.mark.parametrize("train_type", ["projector", "lora"])
def test_what_is_kept_gives_the_same_loss_and_gradients(prepared, tmp_path, train_type, crops):
    expected = step_of(prepared(train_type, crops))
    trainer = prepared(train_type, crops, tmp_path / "cache")
    assert_same(step_of(trainer), expected, exactly=True)
    assert sum(trainer.seen) == (12 if crops else 4) and len(stored(tmp_path / "cache")) == NUM_PICTURES
    assert_same(step_of(trainer), expected, exactly=True)
    assert trainer.seen == []
    again = prepared(train_type, crops, tmp_path / "cache")  # as a later run does
    assert_same(step_of(again), expected, exactly=True)
    assert again.seen == []


def test_a_batch_of_which_a_part_is_kept(prepared, tmp_path):
    expected = step_of(prepared("lora", crops=True))
    trainer = prepared("lora", crops=True, cache=tmp_path / "cache")
    step_of(trainer, [trainer.data_collator([trainer.train_dataset[1], trainer.train_dataset[6]])])  # b and c
    assert_same(step_of(trainer), expected)
    assert sum(trainer.seen) == 6


def test_nothing_is_decoded_that_is_kept(prepared, tmp_path, monkeypatch):
    trainer = prepared(cache=tmp_path / "cache")
    step_of(trainer)
    monkeypatch.setattr(Image, "open", lambda *args: pytest.fail("a picture was opened"))
    assert "pixel_values" not in trainer.data_collator(list(trainer.train_dataset))


def another_weight(model, processor):
    with torch.no_grad():
        model.model.vision_tower.get_input_embeddings().weight.view(-1)[5] += 1e-6


def another_layer(model, processor):
    model.config.vision_feature_layer = -3


def another_colour(model, processor):
    processor.image_processor.image_mean = [0.5, 0.4, 0.4]


def another_shape(model, processor):
    processor.image_processor.do_pad = False


def another_way_up(model, processor):
    processor.picture_opening = "original"


def another_dtype(model, processor):
    model.model.vision_tower.bfloat16()


def another_attention(model, processor):
    model.set_attn_implementation({"vision_config": "eager"})


def the_same(model, processor):
    with torch.no_grad():
        model.lm_head.weight += 1  # which the tower knows nothing of


@pytest.mark.parametrize(
    ("edit", "is_found"),
    [
        (the_same, True),
        *((edit, False) for edit in (another_weight, another_layer, another_colour, another_shape, another_way_up)),
        *((edit, False) for edit in (another_dtype, another_attention)),
    ],
)
def test_only_what_the_same_tower_made_in_the_same_way_is_found(prepared, tmp_path, edit, is_found):
    step_of(prepared(cache=tmp_path / "cache"))
    changed = prepared(cache=tmp_path / "cache", edit=edit)
    batch = changed.data_collator(list(changed.train_dataset))
    assert ("vision_features" in batch, "pixel_values" in batch) == (is_found, not is_found)


def test_a_picture_of_which_a_byte_changes_is_computed_anew(prepared, tmp_path):
    dataset = hf_llava_ft.load_llava_json(*write_rows(tmp_path))
    trainer = prepared(cache=tmp_path / "cache", dataset=dataset)
    step_of(trainer)
    picture = Image.open(tmp_path / "a.png")
    picture.putpixel((0, 0), (1, 2, 3))
    picture.save(tmp_path / "a.png")
    expected = step_of(prepared(dataset=dataset))
    assert_same(step_of(trainer), expected)
    assert sum(trainer.seen) == 1


def cut_off(file: Path):
    os.truncate(file, file.stat().st_size - 8)


def emptied(file: Path):
    file.write_bytes(b"")


def torn(file: Path):
    """As a disk leaves it that lost power: as long as it was, with zeros in place of what was not written."""
    content = file.read_bytes()
    file.write_bytes(content[:-100] + bytes(100))


def of_another(file: Path):
    other = next(each for each in stored(file.parent.parent) if each != file)
    shutil.copyfile(other, file)


@pytest.mark.parametrize("damage", [cut_off, emptied, torn, of_another, Path.unlink])
def test_a_damaged_file_is_computed_anew_and_mended(prepared, tmp_path, damage):
    trainer = prepared(cache=tmp_path / "cache")
    expected = step_of(trainer)
    damage(stored(tmp_path / "cache")[0])
    assert_same(step_of(trainer), expected)
    assert sum(trainer.seen) == 1
    assert_same(step_of(trainer), expected, exactly=True)
    assert trainer.seen == []


def test_what_a_killed_run_left_half_done_is_not_read_and_goes(tmp_path):
    features = VisionFeatures(tmp_path)
    features.write("ab12", StoredPicture(torch.ones(1, 2, 3), 4, 5))
    half = tmp_path / "unfinished" / "cd34-0"
    shutil.copyfile(stored(tmp_path)[0], half)
    features.tidy()
    assert half.exists()  # another run may be writing it
    os.utime(half, (0, 0))
    features.tidy()
    assert not half.exists() and features.read("cd34") is None
    found = features.read("ab12")
    assert torch.equal(found.features, torch.ones(1, 2, 3)) and (found.height, found.width) == (4, 5)


def test_a_full_disk_is_said_before_anything_is_computed(prepared, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    need = NUM_PICTURES * 16 * 32 * 4
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda path: usage._replace(free=need - 1))
    with pytest.raises(UserError, match=r"4 pictures need about 8\.2 kB more in .*, where 8\.2 kB are free"):
        prepared(cache=tmp_path / "cache")
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda path: usage._replace(free=need))
    trainer = prepared(cache=tmp_path / "cache")
    assert "4 pictures need about 8.2 kB more" in trainer.tower_inputs.cache.told
    step_of(trainer)
    assert sum(each.stat().st_size for each in stored(tmp_path / "cache")) - need < 400 * NUM_PICTURES
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda path: usage._replace(free=0))
    assert "about 0.0 kB more" in prepared(cache=tmp_path / "cache").tower_inputs.cache.told


def test_crops_are_counted_by_the_size_of_pictures(prepared, tmp_path):
    trainer = prepared(crops=True, cache=tmp_path / "cache")
    assert f"about {12 * bytes_of_a_crop(trainer.model.config, torch.float32) / 1e3:.1f} kB" in (
        trainer.tower_inputs.cache.told
    )


def test_the_formula_is_that_of_the_documentation():
    from transformers import CLIPVisionConfig

    vision = CLIPVisionConfig(hidden_size=1024, num_attention_heads=16, image_size=336, patch_size=14)
    config = hf_llava_ft.LlavaConfig(vision_config=vision, vision_feature_select_strategy="default")
    assert bytes_of_a_crop(config, torch.bfloat16) == 576 * 1024 * 2


def test_a_disk_that_fills_up_later_ends_no_run(prepared, tmp_path, monkeypatch, caplog):
    expected = step_of(prepared())
    trainer = prepared(cache=tmp_path / "cache")

    def no_room(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hf_llava_ft.data.vision_features.save_file", no_room)
    assert_same(step_of(trainer), expected, exactly=True)
    assert_same(step_of(trainer), expected, exactly=True)
    assert sum("nothing more is kept" in record.message for record in caplog.records) == 1
    assert stored(tmp_path / "cache") == [] and not any(
        (trainer.tower_inputs.cache.features.folder / "unfinished").iterdir()
    )


def test_under_autocast_features_are_kept_as_the_projector_reads_them(prepared, tmp_path):
    expected = step_of(prepared("lora", bf16=True))
    trainer = prepared("lora", cache=tmp_path / "cache", bf16=True)
    for _ in range(2):
        assert_same(step_of(trainer), expected, exactly=True)
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert batch["vision_features"].dtype == torch.bfloat16


# ---------------------------------------------------------------- whole runs


def command(checkpoint, rows, output_dir, **others):
    settings = {"model_name_or_path": checkpoint, "data_path": rows[0], "image_folder": rows[1]}
    settings |= {"output_dir": output_dir, "max_steps": 4, "per_device_train_batch_size": 2, "lora_r": 4}
    settings |= {"gradient_accumulation_steps": 2, "logging_steps": 1, "use_cpu": True, "num_eval_answers": 0}
    settings |= {"learning_rate": 1e-3, "save_steps": 2} | others
    return [f"--{name}={value}" for name, value in settings.items()]


def test_a_run_and_a_resumed_one_are_what_they_are_without(tiny_checkpoint, rows, tmp_path):
    def trained(name, **others):
        train(*resolve(command(tiny_checkpoint, rows, tmp_path / name, **others)).build())
        return logged(tmp_path / name), saved_weights(tmp_path / name)

    log, weights = trained("plain")
    cache = tmp_path / "cache"
    for others in ({"dataloader_num_workers": 2}, {"resume_from_checkpoint": tmp_path / "kept" / "checkpoint-2"}):
        log_of_it, weights_of_it = trained("kept", cache_vision_features=cache, **others)
        for found, expected in zip(log_of_it, log, strict=True):
            assert found == pytest.approx(expected, rel=1e-5)
        for key, weight in weights.items():
            torch.testing.assert_close(weights_of_it[key], weight, rtol=1e-5, atol=1e-6, msg=key)
    assert len(stored(cache)) == NUM_PICTURES
    made_of = json.loads(next(cache.glob("*/made_of.json")).read_text())
    assert str(tmp_path) not in json.dumps(made_of) and made_of["vision_feature_layer"] == -2


@pytest.mark.slow
def test_two_processes_fill_one_cache(tiny_checkpoint, rows, tmp_path):
    for name, others in (("plain", {}), ("first", {}), ("second", {})):
        if name != "plain":
            others = {"cache_vision_features": tmp_path / "cache"}
        argv = command(tiny_checkpoint, rows, tmp_path / name, gradient_accumulation_steps=1, **others)
        run("ddp", argv, tmp_path / f"logs-{name}")
        for found, expected in zip(logged(tmp_path / name), logged(tmp_path / "plain"), strict=True):
            assert found == pytest.approx(expected, rel=1e-5)
    assert len(stored(tmp_path / "cache")) == NUM_PICTURES
    assert list((tmp_path / "cache").glob("*/unfinished/*")) == []


@pytest.mark.parametrize(
    ("others", "sentence"),
    [
        ({"train_type": "full"}, "train_type full trains it"),
        ({"lora_vision_tower": True}, "lora_vision_tower trains it"),
        ({"streaming": True}, "--streaming does not"),
    ],
)
def test_what_does_not_go_with_it_is_said_at_once(tiny_checkpoint, rows, tmp_path, others, sentence):
    settings = resolve(
        command(tiny_checkpoint, rows, tmp_path / "out", cache_vision_features=tmp_path / "c", **others)
    )
    with pytest.raises(UserError, match=sentence):
        train(*settings.build())
    assert not (tmp_path / "c").exists()


def test_a_trainer_refuses_what_it_cannot_keep(prepared, tmp_path, monkeypatch, tiny_processor):
    with pytest.raises(UserError, match="frozen"):
        prepared("full", cache=tmp_path / "cache")

    class Own(LlavaCollator):
        pass

    with pytest.raises(UserError, match="a LlavaCollator"):
        prepared(cache=tmp_path / "cache", collator=Own(tiny_processor))
    with pytest.raises(UserError, match="cannot be written to"):
        (tmp_path / "file").write_text("")
        prepared(cache=tmp_path / "file")
    trainer = prepared(cache=tmp_path / "cache")
    trainer.model.requires_grad_(True)
    with pytest.raises(UserError, match="trains since"):
        step_of(trainer)
