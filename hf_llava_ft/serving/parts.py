"""A LLaVA in the parts that llama.cpp's own converters take: the language model, and tower with projector.

    language_model/   what `convert_hf_to_gguf.py` takes for a language model
    vision/           what `tools/mtmd/legacy-models/convert_image_encoder_to_gguf.py` takes: the tower, and the
                      projector as `llava.projector`, a file of torch with the names of haotian-liu/LLaVA

`convert_hf_to_gguf.py --mmproj` does not do for a LLaVA: it knows Pixtral's tower only and stops at any other.
"""

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from PIL import Image
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    CLIPVisionModel,
    SiglipVisionModel,
)

from hf_llava_ft.checkpoints.reload import opened_pixels, write_hard_pictures
from hf_llava_ft.checkpoints.verify import opened_otherwise
from hf_llava_ft.errors import UserError
from hf_llava_ft.processing.picture_opening_llava import as_rgb
from hf_llava_ft.serving.tokenizer import save_tokenizer, with_media_markers

LANGUAGE_MODEL, VISION = "language_model", "vision"
PROJECTOR = "llava.projector"
_TOWERS = {"clip_vision_model": CLIPVisionModel, "siglip_vision_model": SiglipVisionModel}


def write_parts(model: Any, processor: Any, folder: Path) -> None:
    """Writes `model`, a `LlavaForCausalLM`, in parts to `folder`."""
    _write_language_model(model, processor, folder / LANGUAGE_MODEL)
    _write_vision(model, folder / VISION)


def _write_language_model(model: Any, processor: Any, folder: Path) -> None:
    folder.mkdir()
    prefix = "model.language_model."
    weights = {
        "model." + name.removeprefix(prefix): tensor
        for name, tensor in model.model.state_dict(prefix="model.").items()
        if name.startswith(prefix)
    }
    config = copy.deepcopy(model.config.text_config)
    config.tie_word_embeddings = model.config.tie_word_embeddings
    if not config.tie_word_embeddings:
        weights["lm_head.weight"] = model.lm_head.weight.data
    # Not the rows that fill the embedding up to a multiple of 64: llama.cpp refuses more rows than there are tokens.
    config.vocab_size = len(processor.tokenizer)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in weights:
            weights[name] = weights[name][: config.vocab_size].clone()
    save_torch_state_dict(weights, folder, metadata={"format": "pt"})
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__]  # type: ignore[union-attr,attr-defined]
    config.dtype = model.dtype
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    save_tokenizer(processor.tokenizer, with_media_markers(str(processor.chat_template)), folder)


def _write_vision(model: Any, folder: Path) -> None:
    folder.mkdir()
    tower = {f"vision_model.{name}": tensor for name, tensor in model.model.vision_tower.state_dict().items()}
    save_torch_state_dict(tower, folder, metadata={"format": "pt"})
    settings = model.config.vision_config.to_dict()
    settings |= {
        "architectures": [_TOWERS[settings["model_type"]].__name__],
        # Without it the converter leaves out the last layer, and llama.cpp the last of what is left.
        "vision_feature_layer": model.config.vision_feature_layer,
    }
    if settings["hidden_act"] == "gelu_pytorch_tanh":
        # The converter takes any word but `gelu` for quick_gelu; llama.cpp's gelu is the one with tanh.
        settings["hidden_act"] = "gelu"
    for name in ("_name_or_path", "transformers_version", "dtype"):
        settings.pop(name, None)
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    projector = model.model.multi_modal_projector
    torch.save(
        {
            f"model.mm_projector.{place}.{kind}": projector.get_submodule(layer)
            .get_parameter(kind)
            .detach()
            .float()
            .cpu()
            for place, layer in ((0, "linear_1"), (2, "linear_2"))
            for kind in ("weight", "bias")
        },
        folder / PROJECTOR,
    )


def answers_of_parts(
    folder: Path, config: Any, inputs: dict[str, torch.Tensor], num_tokens: int
) -> dict[str, torch.Tensor]:
    """
    What the parts in `folder` make of one prompt, put together by the plain definition of a LLaVA.

    Args:
        config (`LlavaConfig`): of the whole model.
        inputs: `input_ids` `int64[1, T]` with `config.image_token_id` where a feature stands, `pixel_values`
            `float[N, 3, H, W]`.
        num_tokens (`int`): tokens without the rows that no token has.

    Returns:
        `features` `float32[N, P, D]` and `logits` `float32[1, T, num_tokens]`.
    """
    language = AutoModelForCausalLM.from_pretrained(
        folder / LANGUAGE_MODEL, dtype="auto", trust_remote_code=False
    ).eval()
    # Not by the configuration there, whose name of the activation is meant for llama.cpp.
    tower: Any = AutoModel.from_pretrained(
        folder / VISION, config=config.vision_config, dtype="auto", trust_remote_code=False
    ).eval()
    loaded = torch.load(folder / VISION / PROJECTOR, weights_only=True)
    layers: list[Any] = [nn.functional.linear, nn.functional.gelu, nn.functional.linear]
    with torch.no_grad():
        hidden = tower(inputs["pixel_values"].to(tower.dtype), output_hidden_states=True).hidden_states
        features = hidden[config.vision_feature_layer]
        if config.vision_feature_select_strategy == "default":
            features = features[:, 1:]
        for place, layer in enumerate(layers):
            name = f"model.mm_projector.{place}"
            weights = [loaded[f"{name}.{kind}"].to(features.dtype) for kind in ("weight", "bias") if place != 1]
            features = layer(features, *weights)
        ids = inputs["input_ids"]
        is_image = ids == config.image_token_id
        embeds = language.get_input_embeddings()(ids.masked_fill(is_image, 0))
        embeds = embeds.masked_scatter(is_image[..., None], features.to(embeds.dtype))
        logits = language(inputs_embeds=embeds, use_cache=False).logits[..., :num_tokens]
    return {"features": features.float(), "logits": logits.float()}


def check_parts(
    folder: Path, config: Any, reference: dict[str, torch.Tensor], num_tokens: int, tolerance: float
) -> float:
    """
    The largest difference of two logits, relative to the largest, between the parts in `folder` and the whole model.

    Args:
        reference: of `verify.reference_outputs`, of the whole model.

    Raises:
        UserError: if it is more than `tolerance`.
    """
    found = answers_of_parts(folder, config, reference, num_tokens)["logits"]
    expected = reference["logits"][..., :num_tokens]
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    if not difference <= tolerance:  # also true for NaN
        raise UserError(
            f"the parts are not the same as the whole model: the logits differ by {difference:.3g} of the largest "
            f"(allowed {tolerance:g})."
        )
    return difference


def pictures_seen_otherwise(reference: dict[str, torch.Tensor], processor: Any) -> list[str]:
    """
    Which of the pictures that are hard to open become other pixels when llama.cpp opens them, in words. It reads files
    with stb_image: as they lie, and without their transparency.

    Args:
        reference: of `verify.reference_outputs`, of the whole model and this processor.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_hard_pictures(folder)
        return opened_otherwise(reference, opened_pixels(processor, folder, lambda path: as_rgb(Image.open(path))))
