"""The order of rows by default, what is padding in it, and that the mask of padding on the right is not needed."""

import copy

import numpy as np
import pytest
import torch
from torch.utils.data import RandomSampler

import hf_llava_ft
from hf_llava_ft.checkpoints.opening import load_model, load_processor
from hf_llava_ft.data.lengths import token_lengths
from hf_llava_ft.data.sampler import (
    ModalityLengthSampler,
    like_lengths,
    modality_length_grouped_indices,
    padding_share,
)
from hf_llava_ft.settings.arguments import TuningArguments
from hf_llava_ft.settings.parsing import resolve
from hf_llava_ft.settings.training_arguments import LlavaTrainingArguments
from hf_llava_ft.training.resuming.fingerprint import settings_course
from hf_llava_ft.training.row_order import keep_order
from hf_llava_ft.training.tuning import with_tuning

MINIMAL = ["--model_name_or_path", "m", "--data_path", "d.json", "--image_folder", "i", "--output_dir", "o"]


@pytest.fixture
def prepared(tiny_checkpoint, llava_json, tmp_path):
    """A function that makes a Trainer of so many rows, half of them without a picture."""
    made_data = {}

    def make(num_rows=32, train_type="projector", **settings):
        processor = load_processor(str(tiny_checkpoint))
        tuning = TuningArguments(train_type=train_type, lora_r=4, lora_alpha=8)
        model = with_tuning(load_model(str(tiny_checkpoint), processor), tuning, "")
        given = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "save_strategy": "no"}
        args = LlavaTrainingArguments(
            output_dir=str(tmp_path / "out"), disable_tqdm=True, use_cpu=True, **(given | settings)
        )
        if num_rows not in made_data:
            made_data[num_rows] = hf_llava_ft.load_llava_json(*llava_json(num_rows, with_text_rows=True))
        data = made_data[num_rows]
        return hf_llava_ft.LlavaTrainer(model=model, args=args, train_dataset=data, processing_class=processor)

    return make


def test_rows_are_grouped_by_tokens_and_otherwise_in_each_epoch(prepared):
    trainer = prepared(padding_free="false")
    sampler = trainer._get_train_sampler()
    assert isinstance(sampler, ModalityLengthSampler)
    counted = token_lengths(trainer.train_dataset, trainer.processing_class)
    assert (np.abs(sampler.lengths) == counted).all()
    orders = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert sorted(orders[-1]) == list(range(32))
    batches = [{frozenset(order[start : start + 4]) for start in range(0, 32, 4)} for order in orders]
    assert batches[0] != batches[1]  # a row meets others, and not only in another order of the same batches
    assert trainer.told_of_padding().startswith("Padding: ")
    assert "grouped by pictures and length" in trainer.told_of_padding()

    random = prepared(group_by_modality_length=False, padding_free="false")
    assert isinstance(random._get_train_sampler(), RandomSampler)
    assert "in random order" in random.told_of_padding()


@pytest.mark.parametrize(("num_processes", "accumulation"), [(1, 1), (1, 4), (2, 4)])
def test_micro_batches_hold_like_lengths_in_small_sets_too(num_processes, accumulation):
    random = np.random.default_rng(0)
    lengths = random.integers(20, 600, 192)
    signed = lengths * random.choice([1, -1], 192)
    generator = torch.Generator().manual_seed(0)
    world = num_processes * accumulation
    how = like_lengths(192, 4 * world)
    assert how["mixing"] and like_lengths(4 * world * 100, 4 * world) == {"pool_steps": 50, "mixing": 0.0}
    grouped = {
        micro: modality_length_grouped_indices(signed, 4, world, generator, accumulation_steps=micro, **how)
        for micro in (accumulation, None)
    }
    assert sorted(grouped[accumulation]) == list(range(192))
    shares = {micro: padding_share(lengths[order], 4) for micro, order in grouped.items()}
    at_random = padding_share(lengths[random.permutation(192)], 4)
    assert shares[accumulation] < 0.25 * at_random
    if accumulation > 1:
        assert shares[accumulation] < 0.6 * shares[None]  # which deals short rows and long ones to each
    with_images = [signed[step] > 0 for step in np.split(np.array(grouped[accumulation]), 192 // (4 * world))]
    mixed = sum(0 < step.sum() < len(step) for step in with_images)
    assert mixed <= 2  # of what is left over


def test_the_order_is_that_of_the_settings(tmp_path):
    def grouped(*flags):
        return resolve([*MINIMAL, *flags]).by_name["group_by_modality_length"].value

    assert grouped() is True
    assert grouped("--group_by_modality_length", "False") is False
    for flags in (["--streaming"], ["--sampler_order", "original"], ["--train_sampling_strategy", "sequential"]):
        assert grouped(*flags) is False, flags
    assert grouped("--train_type", "use_lora") is False
    assert grouped("--preset", "llava-v1.5-pretrain") is False and grouped("--preset", "llava-v1.5-lora") is True

    original = LlavaTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, sampler_order="original", group_by_modality_length=True
    )
    assert settings_course(original)["grouped_by"] == "words"


def test_a_run_that_goes_on_keeps_its_order(tmp_path):
    def kept(course, **said):
        args = LlavaTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **said)
        keep_order(args, course)
        return args.group_by_modality_length, args.grouped_by

    assert kept({"group_by_modality_length": False}) == (False, "words")  # begun when that was the default
    assert kept({"group_by_modality_length": True}) == (True, "words")
    assert kept(None) == (False, "words")
    assert kept({"group_by_modality_length": True, "grouped_by": "tokens"}) == (True, "tokens")
    assert kept({"group_by_modality_length": True, "grouped_by": "words"}) == (True, "words")
    assert kept({"group_by_modality_length": False, "grouped_by": None}, group_by_modality_length=True) == (
        *(True, "tokens"),
    )


@pytest.mark.parametrize("train_type", ["full", "lora"])
def test_a_batch_padded_on_the_right_needs_no_mask(prepared, train_type):
    trainer = prepared(train_type=train_type, group_by_modality_length=False, padding_free="false")
    trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    assert not batch["attention_mask"].all()  # there is padding

    def trained(batch, needs_no_mask):
        trainer._needs_no_mask = needs_no_mask
        torch.manual_seed(0)
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch), num_items_in_batch=7)
        loss.backward()
        weights = trainer.model.named_parameters()
        return loss.detach(), {name: each.grad.clone() for name, each in weights if each.grad is not None}

    assert trainer._needs_no_mask
    (loss, gradients), (expected, of_mask) = trained(batch, True), trained(batch, False)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    assert gradients.keys() == of_mask.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, of_mask[name], rtol=1e-4, atol=1e-6, msg=name)

    left = copy.copy(trainer.data_collator)
    left.padding_side = "left"
    rows = [trainer.train_dataset[place] for place in range(4)]
    on_the_left = left(rows), trainer.data_collator(rows)
    losses = [trained(each, True)[0] for each in on_the_left]
    assert not torch.isclose(losses[0], losses[1], rtol=1e-5)  # of padding on the left it is not so
    left_trainer = hf_llava_ft.LlavaTrainer(
        model=trainer.model,
        args=trainer.args,
        data_collator=left,
        train_dataset=trainer.train_dataset,
        processing_class=trainer.processing_class,
    )
    assert not left_trainer._needs_no_mask


def test_workers_follow_from_the_cores_and_what_is_said_holds(tmp_path, monkeypatch):
    def workers(device="cuda", **said):
        with monkeypatch.context() as patch:
            args = LlavaTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **said)
            assert args.dataloader_num_workers == said.get("dataloader_num_workers", 0)  # on a CPU
            patch.setattr(LlavaTrainingArguments, "device", torch.device(device))
            args = LlavaTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **said)
        return args.dataloader_num_workers, args.dataloader_persistent_workers

    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(12))
    assert workers() == (6, True)
    assert workers(dataloader_num_workers=1) == (1, False)
    assert workers(device="cpu") == (0, False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert workers() == (1, True)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(64))
    assert workers() == (8, True)
