"""A model or an adapter as others get it, compared with what this package loads: `llava-ft verify`."""

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from hf_llava_ft.checkpoints.files import hub_refusal
from hf_llava_ft.checkpoints.inspection import inspect_checkpoint
from hf_llava_ft.checkpoints.opening import load_model, load_processor
from hf_llava_ft.checkpoints.verify import Probe, Verification, reference_outputs, verify
from hf_llava_ft.errors import UserError
from hf_llava_ft.library_differences import HTTPError


def verify_for_others(
    model: str, *, base: str | None = None, revision: str | None = None, probe: Probe | None = None
) -> Verification:
    """
    Loads `model`, a folder or a Hub id, in a fresh process by what asks least of others, and compares its tokens,
    pixels, logits and answer with those of this package.

    Args:
        base (`str`, *optional*): instead of the base that an adapter or projector names.
        revision (`str`, *optional*): branch, tag or commit of `model` on the Hub.

    Raises:
        UserError: if it does not load here or there.
    """
    checkpoint = inspect_checkpoint(model, revision, base)
    processor = load_processor(model, revision, base=base)
    loaded: Any = load_model(model, processor, base=base, revision=revision)
    dtype = loaded.dtype
    reference = reference_outputs(loaded, processor, probe or Probe())
    del loaded  # or two would be in memory
    return verify(_downloaded(model, revision), reference, processor, probe or Probe(), dtype, checkpoint.base)


def _downloaded(model: str, revision: str | None) -> Path:
    if Path(model).is_dir():
        return Path(model)
    try:
        return Path(snapshot_download(model, revision=revision))
    except (HTTPError, OSError, ValueError) as error:
        raise UserError(hub_refusal(error, model, revision) or f"{model} cannot be downloaded: {error}.") from error
