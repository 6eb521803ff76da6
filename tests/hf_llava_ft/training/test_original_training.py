"""Training as the original LLaVA trains: its own runs, step by step, from its own initial tensors (tests/golden)."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import RandomSampler
from transformers import TrainerCallback

import hf_llava_ft
from hf_llava_ft.checkpoints.opening import load_model, load_processor
from hf_llava_ft.data.collator import LlavaCollator
from hf_llava_ft.data.sampler import OriginalOrderSampler, modality_length_grouped_indices
from hf_llava_ft.errors import UserError
from hf_llava_ft.evaluation.token_losses import LossOverTokens
from hf_llava_ft.modeling.weight_names_llava import ORIGINAL_NAMES
from hf_llava_ft.settings.arguments import TuningArguments
from hf_llava_ft.settings.training_arguments import LlavaTrainingArguments
from hf_llava_ft.train import main as train_main
from hf_llava_ft.train import parse_arguments
from hf_llava_ft.training.tuning import (
    LANGUAGE_MODEL,
    LM_HEAD,
    PROJECTOR,
    VISION_TOWER,
    idle_tower_modules,
    part_of,
    with_tuning,
)
from tests import warm_python

LORA_RUN, STAGE_1_RUN = "f_lora", "g_pretrain"
# What the original's command line said, in our words.
SETTINGS = {
    LORA_RUN: {"learning_rate": 2e-4, "mm_projector_lr": 2e-5},
    STAGE_1_RUN: {"learning_rate": 1e-3},
}
TUNING = {
    LORA_RUN: TuningArguments(train_type="lora", lora_r=8, lora_alpha=16, lora_dropout=0.0),
    STAGE_1_RUN: TuningArguments(train_type="projector"),
}
TEMPLATE = {LORA_RUN: ("v1", "pad"), STAGE_1_RUN: ("plain", "square")}
DATA = {LORA_RUN: "train_data.json", STAGE_1_RUN: "pretrain_data.json"}


def our_name(original: str) -> str:
    """Our name, without PEFT's additions, of a weight that the original calls `original`."""
    original = original.removeprefix("base_model.model.").replace(".default.", ".")
    for source, target in ORIGINAL_NAMES:
        renamed, count = re.subn(source, target, original)
        if count:
            return renamed
    return original


def plain_name(name: str) -> str:
    """`name` without PEFT's additions."""
    name = name.removeprefix("base_model.model.").replace(".modules_to_save.default.", ".")
    return name.replace(".default.", ".").replace(".base_layer.", ".")


def trainable(model) -> dict[str, torch.nn.Parameter]:
    return {plain_name(name): parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


class Watch(TrainerCallback):
    """The learning rate of each parameter in each step, as the optimizer used it, and the last step's gradients."""

    def __init__(self):
        self.rates, self.gradients = [], {}

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        names = {parameter: name for name, parameter in trainable(model).items()}
        self.rates.append({names[p]: group["lr"] for group in optimizer.param_groups for p in group["params"]})
        self.gradients = {name: parameter.grad.clone() for name, parameter in trainable(model).items()}


def rerun(golden, run: str, output_dir, *, aspect: str | None = None, **more) -> SimpleNamespace:
    """The original's run `run`, by us: model, trainer and what happened."""
    version, its_aspect = TEMPLATE[run]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(golden)  # the checkpoint names its tower as `tiny-clip`
        checkpoint = "c_forward/mlp2x_patch/checkpoint"  # its language model and tower are those of both runs
        processor = load_processor(checkpoint)
        processor.use_chat_template(version)
        processor.image_processor.do_pad = (aspect or its_aspect) == "pad"
        model = load_model(checkpoint, processor)
    model = with_tuning(model, TUNING[run], checkpoint)
    initial = {
        our_name(name): tensor for name, tensor in load_file(golden / run / "init_trainable.safetensors").items()
    }
    parameters = trainable(model)
    assert set(parameters) == set(initial)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(initial[name])
    seen = []

    class Collator(LlavaCollator):
        def __call__(self, rows):
            batch = super().__call__(rows)
            seen.append(([int(row["id"]) for row in rows], batch))
            return batch

    arguments = {
        "num_train_epochs": 1,
        "per_device_train_batch_size": 2,
        "warmup_steps": 0.03,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.0,
        "seed": 42,
        "sampler_order": "original",
        "loss_normalization": "micro_batch",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    watch = Watch()
    trainer = hf_llava_ft.LlavaTrainer(
        model=model,
        args=LlavaTrainingArguments(output_dir=str(output_dir), **(arguments | SETTINGS[run] | more)),
        train_dataset=hf_llava_ft.load_llava_json(golden / run / DATA[run], golden / "b_images/png"),
        processing_class=processor,
        data_collator=Collator(processor, uint8_pixels=True),
        callbacks=[watch],
    )
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    return SimpleNamespace(
        model=model,
        processor=processor,
        trainer=trainer,
        losses=[step["loss"] for step in steps],
        grad_norms=[step["grad_norm"] for step in steps],
        rates=watch.rates,
        gradients=watch.gradients,
        rows=[row for rows, _ in seen for row in rows],
        batches=[trainer._prepare_inputs(batch) for _, batch in seen],
    )


def recorded(golden, run: str) -> dict:
    return json.loads((golden / run / "record.json").read_text())


@pytest.fixture(scope="module")
def runs(golden, tmp_path_factory):
    return {run: rerun(golden, run, tmp_path_factory.mktemp(run)) for run in (LORA_RUN, STAGE_1_RUN)}


# ---------------------------------------------------------------------- the original's runs


@pytest.mark.parametrize("run", [LORA_RUN, STAGE_1_RUN])
def test_losses_and_gradient_norms_are_the_originals(golden, runs, run):
    steps = recorded(golden, run)["steps"]
    assert len(steps) == 5
    assert runs[run].losses == pytest.approx([step["loss"] for step in steps], rel=1e-6)
    assert runs[run].grad_norms == pytest.approx([step["grad_norm_total_before_clip"] for step in steps], rel=2e-6)


@pytest.mark.parametrize("run", [LORA_RUN, STAGE_1_RUN])
def test_rows_and_batches_are_the_originals(golden, runs, run):
    record = recorded(golden, run)
    assert runs[run].rows == record["dataset_getitem_order"]
    num_supervised = [int((batch["labels"] != -100).sum()) for batch in runs[run].batches]
    assert num_supervised == [step["n_supervised"] for step in record["steps"]]
    # The original has one id per image where we have one per feature.
    first, theirs = runs[run].batches[0], record["first_batch"]
    image, pad = runs[run].processor.image_token_id, runs[run].processor.tokenizer.pad_token_id
    for row, ids in enumerate(theirs["input_ids"]):
        kept = first["attention_mask"][row] == 1
        ours = first["input_ids"][row][kept].tolist()
        ours = [token for i, token in enumerate(ours) if token != image or i == 0 or ours[i - 1] != image]
        num_padding = len(ids) - sum(theirs["attention_mask"][row])
        assert [-200 if token == image else token for token in ours] + [pad] * num_padding == ids


@pytest.mark.parametrize("run", [LORA_RUN, STAGE_1_RUN])
def test_every_weight_has_the_originals_learning_rate_and_decay_in_every_step(golden, runs, run):
    record = recorded(golden, run)
    for step, ours in zip(record["steps"], runs[run].rates, strict=True):
        theirs = {
            our_name(name): rate
            for group, rate in zip(record["optimizer_groups"], step["lr_per_group_used_in_this_step"], strict=True)
            for name in group["names"]
        }
        assert ours == pytest.approx(theirs, rel=1e-12)
    # The same weights together in groups, in the same order; ours has no group without weights.
    names = {id(parameter): name for name, parameter in trainable(runs[run].model).items()}
    groups = [{names[id(p)] for p in group["params"]} for group in runs[run].trainer.optimizer.param_groups]
    assert groups == [
        {our_name(name) for name in group["names"]} for group in record["optimizer_groups"] if group["names"]
    ]
    for group in runs[run].trainer.optimizer.param_groups:
        expected = record["optimizer_groups"][0]
        assert [group[name] for name in ("weight_decay", "eps")] == [
            expected[name] for name in ("weight_decay", "eps")
        ]
        assert list(group["betas"]) == expected["betas"]


def test_lora_sits_where_the_original_puts_it(golden, runs):
    # `rerun` has compared the full names with the original's; these are the ones it looked for.
    names = {name.split(".")[-3] for name in trainable(runs[LORA_RUN].model) if ".lora_A." in name}
    assert sorted(names) == recorded(golden, LORA_RUN)["find_all_linear_names_sorted"]


def test_the_merged_weights_are_the_originals(golden, tmp_path):
    run = rerun(golden, LORA_RUN, tmp_path)
    merged = run.model.merge_and_unload().state_dict()
    expected = {our_name(name): tensor for name, tensor in load_file(golden / LORA_RUN / "merged.safetensors").items()}
    assert len(expected) == 14 + 4  # linear layers, and the projector
    for name, tensor in expected.items():
        torch.testing.assert_close(merged[name], tensor, rtol=0, atol=1e-7, msg=name)
    # All others, which the original leaves alone, are as they were.
    untouched = load_file(golden / "c_forward/mlp2x_patch/checkpoint/model.safetensors")
    for name, tensor in untouched.items():
        if our_name(name) in expected:
            assert (expected[our_name(name)] - tensor).abs().max() > 1e-5, name
        else:
            assert torch.equal(merged[our_name(name)][: len(tensor)], tensor), name


def test_the_projector_of_stage_1_is_the_originals(golden, runs):
    # What the LoRA run began with is what stage 1 had ended with.
    start = load_file(golden / LORA_RUN / "init_trainable.safetensors")
    initial = load_file(golden / STAGE_1_RUN / "init_trainable.safetensors")
    ours = trainable(runs[STAGE_1_RUN].model)
    assert len(ours) == 4
    for name, parameter in ours.items():
        [theirs] = [tensor for key, tensor in start.items() if our_name(key) == name]
        [before] = [tensor for key, tensor in initial.items() if our_name(key) == name]
        torch.testing.assert_close(parameter.detach(), theirs, rtol=0, atol=5e-7)
        assert (theirs - before).abs().max() > 1e-3


@pytest.mark.parametrize(
    "change",
    [{"aspect": "square"}, {"sampler_order": "default"}, {"seed": 43}, {"mm_projector_lr": None}],
    ids=["square", "default order", "other seed", "one rate"],
)
def test_another_setting_gives_other_figures(golden, tmp_path, change):
    losses = [step["loss"] for step in recorded(golden, LORA_RUN)["steps"]]
    found = rerun(golden, LORA_RUN, tmp_path, **change).losses
    assert found != pytest.approx(losses, rel=1e-5)


# ---------------------------------------------------------------------- the mean


def test_micro_batch_is_the_mean_of_means_and_tokens_the_mean_over_all(golden, tmp_path):
    settings = {"gradient_accumulation_steps": 2, "max_steps": 1}
    # The original's first step has a learning rate of 0, so its first two losses are of the same weights.
    first, second = recorded(golden, LORA_RUN)["steps"][:2]
    means = rerun(golden, LORA_RUN, tmp_path / "means", **settings)
    assert means.losses == pytest.approx([(first["loss"] + second["loss"]) / 2], rel=1e-6)
    numbers = [step["n_supervised"] for step in (first, second)]
    assert numbers == [18, 21]
    over_all = (first["loss"] * numbers[0] + second["loss"] * numbers[1]) / sum(numbers)
    tokens = rerun(golden, LORA_RUN, tmp_path / "tokens", loss_normalization="tokens", **settings)
    assert tokens.losses == pytest.approx([over_all], rel=1e-6)
    assert means.losses != pytest.approx(tokens.losses, rel=1e-4)
    assert means.grad_norms != pytest.approx(tokens.grad_norms, rel=1e-3)


@pytest.mark.parametrize("normalization", ["micro_batch", "tokens"])
def test_gradients_are_those_of_the_plain_computation(golden, tmp_path, normalization):
    settings = {"gradient_accumulation_steps": 2, "max_steps": 1, "max_grad_norm": 0.0}
    run = rerun(golden, LORA_RUN, tmp_path, loss_normalization=normalization, **settings)  # at a rate of 0
    run.model.zero_grad()
    sums, numbers = [], []
    for batch in run.batches[:2]:
        batch = dict(run.trainer._prepare_inputs(batch))  # uint8 pictures become floats there
        targets = batch.pop("labels")[:, 1:].flatten()
        logits = run.model(**batch).logits[:, :-1, :1024].flatten(0, 1)  # the original's vocabulary
        sums.append(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
        numbers.append(int((targets != -100).sum()))
    means = (sums[0] / numbers[0] + sums[1] / numbers[1]) / 2
    (means if normalization == "micro_batch" else sum(sums) / sum(numbers)).backward()
    for name, parameter in trainable(run.model).items():
        torch.testing.assert_close(run.gradients[name], parameter.grad, rtol=1e-4, atol=1e-7, msg=name)


def test_ids_without_a_token_have_no_part_in_the_loss():
    logits = torch.randn(5, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    targets = torch.tensor([0, 9, -100, 3, 8])

    last = LossOverTokens(num_tokens=11, image_token_id=10)(logits, None, 16, shift_labels=targets)
    torch.testing.assert_close(last, torch.nn.functional.cross_entropy(logits[:, :10], targets))
    last.backward()
    assert logits.grad is not None and not logits.grad[:, 10:].any() and logits.grad[:, :10].any()
    logits.grad = None
    inside = LossOverTokens(num_tokens=11, image_token_id=7)(logits, None, 16, shift_labels=targets)
    others = [index for index in range(11) if index != 7]
    renumbered = torch.tensor([0, 8, -100, 3, 7])
    expected = torch.nn.functional.cross_entropy(logits[:, others], renumbered, ignore_index=-100)
    torch.testing.assert_close(inside, expected)
    inside.backward()
    assert logits.grad.isfinite().all() and not logits.grad[:, [7, *range(11, 16)]].any()


# ---------------------------------------------------------------------- the order


def test_the_original_order_is_what_a_seeded_global_generator_gives():
    lengths = np.array([(-1) ** (i % 3 == 0) * (i % 17 + 1) for i in range(50)])
    for grouped in (False, True):
        ours = OriginalOrderSampler(50, 42, lengths=lengths if grouped else None, batch_size=2, num_processes=2)
        torch.manual_seed(42)
        for epoch in range(3):
            torch.empty((), dtype=torch.int64).random_()  # as iter(DataLoader) does before it asks the sampler
            if grouped:
                expected = modality_length_grouped_indices(lengths, 2, 2, None, original_rng=True)
            else:
                expected = list(RandomSampler(range(50)))
            state = torch.get_rng_state()
            ours.set_epoch(epoch)
            assert list(ours) == list(ours) == expected
            assert torch.equal(torch.get_rng_state(), state)  # global randomness is not moved


def test_micro_batches_that_do_not_fill_a_step_wait_for_the_next_epoch(golden, tmp_path):
    run = rerun(golden, LORA_RUN, tmp_path, gradient_accumulation_steps=2)
    assert run.rows == recorded(golden, LORA_RUN)["dataset_getitem_order"][:8]
    assert [max(rates.values()) for rates in run.rates] == [0.0, 2e-4]  # warmup, and the peak of a run of two steps

    def num_kept(rows, **step):
        sampler = OriginalOrderSampler(rows, 0, **step)
        assert len(list(sampler)) == len(sampler)
        return len(sampler)

    assert num_kept(9, batch_size=2) == 9  # a short batch is a micro-batch too
    assert num_kept(11, batch_size=2, accumulation_steps=3) == 11
    assert num_kept(13, batch_size=2, accumulation_steps=3) == 12
    assert num_kept(3, batch_size=2, accumulation_steps=3) == 3  # the only step of the epoch is taken
    assert num_kept(25, batch_size=2, num_processes=2, accumulation_steps=3) == 24

    def epochs(rows, **step):
        whole, cut = OriginalOrderSampler(rows, 0), OriginalOrderSampler(rows, 0, **step)
        orders = []
        for sampler in (whole, cut):
            orders.append([])
            for epoch in range(3):
                sampler.set_epoch(epoch)
                orders[-1] += list(sampler)
        return orders

    whole, cut = epochs(10, batch_size=2, accumulation_steps=2)
    assert cut == whole[:24]
    whole, cut = epochs(9, batch_size=2, accumulation_steps=2)  # the last micro-batch is a row too short to wait
    assert cut == whole[:8] + whole[9:17] + whole[18:26]


# ---------------------------------------------------------------------- what trains


def make_trainer(checkpoint, data, output_dir, train_type, **arguments):
    torch.manual_seed(0)
    processor = load_processor(str(checkpoint))
    model = load_model(str(checkpoint), processor)
    model = with_tuning(model, TuningArguments(train_type=train_type), str(checkpoint))
    defaults = {"max_steps": 4, "warmup_steps": 0, "weight_decay": 0.1, "learning_rate": 1e-2, "mm_projector_lr": 1e-3}
    quiet = {"save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "per_device_train_batch_size": 2}
    args = LlavaTrainingArguments(output_dir=str(output_dir), **(defaults | quiet | arguments))
    dataset = hf_llava_ft.load_llava_json(*data)
    return hf_llava_ft.LlavaTrainer(model=model, args=args, train_dataset=dataset, processing_class=processor)


TRAINED = {
    "projector": {PROJECTOR},
    "freeze_vision": {PROJECTOR, LANGUAGE_MODEL, LM_HEAD},
    "full": {PROJECTOR, LANGUAGE_MODEL, LM_HEAD, VISION_TOWER},
}


@pytest.mark.parametrize("train_type", TRAINED)
def test_exactly_the_named_parts_move(tiny_checkpoint, llava_json, tmp_path, train_type):
    trainer = make_trainer(tiny_checkpoint, llava_json(4, with_text_rows=True), tmp_path / "out", train_type)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, parameter in trainer.model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert {part_of(name) for name in moved} == TRAINED[train_type]
    # Whole parts, but for what the projector never sees of the tower: CLIP's last layer and its last normalisation.
    idle = {name for name in before if part_of(name) in TRAINED[train_type]} - moved
    places = {
        re.sub(r"^model\.vision_tower\.(vision_model\.)?((encoder\.layers\.\d+|\w+)).*", r"\2", name) for name in idle
    }
    assert places == ({"encoder.layers.2", "post_layernorm"} if train_type == "full" else set())


@pytest.mark.parametrize(("vision", "idle"), [("clip", {"post_layernorm"}), ("siglip", {"post_layernorm", "head"})])
@pytest.mark.parametrize("layer", [-1, -2, 1, [-3, 0]])
def test_the_idle_modules_of_a_tower_are_those_without_a_gradient(tiny, vision, idle, layer):
    model = tiny.model(vision=vision, vision_feature_layer=layer)
    batch = tiny.batch()
    model.train()(**batch).loss.backward()
    prefix = "model.vision_tower."
    without = {n for n, p in model.named_parameters() if n.startswith(prefix) and p.grad is None}
    modules = idle_tower_modules(model)
    named = {n for n, _ in model.named_parameters() if any(n.startswith(f"{module}.") for module in modules)}
    assert without == named
    last = {-1: 3, -2: 2, 1: 1}.get(layer if isinstance(layer, int) else 0, 1)
    assert {module.rpartition(".")[2] for module in modules} == idle | {str(k) for k in range(last, 3)}


@pytest.mark.parametrize("tie", [False, True])
def test_tied_embeddings_train_with_the_language_model_and_stay_with_the_projector(tiny, tie):
    model = tiny.model(tie=tie)
    with_tuning(model, TuningArguments(train_type="freeze_vision"), "base")
    assert model.lm_head.weight.requires_grad and model.get_input_embeddings().weight.requires_grad
    for arguments in (TuningArguments("projector"), TuningArguments("freeze_vision", freeze_backbone=True)):
        with_tuning(model, arguments, "base")
        assert not model.get_input_embeddings().weight.requires_grad
        assert model.lm_head.weight.requires_grad == (arguments.freeze_backbone and not tie)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"train_type": "lora", "freeze_backbone": True}, "freeze_backbone has no meaning with train_type lora"),
        ({"train_type": "projector", "freeze_backbone": True}, "no meaning with train_type projector"),
        ({"train_type": "projector", "freeze_mm_mlp_adapter": True}, "leaves train_type projector nothing to train"),
    ],
)
def test_freezing_what_does_not_train_or_all_that_does_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        TuningArguments(**arguments)
    flags = [part for name, value in arguments.items() for part in (f"--{name}", str(value))]
    with pytest.raises(UserError, match=message):
        parse_arguments(["--model_name_or_path", "m", "--data_path", "d", "--output_dir", "o", *flags])


@pytest.mark.parametrize("train_type", TRAINED)
def test_a_resumed_run_is_the_unbroken_run(tiny_checkpoint, llava_json, tmp_path, train_type):
    data = llava_json(6, with_text_rows=True)
    settings = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8, "sampler_order": "original"}
    settings |= {"loss_normalization": "micro_batch", "group_by_modality_length": True}
    whole = make_trainer(tiny_checkpoint, data, tmp_path / "out", train_type, **settings)
    whole.train()
    resumed = make_trainer(tiny_checkpoint, data, tmp_path / "out", train_type, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    curves = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (whole, resumed)]
    assert len(curves[0]) == 8 and curves[0] == curves[1]
    expected = dict(whole.model.named_parameters())
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, expected[name]), name


NATIVE = """
import sys, torch
from transformers import AutoProcessor, LlavaForConditionalGeneration
assert "hf_llava_ft" not in sys.modules
model, info = LlavaForConditionalGeneration.from_pretrained(sys.argv[1], output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info
AutoProcessor.from_pretrained(sys.argv[1])
print(model.model.multi_modal_projector.linear_1.weight.double().sum().item())
"""


def test_stage_1_from_the_command_line_leaves_one_folder_that_plain_transformers_and_stage_2_read(
    tiny_checkpoint, llava_json, tmp_path
):
    data, folder = llava_json(4)
    common = ["--data_path", str(data), "--image_folder", str(folder), "--max_steps", "2", "--use_cpu", "True"]
    common += ["--per_device_train_batch_size", "2", "--save_strategy", "no", "--warmup_steps", "0"]
    stages = [
        ("projector", tiny_checkpoint, tmp_path / "stage1"),
        ("freeze_vision", tmp_path / "stage1", tmp_path / "2"),
    ]
    for train_type, model, output_dir in stages:
        flags = ["--model_name_or_path", str(model), "--output_dir", str(output_dir), "--train_type", train_type]
        train_main([*flags, *common])
        assert not [path for path in output_dir.iterdir() if "partial" in path.name]
        config = json.loads((output_dir / "config.json").read_text())
        assert config["model_type"] == "llava" and config.get("use_cache", True)
        done = warm_python.run(["-c", NATIVE, str(output_dir)], cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    before, after = (load_file(path / "model.safetensors") for path in (tiny_checkpoint, tmp_path / "stage1"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and {part_of(name) for name in changed} == {PROJECTOR} and len(changed) == 4
