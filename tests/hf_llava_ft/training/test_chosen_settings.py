"""What nobody said is chosen when the rows are counted, by the command and from Python alike, and kept on resume."""

import json

import pytest
from transformers import TrainerCallback

import hf_llava_ft
from hf_llava_ft.checkpoints.opening import load_model, load_processor
from hf_llava_ft.settings.arguments import TuningArguments
from hf_llava_ft.settings.training_arguments import LlavaTrainingArguments
from hf_llava_ft.train import main as train_main
from hf_llava_ft.training.tuning import with_tuning


class Rates(TrainerCallback):
    """The learning rates that steps are taken with."""

    def __init__(self):
        self.seen = []

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        self.seen.append(max(group["lr"] for group in optimizer.param_groups))


def made_trainer(checkpoint, data, output_dir, train_type, callbacks=None, **said):
    processor = load_processor(str(checkpoint))
    rows = hf_llava_ft.load_llava_json(*data)
    model = with_tuning(
        load_model(str(checkpoint), processor), TuningArguments(train_type=train_type), "base", num_rows=len(rows)
    )
    args = LlavaTrainingArguments(str(output_dir), use_cpu=True, save_strategy="no", disable_tqdm=True, **said)
    return hf_llava_ft.LlavaTrainer(model, args, train_dataset=rows, processing_class=processor, callbacks=callbacks)


@pytest.mark.parametrize(
    ("train_type", "rates"),
    [
        ("lora", (2e-4, 2e-5, None)),
        ("projector", (1e-3, None, None)),
        ("freeze_vision", (2e-5, None, None)),
        ("full", (2e-5, None, 2e-6)),
    ],
)
def test_a_trainer_sees_what_trains(tiny_checkpoint, llava_json, tmp_path, train_type, rates):
    trainer = made_trainer(tiny_checkpoint, llava_json(6), tmp_path, train_type)
    args = trainer.args
    assert (args.learning_rate, args.mm_projector_lr, args.mm_vision_tower_lr) == rates
    assert (args.num_train_epochs, args.per_device_train_batch_size, args.warmup_steps) == (10, 4, 0)
    if train_type == "lora":
        config = trainer.model.peft_config["default"]
        assert (config.r, config.lora_alpha) == (8, 16)


def test_what_python_says_stays(tiny_checkpoint, llava_json, tmp_path):
    said = {"learning_rate": 2e-4, "num_train_epochs": 3, "per_device_train_batch_size": 8, "warmup_steps": 0.03}
    args = made_trainer(tiny_checkpoint, llava_json(6), tmp_path, "full", **said).args
    assert {name: getattr(args, name) for name in said} == said and args.mm_vision_tower_lr is None


def test_no_step_of_a_short_run_has_the_rate_zero(tiny_checkpoint, llava_json, tmp_path):
    seen = {}
    for name, said in {"chosen": {}, "said": {"warmup_steps": 0.03}}.items():
        rates = Rates()
        trainer = made_trainer(
            tiny_checkpoint, llava_json(9), tmp_path / name, "projector", [rates], num_train_epochs=3, **said
        )
        trainer.train()
        seen[name] = rates.seen
    assert len(seen["chosen"]) == 9 and min(seen["chosen"]) > 0 and seen["chosen"][0] == 1e-3
    assert seen["said"][0] == 0  # one of nine


def test_a_resumed_run_keeps_what_it_was_told(tiny_checkpoint, llava_json, tmp_path, capfd):
    data, images = llava_json(6)
    flags = ["--model_name_or_path", tiny_checkpoint, "--data_path", data, "--image_folder", images, "--save_steps", 2]
    flags = [str(word) for word in (*flags, "--output_dir", tmp_path / "out", "--use_cpu", "True")]
    told = ["--learning_rate", "3e-4", "--lora_r", "5", "--per_device_train_batch_size", "2", "--warmup_steps", "1"]
    train_main([*flags, *told, "--max_steps", "2"])
    capfd.readouterr()
    train_main([*flags, "--max_steps", "3", "--resume_from_checkpoint", "True"])
    assert "chosen as the run had it before" in capfd.readouterr().err
    settings = json.loads((tmp_path / "out/train_summary.json").read_text())["settings"]
    kept = {"learning_rate": 3e-4, "lora_r": 5, "lora_alpha": 10, "per_device_train_batch_size": 2, "warmup_steps": 1}
    assert {name: settings[name] for name in kept} == kept and settings["mm_projector_lr"] is None


def test_a_run_says_what_was_chosen(tiny_checkpoint, llava_json, tmp_path, capfd):
    data, images = llava_json(3)
    flags = ["--model_name_or_path", tiny_checkpoint, "--data_path", data, "--image_folder", images]
    train_main([*map(str, flags), "--output_dir", str(tmp_path / "out"), "--use_cpu", "True", "--max_steps", "1"])
    told = next(line for line in capfd.readouterr().err.splitlines() if line.startswith("Not given, and chosen by"))
    assert "--train_type lora and 3 rows (docs/settings.md): " in told
    assert "--learning_rate 0.0002 --mm_projector_lr 2e-05" in told and "--lora_r 8 --lora_alpha 16" in told
    assert "num_train_epochs" not in told  # --max_steps says it
