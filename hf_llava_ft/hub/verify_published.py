"""A model or an adapter as others get it, compared with what this package loads: `llava-ft verify`."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download

from hf_llava_ft.checkpoints.files import hub_refusal
from hf_llava_ft.checkpoints.inspection import inspect_checkpoint
from hf_llava_ft.checkpoints.merge import refuse_base_in_few_bits, saved_weights
from hf_llava_ft.checkpoints.opening import load_model, load_processor
from hf_llava_ft.checkpoints.rounding import merged
from hf_llava_ft.checkpoints.verify import (
    LOGIT_TOLERANCE,
    AgainstAdapter,
    Probe,
    Verification,
    reference_outputs,
    verify,
)
from hf_llava_ft.errors import UserError
from hf_llava_ft.library_differences import HTTPError
from hf_llava_ft.processing.processing_llava import LlavaProcessor


def verify_for_others(
    model: str,
    *,
    base: str | None = None,
    revision: str | None = None,
    adapter: str | None = None,
    probe: Probe | None = None,
) -> Verification:
    """
    Loads `model`, a folder or a Hub id, in a fresh process by what asks least of others, and compares its tokens,
    pixels, logits and answer with those of this package.

    Args:
        base (`str`, *optional*): instead of the base that an adapter or projector names.
        revision (`str`, *optional*): branch, tag or commit of `model` on the Hub.
        adapter (`str`, *optional*): folder or Hub id of the adapter that was merged into `model`, which is then
            compared, besides, with it on its base in float32. That takes the memory of both.

    Raises:
        UserError: if it does not load here or there, or `adapter` is none or `model` is one.
    """
    probe = probe or Probe()
    checkpoint = inspect_checkpoint(model, revision, base)
    if adapter is not None and checkpoint.kind != "model":
        raise UserError(f"--adapter is for a merged model, and {model} is a part of one: leave it out.")
    processor = load_processor(model, revision, base=base)
    unmerged = None if adapter is None else _Unmerged.of(adapter, base, processor, probe)
    loaded: Any = load_model(model, processor, base=None if adapter else base, revision=revision)
    dtype = loaded.dtype
    reference = reference_outputs(loaded, processor, probe)
    against = None if unmerged is None else unmerged.compared_with(loaded, reference)
    del loaded, unmerged  # or two would be in memory
    found = verify(_downloaded(model, revision), reference, processor, probe, dtype, checkpoint.base)
    if against is None:
        return found
    differences = list(found.differences)
    if not against.logit_difference <= LOGIT_TOLERANCE[dtype]:  # also true for NaN
        differences.append(
            f"the logits differ from those of {adapter} in float32 by {against.logit_difference:.3g} of the largest "
            f"(allowed {LOGIT_TOLERANCE[dtype]:g})"
        )
    return replace(found, differences=differences, against_adapter=against)


@dataclass
class _Unmerged:
    """
    An adapter on its base in float32.

    Args:
        outputs: of [`reference_outputs`], before it was merged.
        whole: the same, merged in float32.
        learned (`float`): norm of what the adapter changes.
    """

    outputs: dict[str, torch.Tensor]
    whole: Any
    learned: float

    @classmethod
    def of(cls, adapter: str, base: str | None, processor: LlavaProcessor, probe: Probe) -> "_Unmerged":
        checkpoint = inspect_checkpoint(adapter, None, base)
        if not checkpoint.is_adapter:
            raise UserError(f"--adapter {adapter} is a whole model: give the adapter that was merged.")
        refuse_base_in_few_bits(checkpoint)
        model: Any = load_model(adapter, processor, base=base, dtype=torch.float32)
        outputs = reference_outputs(model, processor, probe)
        whole, rounding = merged(model, saved_weights(checkpoint, None))
        return cls(outputs, whole, rounding.learned)

    def compared_with(self, model: Any, outputs: dict[str, torch.Tensor]) -> AgainstAdapter:
        theirs, lost = model.state_dict(), 0.0
        for name, exact in self.whole.state_dict().items():
            if name in theirs and exact.is_floating_point() and exact.shape == theirs[name].shape:
                lost += float(torch.linalg.vector_norm(exact - theirs[name], dtype=torch.float64)) ** 2
        logits = self.outputs["logits"]
        if logits.shape == outputs["logits"].shape:
            difference = ((logits - outputs["logits"]).abs().max() / logits.abs().max()).item()
        else:
            difference = float("inf")  # another tokenizer
        return AgainstAdapter(difference, math.sqrt(lost) / self.learned if self.learned else 0.0)


def _downloaded(model: str, revision: str | None) -> Path:
    if Path(model).is_dir():
        return Path(model)
    try:
        return Path(snapshot_download(model, revision=revision))
    except (HTTPError, OSError, ValueError) as error:
        raise UserError(hub_refusal(error, model, revision) or f"{model} cannot be downloaded: {error}.") from error
