"""An adapter merged into its base: one folder that plain transformers loads, checked before it gets its name."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_llava_ft.checkpoints.adapters import adapter_weights
from hf_llava_ft.checkpoints.checked.folder import check_settings
from hf_llava_ft.checkpoints.checked.read_as_written import is_in_few_bits
from hf_llava_ft.checkpoints.inspection import Checkpoint, inspect_checkpoint
from hf_llava_ft.checkpoints.rewriting import rewriting, save_for_others
from hf_llava_ft.checkpoints.rounding import Rounding, merged
from hf_llava_ft.checkpoints.verify import Probe, Verification
from hf_llava_ft.errors import UserError


@dataclass(frozen=True)
class Merged:
    """
    Args:
        output_dir (`Path`): the folder of the whole model.
        verification (`Verification`): of the folder, against the base with the adapter.
        rounding (`Rounding`): how much of what was learned the dtype of the weights took.
    """

    output_dir: Path
    verification: Verification
    rounding: Rounding


def merge_adapter(
    adapter: str | Path,
    output_dir: str | Path,
    *,
    base: str | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    probe: Probe | None = None,
) -> Merged:
    """
    Merges the adapter at `adapter` into its base and writes the whole model, with processor, to `output_dir`.

    The base is loaded anew, because merging into weights that were used or quantised would merge their rounding. The
    weights are merged exactly and rounded once to `dtype`; what that takes of a small change is measured. What the
    base with the adapter answers is the reference; the merged folder is loaded in a fresh process and has to answer
    the same. What is known of the training goes along as `training.json`.

    Args:
        base (`str`, *optional*): instead of the base that the adapter names.
        revision (`str`, *optional*): branch, tag or commit of an adapter on the Hub; that of its base is in the
            adapter.
        dtype (`str`): dtype of the merged weights; `auto` is that of the base.
        probe (`Probe`, *optional*): what is asked.

    Raises:
        UserError: if there is no adapter, `output_dir` is not empty or not writable, or the merged folder answers
            otherwise; then nothing stays at `output_dir`.
    """
    adapter = str(adapter)
    checkpoint = inspect_checkpoint(adapter, revision, base)
    if not checkpoint.is_adapter:
        raise UserError(f"{adapter} is a whole model, not an adapter: there is nothing to merge.")
    refuse_base_in_few_bits(checkpoint)
    with rewriting(checkpoint, output_dir, revision=revision, dtype=dtype, probe=probe) as draft:
        draft.ask()
        draft.model, rounding = merged(draft.model, saved_weights(checkpoint, revision))
        draft.model.config.use_cache = draft.model.config.text_config.use_cache = True
        save_for_others(draft.model, draft.processor, draft.folder)
        dtype_of_model = draft.model.dtype
        draft.model = None  # the check loads what was written, and two would be in memory
        verification = draft.verify("the merged model is not the same as base and adapter", dtype_of_model)
    return Merged(Path(output_dir), verification, rounding)


def saved_weights(checkpoint: Checkpoint, revision: str | None) -> dict[str, Any]:
    """The weights in the file of a PEFT adapter, in its dtypes; none of the original's, whose base holds the rest."""
    return adapter_weights(checkpoint.path, revision) if checkpoint.kind == "adapter" else {}


def refuse_base_in_few_bits(checkpoint: Checkpoint) -> None:
    """
    Raises:
        UserError: if the base of the adapter is quantised on disk.
    """
    check_settings(checkpoint.base, checkpoint.revision)
    if is_in_few_bits(checkpoint.base, checkpoint.revision):
        raise UserError(
            f"{checkpoint.base}, the base of {checkpoint.path}, is quantised, and what is merged into such weights is "
            f"rounded with them to another model: merge into the one it was made of, --base UNQUANTISED."
        )
