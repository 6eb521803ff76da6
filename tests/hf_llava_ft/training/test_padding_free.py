"""Batches without padding: loss, gradients and whole runs are those of padded batches with their mask."""

import json

import pytest
import torch
from datasets import disable_progress_bars
from safetensors.torch import load_file
from transformers import set_seed

import hf_llava_ft
from hf_llava_ft.checkpoints.opening import load_model, load_processor
from hf_llava_ft.data.collator import FlatCollator, LlavaCollator
from hf_llava_ft.data.formats import open_source
from hf_llava_ft.data.streaming import LlavaStream
from hf_llava_ft.errors import UserError
from hf_llava_ft.settings.arguments import TuningArguments
from hf_llava_ft.settings.training_arguments import LlavaTrainingArguments
from hf_llava_ft.training.speed import packed_attention
from hf_llava_ft.training.speed.packed_attention import BY_DOCUMENT, attention_of
from hf_llava_ft.training.trainer import LlavaTrainer
from hf_llava_ft.training.tuning import with_tuning
from tests.one_step import assert_same, is_same, step_of
from tests.ranks import run, write_rows

disable_progress_bars()


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    return write_rows(folder, 8), folder


@pytest.fixture(scope="module")
def data(rows):
    return hf_llava_ft.load_llava_json(*rows)


@pytest.fixture
def prepared(loaded, data, tmp_path):
    """A function that makes a Trainer whose batches are of four rows."""

    def make(
        train_type="full", model=None, dataset=data, collator=None, name="out", of=LlavaTrainer, loss=None, **settings
    ):
        tiny_model, processor = loaded()
        tuning = TuningArguments(train_type=train_type, lora_r=4, lora_alpha=8, lora_dropout=0.0)
        set_seed(1)
        model = with_tuning(tiny_model if model is None else model, tuning, "")
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.1)
        given = {"max_steps": 4, "learning_rate": 1e-3, "save_strategy": "no", "per_device_train_batch_size": 4}
        given |= {"max_grad_norm": 1e9, "warmup_steps": 0, "use_cpu": True, "disable_tqdm": True}
        args = LlavaTrainingArguments(output_dir=str(tmp_path / name), **(given | settings))
        return of(
            model=model,
            args=args,
            train_dataset=dataset,
            processing_class=processor,
            data_collator=collator,
            compute_loss_func=loss,
        )

    return make


def batches_of(trainer, is_padding_free):
    """Of an epoch, as the Trainer has them, or padded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "is_padding_free", is_padding_free)
        return list(trainer.get_train_dataloader())


@pytest.mark.parametrize("train_type", ["full", "lora", "projector"])
def test_loss_and_gradients_of_an_accumulated_step_are_those_of_padded_batches(prepared, train_type):
    trainer = prepared(train_type)
    assert trainer.is_padding_free  # on a CPU by default
    assert trainer.told_of_padding() == "Padding: none, since each row of a batch is computed at its own length."
    flat, padded = (batches_of(trainer, each) for each in (True, False))
    assert any(not batch["attention_mask"].all() for batch in padded)
    for batch, with_padding in zip(flat, padded, strict=True):
        assert batch["input_ids"].numel() == int(with_padding["attention_mask"].sum()) == batch["attention_mask"].sum()
        assert batch["num_rows"] == len(with_padding["input_ids"])
        assert batch["document_lengths"] == with_padding["attention_mask"].sum(1).tolist()  # rows in the same order
    trainer._needs_no_mask = False
    assert_same(step_of(trainer, flat), step_of(trainer, padded))


def test_beside_what_else_makes_a_step_faster_or_smaller_nothing_changes(prepared, monkeypatch):
    trainer = prepared("lora")
    flat, padded = (batches_of(trainer, each) for each in (True, False))
    expected = step_of(trainer, padded)
    trainer.model.gradient_checkpointing_enable()
    trainer.model.enable_input_require_grads()
    monkeypatch.setattr("hf_llava_ft.modeling.chunked_loss_llava.CHUNK_BYTES", 4 * 1088 * 5)  # five rows
    found = step_of(trainer, flat)
    assert_same(found, expected)
    # Negative controls: a border a token too late, and the rows as one document.
    lengths = flat[0]["document_lengths"]
    late = [lengths[0] + 1, lengths[1] - 1, *lengths[2:]]
    for wrong in (late, [sum(lengths)]):
        assert not is_same(step_of(trainer, [{**flat[0], "document_lengths": wrong}, *flat[1:]]), expected)


@pytest.mark.parametrize("normalization", ["tokens", "micro_batch"])
def test_a_run_is_that_of_padded_batches(prepared, normalization):
    logs, weights = [], []
    for name in ("auto", "false"):
        trainer = prepared(
            name=name, padding_free=name, loss_normalization=normalization, gradient_accumulation_steps=2
        )
        assert trainer.is_padding_free is (name == "auto")
        trainer.train()
        counts = trainer.throughput.local()
        logs.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        weights.append((counts, trainer.model.state_dict()))
    assert logs[0] == pytest.approx(logs[1], rel=1e-5) and len(logs[0]) == 4
    assert weights[0][0] == weights[1][0]  # as many rows, tokens and supervised tokens
    for name, weight in weights[0][1].items():
        torch.testing.assert_close(weight, weights[1][1][name], rtol=1e-3, atol=1e-5, msg=name)


def test_a_run_is_resumed_exactly(prepared, tmp_path):
    whole = prepared("lora", name="whole", save_strategy="steps", save_steps=2)
    whole.train()
    resumed = prepared("lora", name="resumed")
    resumed.train(str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.is_padding_free
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name
    saved = load_file(tmp_path / "whole" / "checkpoint-4" / "adapter_model.safetensors")
    assert saved  # under the names that they have without


def test_a_stream_has_no_padding_either(prepared, rows):
    losses = []
    for name in ("auto", "false"):
        stream = LlavaStream(open_source(*rows), shuffle_buffer_size=0, cache_dir=rows[1] / "cache")
        trainer = prepared(name=name, padding_free=name, dataset=stream)
        trainer.train()
        assert trainer.is_padding_free is (name == "auto")
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


class OwnLoss(LlavaTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


def loss_of_all(outputs, labels, num_items_in_batch=None):
    logits, targets = outputs.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / num_items_in_batch


@pytest.mark.parametrize("own", [{"of": OwnLoss}, {"loss": loss_of_all}], ids=["compute_loss", "compute_loss_func"])
def test_rows_are_apart_also_where_somebody_else_computes_the_loss(prepared, own):
    trainer = prepared("projector", padding_free="true", **own)
    flat, padded = (batches_of(trainer, each) for each in (True, False))
    expected = step_of(trainer, padded)
    assert_same(step_of(trainer, flat), expected)
    together = {**flat[0], "document_lengths": [sum(flat[0]["document_lengths"])]}
    assert not is_same(step_of(trainer, [together, *flat[1:]]), expected)
    # Who did not ask for it may count on a row of the batch for each of the data.
    assert not prepared("projector", **own).is_padding_free


class OwnCollator(LlavaCollator):
    def __call__(self, rows):
        return super().__call__(rows)


def test_what_cannot_go_without_padding_is_padded_or_said(tiny, prepared, monkeypatch):
    eager = tiny.model()
    eager.set_attn_implementation("eager")
    assert not prepared(model=eager).is_padding_free and attention_of(eager) == "eager"
    with pytest.raises(UserError, match="--padding_free true: it needs an attention .* and eager has none"):
        prepared(model=eager, padding_free="true")
    assert not prepared(neftune_noise_alpha=5.0).is_padding_free
    with pytest.raises(UserError, match="--padding_free true: neftune_noise_alpha makes noise"):
        prepared(neftune_noise_alpha=5.0, padding_free="true")
    given = prepared(padding_free="false")
    assert attention_of(given.model) == "sdpa"
    for collator in (OwnCollator(given.processing_class), LlavaCollator(given.processing_class, padding_side="left")):
        assert not prepared(collator=collator).is_padding_free
        with pytest.raises(UserError, match="--padding_free true: it needs a LlavaCollator as it is"):
            prepared(collator=collator, padding_free="true")
    with pytest.raises(ValueError, match="padding_free perhaps is none of auto, true and false"):
        prepared(padding_free="perhaps")

    # A model whose rows would see each other: not by itself, and with a sentence where it was asked for.
    real, all_one = packed_attention.packed_inputs, packed_attention.Documents([8], None)
    monkeypatch.setattr(packed_attention, "packed_inputs", lambda *args: {**real(*args), "documents": all_one})
    leaking = prepared()
    assert not leaking.is_padding_free and attention_of(leaking.model) == "sdpa"
    leaking = prepared(padding_free="true")
    assert attention_of(leaking.model) == BY_DOCUMENT
    with pytest.raises(UserError, match="--padding_free: in llama a row is not computed as it is alone"):
        leaking.train()


def test_the_model_that_a_trial_makes_goes_without_padding_too(tiny_checkpoint, data, tmp_path):
    args = LlavaTrainingArguments(output_dir=str(tmp_path), use_cpu=True, max_steps=1, disable_tqdm=True)
    processor = load_processor(str(tiny_checkpoint))

    def made():
        return with_tuning(load_model(str(tiny_checkpoint), processor), TuningArguments(train_type="projector"), "")

    trainer = hf_llava_ft.LlavaTrainer(model_init=made, args=args, train_dataset=data, processing_class=processor)
    trainer.train()
    assert trainer.is_padding_free and attention_of(trainer.model) == BY_DOCUMENT
    assert isinstance(trainer.train_collator(), FlatCollator) and isinstance(trainer.data_collator, LlavaCollator)


@pytest.mark.slow  # two processes, twice
def test_under_fsdp2_weights_are_shared_out_again_before_the_first_step(tiny_checkpoint, tmp_path):
    data = write_rows(tmp_path, 4)
    losses = []
    for padding_free in ("true", "false"):
        out = tmp_path / padding_free
        argv = ["--model_name_or_path", tiny_checkpoint, "--data_path", data, "--image_folder", data.parent]
        argv += ["--output_dir", out, "--use_cpu", "True", "--max_steps", "2", "--save_strategy", "no"]
        argv += ["--per_device_train_batch_size", "1", "--lora_dropout", "0", "--logging_steps", "1"]
        run("fsdp2", [*argv, "--padding_free", padding_free], tmp_path / f"logs-{padding_free}")
        logged = json.loads((out / "trainer_state.json").read_text())["log_history"]
        losses.append([entry["loss"] for entry in logged if "loss" in entry])
    assert len(losses[0]) == 2 and losses[0] == pytest.approx(losses[1], rel=1e-5)
