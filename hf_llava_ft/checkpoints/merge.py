"""An adapter merged into its base: one folder that plain transformers loads, checked before it gets its name."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_llava_ft.checkpoints.artifact import staged_folder
from hf_llava_ft.checkpoints.opening import Checkpoint, inspect_checkpoint, load_model, load_processor
from hf_llava_ft.checkpoints.read_as_written import is_in_few_bits
from hf_llava_ft.checkpoints.training_facts import training_facts
from hf_llava_ft.checkpoints.verify import Probe, Verification, reference_outputs, verify
from hf_llava_ft.errors import UserError


@dataclass(frozen=True)
class Merged:
    output_dir: Path
    verification: Verification


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

    The base is loaded anew, because merging into weights that were used or quantised would merge their rounding. What
    the base with the adapter answers is the reference; the merged folder is loaded in a fresh process and has to
    answer the same. What is known of the training goes along as `training.json`.

    Args:
        base (`str`, *optional*): instead of the base that the adapter names.
        revision (`str`, *optional*): branch, tag or commit of an adapter on the Hub; that of its base is in the
            adapter.
        dtype (`str`): dtype of the merged weights; `auto` is that of the base.
        probe (`Probe`, *optional*): what is asked.

    Raises:
        UserError: if there is no adapter, `output_dir` is not empty or not writable, or the merged folder answers
        otherwise; then
            nothing stays at `output_dir`.
    """
    adapter = str(adapter)
    checkpoint = inspect_checkpoint(adapter, revision, base)
    if not checkpoint.is_adapter:
        raise UserError(f"{adapter} is a whole model, not an adapter: there is nothing to merge.")
    refuse_base_in_few_bits(checkpoint)
    facts = training_facts(adapter, revision)
    probe = probe or Probe()
    with staged_folder(output_dir) as staged:
        processor = load_processor(adapter, revision, base=base)
        model: Any = load_model(adapter, processor, base=base, revision=revision, dtype=dtype)
        reference = reference_outputs(model, processor, probe)
        merged = model.merge_and_unload()
        merged.config.use_cache = merged.config.text_config.use_cache = True
        # Not the original's format, even where the base came in it: a merged model is for others to load.
        merged.save_pretrained(staged, checkpoint_format="llava-hf" if merged.config.is_native else "nested")
        processor.save_pretrained(staged)
        if facts is not None:
            facts.save(staged)
        verification = verify(staged, reference, processor, probe, dtype=merged.dtype)
        if not verification.ok:
            raise UserError(
                f"the merged model is not the same as base and adapter: {'; '.join(verification.differences)}."
            )
    return Merged(Path(output_dir), verification)


def refuse_base_in_few_bits(checkpoint: Checkpoint) -> None:
    """
    Raises:
        UserError: if the base of the adapter is quantised on disk.
    """
    if is_in_few_bits(checkpoint.base, checkpoint.revision):
        raise UserError(
            f"{checkpoint.base}, the base of {checkpoint.path}, is quantised, and what is merged into such weights is "
            f"rounded with them to another model: merge into the one it was made of, --base UNQUANTISED."
        )
