"""`--cache_vision_features`: what a frozen tower makes of a picture is computed once and kept on disk, for all epochs
and all later runs.

There is no phase before training: the first step that meets a picture computes and stores it, each process for its
own batches. The DataLoader's workers look pictures up by the bytes of their files; what is found is not decoded.
Features are found again only for the same weights, layers, image settings and ways of computing, which together name
the folder, and are written in it in words (`made_of.json`).

What may surprise: under autocast the tower's states are float32, and the projector begins by rounding them to 16
bits. They are kept as it reads them, which halves the disk and changes no bit of what follows.
"""

import io
import json
import logging
import shutil
from collections.abc import Sequence
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pyarrow.compute as pc
import torch
import transformers
from datasets import Dataset
from PIL import Image

from hf_llava_ft.data.distinct_pictures import NewPicture
from hf_llava_ft.data.vision_features import StoredPicture, VisionFeatures, digest_of
from hf_llava_ft.errors import UserError
from hf_llava_ft.modeling.anyres_llava import num_crops
from hf_llava_ft.modeling.configuration_llava import LlavaConfig
from hf_llava_ft.processing.picture_opening_llava import size_when_opened
from hf_llava_ft.processing.processing_llava import LlavaProcessor
from hf_llava_ft.settings.arguments import DataArguments, TuningArguments
from hf_llava_ft.settings.training_arguments import LlavaTrainingArguments
from hf_llava_ft.training.first_process import in_first_process
from hf_llava_ft.training.fsdp import uses_fsdp
from hf_llava_ft.training.speed.feature_sizes import bytes_of_a_crop, stored_dtype
from hf_llava_ft.whole_files import write_atomically

logger = logging.getLogger(__name__)

_VERSION = 1  # raise it when the same tower gives other features
_NAME = "--cache_vision_features"
_MOST_LOOKED_AT = 256


def check_feature_cache(data_args: DataArguments, tuning_args: TuningArguments, args: LlavaTrainingArguments) -> None:
    """
    Raises:
        UserError: if these settings leave no features that could be kept.
    """
    if args.cache_vision_features is None:
        return
    if tuning_args.train_type == "full" or tuning_args.lora_vision_tower:
        trains = "lora_vision_tower" if tuning_args.lora_vision_tower else "train_type full"
        raise UserError(f"{_NAME} keeps what a frozen vision tower gives, and --{trains} trains it: leave one out.")
    if data_args.streaming:
        raise UserError(
            f"{_NAME} has to know how many pictures there are, to say what room they take, and --streaming does not: "
            "leave one out."
        )
    _refuse_engines(args)


def _refuse_engines(args: LlavaTrainingArguments) -> None:
    if args.deepspeed_plugin is not None or uses_fsdp(args):
        raise UserError(
            f"{_NAME} runs the tower by itself, and DeepSpeed and FSDP divide or change its weights: leave one out."
        )


class FeatureCache:
    """
    Args:
        trainer (`LlavaTrainer`): of the run, whose tower gives the same always.
        processor (`LlavaProcessor`): by which its pictures are prepared.

    Attributes:
        features (`VisionFeatures`): where they lie.
        told (`str`): a sentence on the room that they take.

    Raises:
        UserError: if they cannot be kept, or there is too little room.
    """

    def __init__(self, trainer: Any, processor: LlavaProcessor):
        args = trainer.args
        _refuse_engines(args)
        self._model, self._accelerator = trainer._unwrapped_model, trainer.accelerator
        autocast = self._accelerator.mixed_precision if self._accelerator.native_amp else None
        self.dtype = stored_dtype(self._model.config, self._model.model.vision_tower.dtype, autocast)
        made_of = _made_of(self._model, processor, args, autocast, self.dtype)
        root = Path(args.cache_vision_features).expanduser()
        self.features = VisionFeatures(root / _digest(made_of))
        self._is_full = False
        rows = _datasets(trainer.train_dataset) + _datasets(trainer.eval_dataset)
        self.told: str = in_first_process(args, lambda: self._opened(root, rows, processor, made_of))

    def _opened(self, root: Path, rows: Sequence[Any], processor: LlavaProcessor, made_of: dict[str, Any]) -> str:
        needed, number = self._needed(rows, processor)
        described = self.features.folder / "made_of.json"
        content = json.dumps(made_of, indent=2, default=str) + "\n"
        try:
            if not described.exists():  # one that is there may be of others, for reading alone
                write_atomically(described, lambda path: path.write_text(content, "utf-8"))
        except OSError as error:
            raise UserError(f"{_NAME} {root} cannot be written to: {error.strerror}.") from error
        self.features.tidy()
        free = shutil.disk_usage(root).free
        room = f"the features of {number:,} pictures need about {disk_size(needed)} more in {root}"
        if needed > free:
            raise UserError(
                f"{_NAME}: {room}, where {disk_size(free)} are free; name a folder on a larger disk, or leave it out."
            )
        return f"Vision features are kept: {room}, where {disk_size(free)} are free."

    def _needed(self, rows: Sequence[Any], processor: LlavaProcessor) -> tuple[int, int]:
        """Bytes that are still needed, by a look at some pictures, and the number of all."""
        for each in rows:
            if not isinstance(each, Dataset) or not {"images", "num_images"} <= set(each.column_names):
                raise UserError(f"{_NAME} needs rows of load_data or load_llava_json, whose pictures can be counted.")
        number = _num_pictures(rows)
        looked_at = _some_pictures(rows)
        crop, config = bytes_of_a_crop(self._model.config, self.dtype), self._model.config
        missing = 0
        for picture in looked_at:
            if not self.features.has(digest_of(picture)):
                with suppress(OSError):  # of a file that is no picture
                    missing += crop * _num_crops(picture, processor, config)
        return (round(missing * number / len(looked_at)) if looked_at else 0), number

    def completed(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """A batch in which `vision_features` stand for all pictures; what was not kept is computed, and kept."""
        new: list[NewPicture] = inputs.get("new_pictures", [])
        inputs = {name: value for name, value in inputs.items() if name != "new_pictures"}
        pixels = inputs.pop("pixel_values", None)
        if pixels is None:
            return inputs
        tower = self._model.model.vision_tower
        if any(parameter.requires_grad for parameter in tower.parameters()):
            raise UserError("cache_vision_features: the vision tower trains since the Trainer was made; freeze it.")
        with torch.no_grad(), self._accelerator.autocast():
            computed = self._model.model.vision_features(pixels)[0].to(self.dtype)
        if new:  # not those of another collator
            for picture, features in zip(new, computed.split([each.crops for each in new]), strict=True):
                self._keep(picture, features)
        stored = inputs.get("vision_features")
        inputs["vision_features"] = computed if stored is None else torch.cat((stored, computed))
        return inputs

    def _keep(self, picture: NewPicture, features: torch.Tensor) -> None:
        if picture.digest is None or self._is_full:
            return
        try:
            self.features.write(picture.digest, StoredPicture(features, picture.height, picture.width))
        except OSError as error:
            # What is there goes on being read; a run does not end over what only saves time.
            self._is_full = True
            logger.warning(f"{_NAME}: nothing more is kept in {self.features.folder}: {error}.")


def _made_of(
    model: Any, processor: LlavaProcessor, args: LlavaTrainingArguments, autocast: str | None, dtype: torch.dtype
) -> dict[str, Any]:
    """All that a picture's features follow from, but the picture."""
    tower, config = model.model.vision_tower, model.config
    weights = blake2b(digest_size=16)
    for name, parameter in sorted(tower.state_dict().items()):
        weights.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        weights.update(memoryview(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()))
    image_processor = processor.image_processor
    return {
        "version": _VERSION,
        "vision_tower": weights.hexdigest(),
        "vision_config": config.vision_config.to_diff_dict(),
        "vision_feature_layer": config.vision_feature_layer,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "processor": type(processor).__name__,
        "image_processor": {"class": type(image_processor).__name__, **json.loads(image_processor.to_json_string())},
        "picture_opening": processor.picture_opening,
        "attention": tower.config._attn_implementation,
        "computed": {"autocast": autocast, "device": args.device.type, "tf32": args.tf32, "stored": str(dtype)},
        "libraries": {"transformers": transformers.__version__, "pillow": PIL.__version__},
    }


def _digest(made_of: dict[str, Any]) -> str:
    return blake2b(json.dumps(made_of, sort_keys=True, default=str).encode(), digest_size=10).hexdigest()


def _datasets(rows: Any) -> list[Any]:
    """The Trainer takes one to evaluate, several by name, or none."""
    return [] if rows is None else list(rows.values()) if isinstance(rows, dict) else [rows]


def _num_pictures(rows: Sequence[Dataset]) -> int:
    """Different ones, by path or, inside of a table, by place; at most as many as the rows have."""
    paths: set[str] = set()
    inside = 0
    for table in {id(each.data): each.data for each in rows}.values():
        for chunk in table.column("images").chunks:
            images = pc.list_flatten(chunk)
            is_file = pc.is_null(pc.struct_field(images, "bytes"))
            paths.update(pc.unique(images.filter(is_file).field("path")).to_pylist())
            inside += len(images) - pc.sum(is_file).as_py() if len(images) else 0
    return min(len(paths) + inside, sum(int(_num_images(each).sum()) for each in rows))


def _some_pictures(rows: Sequence[Dataset]) -> list[bytes]:
    """Encoded pictures from all over the rows."""
    found: list[bytes] = []
    for each in rows:
        places = np.flatnonzero(_num_images(each))
        chosen = places[np.linspace(0, len(places) - 1, min(len(places), _MOST_LOOKED_AT), dtype=np.int64)]
        for place in chosen.tolist():
            for image in each[place]["images"]:
                with suppress(OSError):  # of which the batch will speak that needs it
                    found.append(image.get("bytes") or Path(image["path"]).read_bytes())
    return found


def _num_images(rows: Dataset) -> np.ndarray:
    return np.asarray(rows.select_columns(["num_images"]).with_format("numpy")[:]["num_images"])


def _num_crops(picture: bytes, processor: LlavaProcessor, config: LlavaConfig) -> int:
    if not processor.depends_on_image_size:
        return 1
    with Image.open(io.BytesIO(picture)) as opened:
        return num_crops(torch.tensor([size_when_opened(opened, processor.picture_opening)]), config)[0]


def disk_size(number: int) -> str:
    """In units of 1000, as disks are sold."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number / 1e3:.1f} kB"
