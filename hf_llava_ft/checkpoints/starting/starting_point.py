"""The LLaVA that training starts from: the one that is named, or a new one of a language model and a vision tower.

The original's scripts start from a language model and name the tower beside it, in stage 1 with a fresh projector and
in stage 2 with the one that stage 1 left. A new LLaVA is written to the folder `composed` under the output folder:
an adapter needs a base that others can load, and every engine loads a folder. For runs that end in a whole model it is
removed at the end.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.integrations import set_hf_deepspeed_config, unset_hf_deepspeed_config

from hf_llava_ft.checkpoints.adapters import tuning_of_adapter
from hf_llava_ft.checkpoints.artifact import staged_folder
from hf_llava_ft.checkpoints.checked.folder import UNREADABLE, check_settings, reason_of
from hf_llava_ft.checkpoints.compose import compose_llava
from hf_llava_ft.checkpoints.files import read_json
from hf_llava_ft.checkpoints.inspection import ADAPTER_CONFIG, inspect_checkpoint, is_language_model
from hf_llava_ft.checkpoints.opening import load_config, load_model
from hf_llava_ft.checkpoints.original_folders import PROJECTOR_FILE, load_projector, read_weights
from hf_llava_ft.checkpoints.starting.agreement import check_agreement
from hf_llava_ft.checkpoints.training_facts import base_facts, hub_commit
from hf_llava_ft.errors import UserError
from hf_llava_ft.modeling.part_names_llava import PROJECTOR
from hf_llava_ft.modeling.weight_names_llava import name_in_memory
from hf_llava_ft.processing.processing_llava import LlavaProcessor
from hf_llava_ft.settings.arguments import ModelArguments, TuningArguments
from hf_llava_ft.settings.composition import Composition
from hf_llava_ft.settings.training_arguments import LlavaTrainingArguments

COMPOSED = "composed"
_FINGERPRINT = "composed_from.sha256"
_EXAMPLE_TOWER = "openai/clip-vit-large-patch14-336"


@dataclass(frozen=True)
class StartingPoint:
    """
    Args:
        name (`str`): folder or Hub id of a LLaVA.
        revision (`str`, *optional*): on the Hub.
        projector (`dict[str, torch.Tensor]`, *optional*): weights to put into it when it is loaded.
        composed (`Path`, *optional*): the folder, if the LLaVA was made for this run.
        adapter (`str`, *optional*): folder or Hub id of an adapter on it that is trained further.
    """

    name: str
    revision: str | None
    projector: dict[str, torch.Tensor] | None = None
    composed: Path | None = None
    adapter: str | None = None
    adapter_revision: str | None = None

    def load(self, processor: LlavaProcessor, model_args: ModelArguments, **kwargs: Any) -> Any:
        """
        The model, without the adapter that is trained further, which `with_tuning` puts on it.

        Args:
            processor (`LlavaProcessor`): see `load_model`; there, too, is what `kwargs` may be.

        Raises:
            UserError: see `load_model`; or if the projector is that of another kind of model.
        """
        model: Any = load_model(
            self.name,
            processor,
            revision=self.revision,
            dtype=model_args.dtype,
            attn_implementation=model_args.attn_implementation,
            allow_nan=model_args.allow_nan,
            **kwargs,
        )
        if self.projector is not None:
            load_projector(model, self.projector)
        return model

    @property
    def commit(self) -> str | None:
        """Of what came from the Hub; None for a folder."""
        return hub_commit(self.name, self.revision)

    def facts(self, model_args: ModelArguments) -> list[dict[str, str]]:
        """Name and commit of the models on the Hub that it is, or was made of."""
        if self.composed is None:
            return base_facts([self.name], self.revision)
        return base_facts([model_args.model_name_or_path, str(model_args.vision_tower)], model_args.revision)

    def remove_composed(self) -> None:
        if self.composed is not None:
            shutil.rmtree(self.composed, ignore_errors=True)


def starting_point(
    model_args: ModelArguments, tuning_args: TuningArguments, training_args: LlavaTrainingArguments
) -> StartingPoint:
    """
    Finds or makes the LLaVA that `model_args` speak of; the first process makes it, the others wait.

    Raises:
        UserError: if `model_args` contradict what is there, or a part is missing.
    """
    name, revision, path = model_args.model_name_or_path, model_args.revision, model_args.pretrain_mm_mlp_adapter
    is_new = check_starting_point(model_args, tuning_args)
    projector = None if path is None else read_projector_of(path)
    if not is_new:
        checkpoint = inspect_checkpoint(name, revision)
        if checkpoint.kind == "adapter":
            return StartingPoint(checkpoint.base, checkpoint.revision, adapter=name, adapter_revision=revision)
        return StartingPoint(name, revision, projector)
    folder = Path(str(training_args.output_dir), COMPOSED)
    with training_args.main_process_first(local=training_args.save_on_each_node), _undivided(training_args):
        _compose(model_args, projector, folder, training_args.seed)
    return StartingPoint(str(folder), None, composed=folder)


def settled_tuning(model_args: ModelArguments, tuning_args: TuningArguments) -> TuningArguments:
    """
    `tuning_args`, or for a run that goes on training an adapter what is in them and in the adapter.

    Raises:
        UserError: if they ask for what the adapter has not.
    """
    name, revision = model_args.model_name_or_path, model_args.revision
    config = read_json(name, ADAPTER_CONFIG, revision)
    if config is None or inspect_checkpoint(name, revision).kind != "adapter":
        return tuning_args
    return tuning_of_adapter(name, config, tuning_args, revision)


@contextmanager
def _undivided(training_args: LlavaTrainingArguments) -> Iterator[None]:
    """Under ZeRO-3 every model that is loaded is divided among all processes, which are not all there."""
    config = getattr(training_args, "hf_deepspeed_config", None)
    if config is None:
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(config)


def check_starting_point(model_args: ModelArguments, tuning_args: TuningArguments) -> bool:
    """
    Reads configurations alone.

    Returns:
        Whether a new LLaVA has to be made.

    Raises:
        UserError: if `model_args` contradict what is there.
    """
    name = model_args.model_name_or_path
    if not is_language_model(name, model_args.revision):
        checkpoint = inspect_checkpoint(name, model_args.revision)
        if checkpoint.kind == "original_lora":
            raise UserError(
                f"{name} is an adapter in the format of haotian-liu/LLaVA: convert it first (llava-ft convert --model "
                f"{name} --format llava-hf --output_dir ADAPTER) and train ADAPTER."
            )
        if checkpoint.kind == "adapter":
            check_settings(name, model_args.revision)
            if model_args.pretrain_mm_mlp_adapter is not None:
                raise UserError(
                    f"--pretrain_mm_mlp_adapter: {name} is an adapter, which goes on with its own projector: leave it "
                    f"out, or merge the adapter first (llava-ft merge)."
                )
            settled_tuning(model_args, tuning_args)
            check_agreement(model_args, load_config(checkpoint.base, checkpoint.revision, adapter=name))
        else:
            check_agreement(model_args, load_config(name, model_args.revision))
        return False
    if model_args.vision_tower is None:
        raise UserError(
            f"{name} is a language model without a vision tower: add --vision_tower {_EXAMPLE_TOWER}, or start from a "
            f"LLaVA."
        )
    if model_args.image_aspect_ratio == "anyres" or model_args.mm_patch_merge_type not in (None, "flat"):
        raise UserError(
            f"a new LLaVA of {name} sees one picture as one square, so --image_aspect_ratio anyres and "
            f"--mm_patch_merge_type have no meaning: use --image_aspect_ratio pad, or start from a LLaVA-1.6."
        )
    if model_args.mm_use_im_start_end and tuning_args.train_type == "projector":
        raise UserError(
            "--mm_use_im_start_end True adds two tokens, whose embeddings would have to train with the projector: "
            "leave it out in stage 1, as LLaVA-1.5 does."
        )
    return True


def _compose(model_args: ModelArguments, projector: dict[str, torch.Tensor] | None, folder: Path, seed: int) -> None:
    layer = model_args.mm_vision_select_layer
    settings: dict[str, Any] = {
        "version": model_args.version,
        "projector_type": model_args.mm_projector_type or Composition.projector_type,
        "vision_feature_layer": Composition.vision_feature_layer if layer is None else layer,
        "vision_feature_select_strategy": None,
        "image_aspect_ratio": model_args.image_aspect_ratio or Composition.image_aspect_ratio,
        "image_start_end": bool(model_args.mm_use_im_start_end),
        "revision": model_args.revision,
        "seed": seed,
    }
    if model_args.mm_vision_select_feature == "cls_patch":
        settings["vision_feature_select_strategy"] = "full"
    parts = (str(model_args.vision_tower), model_args.model_name_or_path)
    # The weights of a projector are part of what was asked for; a digest names no folder of this machine.
    said = json.dumps([parts, settings, model_args.pretrain_mm_mlp_adapter])
    fingerprint = hashlib.sha256(said.encode()).hexdigest()
    if folder.is_dir():
        path = folder / _FINGERPRINT
        if path.is_file() and path.read_text(encoding="utf-8") == fingerprint:
            return  # of the run that is resumed, or of another process
        raise UserError(f"{folder} holds a LLaVA made of other parts: remove it, or choose another --output_dir.")
    try:
        with staged_folder(folder) as staged:
            compose_llava(*parts, staged / "model", projector=projector, **settings)
            for file in (staged / "model").iterdir():
                file.rename(staged / file.name)
            (staged / "model").rmdir()
            (staged / _FINGERPRINT).write_text(fingerprint, encoding="utf-8")
    except UserError:
        raise
    except UNREADABLE as error:
        raise UserError(f"{' and '.join(parts)} cannot be made into a LLaVA: {reason_of(error)}") from error


def read_projector_of(path: str) -> dict[str, torch.Tensor]:
    """
    The weights of a projector by their names in memory, from the original's `mm_projector.bin`, its folder, or the
    folder of a whole LLaVA, which is what stage 1 leaves here. A `mm_projector.bin` that is not there is looked for in
    the whole LLaVA beside it, so that the original's path to it stays right.

    Raises:
        UserError: if there is none.
    """
    place = Path(path)
    if place.is_dir() and (place / PROJECTOR_FILE).is_file():
        place = place / PROJECTOR_FILE
    if place.is_file():
        weights = read_weights(place)
    else:
        folder = place if place.is_dir() else place.parent
        weights = {}
        for file in sorted(folder.glob("*.safetensors")):
            weights |= _projector_in(file)
    found = {name: tensor for name, tensor in weights.items() if f".{PROJECTOR}." in name}
    if not found:
        raise UserError(
            f"--pretrain_mm_mlp_adapter {path}: there is no projector; give the original's {PROJECTOR_FILE}, or the "
            f"folder that stage 1 wrote."
        )
    if other := sorted(set(weights) - set(found)):
        raise UserError(
            f"--pretrain_mm_mlp_adapter {path} holds more than a projector, {other[0]} among it: start from the whole "
            f"folder, --model_name_or_path {place.parent}."
        )
    return found


def _projector_in(file: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(file, framework="pt") as tensors:
            names = {name: name_in_memory(name) for name in tensors.keys()}
            return {ours: tensors.get_tensor(name) for name, ours in names.items() if f".{PROJECTOR}." in ours}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is not a readable weights file: {error}.") from error
