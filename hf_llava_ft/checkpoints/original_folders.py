"""What haotian-liu/LLaVA writes that is no whole model: a LoRA folder, and the projector of stage 1. A whole model
of it is read in `modeling/`: `original_config_llava.py`, `weight_names_llava.py`, `checkpoint_mixin_llava.py`.

A LoRA folder holds an adapter with the original's names, `non_lora_trainables.bin` with what trained besides (the
projector, and with added image tokens the embeddings), and the flat config.json. A stage-1 folder holds
`mm_projector.bin` and config.json. Both are read into, and written from, the module tree in memory.
"""

import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hf_llava_ft.errors import UserError
from hf_llava_ft.modeling.modeling_llava import LlavaForCausalLM
from hf_llava_ft.modeling.part_names_llava import LANGUAGE_MODEL, PROJECTOR
from hf_llava_ft.modeling.weight_names_llava import name_in_memory, original_name

PROJECTOR_FILE = "mm_projector.bin"
NON_LORA_FILE = "non_lora_trainables.bin"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")

_PEFT_PREFIX = "base_model.model."


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """
    The tensors of a file by their names in memory; a `.bin` is read without running anything in it.

    Raises:
        UserError: if the file is damaged or holds anything but tensors.
    """
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(tensors, dict) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
            raise ValueError("it holds something else than tensors")
    except (OSError, ValueError, RuntimeError, KeyError, EOFError, SafetensorError, UnpicklingError) as error:
        reason = "it holds code" if "Unsupported global" in str(error) else str(error).splitlines()[0][:100]
        raise UserError(f"{path} is not a readable weights file: {reason}.") from error
    # The original's DeepSpeed runs leave the prefix of PEFT, or only its first half, before the model's own names.
    bare = {name.removeprefix(_PEFT_PREFIX).removeprefix("base_model."): value for name, value in tensors.items()}
    return {name_in_memory(name): value for name, value in bare.items()}


def read_projector(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a stage-1 folder, by their names in memory."""
    return read_weights(folder / PROJECTOR_FILE)


def load_projector(model: LlavaForCausalLM, weights: dict[str, torch.Tensor]) -> None:
    """
    Puts the weights of a projector, by their names in memory, into `model`, which ZeRO-3 may have divided.

    Raises:
        UserError: if they are not those of this model's projector.
    """
    prefix = f"model.{PROJECTOR}."
    own = {name: p for name, p in model.named_parameters() if name.startswith(prefix)}
    with gathered(list(own.values())):
        shapes = {name: tuple(parameter.shape) for name, parameter in own.items()}
        given = {name: tuple(tensor.shape) for name, tensor in weights.items()}
        if shapes != given:
            raise UserError(
                f"the projector does not fit the model: its weights are {_listed(given, prefix)}, and the model's "
                f"{_listed(shapes, prefix)}; see --mm_projector_type and --vision_tower."
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(weights[name])


def _listed(shapes: dict[str, tuple[int, ...]], prefix: str) -> str:
    return ", ".join(f"{name.removeprefix(prefix)} {list(shape)}" for name, shape in sorted(shapes.items())) or "none"


def gathered(parameters: list[torch.nn.Parameter]) -> AbstractContextManager:
    """Inside the block, parameters that ZeRO-3 has divided are whole, and what the first rank writes is kept."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)


def read_non_lora(folder: Path) -> dict[str, torch.Tensor]:
    """What a LoRA folder trained besides LoRA, by names in memory; empty where the file is missing."""
    path = folder / NON_LORA_FILE
    return read_weights(path) if path.is_file() else {}


def with_original_lora(model: LlavaForCausalLM, folder: Path) -> PeftModel:
    """
    `model`, which already has the projector of the folder, with its LoRA weights, as an adapter of ours.

    Raises:
        UserError: if the weights do not fit the model.
    """
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    if lacking := [name for name in ("target_modules", "r", "lora_alpha") if name not in config]:
        raise UserError(f"{folder}: adapter_config.json does not say {lacking[0]}: copy it there again.")
    names = config["target_modules"]
    # The original's bare names would also put LoRA on CLIP, where these folders have no weights for it.
    pattern = names if isinstance(names, str) else rf"model\.{LANGUAGE_MODEL}\..*\.({'|'.join(sorted(names))})"
    peft_model = get_peft_model(
        model,
        LoraConfig(
            r=config["r"],
            lora_alpha=config["lora_alpha"],
            lora_dropout=config.get("lora_dropout", 0.0),
            bias=config.get("bias", "none"),
            use_rslora=config.get("use_rslora", False),
            target_modules=pattern,
            modules_to_save=[PROJECTOR],
            task_type="CAUSAL_LM",
            inference_mode=True,
        ),
    )
    path = next((folder / name for name in ADAPTER_FILES if (folder / name).is_file()), None)
    if path is None:
        raise UserError(f"{folder} has an adapter_config.json and no adapter_model.safetensors or .bin beside it.")
    state = {_PEFT_PREFIX + name: tensor for name, tensor in read_weights(path).items()}
    expected = {name for name in get_peft_model_state_dict(peft_model) if "lora_" in name}
    if set(state) != expected:
        odd = min(set(state) ^ expected)
        raise UserError(f"{path} does not fit the base model: {odd} is in one of them only.")
    broken = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    if broken:
        raise UserError(
            f"{path} holds NaN or infinite numbers in {broken[0]}: it is damaged, or its training went wrong."
        )
    own = model.state_dict()
    projector = {name: own[name] for name in own if name.startswith(f"model.{PROJECTOR}.modules_to_save.default.")}
    state |= {_PEFT_PREFIX + name.replace(".modules_to_save.default", ""): value for name, value in projector.items()}
    try:
        set_peft_model_state_dict(peft_model, state)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit the base model: {str(error).splitlines()[-1].strip()}.") from error
    return peft_model


def write_projector(model: LlavaForCausalLM, folder: Path) -> None:
    """Writes the stage-1 folder of a model: `mm_projector.bin` and config.json."""
    kind = model.config.projector_type
    tensors = {
        original_name(name, kind): tensor.detach().cpu().contiguous()
        for name, tensor in model.state_dict().items()
        if f".{PROJECTOR}." in name
    }
    torch.save(tensors, folder / PROJECTOR_FILE)  # the original reads nothing else
    model.config.save_original(folder)


def _check_plain(model: PeftModel) -> None:
    config: Any = model.peft_config["default"]
    kind = "DoRA" if config.use_dora else "rank-stabilised LoRA" if config.use_rslora else None
    if kind is None and any("lora_" in name and ".vision_tower." in name for name, _ in model.named_parameters()):
        kind = "LoRA on the vision tower"
    if kind is not None:
        raise UserError(
            f"the format of haotian-liu/LLaVA has no {kind}: merge the adapter (llava-ft merge), and convert the "
            f"merged model."
        )


def write_original_lora(model: PeftModel, base: str, folder: Path, revision: str | None = None) -> None:
    """
    Writes the LoRA folder of a PEFT model: adapter, `non_lora_trainables.bin` and config.json.

    Args:
        base (`str`): folder or Hub id of the base.
        revision (`str`, *optional*): of the base on the Hub.

    Raises:
        UserError: for an adapter that the original, which has plain LoRA on the language model, cannot express.
    """
    _check_plain(model)
    own: Any = model.get_base_model()
    kind = own.config.projector_type
    lora: dict[str, torch.Tensor] = {}
    others: dict[str, torch.Tensor] = {}
    for name, tensor in get_peft_model_state_dict(model).items():
        bare = name.removeprefix(_PEFT_PREFIX)
        into = lora if "lora_" in name else others
        into[_PEFT_PREFIX + original_name(bare, kind)] = tensor.detach().cpu().contiguous()
    config = model.peft_config["default"].to_dict()
    modules = {name.rsplit(".lora_", 1)[0].rsplit(".", 1)[-1] for name in lora}
    kept = ("r", "lora_alpha", "lora_dropout", "bias", "fan_in_fan_out", "init_lora_weights")
    written = {name: config[name] for name in kept} | {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        "modules_to_save": None,
        "target_modules": sorted(modules),
    }
    save_file(lora, folder / ADAPTER_FILES[0], metadata={"format": "pt"})
    torch.save(others, folder / NON_LORA_FILE)
    (folder / "adapter_config.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    own.config.save_original(folder)
