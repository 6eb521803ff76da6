"""LLaVA-1.6 through the whole package: both dialects, training, merging, and what is refused."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor
from transformers.models.llava_next.modeling_llava_next import LlavaNextForConditionalGeneration

import hf_llava_ft
from hf_llava_ft.checkpoints.convert import convert
from hf_llava_ft.checkpoints.merge import merge_adapter
from hf_llava_ft.checkpoints.opening import load_model, load_processor
from hf_llava_ft.errors import UserError
from hf_llava_ft.processing.processing_llava import LlavaNextProcessor, LlavaProcessor
from hf_llava_ft.processing.tokenizer_llava import load_tokenizer
from hf_llava_ft.train import parse_arguments, train

PINPOINTS = [[112, 56], [56, 112], [112, 112], [56, 168], [168, 56]]


def next_config(tiny, merge_type: str = "spatial_unpad", **fields):
    return tiny.config(
        image_aspect_ratio="anyres", patch_merge_type=merge_type, image_grid_pinpoints=PINPOINTS, **fields
    )


@pytest.fixture(scope="module")
def native_folder(tiny, golden, tmp_path_factory):
    """A whole native `llava_next` folder, model and processor."""
    folder = tmp_path_factory.mktemp("next") / "native"
    model = tiny.model(image_aspect_ratio="anyres", patch_merge_type="spatial_unpad", image_grid_pinpoints=PINPOINTS)
    processor = LlavaProcessor.build(
        load_tokenizer(golden / "tokenizer_tiny"),
        model.config.vision_config,
        version="v1",
        image_aspect_ratio="anyres",
        image_grid_pinpoints=PINPOINTS,
    )
    model.generation_config.eos_token_id = [2]
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def original_folder(golden, tmp_path_factory):
    """The original's checkpoint with its tower inside and its tokenizer."""
    import shutil

    folder = tmp_path_factory.mktemp("next") / "original"
    shutil.copytree(golden / "c_forward/anyres_spatial_unpad/checkpoint", folder)
    config = json.loads((folder / "config.json").read_text())
    config["mm_vision_tower"] = str(golden / "tiny-clip")
    (folder / "config.json").write_text(json.dumps(config))
    for path in (golden / "tokenizer_tiny").iterdir():
        shutil.copyfile(path, folder / path.name)
    return folder


def batch_of(processor, *sizes) -> dict:
    """Rows of one picture each, of `(width, height)`, and one of text alone."""
    rows = []
    for size in (*sizes, None):
        question = [{"type": "text", "text": "What is it?"}]
        content = question if size is None else [{"type": "image", "text": None}, *question]
        turns = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        ]
        pictures = [] if size is None else [Image.linear_gradient("L").resize(size).convert("RGB")]
        rows.append(processor.encode_conversation(turns, pictures))
    return processor.pad(rows)


def test_transformers_own_class_gives_the_same_loss_logits_and_answer(native_folder):
    config = json.loads((native_folder / "config.json").read_text())
    assert config["model_type"] == "llava_next" and config["architectures"] == ["LlavaNextForConditionalGeneration"]
    assert not {"projector_type", "patch_merge_type", "image_aspect_ratio"} & set(config)
    native = AutoModelForImageTextToText.from_pretrained(native_folder)
    assert type(native) is LlavaNextForConditionalGeneration
    ours, processor = load_model(str(native_folder)), load_processor(str(native_folder))
    assert isinstance(processor, LlavaNextProcessor)
    batch = batch_of(processor, (150, 60), (45, 130), (56, 56))
    with torch.no_grad():
        theirs = native(**{name: value for name, value in batch.items() if name != "labels"}).logits
        found = ours(**batch)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(found.logits[real], theirs[real], rtol=0, atol=1e-5)
    prompt = {name: value[:1] for name, value in batch_of(processor, (150, 60)).items() if name != "labels"}
    prompt["pixel_values"] = batch_of(processor, (150, 60))["pixel_values"]
    answers = [model.generate(**prompt, do_sample=False, max_new_tokens=8) for model in (ours, native)]
    assert torch.equal(*answers)


def test_the_padded_form_of_the_pixels_is_the_same(native_folder):
    model, processor = load_model(str(native_folder)), load_processor(str(native_folder))
    pictures = [Image.linear_gradient("L").resize(size).convert("RGB") for size in ((150, 60), (90, 90))]
    encoded, padded = processor.encode_images(pictures), processor.image_processor(pictures, return_tensors="pt")
    assert padded["pixel_values"].dim() == 5 and encoded["pixel_values"].dim() == 4
    with torch.no_grad():
        ours = model.get_image_features(**encoded, return_dict=True).pooler_output
        theirs = model.get_image_features(**padded, return_dict=True).pooler_output
    assert len(ours) == 2 and all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))
    with pytest.raises(ValueError, match="have 9 crops, and pixel_values holds 8"):
        model.get_image_features(**{**encoded, "pixel_values": encoded["pixel_values"][1:]})


def test_folders_of_transformers_4_load(native_folder, tmp_path):
    """They name `image_newline` without a prefix, as those of llava-hf on the Hub do."""
    import shutil

    shutil.copytree(native_folder, tmp_path / "old")
    weights = load_file(native_folder / "model.safetensors")
    assert "image_newline" in weights and "language_model.model.norm.weight" in weights
    newer = {name.replace("image_newline", "model.image_newline"): tensor for name, tensor in weights.items()}
    save_file(newer, tmp_path / "old" / "model.safetensors", metadata={"format": "pt"})
    one, other = load_model(str(native_folder)), load_model(str(tmp_path / "old"))
    assert torch.equal(one.model.image_newline, other.model.image_newline)


def test_the_original_comes_in_and_goes_out_bit_for_bit(original_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(original_folder)
    assert model.config.native_model_type == "llava_next"
    assert model.config.image_grid_pinpoints[0] == [112, 56]  # 56 wide and 112 high in the original
    model.save_pretrained(tmp_path)
    before, after = load_file(original_folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (original_folder, tmp_path)]
    assert configs[0]["image_grid_pinpoints"] == configs[1]["image_grid_pinpoints"]
    assert configs[0]["mm_patch_merge_type"] == configs[1]["mm_patch_merge_type"] == "spatial_unpad"
    assert isinstance(AutoProcessor.from_pretrained(original_folder), LlavaNextProcessor)


def test_pinpoints_written_as_text_are_read(original_folder):
    config = json.loads((original_folder / "config.json").read_text())
    config["image_grid_pinpoints"] = "[(56, 112), (112, 112)]"
    assert hf_llava_ft.LlavaConfig.from_dict(config).image_grid_pinpoints == [[112, 56], [112, 112]]


def test_conversion_both_ways_is_verified(original_folder, native_folder, golden, tmp_path):
    converted = convert(str(original_folder), tmp_path / "hf", "llava-hf")
    assert converted.verification.ok
    assert json.loads((tmp_path / "hf/config.json").read_text())["model_type"] == "llava_next"
    native = AutoModelForImageTextToText.from_pretrained(tmp_path / "hf")
    assert type(native) is LlavaNextForConditionalGeneration
    assert type(AutoProcessor.from_pretrained(tmp_path / "hf")).__name__ == "LlavaNextProcessor"
    back = convert(str(tmp_path / "hf"), tmp_path / "original", "llava", vision_tower=str(golden / "tiny-clip"))
    assert back.verification.ok
    config = json.loads((tmp_path / "original/config.json").read_text())
    assert config["image_aspect_ratio"] == "anyres" and config["mm_patch_merge_type"] == "spatial_unpad"
    assert config["image_grid_pinpoints"][0] == [56, 112]
    weights = [load_file(folder / "model.safetensors") for folder in (original_folder, tmp_path / "original")]
    assert torch.equal(weights[0]["model.image_newline"], weights[1]["model.image_newline"])


def run(model, llava_json, output_dir, *flags) -> tuple:
    data, images = llava_json(6, with_text_rows=True)
    arguments = [
        *("--model_name_or_path", str(model), "--data_path", str(data), "--image_folder", str(images)),
        *("--output_dir", str(output_dir), "--per_device_train_batch_size", "2", "--max_steps", "3"),
        *("--logging_steps", "1", "--use_cpu", "True", "--save_strategy", "no", "--learning_rate", "1e-2", *flags),
    ]
    return train(*parse_arguments(arguments))


@pytest.mark.parametrize("train_type", ["lora", "projector", "full"])
def test_it_trains_on_its_crops(native_folder, llava_json, tmp_path, train_type):
    result = run(native_folder, llava_json, tmp_path / "out", "--train_type", train_type)
    assert len(result.losses) == 3 and result.losses[-1] < result.losses[0]
    before = load_model(str(native_folder)).model.image_newline
    trained = load_model(str(tmp_path / "out"))
    after = (trained.get_base_model() if train_type == "lora" else trained).model.image_newline
    assert torch.equal(before, after) == (train_type != "full")  # as in the original, it trains with the whole only
    assert isinstance(load_processor(str(tmp_path / "out")), LlavaNextProcessor)
    if train_type == "lora":
        merged = merge_adapter(str(tmp_path / "out"), tmp_path / "merged")
        assert merged.verification.ok
        native = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
        assert type(native) is LlavaNextForConditionalGeneration


def test_the_aspect_ratio_of_the_other_kind_is_refused(native_folder, tiny_checkpoint, llava_json, tmp_path):
    with pytest.raises(UserError, match="LLaVA-1.6, which sees several crops of a picture; .* or use anyres"):
        run(native_folder, llava_json, tmp_path / "out", "--image_aspect_ratio", "pad")
    with pytest.raises(UserError, match="LLaVA-1.5, which sees one; .* or use pad or square"):
        run(tiny_checkpoint, llava_json, tmp_path / "out", "--image_aspect_ratio", "anyres")
    assert not (tmp_path / "out").exists()


def test_a_text_batch_gives_the_newline_a_zero_gradient(native_folder):
    model, processor = load_model(str(native_folder)), load_processor(str(native_folder))
    model.train()(**batch_of(processor)).loss.backward()
    gradient = model.model.image_newline.grad
    assert gradient is not None and not gradient.any()


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"image_grid_pinpoints": None}, "needs image_grid_pinpoints"),
        ({"image_grid_pinpoints": [[100, 56]]}, "multiples of the tower's 56 pixels"),
        ({"vision_feature_select_strategy": "full"}, "class token has no place"),
    ],
)
def test_settings_that_cannot_work_are_refused(tiny, fields, sentence):
    config = next_config(tiny).to_dict()
    with pytest.raises(ValueError, match=sentence):
        hf_llava_ft.LlavaConfig.from_dict({**config, **fields})


@pytest.mark.parametrize("merge_type", ["flat", "spatial"])
def test_what_llava_next_cannot_express_says_so(tiny, merge_type):
    config = next_config(tiny, merge_type)
    assert not config.is_native
    with pytest.raises(ValueError, match="only 'spatial_unpad' with 'anyres'"):
        config.to_native()
