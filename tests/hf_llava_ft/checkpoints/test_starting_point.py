"""The original's two stages from a language model and a tower, in its own words; flags that describe a model."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

import hf_llava_ft
from hf_llava_ft.checkpoints.merge import merge_adapter
from hf_llava_ft.checkpoints.starting.starting_point import check_starting_point, read_projector_of
from hf_llava_ft.errors import UserError
from hf_llava_ft.modeling.weight_names_llava import name_in_memory
from hf_llava_ft.settings.arguments import ModelArguments, TuningArguments
from hf_llava_ft.train import main as train_main

# Of scripts/v1_5/pretrain.sh and finetune.sh, without what a CPU does not have.
SCRIPT = """
    --mm_projector_type mlp2x_gelu --mm_vision_select_layer -2 --mm_use_im_start_end False
    --mm_use_im_patch_token False --num_train_epochs 1 --per_device_train_batch_size 2 --evaluation_strategy no
    --save_strategy no --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine --logging_steps 1
    --model_max_length 400 --gradient_checkpointing True --lazy_preprocess True --no_cuda True
"""


@pytest.fixture
def script(golden, llava_json, tmp_path):
    """A function that trains as a script of the original says, starting from the bare language model."""
    data, images = llava_json(4)

    def run(output_dir, *flags, model=golden / "tiny-llama", tower=golden / "tiny-clip", unsaid=""):
        paths = {"model_name_or_path": model, "vision_tower": tower, "data_path": data, "image_folder": images}
        named = [word for name, value in paths.items() if value for word in (f"--{name}", str(value))]
        train_main(
            [*named, *SCRIPT.replace(unsaid, "").split(), "--output_dir", str(tmp_path / output_dir), *map(str, flags)]
        )
        return tmp_path / output_dir

    return run


def projector_of(folder):
    weights = {name_in_memory(name): value for name, value in load_file(folder / "model.safetensors").items()}
    return {name: value for name, value in weights.items() if "multi_modal_projector" in name}


def test_both_stages_without_touching_a_file_name(script, golden, tmp_path):
    stage_1 = script("stage1", "--tune_mm_mlp_adapter", True, "--version", "plain", "--learning_rate", "1e-3")
    config = json.loads((stage_1 / "config.json").read_text())
    assert config["model_type"] == "llava" and not (stage_1 / "composed").exists()
    bin_of_the_original = stage_1 / "mm_projector.bin"  # as finetune.sh names it; here the projector is in the model
    assert not bin_of_the_original.exists()

    more = ["--version", "v1", "--image_aspect_ratio", "pad", "--pretrain_mm_mlp_adapter", bin_of_the_original]
    stage_2 = script("stage2", *more, "--learning_rate", "2e-5")
    model, info = LlavaForConditionalGeneration.from_pretrained(stage_2, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not (stage_2 / "composed").exists()
    # Two steps of 2e-5 from where stage 1 ended, which is far from where it began.
    trained, ended = projector_of(stage_2), projector_of(stage_1)
    for name, value in ended.items():
        torch.testing.assert_close(trained[name], value, rtol=0, atol=1e-4)
        assert not torch.equal(trained[name], value)
    # The tower is the one that was named, and stayed.
    tower = load_file(golden / "tiny-clip/model.safetensors")
    assert all(
        torch.equal(value, tower[name if name in tower else f"vision_model.{name}"])
        for name, value in model.model.vision_tower.state_dict().items()
    )

    adapter = script("lora", *more, "--lora_enable", True, "--lora_r", 4, "--learning_rate", "2e-4")
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        adapter / "composed"
    )
    base = projector_of(adapter / "composed")
    assert all(torch.equal(base[name], value) for name, value in ended.items())
    assert merge_adapter(adapter, tmp_path / "merged").verification.ok


@pytest.mark.parametrize("train_type", ["freeze_vision", pytest.param("lora", marks=pytest.mark.slow)])
def test_the_tokens_around_an_image_survive_training(script, tmp_path, monkeypatch, train_type):
    trained = []
    save = hf_llava_ft.LlavaTrainer.save_model

    def remembered(self, *args, **kwargs):
        names = ("embed_tokens.weight", "lm_head.weight")
        trained.extend(w.detach().clone() for n, w in self.model.named_parameters() if n.endswith(names))
        save(self, *args, **kwargs)

    monkeypatch.setattr(hf_llava_ft.LlavaTrainer, "save_model", remembered)
    flags = ["--mm_use_im_start_end", True, "--version", "v1", "--learning_rate", "1e-2"]
    lora = ["--lora_enable", True, "--lora_r", 4] if train_type == "lora" else []
    folder = script("out", *flags, *lora, unsaid="--mm_use_im_start_end False")
    if lora:
        verified = merge_adapter(folder, tmp_path / "merged").verification
        assert verified is not None and verified.ok
    for place in [folder, tmp_path / "merged"] if lora else [folder]:
        processor = hf_llava_ft.load_processor(str(place))
        start, end = ids = processor.tokenizer.convert_tokens_to_ids(["<im_start>", "<im_end>"])
        text = processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
        )
        assert "<im_start><image><im_end>" in text
        assert [each for each in processor.tokenizer(text)["input_ids"] if each in ids] == [start, end]
        model = hf_llava_ft.load_model(str(place), processor)
        found = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        for rows, expected in zip(found, trained, strict=True):
            assert torch.equal(rows[ids], expected[ids])
        # Both begin as the same mean; only training can tell them apart.
        assert torch.equal(found[0][start], found[0][end]) == bool(lora)


def test_what_nobody_says_is_a_linear_projector_over_the_last_layer_as_in_the_original(script):
    unsaid = "--mm_projector_type mlp2x_gelu --mm_vision_select_layer -2"
    folder = script("stage1", "--tune_mm_mlp_adapter", True, "--version", "plain", unsaid=unsaid)
    config = hf_llava_ft.LlavaConfig.from_pretrained(folder)
    assert (config.projector_type, config.vision_feature_layer) == ("linear", -1)


def test_stage_1_goes_on_from_its_checkpoint_without_being_asked_as_in_the_original(script):
    flags = ["--tune_mm_mlp_adapter", True, "--version", "plain", "--save_strategy", "steps", "--save_steps", 1]
    flags += ["--num_train_epochs", 2, "--learning_rate", "1e-2", "--save_total_limit", 9]
    whole, broken = script("whole", *flags), script("broken", *flags)
    # As if the process had ended after step 2 of 4.
    for path in [*broken.glob("checkpoint-[34]"), broken / "model.safetensors"]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    first = broken / "checkpoint-1/trainer_state.json"
    before = first.stat().st_mtime_ns
    script("broken", *flags)
    assert first.stat().st_mtime_ns == before  # a run from the beginning would have written it again
    log = json.loads((broken / "trainer_state.json").read_text())["log_history"]
    assert len([entry for entry in log if "loss" in entry]) == 4
    for name, value in projector_of(whole).items():
        assert torch.equal(projector_of(broken)[name], value)
    # A run from the beginning puts what is there aside.
    script("broken", *flags, "--resume_from_checkpoint", False, "--overwrite_output_dir", True)
    assert first.stat().st_mtime_ns != before


def test_a_composed_model_is_used_again_only_if_it_is_the_same(script, tmp_path):
    flags = ["--lora_enable", True, "--lora_r", 4, "--version", "v1"]
    folder = script("lora", *flags)
    before = (folder / "composed/model.safetensors").stat().st_mtime_ns
    script("lora", *flags)
    assert (folder / "composed/model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(SystemExit):
        script("lora", *flags, "--seed", 7)
    assert (folder / "composed/model.safetensors").stat().st_mtime_ns == before


def test_a_projector_for_a_llava_that_is_there(script, tiny, tiny_checkpoint, tmp_path):
    other = tiny.model()
    weights = {
        name: torch.randn_like(value) * 0.1 for name, value in other.state_dict().items() if "projector" in name
    }
    # As the original names them.
    torch.save(
        {
            name.replace("multi_modal_projector.linear_1", "mm_projector.0").replace(
                "multi_modal_projector.linear_2", "mm_projector.2"
            ): value
            for name, value in weights.items()
        },
        tmp_path / "mm_projector.bin",
    )
    flags = ["--pretrain_mm_mlp_adapter", tmp_path / "mm_projector.bin", "--learning_rate", "1e-9", "--version", "v1"]
    folder = script("out", *flags, model=tiny_checkpoint, tower=None)
    for name, value in projector_of(folder).items():
        torch.testing.assert_close(value, weights[name], rtol=0, atol=1e-6)


def arguments(model, **fields):
    return ModelArguments(model_name_or_path=str(model), **fields)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"mm_projector_type": "linear"}, "--mm_projector_type linear: in .* it is mlp2x_gelu"),
        ({"mm_vision_select_layer": -1}, "--mm_vision_select_layer -1: in .* it is -2"),
        ({"mm_vision_select_feature": "cls_patch"}, "it is patch"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "it is flat"),
        ({"image_grid_pinpoints": "[(336, 672)]"}, "it is None"),
        ({"image_grid_pinpoints": "many"}, "is not a list of sizes"),
    ],
)
def test_a_flag_that_contradicts_the_model_is_refused(tiny_checkpoint, fields, sentence):
    with pytest.raises(UserError, match=sentence):
        check_starting_point(arguments(tiny_checkpoint, **fields), TuningArguments())


def test_a_flag_that_agrees_with_the_model_is_fine(tiny_checkpoint, tiny, tmp_path):
    tiny.config().vision_config.save_pretrained(tmp_path / "same")
    agreeing = {
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "flat",
        "vision_tower": str(tmp_path / "same"),
    }
    assert check_starting_point(arguments(tiny_checkpoint, **agreeing), TuningArguments()) is False
    larger = tiny.config().vision_config
    larger.image_size = 112
    larger.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="has another one, which no flag can change"):
        check_starting_point(arguments(tiny_checkpoint, vision_tower=str(tmp_path / "other")), TuningArguments())


def test_a_default_of_the_originals_contradicts_nothing(tiny_checkpoint):
    model_args = arguments(tiny_checkpoint, mm_projector_type="linear", mm_vision_select_layer=-1)
    model_args.assumed = frozenset(("mm_projector_type", "mm_vision_select_layer"))
    assert check_starting_point(model_args, TuningArguments()) is False


@pytest.mark.parametrize(
    ("fields", "train_type", "sentence"),
    [
        ({}, "lora", "is a language model without a vision tower: add --vision_tower"),
        ({"vision_tower": "t", "image_aspect_ratio": "anyres"}, "lora", "start from a LLaVA-1.6"),
        ({"vision_tower": "t", "mm_use_im_start_end": True}, "projector", "leave it out in stage 1"),
    ],
)
def test_what_a_language_model_cannot_become(golden, fields, train_type, sentence):
    with pytest.raises(UserError, match=sentence):
        check_starting_point(arguments(golden / "tiny-llama", **fields), TuningArguments(train_type=train_type))


def test_a_tower_that_is_none_leaves_nothing(script, golden, capsys, tmp_path):
    with pytest.raises(SystemExit) as exited:
        script("out", "--lora_enable", True, tower=golden / "tiny-llama")
    assert exited.value.code == 2 and "not a vision tower" in capsys.readouterr().err
    assert not [path for path in tmp_path.rglob("*") if "composed" in path.name]


def test_projectors_that_are_none(tmp_path, tiny_checkpoint):
    with pytest.raises(UserError, match="there is no projector; give the original's mm_projector.bin"):
        read_projector_of(str(tmp_path / "mm_projector.bin"))
    (tmp_path / "mm_projector.bin").write_bytes(b"no weights")
    with pytest.raises(UserError, match="is not a readable weights file"):
        read_projector_of(str(tmp_path))
    tensors = {"model.mm_projector.0.weight": torch.zeros(2, 2), "model.embed_tokens.weight": torch.zeros(2, 2)}
    torch.save(tensors, tmp_path / "mm_projector.bin")
    with pytest.raises(UserError, match="holds more than a projector, .*embed_tokens"):
        read_projector_of(str(tmp_path))
    assert set(read_projector_of(str(tiny_checkpoint))) == set(projector_of(tiny_checkpoint))


def test_a_projector_of_another_width(script, tmp_path, capsys, tiny_checkpoint):
    save_file({"multi_modal_projector.linear_1.weight": torch.zeros(3, 3)}, tmp_path / "other.safetensors")
    with pytest.raises(SystemExit):
        script("out", "--pretrain_mm_mlp_adapter", tmp_path / "other.safetensors", "--lora_enable", True)
    assert "the projector does not fit the model: its weights are linear_1.weight [3, 3]" in capsys.readouterr().err
