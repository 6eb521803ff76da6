"""What `merge`, `convert` and `export` share: a model is loaded, asked a question and written as another folder, which
gets its name only if a fresh process that loads it gives the same answer."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hf_llava_ft.checkpoints.artifact import staged_folder
from hf_llava_ft.checkpoints.inspection import Checkpoint
from hf_llava_ft.checkpoints.opening import load_model, load_processor
from hf_llava_ft.checkpoints.training_facts import training_facts
from hf_llava_ft.checkpoints.verify import Probe, Verification, reference_outputs, verify
from hf_llava_ft.errors import UserError
from hf_llava_ft.processing.processing_llava import LlavaProcessor


@dataclass
class Rewriting:
    """
    A model on its way into another folder.

    Args:
        folder (`Path`): where its files go until they have been checked.
        model: as it was loaded; for an adapter, PEFT's.
        processor (`LlavaProcessor`): the one that goes with it.
        probe (`Probe`): what is asked.
        reference (`dict[str, torch.Tensor]`): what the model in memory makes of `probe`, from `ask` on.
    """

    folder: Path
    model: Any
    processor: LlavaProcessor
    probe: Probe
    reference: dict[str, torch.Tensor] = field(default_factory=dict)

    def ask(self) -> None:
        self.reference = reference_outputs(self.model, self.processor, self.probe)

    def verify(
        self, complaint: str, dtype: torch.dtype, *, part: Path | None = None, base: str | None = None
    ) -> Verification:
        """
        Args:
            complaint (`str`): what is said if the answers differ; how they do is added.
            dtype (`torch.dtype`): of the weights.
            part (`Path`, *optional*): the folder inside the new one that is loaded; by default the whole.
            base (`str`, *optional*): of an adapter or projector.

        Raises:
            UserError: if the folder does not load, or answers otherwise than the model did.
        """
        found = verify(part or self.folder, self.reference, self.processor, self.probe, dtype, base)
        if not found.ok:
            raise UserError(f"{complaint}: {'; '.join(found.differences)}.")
        return found


@contextmanager
def rewriting(
    checkpoint: Checkpoint,
    output_dir: str | Path,
    *,
    revision: str | None,
    dtype: str,
    probe: Probe | None,
    fits_processor: bool = True,
    keeps_facts: bool = True,
) -> Iterator[Rewriting]:
    """
    Loads what is at `checkpoint`. What the block writes into `folder` appears as `output_dir` when the block ends
    well; else nothing stays there.

    Args:
        revision (`str`, *optional*): of `checkpoint.path` on the Hub.
        dtype (`str`): of the weights; `auto` keeps it.
        fits_processor (`bool`): whether the model gets the image token of the processor when it is loaded.
        keeps_facts (`bool`): whether what is known of the training goes along as `training.json`.

    Raises:
        UserError: if the model does not load, or `output_dir` is not empty or not writable.
    """
    facts = training_facts(checkpoint.path, revision) if keeps_facts else None
    with staged_folder(output_dir) as staged:
        processor = load_processor(checkpoint.path, revision, base=checkpoint.base)
        fitting = processor if fits_processor else None
        # In no variable of its own: who sets `draft.model = None` has the memory back.
        draft = Rewriting(
            staged,
            load_model(checkpoint.path, fitting, base=checkpoint.base, revision=revision, dtype=dtype),
            processor,
            probe or Probe(),
        )
        if facts is not None:
            facts.save(staged)
        yield draft


def save_for_others(model: Any, processor: LlavaProcessor, folder: Path) -> None:
    """Writes a whole model and its processor as transformers loads them: native, or with the code where it cannot be.
    Not in the original's format, even if the model came in it."""
    model.save_pretrained(folder, checkpoint_format="llava-hf" if model.config.is_native else "nested")
    processor.save_pretrained(folder)
