"""What each server can't do with a LLaVA, and what it does differently from training.

Everything here comes from the source of the version that `docs/serving.md` names.
"""

from typing import Literal, get_args

from hf_llava_ft.errors import UserError
from hf_llava_ft.modeling.configuration_llava import LlavaConfig

Server = Literal["vllm", "sglang", "llama.cpp", "ollama", "endpoints"]
SERVERS: tuple[Server, ...] = get_args(Server)

_TITLES = {"vllm": "vLLM", "sglang": "SGLang", "llama.cpp": "llama.cpp", "ollama": "Ollama"}
# What llama.cpp's converter has a class for, and its runtime feeds image features to as transformers does. Not Gemma:
# transformers scales image features with the embeddings, llama.cpp scales some of them and not others.
_LANGUAGE_MODELS = ("llama", "mistral", "phi3", "qwen2", "qwen3")
_ACTIVATIONS = ("gelu", "gelu_pytorch_tanh", "quick_gelu")
# With what llama.cpp fills up a picture to a square: the mean colour of CLIP, rounded, whatever the tower.
_PAD_COLOUR = (122, 116, 104)


def refuse_what_cannot_be_served(config: LlavaConfig, server: Server) -> None:
    """
    Raises:
        UserError: if `server` has no place for a model of `config`.
    """
    if server == "endpoints":
        return
    reason = _why_not(config, server)
    if reason:
        raise UserError(f"{_TITLES[server]} can't serve this model: {reason}.")


def _why_not(config: LlavaConfig, server: Server) -> str | None:
    if not config.is_native:
        what = (
            f"a projector of type {config.projector_type}, and it knows mlp2x_gelu only"
            if config.projector_type != "mlp2x_gelu"
            else f"crops that are merged as {config.patch_merge_type!r}, and it knows 'spatial_unpad' only"
        )
        return f"it has {what}; --for endpoints writes a folder that brings its own code"
    several_layers = not isinstance(config.vision_feature_layer, int)
    is_next = config.native_model_type == "llava_next"
    if server == "vllm":
        if several_layers and not is_next:
            return "its projector reads several layers of the tower, and vLLM's LLaVA-1.5 reads one"
        return None
    if server == "sglang":
        if is_next:
            return "it is a LLaVA-1.6, whose image_newline SGLang's Transformers backend does not load; use --for vllm"
        return None
    if is_next:
        return (
            "it is a LLaVA-1.6, of which llama.cpp leaves out image_newline and the cutting of padding; use --for vllm"
        )
    if config.text_config.model_type not in _LANGUAGE_MODELS:
        return (
            f"its language model is a {config.text_config.model_type}, and the ones whose image features llama.cpp "
            f"treats alike are {', '.join(_LANGUAGE_MODELS)}; use --for vllm"
        )
    if several_layers:
        return "its projector reads several layers of the tower, which is tried with one only; use --for vllm"
    if config.vision_config.hidden_act not in _ACTIVATIONS:
        return (
            f"its tower has the activation {config.vision_config.hidden_act}, and llama.cpp knows gelu and quick_gelu"
        )
    if not config.multimodal_projector_bias:
        return "its projector has no bias, and llama.cpp adds one; use --for vllm"
    if config.vision_config.model_type == "clip_vision_model" and config.vision_feature_select_strategy != "default":
        return "its projector reads the tower's class token, which llama.cpp drops; use --for vllm"
    return None


def differences(config: LlavaConfig, processor, server: Server) -> list[str]:
    """What `server` does otherwise than training did, in sentences; empty if nothing."""
    found = []
    upright = processor.picture_opening == "upright"
    if server in ("vllm", "endpoints") and not upright:
        found.append(
            "This model was trained on pictures as they lie (picture_opening original), and here they are turned as "
            "their EXIF data say: strip these before pictures are sent."
        )
    if server == "vllm":
        found.append(
            "vLLM paints transparent pixels white (and before its change 44974, of June 2026, turns no picture as its "
            "EXIF data say); training dropped an alpha channel. Send opaque pictures."
        )
    if server not in ("llama.cpp", "ollama"):
        return found
    image_processor = processor.image_processor
    if config.vision_config.model_type == "clip_vision_model":
        found.append(
            "llama.cpp computes CLIP towers wrongly: it puts the class token behind the patches, so that every patch "
            "gets its neighbour's position and one patch is lost. That is its issue 25814; use a build with the "
            "change of its pull request 25844. Models with a SigLIP tower are not affected."
        )
    colour = tuple(int(255 * channel) for channel in image_processor.image_mean)
    if not getattr(image_processor, "do_pad", False):  # CLIP's own has no such word
        found.append(
            "llama.cpp pads every picture to a square; this model was trained on pictures "
            + ("cut" if getattr(image_processor, "do_center_crop", False) else "squeezed")
            + " to one. Send square pictures."
        )
    elif colour != _PAD_COLOUR:
        found.append(f"llama.cpp pads pictures with the colour {_PAD_COLOUR}, training did with {colour}.")
    found.append(
        "llama.cpp resizes pictures with its own bicubic filter, so pixels differ where a picture is resized."
    )
    return found
