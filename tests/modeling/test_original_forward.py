"""The original's checkpoints give the original's figures: sequence, loss, logits, gradients and greedy answers."""

import json
import math
from itertools import islice

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_llava_ft.modeling.anyres_llava import num_crops
from hf_llava_ft.modeling.modeling_llava import IGNORE_INDEX
from hf_llava_ft.processing.picture_opening_llava import as_rgb
from hf_llava_ft.processing.processing_llava import LlavaProcessor
from hf_llava_ft.processing.tokenizer_llava import load_tokenizer

BATCHES = {
    "mlp2x_patch": "single mixed_right image_and_text text_only_dummy two_images_one_sample truncated "
    "truncated_mid_answer truncated_in_image left_pad list_images no_attention_mask text_only_images_none",
    "anyres_spatial_unpad": "unpad_mixed unpad_5d_same_grid unpad_with_text_dummy_single_crop spatial_no_unpad "
    "flat_5crop unpad_truncated unpad_thin",
}
CASES = [(variant, name) for variant, names in BATCHES.items() for name in names.split()]
# Cut within an image: there are more features than places for them, which ours refuses. The sequence is compared as
# embeddings then.
CUT_IN_IMAGE = {"truncated_in_image", "unpad_truncated"}
GRADIENTS = {
    "model.image_newline": "model.image_newline",
    "model.mm_projector.0.weight": "model.multi_modal_projector.linear_1.weight",
    "model.mm_projector.0.bias": "model.multi_modal_projector.linear_1.bias",
    "model.mm_projector.2.weight": "model.multi_modal_projector.linear_2.weight",
    "model.mm_projector.2.bias": "model.multi_modal_projector.linear_2.bias",
    "model.layers.0.self_attn.q_proj.weight": "model.language_model.layers.0.self_attn.q_proj.weight",
    "model.layers.1.self_attn.k_proj.weight": "model.language_model.layers.1.self_attn.k_proj.weight",
    "model.layers.1.mlp.down_proj.weight": "model.language_model.layers.1.mlp.down_proj.weight",
    "model.norm.weight": "model.language_model.norm.weight",
}
GRADIENT_ROW_SUMS = {
    "lm_head.weight": "lm_head.weight",
    "model.embed_tokens.weight": "model.language_model.embed_tokens.weight",
}


@pytest.fixture(scope="module")
def models(golden):
    """A function that gives the model of a variant, with the settings that a batch was recorded under."""
    loaded = {}

    def model(variant: str, overrides: dict | None = None):
        if variant not in loaded:
            loaded[variant] = AutoModelForCausalLM.from_pretrained(f"c_forward/{variant}/checkpoint")
        default = "spatial_unpad" if variant.startswith("anyres") else "flat"
        loaded[variant].config.patch_merge_type = (overrides or {}).get("mm_patch_merge_type", default)
        return loaded[variant]

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(golden)  # the checkpoints name their tower relative to this folder
        yield model


@pytest.fixture(scope="module")
def pictures(golden) -> dict[str, torch.Tensor]:
    return load_file(golden / "c_forward/images.safetensors")


def processor_for(model, golden) -> LlavaProcessor:
    config = model.config
    return LlavaProcessor.build(
        load_tokenizer(golden / "tokenizer_tiny"),
        config.vision_config,
        image_aspect_ratio=config.image_aspect_ratio,
        image_grid_pinpoints=config.image_grid_pinpoints,
        patch_merge_type=config.patch_merge_type,
    )


def original_batch(model, golden, pictures, variant: str, name: str):
    """A batch of the original, with one -200 per image, as ours has it: as many placeholders as the processor says."""
    stored = load_file(golden / f"c_forward/{variant}/{name}.safetensors")
    meta = json.loads((golden / "c_forward/batches.json").read_text())[variant][name]
    processor = processor_for(model, golden)
    is_anyres = variant.startswith("anyres")
    keys = (meta["images"] or {"keys": []})["keys"]
    given = iter(zip(keys, meta["image_sizes_wh"] or [None] * len(keys), strict=True))
    rows, used = [], []
    for index, ids in enumerate(stored["in.input_ids"].tolist()):
        attend = stored["in.attention_mask"][index].tolist() if "in.attention_mask" in stored else [1] * len(ids)
        # The original feeds a row without an image a picture that it then does not use.
        num_images = ids.count(-200)
        own = list(islice(given, max(num_images, 1)))[:num_images]
        used += own
        counts = iter(
            [processor.num_image_tokens_at(size[1], size[0]) if is_anyres else 16 for _, size in own]  # type: ignore
        )
        row_ids, row_labels = [], []
        for token, label, attended in zip(ids, stored["in.labels"][index].tolist(), attend, strict=True):
            if attended:
                count = next(counts) if token == -200 else 1
                row_ids += [model.config.image_token_id if token == -200 else token] * count
                row_labels += [label] * count
        limit = meta["config_overrides"].get("tokenizer_model_max_length")
        rows.append((row_ids[:limit], row_labels[:limit]))
    length = max(len(ids) for ids, _ in rows)
    left = name == "left_pad"

    def padded(values, fill):
        return [fill] * (length - len(values)) + values if left else values + [fill] * (length - len(values))

    batch = {
        "input_ids": torch.tensor([padded(ids, 0) for ids, _ in rows]),
        "labels": torch.tensor([padded(labels, IGNORE_INDEX) for _, labels in rows]),
        "attention_mask": torch.tensor([padded([1] * len(ids), 0) for ids, _ in rows]),
    }
    if used:
        batch["pixel_values"] = torch.cat([pictures[key].reshape(-1, 3, 56, 56) for key, _ in used])
    if used and is_anyres:
        batch["image_sizes"] = torch.tensor([[height, width] for _, (width, height) in used])
    return batch, stored, meta


def with_embeddings(model, batch: dict) -> dict:
    """The batch with features in the places of the placeholders as far as there are any, image by image."""
    batch = dict(batch)
    ids, pixels, sizes = batch.pop("input_ids"), batch.pop("pixel_values"), batch.pop("image_sizes", None)
    features = iter(model.get_image_features(pixel_values=pixels, image_sizes=sizes, return_dict=True).pooler_output)
    is_image = ids == model.config.image_token_id
    embeddings = model.get_input_embeddings()(ids.masked_fill(is_image, 0)).clone()
    for row, places in enumerate(is_image):
        runs = places.nonzero().squeeze(-1).tolist()
        start = 0
        for index, position in enumerate(runs):
            if index + 1 == len(runs) or runs[index + 1] != position + 1:
                count = index + 1 - start
                embeddings[row, runs[start] : position + 1] = next(features)[:count]
                start = index + 1
    return {**batch, "inputs_embeds": embeddings}


@pytest.mark.parametrize(("variant", "name"), CASES)
def test_the_originals_sequence_loss_logits_and_gradients(models, golden, pictures, variant, name):
    overrides = json.loads((golden / "c_forward/batches.json").read_text())[variant][name]["config_overrides"]
    model = models(variant, overrides)
    batch, stored, meta = original_batch(model, golden, pictures, variant, name)
    if name in CUT_IN_IMAGE:
        with pytest.raises(ValueError, match="image placeholders"):
            model(**batch)
        batch = with_embeddings(model, batch)
    real = batch["attention_mask"].bool()
    if "mm.labels" in stored:
        assert torch.equal(batch["labels"][real], stored["mm.labels"][real])
    seen = {}
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    model.zero_grad()
    outputs = model.train()(**batch)
    handle.remove()
    if "mm.inputs_embeds" in stored:
        close(seen["inputs_embeds"][real], stored["mm.inputs_embeds"][real])
    # The original's logits at padding depend on what it fills the mask with: none of anybody's business.
    close(outputs.logits[..., ::16][real], stored["out.logits_cols_step16"][real])
    close(outputs.logits.logsumexp(-1)[real], stored["out.logits_logsumexp"][real])
    assert torch.equal(outputs.logits.argmax(-1)[real], stored["out.logits_argmax"][real].long())
    if math.isnan(stored["out.loss"]):  # no label is left: the original's mean over nothing
        assert not (batch["labels"] != IGNORE_INDEX).any()
        return
    torch.testing.assert_close(outputs.loss, stored["out.loss"], rtol=1e-5, atol=0)
    outputs.loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for theirs, own in GRADIENTS.items():
        if f"grad.{theirs}" in stored:
            close(gradients[own], stored[f"grad.{theirs}"], rtol=1e-5)
    for theirs, own in GRADIENT_ROW_SUMS.items():
        if f"gradrowsum.{theirs}" in stored:
            close(gradients[own].sum(1), stored[f"gradrowsum.{theirs}"], rtol=1e-5)
    for theirs in meta["grad_none"]:
        if theirs in GRADIENTS:
            gradient = gradients.get(GRADIENTS[theirs])
            assert gradient is None or not gradient.any(), theirs


def close(found: torch.Tensor, expected: torch.Tensor, rtol: float = 1e-5) -> None:
    """Within `rtol` of the largest value."""
    torch.testing.assert_close(found, expected, rtol=0, atol=rtol * max(expected.abs().max().item(), 1e-6))


@pytest.mark.parametrize("change", ["newline", "order of crops"])
def test_the_comparison_notices_a_wrong_merge(models, golden, pictures, change):
    model = models("anyres_spatial_unpad")
    batch, stored, _ = original_batch(model, golden, pictures, "anyres_spatial_unpad", "unpad_mixed")
    kept = model.model.image_newline.data
    if change == "newline":
        model.model.image_newline.data = 2 * kept
    else:
        crops = batch["pixel_values"].split(num_crops(batch["image_sizes"], model.config))
        batch["pixel_values"] = torch.cat([torch.cat((crop[:1], crop[1:].flip(0))) for crop in crops])
    with torch.no_grad():
        loss = model(**batch).loss
    model.model.image_newline.data = kept
    assert abs(loss / stored["out.loss"] - 1) > 1e-5


@pytest.mark.parametrize(
    ("variant", "name"),
    [
        *(("mlp2x_patch", name) for name in ("img", "text", "two_img", "batched_input_left_padded__config_side_left")),
        *(("anyres_spatial_unpad", name) for name in ("img", "text", "two_img")),
    ],
)
def test_the_original_checkpoint_answers_as_the_original_does(models, golden, pictures, variant, name):
    model = models(variant)
    processor = processor_for(model, golden)
    case = json.loads((golden / "d_generation/generation.json").read_text())[variant][name]
    rows, masks, answers = case["input_ids"], case.get("attention_mask"), case["output_ids"]
    if masks is None:
        rows, masks, answers = [rows], [[1] * len(rows)], [answers]
    inputs, counts = {}, [16] * len(case["images"] or [])
    if case["images"] and variant == "mlp2x_patch":
        inputs["pixel_values"] = torch.stack([pictures[f"{n}|pad"].reshape(3, 56, 56) for n in case["images"]])
    elif case["images"]:
        images = [as_rgb(Image.open(golden / f"b_images/png/{name}.png")) for name in case["images"]]
        inputs = processor.encode_images(images)
        counts = processor.num_placeholders(inputs)
    counts = iter(counts)
    rows = [
        [
            token
            for given, attended in zip(ids, mask, strict=True)
            if attended
            for token in ([model.config.image_token_id] * next(counts) if given == -200 else [given])
        ]
        for ids, mask in zip(rows, masks, strict=True)
    ]
    length = max(map(len, rows))
    inputs["input_ids"] = torch.tensor([[0] * (length - len(ids)) + ids for ids in rows])
    inputs["attention_mask"] = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in rows])
    found = model.eval().generate(**inputs, do_sample=False, max_new_tokens=16)[:, length:]
    for answer, expected in zip(found.tolist(), answers, strict=True):
        assert answer[: len(expected) - 1] == expected[1:]
