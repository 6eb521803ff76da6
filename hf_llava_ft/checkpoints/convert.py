"""From one checkpoint dialect to the other: models, adapters and projectors, each checked before it gets its name.

In the format `llava-hf`, a model that transformers' own LLaVA cannot express is written with the code that reads it,
and the verification says so: `loader` is `"trust_remote_code"`.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hf_llava_ft.checkpoints.files import find_file, name_for_anywhere
from hf_llava_ft.checkpoints.inspection import Checkpoint, inspect_checkpoint
from hf_llava_ft.checkpoints.opening import fit_to_processor, load_config
from hf_llava_ft.checkpoints.original_folders import write_original_lora, write_projector
from hf_llava_ft.checkpoints.rewriting import rewriting, save_for_others
from hf_llava_ft.checkpoints.verify import Probe, Verification
from hf_llava_ft.errors import UserError
from hf_llava_ft.processing.processing_llava import LlavaProcessor

Format = Literal["llava-hf", "llava"]
# What the original's loader reads besides config.json and the weights.
_TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


@dataclass(frozen=True)
class Converted:
    """
    Args:
        output_dir (`Path`): the new folder.
        kind (`str`): what it holds, a `Kind` of `checkpoints`.
        verification (`Verification`): of the folder, loaded in a fresh process.
    """

    output_dir: Path
    kind: str
    verification: Verification


def convert(
    model: str,
    output_dir: str | Path,
    checkpoint_format: Format,
    *,
    base: str | None = None,
    revision: str | None = None,
    vision_tower: str | None = None,
    dtype: str = "auto",
    probe: Probe | None = None,
) -> Converted:
    """
    Writes what is at `model`, a whole model, an adapter or a projector, to `output_dir` in `checkpoint_format`.
    What is known of the training goes along as `training.json`.

    Args:
        base (`str`, *optional*): instead of the base that an adapter or projector names.
        revision (`str`, *optional*): branch, tag or commit of `model` on the Hub.
        vision_tower (`str`, *optional*): folder or Hub id of the tower, which the original format names instead of
            describing; by default the name the model has.
        dtype (`str`): dtype of the weights; `auto` keeps it.

    Raises:
        UserError: if the format cannot express the model, or the folder answers otherwise than the model did; then
            nothing stays at `output_dir`.
    """
    checkpoint = inspect_checkpoint(model, revision, base)
    with rewriting(checkpoint, output_dir, revision=revision, dtype=dtype, probe=probe, fits_processor=False) as draft:
        loaded, processor = draft.model, draft.processor
        whole = loaded.get_base_model() if checkpoint.is_adapter else loaded
        if vision_tower is not None:
            whole.config.vision_tower_name = vision_tower
        try:
            if checkpoint_format == "llava-hf":
                fit_to_processor(whole, processor)
                _write_native(loaded, processor, checkpoint, draft.folder)
            else:
                if not processor.depends_on_image_size:
                    whole.config.image_aspect_ratio = "pad" if processor.image_processor.do_pad else "square"
                _write_original(loaded, checkpoint, draft.folder)
                _copy_tokenizer(checkpoint, draft.folder)
                (draft.folder / "chat_template.jinja").write_text(str(processor.chat_template), encoding="utf-8")
                _write_opening(processor, draft.folder)
                fit_to_processor(whole, processor)  # after writing: the original has no row for an image
        except ValueError as error:
            raise UserError(f"{model} cannot be written as {checkpoint_format}: {error}") from error
        draft.ask()
        dtype_of_model = whole.dtype
        draft.model = loaded = whole = None  # the check loads what was written, and two would be in memory
        verification = draft.verify("the converted model is not the same", dtype_of_model, base=checkpoint.base)
    return Converted(Path(output_dir), checkpoint.kind, verification)


def _write_native(model: Any, processor: LlavaProcessor, checkpoint: Checkpoint, folder: Path) -> None:
    if not checkpoint.is_adapter:
        save_for_others(model, processor, folder)
        return
    if not _is_llava(checkpoint.base, checkpoint.revision):
        raise UserError(
            f"{checkpoint.path} was trained on the bare language model {checkpoint.base}, for which the format "
            f"llava-hf has no adapters: merge it with llava-ft merge, or name a LLaVA made of it with --base."
        )
    model.peft_config["default"].base_model_name_or_path = name_for_anywhere(checkpoint.base)
    model.peft_config["default"].revision = checkpoint.revision
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's, which says nothing; `push` writes one
    processor.save_pretrained(folder)


def _is_llava(path: str, revision: str | None) -> bool:
    try:
        load_config(path, revision)
    except UserError:
        return False
    return True


def _write_original(model: Any, checkpoint: Checkpoint, folder: Path) -> None:
    if checkpoint.is_adapter:
        write_original_lora(model, name_for_anywhere(checkpoint.base), folder, checkpoint.revision)
    elif checkpoint.kind == "projector":
        write_projector(model, folder)
    else:
        model.save_pretrained(folder, checkpoint_format="llava")


def _write_opening(processor: LlavaProcessor, folder: Path) -> None:
    """Into config.json, where pictures were opened as the original does: it has no file for a processor."""
    if processor.picture_opening != "upright":
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["picture_opening"] = processor.picture_opening
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _copy_tokenizer(checkpoint: Checkpoint, folder: Path) -> None:
    for name in _TOKENIZER_FILES:
        source = find_file(checkpoint.base, name, checkpoint.revision)
        if source is not None:
            shutil.copyfile(source, folder / name)
