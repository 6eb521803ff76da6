"""PEFT adapters as folders: put on their base with every weight that they should have, or trained further."""

import dataclasses
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from safetensors import SafetensorError, safe_open

from hf_llava_ft.checkpoints.checked.folder import UNREADABLE, reason_of
from hf_llava_ft.checkpoints.files import find_file, hub_refusal
from hf_llava_ft.checkpoints.original_folders import ADAPTER_FILES, gathered, read_weights
from hf_llava_ft.errors import UserError
from hf_llava_ft.modeling.adapters_llava import PEFT_PREFIX, refuse_difference
from hf_llava_ft.modeling.modeling_llava import LlavaForCausalLM
from hf_llava_ft.modeling.part_names_llava import VISION_TOWER
from hf_llava_ft.modeling.weight_names_llava import name_in_memory
from hf_llava_ft.settings.arguments import TuningArguments

# What the adapter decides: the setting, and its name in adapter_config.json.
_DECIDED = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_bias": "bias",
    "use_dora": "use_dora",
    "use_rslora": "use_rslora",
}
_EMBEDDINGS = ("embed_tokens.weight", "lm_head.weight")


def with_adapter(
    model: LlavaForCausalLM,
    adapter: str,
    revision: str | None = None,
    *,
    is_trainable: bool = False,
    lora_dropout: float | None = None,
) -> PeftModel:
    """
    `model` with the adapter on it.

    Args:
        adapter (`str`): folder or Hub id.
        is_trainable (`bool`): to be trained further.
        lora_dropout (`float`, *optional*): instead of the adapter's.

    Raises:
        UserError: if its file lacks weights that its configuration makes, holds others, of other shapes, or some that
            are no numbers.
    """
    with _told(adapter, revision):
        config: Any = PeftConfig.from_pretrained(adapter, revision=revision)
        config.inference_mode = not is_trainable
        if lora_dropout is not None:
            config.lora_dropout = lora_dropout
        base = config.base_model_name_or_path
        weights = adapter_weights(adapter, revision)
        peft_model = get_peft_model(model, config)
        config.base_model_name_or_path = base  # get_peft_model takes it from the loaded model
        with _gathered(peft_model):
            _fill(peft_model, adapter, weights)
        return peft_model if is_trainable else peft_model.eval()


def add_adapter(model: PeftModel, adapter: str, name: str, revision: str | None = None) -> None:
    """
    Puts one more adapter of the same base on `model`, to be switched to by [`PeftModel.set_adapter`].

    Args:
        adapter (`str`): folder or Hub id.
        name (`str`): what PEFT is to know it by.

    Raises:
        UserError: as [`with_adapter`].
    """
    with _told(adapter, revision):
        config: Any = PeftConfig.from_pretrained(adapter, revision=revision)
        config.inference_mode = True
        model.add_adapter(name, config)
        _fill(model, adapter, adapter_weights(adapter, revision), name)
        model.eval()  # the dropout of what was added too


def changes_base(adapter: str, revision: str | None = None) -> bool:
    """
    Whether an adapter puts weights into the base itself, where switching it off leaves them: biases, or embeddings
    that PEFT writes besides.

    Raises:
        UserError: if it cannot be read.
    """
    with _told(adapter, revision):
        config: Any = PeftConfig.from_pretrained(adapter, revision=revision)
    whole = tuple(f"{each}.weight" for each in getattr(config, "modules_to_save", None) or ())  # PEFT switches these
    names = adapter_weight_names(adapter, revision)
    brings_embeddings = any(each.endswith(_EMBEDDINGS) and not each.endswith(whole) for each in names)
    return brings_embeddings or getattr(config, "bias", "none") != "none"


@contextmanager
def _told(adapter: str, revision: str | None) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except UNREADABLE as error:
        reason = hub_refusal(error, adapter, revision)
        raise UserError(
            f"the adapter at {adapter} cannot be loaded: {reason}"
            if reason
            else f"the adapter at {adapter} does not fit its base: {reason_of(error)}"
        ) from error


def _fill(model: PeftModel, adapter: str, weights: dict[str, Any], name: str = "default") -> None:
    _refuse_difference(adapter, weights, _expected(model, weights, name))
    named = {f"{PEFT_PREFIX}{each}": weight for each, weight in weights.items()}
    set_peft_model_state_dict(model, named, adapter_name=name)


def check_resumed_adapter(model: PeftModel, checkpoint: str) -> None:
    """
    Raises:
        UserError: if the adapter in a checkpoint of a run is not, name by name, one of `model`.
    """
    if not any(Path(checkpoint, name).is_file() for name in ADAPTER_FILES):
        return  # the engine has its own files
    weights = adapter_weights(checkpoint)
    with _gathered(model):
        _refuse_difference(checkpoint, weights, _expected(model, weights))


def adapter_weights(adapter: str, revision: str | None = None) -> dict[str, Any]:
    """The weights in the file of an adapter by their names in memory."""
    saved = load_peft_weights(adapter, device="cpu", revision=revision)
    return {name_in_memory(name.removeprefix(PEFT_PREFIX)): weight for name, weight in saved.items()}


def _gathered(model: PeftModel) -> AbstractContextManager:
    """What ZeRO-3 may have divided before the adapter came."""
    return gathered([each for name, each in model.named_parameters() if ".modules_to_save." in name])


def _refuse_difference(adapter: str, weights: dict[str, Any], expected: dict[str, Any]) -> None:
    try:
        refuse_difference(adapter, weights, expected)
    except ValueError as error:
        raise UserError(str(error)) from error


def _expected(model: PeftModel, weights: dict[str, Any], name: str = "default") -> dict[str, Any]:
    """The weights that the configuration makes, and of the embeddings those in the file: PEFT writes them besides
    where rows were added to the base's."""
    # Not "auto", with which PEFT asks the Hub for the base's vocabulary.
    made = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    expected = {each.removeprefix(PEFT_PREFIX): weight for each, weight in made.items()}
    extra = {each for each in weights if each.endswith(_EMBEDDINGS)} - expected.keys()
    if extra:
        own = model.get_base_model().state_dict()
        expected |= {each: own[each] for each in extra if each in own}
    return expected


def adapter_weight_names(adapter: str, revision: str | None = None) -> list[str]:
    """
    Names in memory of the weights in the file of an adapter.

    Raises:
        UserError: if it has none, or one that cannot be read.
    """
    found = next(filter(None, (find_file(adapter, name, revision) for name in ADAPTER_FILES)), None)
    if found is None:
        raise UserError(
            f"{adapter} has an adapter_config.json and no {' or '.join(ADAPTER_FILES)} beside it: copy it there."
        )
    if not found.endswith(".safetensors"):
        return sorted(read_weights(Path(found)))
    try:
        with safe_open(found, framework="pt") as tensors:
            return [name_in_memory(name.removeprefix(PEFT_PREFIX)) for name in tensors.keys()]
    except (OSError, SafetensorError) as error:
        raise UserError(f"{found} is no readable file of weights: {error}.") from error


def tuning_of_adapter(
    adapter: str, config: dict[str, Any], tuning_args: TuningArguments, revision: str | None = None
) -> TuningArguments:
    """
    `tuning_args` for a run that goes on training an adapter: what it decides is as it has it.

    Args:
        config (`dict`): its adapter_config.json.

    Raises:
        UserError: if what was asked for is something else, or needs the merged model.
    """
    merge = f"merge it first (llava-ft merge --adapter {adapter} --output_dir MERGED) and train MERGED"
    if not tuning_args.is_lora:
        raise UserError(
            f"--train_type {tuning_args.train_type}: {adapter} is an adapter, and only an adapter can be trained "
            f"further in it: {merge}, or leave the flag out."
        )
    if config.get("peft_type") != "LORA":
        raise UserError(f"{adapter} is an adapter of the kind {config.get('peft_type')}, not of LoRA: {merge}.")
    decided = {name: config.get(theirs, _default(name)) for name, theirs in _DECIDED.items()}
    names = adapter_weight_names(adapter, revision)
    leaves = sorted({match[1] for name in names if (match := re.search(r"\.(\w+)\.lora_A\.", f".{name}"))})
    in_tower = any(f".{VISION_TOWER}." in f".{name}" and ".lora_" in name for name in names)
    wanted = {
        "lora_target_modules": (sorted(tuning_args.lora_target_modules or ()), leaves),
        "lora_vision_tower": (tuning_args.lora_vision_tower, in_tower),
        **{name: (getattr(tuning_args, name), value) for name, value in decided.items()},
    }
    for name, (said, value) in wanted.items():
        if said != value and _is_said(tuning_args, name):
            shown, has = (" ".join(each) if isinstance(each, list) else each for each in (said, value))
            raise UserError(
                f"--{name} {shown}: the adapter {adapter} has {has}, which stays as it is when it is trained further: "
                f"leave it out, or {merge}."
            )
    if not _is_said(tuning_args, "lora_dropout"):
        decided["lora_dropout"] = config.get("lora_dropout", 0.0)
    settled = dataclasses.replace(tuning_args, **decided, lora_vision_tower=in_tower, lora_target_modules=leaves)
    settled.said = tuning_args.said
    return settled


def _default(name: str) -> Any:
    return next(field.default for field in dataclasses.fields(TuningArguments) if field.name == name)


def _is_said(tuning_args: TuningArguments, name: str) -> bool:
    if tuning_args.said is None:
        return getattr(tuning_args, name) != _default(name)
    return name in tuning_args.said
