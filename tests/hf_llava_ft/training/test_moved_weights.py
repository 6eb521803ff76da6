"""What moves in the first steps is held to what is said to train, one weight at a time."""

import pytest
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, set_seed

import hf_llava_ft
from hf_llava_ft.checkpoints.opening import load_model, load_processor
from hf_llava_ft.settings.arguments import TuningArguments
from hf_llava_ft.settings.training_arguments import LlavaTrainingArguments
from hf_llava_ft.train import main as train_main
from hf_llava_ft.training.guards.moved_weights import MAX_STEPS, MovedWeights, WrongWeightsMoved, checksums
from hf_llava_ft.training.tuning import with_tuning

FROZEN = "base_model.model.model.vision_tower.encoder.layers.0.mlp.fc1.weight"
TRAINED = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_B.default.weight"


@pytest.fixture
def trainer(tiny_checkpoint, llava_json, tmp_path):
    """`trainer(*callbacks, train_type=..., dtype=..., **arguments)`."""

    def make(*callbacks, train_type="lora", dtype="auto", data=None, **arguments):
        set_seed(0)
        processor = load_processor(str(tiny_checkpoint))
        tuning = TuningArguments(train_type=train_type, lora_r=4, lora_target_modules=["q_proj"])
        model = with_tuning(load_model(str(tiny_checkpoint), processor, dtype=dtype), tuning, str(tiny_checkpoint))
        defaults = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "warmup_steps": 0}
        defaults |= {"save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
        return hf_llava_ft.LlavaTrainer(
            model,
            LlavaTrainingArguments(output_dir=str(tmp_path / "out"), **(defaults | arguments)),
            train_dataset=hf_llava_ft.load_llava_json(*(data or llava_json(4))),
            processing_class=processor,
            callbacks=list(callbacks),
        )

    return make


def watched(trainer) -> MovedWeights:
    return next(each for each in trainer.callback_handler.callbacks if isinstance(each, MovedWeights))


class Touch(TrainerCallback):
    """Changes one weight in one step."""

    def __init__(self, name: str, step: int = 1):
        self.name, self.step = name, step

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == self.step:
            with torch.no_grad():
                model.get_parameter(self.name).view(-1)[3] += 1e-6


class Hold(TrainerCallback):
    """Takes the gradient of a parameter away before the optimizer sees it."""

    def __init__(self, name: str):
        self.name = name

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        model.get_parameter(self.name).register_hook(torch.zeros_like)


@pytest.mark.parametrize("train_type", ["lora", "full"])
def test_a_run_that_trains_what_it_says_is_seen_to(trainer, train_type):
    run = trainer(train_type=train_type)
    run.train()
    check = watched(run)
    assert torch.equal(check._has_moved, check._trains) and check._trains.any() and not check._trains.all()
    assert not check._hooks and not check._parameters  # nothing is held any longer


@pytest.mark.parametrize("step", [1, 2])
def test_a_frozen_weight_that_moves_ends_the_run(trainer, step):
    # In the second step LoRA's A has yet to be seen moving, so the frozen ones are looked at too.
    with pytest.raises(WrongWeightsMoved, match=f"in step {step} weights moved, although they are frozen: {FROZEN}"):
        trainer(Touch(FROZEN, step)).train()


def test_a_trainable_weight_that_stays_ends_the_run(trainer):
    with pytest.raises(WrongWeightsMoved, match=f"in step 1 weights train and did not move: {TRAINED}"):
        trainer(Hold(TRAINED)).train()


def test_a_trainable_weight_that_no_optimizer_has_ends_the_run(trainer):
    run = trainer(train_type="full")
    optimizer = run.create_optimizer()
    for group in optimizer.param_groups:
        group["params"] = [each for each in group["params"] if each is not run.model.lm_head.weight]
    with pytest.raises(WrongWeightsMoved, match=r"did not move: lm_head\.weight\."):
        run.train()


def test_nothing_has_to_move_while_the_learning_rate_is_zero(trainer):
    trainer(warmup_steps=2).train()
    with pytest.raises(WrongWeightsMoved, match="in step 2 weights train and did not move"):
        trainer(Hold(TRAINED), warmup_steps=2).train()


def test_the_projector_of_a_run_on_text_need_not_move(trainer, llava_json, tmp_path):
    path, folder = llava_json(3)
    path.write_text(path.read_text().replace("<image>\\n", "").replace('"image":', '"picture":'))
    run = trainer(train_type="freeze_vision", data=(path, folder), max_steps=MAX_STEPS + 1)
    run.train()
    check = watched(run)
    stayed = {name for name, moved in zip(check._names, check._has_moved & check._trains, strict=True) if moved}
    assert not [name for name in stayed if "multi_modal_projector" in name] and "lm_head.weight" in stayed


def test_steps_below_the_rounding_of_bfloat16_move_what_trains_of_a_bfloat16_model_too(trainer):
    """A step of 1e-5 leaves 1.0 as it is in bfloat16, and a normalisation begins with ones: what trains is float32."""
    run = trainer(train_type="full", dtype="bfloat16", learning_rate=1e-5)
    run.train()
    check = watched(run)
    moved = [n for n, m, t in zip(check._names, check._has_moved, check._trains, strict=True) if t and m]
    assert "model.language_model.norm.weight" in moved
    with pytest.raises(WrongWeightsMoved, match="did not move: model.language_model.norm.weight"):
        trainer(Hold("model.language_model.norm.weight"), train_type="full", learning_rate=1e-5).train()


def test_a_step_that_fp16_skips_is_not_looked_at():
    class Skipping(torch.optim.AdamW):
        step_was_skipped = True

    model = torch.nn.Linear(3, 2)
    optimizer = Skipping(model.parameters(), lr=0.1)
    args = LlavaTrainingArguments(output_dir="unused", use_cpu=True)
    check, state, control = MovedWeights(), TrainerState(global_step=1), TrainerControl()
    check.on_train_begin(args, state, control, model=model, optimizer=optimizer)
    model(torch.randn(4, 3)).sum().backward()
    check.on_step_end(args, state, control, optimizer=optimizer)
    model.zero_grad()
    optimizer.step_was_skipped = False
    check.on_step_end(args, state, control, optimizer=optimizer)  # what was skipped is no reason to have moved
    model(torch.randn(4, 3)).sum().backward()
    with pytest.raises(WrongWeightsMoved, match="did not move: weight, bias"):
        check.on_step_end(args, state, control, optimizer=optimizer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_a_checksum_sees_one_bit(dtype):
    values = torch.arange(1, 14, dtype=torch.float32).to(dtype)
    for weights in (values, values[1:], values[:1]):  # not all of whole eight bytes, nor at their beginning
        parameter = torch.nn.Parameter(weights.clone()[: len(weights)], requires_grad=False)
        before = checksums([parameter])
        assert checksums([parameter]) == before
        parameter.view(torch.uint8)[-1] ^= 1
        assert checksums([parameter]) != before
    assert checksums([torch.nn.Parameter(torch.empty(0)), torch.nn.Parameter(torch.empty(2, device="meta"))]) == [
        0,
        None,
    ]


def test_the_command_ends_with_a_sentence(tiny_checkpoint, llava_json, tmp_path, monkeypatch, capsys):
    path, folder = llava_json(4)
    callback = Touch(FROZEN)
    real = hf_llava_ft.LlavaTrainer.create_optimizer

    def with_a_fault(self, model=None):
        self.add_callback(callback)
        return real(self, model)

    monkeypatch.setattr(hf_llava_ft.LlavaTrainer, "create_optimizer", with_a_fault)
    flags = {"model_name_or_path": tiny_checkpoint, "data_path": path, "image_folder": folder, "use_cpu": True}
    flags |= {"output_dir": tmp_path / "out", "max_steps": 2, "lora_r": 4, "warmup_steps": 0}
    with pytest.raises(SystemExit) as ended:
        train_main([str(word) for name, value in flags.items() for word in (f"--{name}", value)])
    assert ended.value.code == 1
    assert f"error: in step 1 weights moved, although they are frozen: {FROZEN}" in capsys.readouterr().err
    assert not (tmp_path / "out/adapter_config.json").exists()
