"""Every way to train moves exactly what it names, and what it leaves merges and loads."""

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import LlavaForConditionalGeneration, set_seed

import hf_llava_ft
from hf_llava_ft.checkpoints.opening import load_model, load_processor
from hf_llava_ft.checkpoints.original_folders import write_original_lora
from hf_llava_ft.errors import UserError
from hf_llava_ft.modeling.part_names_llava import PROJECTOR, VISION_TOWER, part_of
from hf_llava_ft.settings.arguments import TuningArguments
from hf_llava_ft.settings.training_arguments import LlavaTrainingArguments
from hf_llava_ft.train import main as train_main
from hf_llava_ft.training.tuning import learning_rate_of, trained_parts, with_tuning

LORA = {"train_type": "lora", "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0}


def tuned(tiny, vision="clip", **arguments):
    model = tiny.model(vision=vision)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return with_tuning(model, TuningArguments(**(LORA | arguments)), "base")


def moved_by_two_steps(model, tiny) -> set[str]:
    """Names of the parameters that AdamW changed. Two steps: LoRA's A has no gradient before B has moved."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    for _ in range(2):
        optimizer.zero_grad()
        model.train()(**tiny.batch()).loss.backward()
        optimizer.step()
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


def trainable(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"lora_bias": "all"},
        {"lora_bias": "lora_only"},
        {"use_dora": True},
        {"use_rslora": True},
        {"lora_target_modules": ["q_proj", "v_proj"]},
        {"lora_vision_tower": True},
        {"lora_vision_tower": True, "lora_bias": "lora_only"},
        {"freeze_mm_mlp_adapter": True},
    ],
)
def test_what_is_said_to_train_is_what_moves(tiny, arguments):
    model = tuned(tiny, **arguments)
    said = trainable(model)
    assert moved_by_two_steps(model, tiny) == said
    tower = {name for name in said if part_of(name) == VISION_TOWER}
    assert bool(tower) == bool(arguments.get("lora_vision_tower"))
    assert any(part_of(name) == PROJECTOR for name in said) != bool(arguments.get("freeze_mm_mlp_adapter"))


@pytest.mark.parametrize(("vision", "layers"), [("clip", {"0", "1"}), ("siglip", {"0", "1"})])
def test_lora_on_the_tower_leaves_out_the_layers_that_nothing_reads(tiny, vision, layers):
    names = [name for name in trainable(tuned(tiny, vision, lora_vision_tower=True)) if part_of(name) == VISION_TOWER]
    assert {name.split(".layers.")[1].split(".")[0] for name in names} == layers
    assert {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in names} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "out_proj",
        "fc1",
        "fc2",
    }


def test_target_modules_are_layers_of_the_language_model_alone(tiny):
    names = [name for name in trainable(tuned(tiny, lora_target_modules=["q_proj"])) if "lora_" in name]
    assert len(names) == 2 * 2 and all("language_model" in name and "q_proj" in name for name in names)
    with pytest.raises(
        UserError, match="--lora_target_modules out_proj: the language model has no linear layer .*q_pr"
    ):
        tuned(tiny, lora_target_modules=["out_proj"])


def test_rank_stabilised_lora_scales_by_the_root_of_the_rank(tiny):
    def scaling(**arguments):
        module = next(m for m in tuned(tiny, **arguments).modules() if isinstance(m, LoraLayer))
        return module.scaling["default"]

    assert scaling() == 8 / 4 and scaling(use_rslora=True) == 8 / 2


def test_the_table_shows_the_rate_of_each_part(tiny, tmp_path):
    args = LlavaTrainingArguments(
        output_dir=str(tmp_path), learning_rate=1e-4, mm_projector_lr=2e-5, mm_vision_tower_lr=3e-6, use_cpu=True
    )
    parts = trained_parts(tuned(tiny, train_type="full"))
    rates = {part.part: learning_rate_of(part, args) for part in parts}
    assert rates == {
        "vision_tower": "3e-06",
        "multi_modal_projector": "2e-05",
        "language_model": "0.0001",
        "lm_head": "0.0001",
    }


def trainer_of(tiny_checkpoint, llava_json, output_dir, tuning, **settings):
    set_seed(42)
    processor = load_processor(str(tiny_checkpoint))
    model = with_tuning(load_model(str(tiny_checkpoint), processor), TuningArguments(**tuning), str(tiny_checkpoint))
    settings = {"max_steps": 2, "per_device_train_batch_size": 2, "warmup_steps": 0, "save_strategy": "no"} | settings
    args = LlavaTrainingArguments(output_dir=str(output_dir), use_cpu=True, disable_tqdm=True, **settings)
    data = hf_llava_ft.load_llava_json(*llava_json(4))
    return hf_llava_ft.LlavaTrainer(model=model, args=args, train_dataset=data, processing_class=processor)


def test_projector_and_tower_have_learning_rates_of_their_own(tiny_checkpoint, llava_json, tmp_path):
    rates = {"learning_rate": 1e-3, "mm_projector_lr": 2e-4, "mm_vision_tower_lr": 3e-5}
    trainer = trainer_of(tiny_checkpoint, llava_json, tmp_path, {"train_type": "full"}, **rates)
    groups = trainer.create_optimizer().param_groups
    rate_of = {parameter: group["lr"] for group in groups for parameter in group["params"]}
    by_part = {}
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            by_part.setdefault(part_of(name), set()).add(rate_of[parameter])
    assert by_part == {
        "vision_tower": {3e-5},
        "multi_modal_projector": {2e-4},
        "language_model": {1e-3},
        "lm_head": {1e-3},
    }


def test_neftune_is_noise_on_the_embeddings_while_training(tiny_checkpoint, llava_json, tmp_path):
    def losses(**settings):
        trainer = trainer_of(tiny_checkpoint, llava_json, tmp_path, LORA, **settings)
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    plain, again, noisy = losses(), losses(), losses(neftune_noise_alpha=50.0)
    assert plain == again and plain[0] != noisy[0]


@pytest.mark.parametrize(
    "flags",
    [
        ["--lora_bias", "all"],
        ["--use_dora", "True"],
        ["--use_rslora", "True"],
        ["--lora_vision_tower", "True", "--mm_vision_tower_lr", "1e-3"],
        ["--lora_target_modules", "q_proj", "v_proj"],
        ["--freeze_mm_mlp_adapter", "True", "--train_type", "lora"],
    ],
)
def test_an_adapter_of_each_kind_loads_by_peft_alone_and_merges(tiny_checkpoint, llava_json, tmp_path, flags):
    data, images = llava_json(4)
    paths = {"model_name_or_path": tiny_checkpoint, "data_path": data, "image_folder": images}
    common = [word for name, value in paths.items() for word in (f"--{name}", str(value))]
    common += ["--output_dir", str(tmp_path / "out"), "--use_cpu", "True", "--max_steps", "2", "--lora_r", "4"]
    train_main([*common, "--learning_rate", "1e-2", "--warmup_steps", "0", "--save_strategy", "no", *flags])
    native = LlavaForConditionalGeneration.from_pretrained(tiny_checkpoint).eval()
    batch = {"pixel_values": torch.randn(1, 3, 56, 56), "input_ids": torch.tensor([[1, *[1024] * 16, 5, 9]])}
    with torch.no_grad():
        base = native(**batch).logits
        adapted = PeftModel.from_pretrained(native, str(tmp_path / "out"))(**batch).logits
        ours = load_model(str(tmp_path / "out"))(**batch).logits
        merged = load_model(str(tmp_path / "out")).merge_and_unload()(**batch).logits
    assert not torch.allclose(adapted, base, atol=1e-3)
    torch.testing.assert_close(ours, adapted, rtol=0, atol=1e-5)
    torch.testing.assert_close(merged, adapted, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"use_rslora": True}, "rank-stabilised LoRA"),
        ({"lora_vision_tower": True}, "LoRA on the vision tower"),
    ],
)
def test_what_the_originals_folder_cannot_hold_is_not_written_into_one(tiny, tmp_path, arguments, kind):
    with pytest.raises(UserError, match=f"has no {kind}: merge the adapter"):
        write_original_lora(tuned(tiny, **arguments), "base", tmp_path)
    assert not list(tmp_path.iterdir())
