"""What the model promises beyond native LLaVA. Everything is compared with the plain computation."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    LlavaForConditionalGeneration,
)

import hf_llava_ft
from hf_llava_ft.modeling.modeling_llava import IGNORE_INDEX

SUPERVISED = 4  # tokens at the end of each row that the tests below supervise


def with_last_tokens_supervised(batch: dict) -> dict:
    """The batch with labels at the last tokens of each row only."""
    last = batch["attention_mask"].flip(1).cumsum(1).flip(1) <= SUPERVISED
    keep = last & batch["attention_mask"].bool() & (batch["input_ids"] != 1024)
    return {**batch, "labels": batch["input_ids"].masked_fill(~keep, IGNORE_INDEX)}


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


# ---------------------------------------------------------------------- parity


@pytest.mark.parametrize("text", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_native_llava_with_the_same_weights_gives_the_same_logits(tiny, tmp_path, text, vision):
    model = tiny.model(text, vision)
    model.save_pretrained(tmp_path)
    native = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    batch = tiny.batch()
    del batch["labels"]
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, native(**batch).logits, rtol=0, atol=1e-6)
        batch["pixel_values"] = batch["pixel_values"].flip(0)  # the images matter
        assert (model(**batch).logits - native(**tiny.batch()).logits).abs().max() > 1e-2


# ---------------------------------------------------------------------- loss


def test_images_and_padding_are_never_counted_in_the_loss(tiny):
    model, batch = tiny.model(), tiny.batch()
    keep = batch["attention_mask"].bool() & (batch["input_ids"] != 1024)
    masked = {**batch, "labels": batch["labels"].masked_fill(~keep, IGNORE_INDEX)}
    torch.testing.assert_close(model(**batch).loss, model(**masked).loss, rtol=0, atol=0)
    # What native LLaVA does with the same labels is another number.
    native = LlavaForConditionalGeneration(model.config.to_native()).eval()
    native.load_state_dict(model.state_dict())
    assert abs(native(**batch).loss.item() - model(**batch).loss.item()) > 1e-2


@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(11)])
def test_supervised_logits_only_gives_the_same_loss_and_gradients(tiny, num_items):
    model, batch = tiny.model().train(), with_last_tokens_supervised(tiny.batch())
    results = []
    for only in (False, True):
        model.zero_grad()
        outputs = model(**batch, supervised_logits_only=only, num_items_in_batch=num_items)
        outputs.loss.backward()
        results.append((outputs, gradients(model)))
    (full, full_gradients), (short, short_gradients) = results
    assert full.logits.shape == (*batch["input_ids"].shape, 1088)
    assert short.logits.shape == (3 * SUPERVISED, 1088)
    torch.testing.assert_close(full.loss, short.loss, rtol=1e-6, atol=0)
    for name, expected in full_gradients.items():
        torch.testing.assert_close(short_gradients[name], expected, rtol=1e-4, atol=1e-6)
    # Negative control: the comparison sees one label more.
    batch["labels"][1, 4] = batch["input_ids"][1, 4]
    assert abs(model(**batch, supervised_logits_only=True, num_items_in_batch=num_items).loss - full.loss) > 1e-4


# ---------------------------------------------------------------------- inputs


def test_a_wrong_number_of_placeholders_names_both_numbers(tiny):
    batch = tiny.batch()
    batch["input_ids"][0, 5] = 7
    with pytest.raises(ValueError, match=r"47 image placeholders, but 3 images give 48 features"):
        tiny.model()(**batch)


def test_placeholders_without_images_are_refused(tiny):
    batch = tiny.batch()
    del batch["pixel_values"]
    with pytest.raises(ValueError, match="48 image placeholders, but there are no pixel_values"):
        tiny.model()(**batch)


def test_padding_on_either_side_and_no_batch_give_the_same_logits(tiny):
    model = tiny.model()
    right, left = tiny.batch(), tiny.batch(padding_side="left")
    with torch.no_grad():
        right_logits, left_logits = model(**right).logits, model(**left).logits
        torch.testing.assert_close(
            right_logits[right["attention_mask"].bool()], left_logits[left["attention_mask"].bool()], rtol=0, atol=1e-5
        )
        row = right["input_ids"][1, : right["attention_mask"][1].sum()]
        alone = model(input_ids=row[None]).logits[0]
    torch.testing.assert_close(right_logits[1, : len(row)], alone, rtol=0, atol=1e-5)


def test_an_image_token_outside_the_embedding_is_allowed(tiny):
    inside, outside = tiny.model(), tiny.model(image_token_index=5000)
    outside.load_state_dict(inside.state_dict())
    with torch.no_grad():
        expected = inside(**tiny.batch()).loss
        torch.testing.assert_close(outside(**tiny.batch(image_token_id=5000)).loss, expected, rtol=0, atol=0)


def test_embeddings_can_be_passed_instead_of_ids(tiny):
    model, batch = tiny.model(), tiny.batch()
    del batch["labels"]
    expected = model(**batch).logits
    ids = batch.pop("input_ids")
    torch.testing.assert_close(model(inputs_embeds=model.get_input_embeddings()(ids), **batch).logits, expected)


# ---------------------------------------------------------------------- a batch without images


def text_only(batch: dict) -> dict:
    return {name: value[1:2] for name, value in batch.items() if name != "pixel_values"}


def test_a_text_batch_gives_training_vision_parts_a_zero_gradient(tiny):
    model, batch = tiny.model().train(), text_only(tiny.batch())
    loss = model(**batch).loss
    loss.backward()
    projector = list(model.model.multi_modal_projector.parameters())
    tower = [p for n, p in model.model.vision_tower.named_parameters() if "encoder.layers.0" in n]
    assert projector and tower
    for parameter in projector + tower:
        assert parameter.grad is not None and not parameter.grad.any()
    torch.testing.assert_close(loss, model.eval()(**batch).loss, rtol=0, atol=0)


def test_a_text_batch_does_not_run_frozen_vision_parts(tiny):
    model = tiny.model().train()
    model.model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(False)
    model.model.vision_tower.register_forward_hook(lambda *_: pytest.fail("the frozen tower ran"))
    model(**text_only(tiny.batch())).loss.backward()


def test_an_overflow_in_the_idle_tower_does_not_reach_the_loss(tiny):
    model = tiny.model().train()
    with torch.no_grad():
        model.model.multi_modal_projector.linear_2.bias.fill_(float("inf"))
    assert torch.isfinite(model(**text_only(tiny.batch())).loss)


# ---------------------------------------------------------------------- projectors


@pytest.mark.parametrize(
    ("projector_type", "names"),
    [
        ("linear", {"linear_1"}),
        ("mlp2x_gelu", {"linear_1", "linear_2"}),
        ("mlp3x_gelu", {"linear_1", "linear_2", "linear_3"}),
    ],
)
def test_projector_family(tiny, tmp_path, projector_type, names):
    model, batch = tiny.model(projector_type=projector_type), tiny.batch()
    assert {name for name, _ in model.model.multi_modal_projector.named_children()} - {"act"} == names
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path) if projector_type != "mlp2x_gelu" else None
    saved_type = json.loads((tmp_path / "config.json").read_text())["model_type"]
    assert saved_type == ("llava" if projector_type == "mlp2x_gelu" else "llava_llama")
    if reloaded is not None:
        torch.testing.assert_close(reloaded(**batch).logits, model(**batch).logits, rtol=0, atol=0)


def test_identity_projector_hands_the_features_on(tiny):
    config = tiny.config()
    config.vision_config.hidden_size = 64
    config.projector_type = "identity"
    model = hf_llava_ft.LlavaForCausalLM(config)
    features = torch.randn(2, 16, 64)
    assert model.model.multi_modal_projector(features) is features
    assert model(**tiny.batch()).logits.shape[-1] == 1088


def test_projector_errors_say_what_to_use(tiny):
    with pytest.raises(ValueError, match="identity.*32 and 64.*use 'linear'"):
        tiny.config(projector_type="identity")
    with pytest.raises(ValueError, match="unknown projector_type 'mlp0x_gelu'"):
        tiny.config(projector_type="mlp0x_gelu")


# ---------------------------------------------------------------------- generation and memory


def test_generation_in_a_left_padded_batch_is_that_of_each_row_alone(tiny):
    model, batch = tiny.model(), tiny.batch(padding_side="left")
    config = GenerationConfig(max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    together = model.generate(**inputs, generation_config=config)[:, batch["input_ids"].shape[1] :]
    images_of_row = ([0], [], [1, 2])
    for row, images in enumerate(images_of_row):
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()][None]
        alone = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if images:
            alone["pixel_values"] = batch["pixel_values"][images]
        for use_cache in (True, False):
            answer = model.generate(**alone, generation_config=config, use_cache=use_cache)[0, ids.shape[1] :]
            assert answer.tolist() == together[row].tolist()


def test_gradient_checkpointing_changes_no_gradient(tiny):
    model, batch = tiny.model().train(), tiny.batch()
    model(**batch).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(**batch, use_cache=False).loss.backward()
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0)


def test_the_unused_last_vision_layer_gets_no_gradient_and_the_others_do(tiny):
    model = tiny.model().train()
    model(**tiny.batch()).loss.backward()
    grads = gradients(model)
    assert not any("vision_tower.encoder.layers.2." in name or "post_layernorm" in name for name in grads)
    assert grads["model.vision_tower.encoder.layers.1.mlp.fc1.weight"].any()


def test_device_map_loads_the_same_model(tiny_checkpoint, tiny):
    plain = hf_llava_ft.LlavaForCausalLM.from_pretrained(tiny_checkpoint)
    mapped = hf_llava_ft.LlavaForCausalLM.from_pretrained(tiny_checkpoint, device_map="auto")
    with torch.no_grad():
        torch.testing.assert_close(mapped(**tiny.batch()).logits, plain(**tiny.batch()).logits, rtol=0, atol=0)


# ---------------------------------------------------------------------- saving and loading


@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_the_native_layout_is_that_of_llava_hf(tiny, tmp_path, vision):
    tiny.model(vision=vision).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "llava" and config["architectures"] == ["LlavaForConditionalGeneration"]
    assert "projector_type" not in config
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        prefixes = {name.split(".weight")[0].split(".bias")[0] for name in file.keys()}
    assert "language_model.model.embed_tokens" in prefixes and "language_model.lm_head" in prefixes
    assert "vision_tower.vision_model.embeddings.patch_embedding" in prefixes
    assert "multi_modal_projector.linear_2" in prefixes


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("projector_type", ["mlp2x_gelu", "linear"])
def test_every_weight_survives_saving_and_loading(tiny, tmp_path, tie, projector_type):
    model = tiny.model(tie=tie, projector_type=projector_type)
    model.save_pretrained(tmp_path)
    reloaded, info = hf_llava_ft.LlavaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    expected = model.state_dict()
    assert reloaded.state_dict().keys() == expected.keys()
    for name, tensor in reloaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert (reloaded.lm_head.weight is reloaded.get_input_embeddings().weight) == tie


def test_saving_leaves_the_model_as_it_was(tiny, tmp_path):
    model = tiny.model()
    model.save_pretrained(tmp_path)
    assert isinstance(model.config, hf_llava_ft.LlavaConfig) and model.config.model_type == "llava_llama"
    model(**tiny.batch())


def test_auto_classes_find_ours_and_native_ones_stay(tiny, tmp_path, tiny_checkpoint):
    tiny.model(projector_type="linear").save_pretrained(tmp_path)
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is hf_llava_ft.LlavaForCausalLM
    assert type(AutoModelForImageTextToText.from_pretrained(tmp_path)) is hf_llava_ft.LlavaForCausalLM
    assert type(AutoModel.from_pretrained(tmp_path)).__name__ == "LlavaBaseModel"
    assert type(AutoModelForImageTextToText.from_pretrained(tiny_checkpoint)) is LlavaForConditionalGeneration


def test_missing_weights_are_an_error_and_not_random(tiny, tmp_path):
    from safetensors.torch import save_file

    tiny.model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["multi_modal_projector.linear_2.bias"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match="no weights for 1 parameters of a LLaVA, model.multi_modal_projector.linear_2.bias"
    ):
        hf_llava_ft.LlavaForCausalLM.from_pretrained(tmp_path)


def test_a_tower_that_the_checkpoint_only_names_is_loaded(golden, tmp_path, monkeypatch):
    from safetensors.torch import save_file

    source = golden / "c_forward/mlp2x_patch/checkpoint"
    weights = {n: t for n, t in load_file(source / "model.safetensors").items() if "vision_tower" not in n}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    monkeypatch.chdir(golden)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = load_file(golden / "tiny-clip/model.safetensors")
    found = model.model.vision_tower.state_dict()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[f"vision_model.{name}"]), name


def test_a_model_that_is_no_llava_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="'bert' is not a LLaVA"):
        hf_llava_ft.LlavaConfig.from_pretrained(tmp_path)


def test_weights_that_have_no_place_are_an_error(tiny, tmp_path):
    from safetensors.torch import save_file

    tiny.model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors") | {"image_newline": torch.zeros(64)}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 weights that this LLaVA has no place for, .*image_newline"):
        hf_llava_ft.LlavaForCausalLM.from_pretrained(tmp_path)
