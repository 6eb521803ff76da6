"""A run that gives NaN or infinity ends, says so, and saves nothing of it."""

import math

import pytest
import torch
from transformers import TrainerCallback

from hf_llava_ft.training.guards.finite import FiniteTraining, NotFinite, are_finite
from tests.hf_llava_ft.training.test_trainer import make_trainer
from tests.ranks import ENGINES, Run, write_rows


@pytest.fixture
def run(llava_ft, tiny_checkpoint, llava_json, tmp_path):
    data, images = llava_json(4)

    def train(*flags):
        out = tmp_path / "out"
        code, _, err = llava_ft(
            *("train", "--model_name_or_path", tiny_checkpoint, "--data_path", data, "--image_folder", images),
            *("--output_dir", out, "--use_cpu", "True", "--per_device_train_batch_size", "1", "--warmup_steps", "0"),
            *("--report_to", "none", *flags),
        )
        return code, " ".join(err.split()), out

    return train


class At(TrainerCallback):
    """Calls `what(model)` before the step of a number is taken."""

    def __init__(self, step, what, event="on_step_begin"):
        def call(args, state, control, model=None, **kwargs):
            if state.global_step + 1 == step:
                with torch.no_grad():
                    what(model)

        setattr(self, event, call)


def spoil(model):
    next(each for each in model.parameters() if each.requires_grad).fill_(math.nan)


def test_a_learning_rate_that_breaks_the_model_ends_the_run_and_leaves_what_was_good(run):
    flags = ("--train_type", "full", "--max_steps", "6", "--save_steps", "1")
    code, err, out = run(*flags, "--learning_rate", "1e25", "--max_grad_norm", "0")
    assert code == 1 and err.count("error:") == 1 and "The result is at" not in err
    assert "is not finite in step" in err and "1e+25" in err and "float32" in err and "--learning_rate" in err
    assert not list(out.glob("*.safetensors")) and not list(out.glob("train_summary*")) + list(out.glob("report*"))
    from safetensors.torch import load_file

    for path in out.glob("checkpoint-*/*.safetensors"):
        assert all(each.isfinite().all() for each in load_file(path).values())


def test_the_last_good_checkpoint_is_named(tiny_checkpoint, llava_json, tmp_path):
    trainer = make_trainer(
        *(tiny_checkpoint, llava_json(), tmp_path / "out"),
        callbacks=[At(4, spoil)],
        save_strategy="steps",
        save_steps=2,
    )
    with pytest.raises(
        NotFinite, match=r"loss is not finite in step 4, .*The last good checkpoint is .*checkpoint-2;"
    ):
        trainer.train()
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-2"]
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)


def test_a_gradient_that_is_infinite_ends_it_before_the_step_is_taken(tiny_checkpoint, llava_json, tmp_path):
    trainer = make_trainer(tiny_checkpoint, llava_json(), tmp_path / "out", max_grad_norm=0.0)
    weight = next(each for each in trainer.model.parameters() if each.requires_grad)
    weight.register_hook(lambda gradient: gradient * (math.inf if trainer.state.global_step == 1 else 1))
    with pytest.raises(NotFinite, match="gradient norm is not finite in step 2"):
        trainer.train()
    assert all(each.isfinite().all() for each in trainer.model.parameters())


def test_weights_that_the_last_step_broke_are_not_saved(tiny_checkpoint, llava_json, tmp_path):
    out = tmp_path / "out"
    spoiled = At(3, spoil, "on_optimizer_step")
    trainer = make_trainer(
        tiny_checkpoint, llava_json(), out, callbacks=[spoiled], max_steps=3, save_strategy="steps", save_steps=1
    )
    with pytest.raises(NotFinite, match="what the weights hold .*checkpoint-2"):
        trainer.train()
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    trainer = make_trainer(tiny_checkpoint, llava_json(), tmp_path / "other", callbacks=[spoiled], max_steps=3)
    trainer.train()
    with pytest.raises(NotFinite, match="what the weights hold"):
        trainer.save_model()
    assert not list((tmp_path / "other").rglob("*.safetensors"))


def test_an_evaluation_loss_that_is_none_ends_it(tiny_checkpoint, llava_json, tmp_path):
    trainer = make_trainer(tiny_checkpoint, llava_json(), tmp_path / "out", max_steps=2)
    assert math.isfinite(trainer.evaluate(trainer.train_dataset)["eval_loss"])
    with torch.no_grad():
        spoil(trainer.model)
    with pytest.raises(NotFinite, match="evaluation loss"):
        trainer.evaluate(trainer.train_dataset)


def test_a_step_that_fp16_skips_is_let_pass_but_not_all_of_them(tiny_checkpoint, llava_json, tmp_path):
    trainer = make_trainer(tiny_checkpoint, llava_json(), tmp_path / "out")
    finite, skipping = FiniteTraining(trainer), type("Skipping", (), {"step_was_skipped": True})()

    def step(optimizer, norm):
        trainer.state.global_step += 1
        finite.on_step_begin(None, None, None)
        finite.see_loss(torch.tensor(1.0))
        finite.see_gradients(torch.tensor(norm))
        finite.on_step_end(trainer.args, trainer.state, None, optimizer=optimizer)

    with pytest.raises(NotFinite, match="gradient norm is not finite in step 2,"):
        step(skipping, math.inf)  # without fp16
    trainer.args.fp16 = True
    for _ in range(32):
        step(skipping, math.inf)
    step(None, 1.0)
    for _ in range(32):
        step(skipping, math.nan)
    with pytest.raises(NotFinite, match="fp16 skipped"):
        step(skipping, math.nan)
    with pytest.raises(NotFinite):
        step(None, math.inf)  # taken all the same


def test_the_look_at_weights_knows_every_dtype():
    good = [torch.ones(3, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    assert are_finite([*good, torch.zeros(0), torch.arange(3)]) and are_finite([])
    for each in good:
        for value in (math.nan, math.inf, -math.inf):
            broken = each.clone()
            broken[1] = value
            assert not are_finite([*good, broken])


def test_losses_that_are_left_out_of_the_log_are_refused(run):
    code, err, _ = run("--logging_nan_inf_filter", "True", "--max_steps", "1")
    assert code == 2 and "logging_nan_inf_filter" in err


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_all_processes_end_together_where_one_has_no_number(tiny_checkpoint, tmp_path, engine):
    data = write_rows(tmp_path)
    words = ["--model_name_or_path", tiny_checkpoint, "--data_path", data, "--image_folder", tmp_path]
    words += ["--output_dir", tmp_path / "out", "--use_cpu", "True", "--max_steps", "4", "--save_steps", "1"]
    going_on = Run(
        engine, [*words, "--per_device_train_batch_size", "1"], tmp_path / "logs", "tests.spoiled_rank:spoil"
    )
    for process in going_on.processes:
        process.join(300)
    assert [process.exitcode for process in going_on.processes] == [1, 1], going_on.all_printed()
    printed = going_on.printed()
    assert "error: the loss is not finite in step 2" in printed and "checkpoint-1;" in printed
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-1"]
