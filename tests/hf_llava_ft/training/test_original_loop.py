"""Whole runs against the original's training loop written out: full fine-tuning, frozen parts, accumulation, grouping.

Its own recorded runs (LoRA, stage 1) are compared in test_original_training.py. What is expected here comes from a
loop over plain torch that does what its Trainer does (transformers 4.37, `--gradient_accumulation_steps`, cosine with
warmup, AdamW, clipping): no Trainer, no sampler object and no fused loss of ours takes part in it.
"""

import copy
import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler, Sampler
from transformers import TrainerCallback

import hf_llava_ft
from hf_llava_ft.checkpoints.opening import load_model, load_processor
from hf_llava_ft.data.collator import LlavaCollator
from hf_llava_ft.data.sampler import modality_length_grouped_indices
from hf_llava_ft.settings.arguments import TuningArguments
from hf_llava_ft.settings.training_arguments import LlavaTrainingArguments
from hf_llava_ft.training.tuning import with_tuning

CHECKPOINT, RUN = "c_forward/mlp2x_patch/checkpoint", "f_lora"
VOCABULARY = 1024  # the original's; our head has a row for `<image>`, and rows that fill it up, behind it
BATCH_SIZE, SEED, WARMUP_RATIO, MAX_GRAD_NORM = 2, 42, 0.03, 1.0

# What the original trains under each of its flags, in our names: the tower never.
LANGUAGE_MODEL, HEAD, PROJECTOR = r"model\.language_model\.", r"lm_head\.", r"model\.multi_modal_projector\."
LORA, LORA_PROJECTOR = r".*\.lora_[AB]\.", r".*multi_modal_projector\.modules_to_save\."
MODES = {
    "full": (TuningArguments("freeze_vision"), [LANGUAGE_MODEL, HEAD, PROJECTOR]),
    "freeze_backbone": (TuningArguments("freeze_vision", freeze_backbone=True), [HEAD, PROJECTOR]),
    "freeze_mm_mlp_adapter": (
        TuningArguments("freeze_vision", freeze_mm_mlp_adapter=True),
        [LANGUAGE_MODEL, HEAD],
    ),
    "both": (TuningArguments("freeze_vision", freeze_backbone=True, freeze_mm_mlp_adapter=True), [HEAD]),
    "tune_mm_mlp_adapter": (TuningArguments("projector"), [PROJECTOR]),
    "lora": (TuningArguments("lora", lora_r=4, lora_alpha=8, lora_dropout=0.0), [LORA, LORA_PROJECTOR]),
    "lora, freeze_mm_mlp_adapter": (
        TuningArguments("lora", lora_r=4, lora_alpha=8, lora_dropout=0.0, freeze_mm_mlp_adapter=True),
        [LORA],
    ),
}


class GlobalOrder(Sampler):
    """The order of each epoch from torch's global generator, as the original's Trainer draws it."""

    def __init__(self, lengths: list[int] | None, num_rows: int, accumulation: int):
        self.lengths, self.num_rows, self.accumulation = lengths, num_rows, accumulation

    def __iter__(self):
        if self.lengths is None:
            return iter(RandomSampler(range(self.num_rows)))
        return iter(modality_length_grouped_indices(self.lengths, BATCH_SIZE, self.accumulation, original_rng=True))

    def __len__(self):
        return self.num_rows


def words_by_modality(path) -> list[int]:
    """The original's `modality_lengths`."""
    rows = json.loads(path.read_text())
    counts = [sum(len(turn["value"].split()) for turn in row["conversations"]) for row in rows]
    return [count if "image" in row else -count for row, count in zip(rows, counts, strict=True)]


def share_of_peak(step: int, num_steps: int) -> float:
    """Cosine with warmup, at `step` of 0 ... num_steps - 1."""
    warmup = math.ceil(num_steps * WARMUP_RATIO)
    if step < warmup:
        return step / max(1, warmup)
    return (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup))) / 2


def decays(name: str) -> bool:
    return not name.endswith("bias") and "norm" not in name


def plain_run(model, dataset, collate, lengths, patterns, settings: dict) -> SimpleNamespace:
    """The original's loop."""
    accumulation, num_epochs = settings["gradient_accumulation_steps"], settings["num_train_epochs"]
    trained = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(re.match(pattern, name) for pattern in patterns))
        if parameter.requires_grad:
            trained[name] = parameter
    projector_lr = settings.get("mm_projector_lr")
    groups = []
    for name, parameter in trained.items():
        of_projector = projector_lr is not None and "multi_modal_projector" in name
        decay = settings["weight_decay"] if decays(name) else 0.0
        peak = projector_lr if of_projector else settings["learning_rate"]
        groups.append({"params": [parameter], "weight_decay": decay, "lr": peak, "peak": peak})
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)

    order = GlobalOrder(lengths, len(dataset), accumulation)
    loader = DataLoader(dataset, batch_size=BATCH_SIZE, sampler=order, collate_fn=collate)
    num_steps = math.ceil(num_epochs * max(len(loader) // accumulation, 1))
    losses, norms, step, pending = [], [], 0, []
    torch.manual_seed(SEED)
    model.train()
    while step < num_steps:
        for batch in loader:
            labels = batch.pop("labels")[:, 1:].flatten()
            logits = model(**batch).logits[:, :-1, :VOCABULARY].flatten(0, 1)
            loss = torch.nn.functional.cross_entropy(logits, labels) / accumulation
            loss.backward()
            pending.append(loss.item())
            if len(pending) < accumulation:
                continue
            norm = torch.sqrt(sum((p.grad.double() ** 2).sum() for p in trained.values() if p.grad is not None))
            for parameter in trained.values():
                if parameter.grad is not None:
                    parameter.grad.mul_(min(1.0, MAX_GRAD_NORM / (norm.item() + 1e-6)))
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * share_of_peak(step, num_steps)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(sum(pending))
            norms.append(norm.item())
            step, pending = step + 1, []
            if step == num_steps:
                break
    return SimpleNamespace(losses=losses, norms=norms, weights={name: p.detach() for name, p in trained.items()})


class Norms(TrainerCallback):
    def __init__(self):
        self.values = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "grad_norm" in logs:
            self.values.append(float(logs["grad_norm"]))


SETTINGS = {
    "learning_rate": 2e-3,
    "weight_decay": 0.0,
    "num_train_epochs": 1,
    "gradient_accumulation_steps": 1,
    "group_by_modality_length": False,
}


@pytest.fixture(scope="module")
def both(golden, tmp_path_factory):
    """`both(mode, **changed settings)`: the plain run and ours, from the same weights."""

    def run(mode: str, ours_differs: dict | None = None, **changed) -> tuple[SimpleNamespace, SimpleNamespace]:
        arguments, patterns = MODES[mode]
        settings = SETTINGS | changed
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(golden)
            processor = load_processor(CHECKPOINT)
            torch.manual_seed(0)
            model = with_tuning(load_model(CHECKPOINT, processor), arguments, CHECKPOINT)
        data = golden / RUN / "train_data.json"
        dataset = hf_llava_ft.load_llava_json(data, golden / "b_images/png")
        collate = LlavaCollator(processor)
        lengths = words_by_modality(data) if settings["group_by_modality_length"] else None
        plain = plain_run(copy.deepcopy(model), dataset, collate, lengths, patterns, settings)

        common = {
            "per_device_train_batch_size": BATCH_SIZE,
            "warmup_steps": WARMUP_RATIO,
            "max_grad_norm": MAX_GRAD_NORM,
            "lr_scheduler_type": "cosine",
            "seed": SEED,
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
        }
        norms = Norms()
        theirs = {"loss_normalization": "micro_batch", "sampler_order": "original"} | (ours_differs or {})
        trainer = hf_llava_ft.LlavaTrainer(
            model=model,
            args=LlavaTrainingArguments(
                output_dir=str(tmp_path_factory.mktemp("out")),
                **(common | settings | theirs),
            ),
            train_dataset=dataset,
            processing_class=processor,
            data_collator=collate,
            callbacks=[norms],
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        return plain, SimpleNamespace(losses=losses, norms=norms.values, weights=trained)

    return run


def assert_equal_runs(plain: SimpleNamespace, ours: SimpleNamespace) -> None:
    assert len(plain.losses) > 0
    assert ours.losses == pytest.approx(plain.losses, rel=1e-5)
    assert ours.norms == pytest.approx(plain.norms, rel=1e-4)
    assert set(ours.weights) == set(plain.weights)
    for name, weight in ours.weights.items():
        # Ours has rows behind the original's vocabulary, which have no part in its loss.
        kept = slice(VOCABULARY) if "lm_head" in name or "embed_tokens" in name else slice(None)
        torch.testing.assert_close(weight[kept], plain.weights[name][kept], rtol=1e-3, atol=2e-6, msg=name)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_trains_as_the_original(both, mode):
    assert_equal_runs(*both(mode))


@pytest.mark.parametrize(
    "changed",
    [
        {"gradient_accumulation_steps": 2},
        {"gradient_accumulation_steps": 2, "group_by_modality_length": True},
        {"group_by_modality_length": True, "num_train_epochs": 2},
        {"gradient_accumulation_steps": 5, "num_train_epochs": 3},
        {"gradient_accumulation_steps": 3, "group_by_modality_length": True},
        {"mm_projector_lr": 1e-4, "weight_decay": 0.1},
        {"gradient_accumulation_steps": 2, "num_train_epochs": 2},
        {"gradient_accumulation_steps": 2, "group_by_modality_length": True, "num_train_epochs": 3},
    ],
    ids=lambda changed: ", ".join(f"{name} {value}" for name, value in changed.items()),
)
def test_every_setting_trains_as_the_original(both, changed):
    assert_equal_runs(*both("full", **changed))


@pytest.mark.parametrize(
    "different",
    [{"loss_normalization": "tokens"}, {"sampler_order": "default"}, {"max_grad_norm": 0.5}, {"warmup_steps": 0}],
    ids=str,
)
def test_another_setting_gives_other_figures(both, different):
    settings = {"gradient_accumulation_steps": 2, "group_by_modality_length": True}
    plain, ours = both("full", ours_differs=different, **settings)
    with pytest.raises(AssertionError):
        assert_equal_runs(plain, ours)


def test_a_step_of_fewer_micro_batches_is_their_mean(both):
    """Where fewer are there in an epoch than are accumulated; the original divides by the number asked for."""
    _, whole = both("full", gradient_accumulation_steps=5)
    _, fewer = both("full", gradient_accumulation_steps=5, ours_differs={"gradient_accumulation_steps": 8})
    assert fewer.losses == pytest.approx(whole.losses, rel=1e-6) and len(whole.losses) == 1
    assert fewer.norms == pytest.approx(whole.norms, rel=1e-6)
