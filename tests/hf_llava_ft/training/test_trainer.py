"""Training runs for real on a tiny model, and the weights are looked at."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import TrainerCallback, set_seed

import hf_llava_ft
from hf_llava_ft.checkpoints.opening import load_model, load_processor
from hf_llava_ft.settings.arguments import TuningArguments
from hf_llava_ft.settings.training_arguments import LlavaTrainingArguments
from hf_llava_ft.training.tuning import (
    PROJECTOR,
    VISION_TOWER,
    lora_target_pattern,
    part_of,
    trained_parts,
    with_lora,
    with_tuning,
)
from tests import warm_python


def make_trainer(checkpoint, data, output_dir, *, lora: bool = True, callbacks=None, **arguments):
    set_seed(arguments.get("seed", 42))
    processor = load_processor(str(checkpoint))
    model = load_model(str(checkpoint), processor)
    if lora:
        model = with_lora(model, TuningArguments(lora_r=4, lora_alpha=8, lora_dropout=0.1), str(checkpoint))
    defaults = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "mm_projector_lr": 1e-3,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    args = LlavaTrainingArguments(output_dir=str(output_dir), **{**defaults, **arguments})
    dataset = hf_llava_ft.load_llava_json(*data)
    return hf_llava_ft.LlavaTrainer(
        model=model, args=args, train_dataset=dataset, processing_class=processor, callbacks=callbacks
    )


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_exactly_lora_and_projector_move(tiny_checkpoint, llava_json, tmp_path):
    trainer = make_trainer(tiny_checkpoint, llava_json(4), tmp_path / "out", max_steps=2, warmup_steps=0)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, parameter in trainer.model.named_parameters() if not torch.equal(parameter, before[name])}
    trainable = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert moved == trainable
    assert all("lora_" in name or f"{PROJECTOR}.modules_to_save" in name for name in moved)
    assert {part_of(name) for name in moved} == {PROJECTOR, "language_model"}
    table = {part.part: part for part in trained_parts(trainer.model)}
    assert table[VISION_TOWER].num_trainable == 0 and table[PROJECTOR].num_trainable == table[PROJECTOR].num_total


def test_lora_sits_on_every_linear_layer_of_the_language_model_and_nowhere_else(tiny):
    import re

    model = tiny.model()
    pattern = re.compile(lora_target_pattern(model))
    matched = {name for name, _ in model.named_modules() if pattern.fullmatch(name)}
    expected = {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith("model.language_model.")
    }
    assert matched == expected and len(matched) == 14
    assert any(
        name.endswith("q_proj") for name, _ in model.model.vision_tower.named_modules()
    )  # the bare name is not enough


def test_the_projector_has_its_own_learning_rate(tiny_checkpoint, llava_json, tmp_path):
    trainer = make_trainer(tiny_checkpoint, llava_json(2), tmp_path / "out")
    optimizer = trainer.create_optimizer()
    rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    named = {name: parameter for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert len(rates) == len(named)
    for name, parameter in named.items():
        assert rates[id(parameter)] == (1e-3 if part_of(name) == PROJECTOR else 1e-2)


def test_accumulation_and_batch_size_give_the_same_curve(tiny_checkpoint, llava_json, tmp_path):
    data = llava_json(4, with_text_rows=True)
    curves = []
    for batch_size, accumulation in ((4, 1), (1, 4)):
        trainer = make_trainer(
            tiny_checkpoint,
            data,
            tmp_path / f"b{batch_size}",
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            lora=False,
            max_steps=3,
            learning_rate=1e-3,
        )
        trainer.train()
        curves.append(losses(trainer))
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_two_runs_of_one_seed_agree_to_the_last_digit(tiny_checkpoint, llava_json, tmp_path):
    data = llava_json(6)
    curves, states = [], []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        trainer = make_trainer(tiny_checkpoint, data, tmp_path / name, seed=seed)
        trainer.train()
        curves.append(losses(trainer))
        states.append({n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad})
    assert curves[0] == curves[1] != curves[2]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


class StopAfter(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_training_stop = True


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("grouped", [True, False])
def test_a_resumed_run_is_the_unbroken_run(tiny_checkpoint, llava_json, tmp_path, lora, grouped):
    data = llava_json(10, with_text_rows=True)
    settings = {
        "lora": lora,
        "group_by_modality_length": grouped,
        "save_strategy": "steps",
        "save_steps": 4,
        "max_steps": 8,
    }
    whole = make_trainer(tiny_checkpoint, data, tmp_path / "whole", **settings)
    whole.train()
    broken = make_trainer(tiny_checkpoint, data, tmp_path / "broken", callbacks=[StopAfter(4)], **settings)
    broken.train()
    resumed = make_trainer(tiny_checkpoint, data, tmp_path / "broken", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-4"))
    assert losses(resumed) == losses(whole)
    expected = dict(whole.model.named_parameters())
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, expected[name]), name


def test_a_checkpoint_of_another_model_is_not_half_loaded(tiny_checkpoint, llava_json, tmp_path, tiny):
    data = llava_json(4)
    settings = {"lora": False, "save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    make_trainer(tiny_checkpoint, data, tmp_path / "out", **settings).train()
    other = make_trainer(tiny_checkpoint, data, tmp_path / "other", **settings)
    other.model.model.language_model.layers.append(other.model.model.language_model.layers[0])
    with pytest.raises(ValueError, match="lacks weights of this model"):
        other.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))


PEFT_ALONE = """
import json, sys, torch
from peft import PeftModel
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration
base, adapter, image = sys.argv[1:]
assert "hf_llava_ft" not in sys.modules
model = PeftModel.from_pretrained(LlavaForConditionalGeneration.from_pretrained(base), adapter).eval()
processor = AutoProcessor.from_pretrained(adapter)
messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
text = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(text=[text], images=[Image.open(image)], return_tensors="pt")
with torch.no_grad():
    print(json.dumps(model(**inputs).logits[0, -1].tolist()))
"""


def test_peft_alone_loads_the_adapter_onto_the_native_base(tiny_checkpoint, llava_json, tmp_path):
    data, folder = llava_json(4)
    trainer = make_trainer(tiny_checkpoint, (data, folder), tmp_path / "out", save_strategy="steps", save_steps=3)
    trainer.train()
    # Every checkpoint is a whole adapter, the projector included.
    adapter = tmp_path / "out" / "checkpoint-6"
    names = set(load_file(adapter / "adapter_model.safetensors"))
    assert "base_model.model.model.multi_modal_projector.linear_1.weight" in names
    assert not (adapter / "training_args.bin").exists()
    done = warm_python.run(["-c", PEFT_ALONE, str(tiny_checkpoint), str(adapter), str(folder / "0.png")], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    processor = load_processor(str(adapter))
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=[text], images=[Image.open(folder / "0.png")], return_tensors="pt")
    with torch.no_grad():
        expected = trainer.model.eval()(**inputs).logits[0, -1]
        base = trainer.model.get_base_model()
        with trainer.model.disable_adapter():
            untuned = base(**inputs).logits[0, -1]
    found = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (found - untuned).abs().max() > 1e-2


def test_the_trainer_works_with_defaults_from_python(tiny_checkpoint, llava_json, tmp_path):
    processor = hf_llava_ft.load_processor(str(tiny_checkpoint))
    trainer = hf_llava_ft.LlavaTrainer(
        hf_llava_ft.load_model(str(tiny_checkpoint), processor),
        LlavaTrainingArguments(output_dir=str(tmp_path), max_steps=1, use_cpu=True, save_strategy="no"),
        train_dataset=hf_llava_ft.load_llava_json(*llava_json(2)),
        eval_dataset=hf_llava_ft.load_llava_json(*llava_json(2)),
        processing_class=processor,
    )
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize("train_type", ["lora", "projector"])
def test_small_steps_of_the_projector_are_not_lost_in_bfloat16(tiny, train_type):
    arguments = TuningArguments(train_type=train_type, lora_r=4, lora_dropout=0.0)
    model = with_tuning(tiny.model().to(torch.bfloat16), arguments, "base").train()
    projector = {n: p for n, p in model.named_parameters() if part_of(n) == PROJECTOR and p.requires_grad}
    assert projector and all(parameter.dtype == torch.float32 for parameter in projector.values())
    optimizer = torch.optim.AdamW(projector.values(), lr=1e-6, weight_decay=0.0)
    before = {name: parameter.detach().clone() for name, parameter in projector.items()}
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            model(**tiny.batch()).loss.backward()
    optimizer.step()
    for name, parameter in projector.items():
        moved = parameter != before[name]
        assert moved.float().mean() > 0.9
        assert torch.equal(
            parameter.bfloat16()[before[name].abs() > 0.1], before[name].bfloat16()[before[name].abs() > 0.1]
        )
