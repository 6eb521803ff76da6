"""One base in memory, asked as itself and with each of its adapters in turn."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel

from hf_llava_ft.checkpoints.adapters import add_adapter, changes_base, with_adapter
from hf_llava_ft.checkpoints.inspection import Checkpoint, inspect_checkpoint
from hf_llava_ft.checkpoints.opening import fit_to_processor, load_processor
from hf_llava_ft.errors import UserError

BASE = "base"  # the name of the model without any adapter


class SharedBase:
    """
    Args:
        model, processor: as [`~hf_llava_ft.answering.loading.load_for_answering`] gives them.
        checkpoint (`Checkpoint`, *optional*): what they were loaded from.
        revision (`str`, *optional*): that it was loaded at.

    Attributes:
        names (`list[str]`): by which it can be asked, the one that was loaded first.
    """

    def __init__(self, model: Any, processor: Any, checkpoint: Checkpoint | None = None, revision: str | None = None):
        self.model, self._checkpoint = model, checkpoint
        is_adapter = checkpoint is not None and checkpoint.kind == "adapter"
        self._base_is_changed = is_adapter and changes_base(checkpoint.path, revision)
        self.names = [Path(checkpoint.path).name or checkpoint.path] if checkpoint else ["model"]
        self._processors = {self.names[0]: processor}
        # What PEFT calls each; there is nothing to switch where a whole model stands alone.
        self._adapters = {self.names[0]: "default"} if isinstance(model, PeftModel) else {}
        self._turn = threading.Lock()
        if self._adapters and self.why_no_base is None:
            self._add_name(BASE, processor)

    @property
    def why_no_base(self) -> str | None:
        """Why the base cannot be asked; `None` where it can."""
        if not self._adapters:
            return "this model is no adapter, so that it has no base here: chat with --model ADAPTER."
        if self._checkpoint and self._checkpoint.kind == "original_lora":
            return "a LoRA folder of the original brings a projector for its base, which is no LLaVA without it."
        if self._base_is_changed:
            return (
                "this adapter changes biases or embeddings of its base, so that the base is not here: evaluate has "
                "--base."
            )
        return None

    def processor(self, name: str) -> Any:
        return self._processors[name]

    @contextmanager
    def active(self, name: str) -> Iterator[None]:
        """Inside, the model answers as `name`; one at a time, and others wait."""
        with self._turn:
            if name in self._adapters:
                self.model.set_adapter(self._adapters[name], inference_mode=True)
                yield
            elif self._adapters:
                with self.model.disable_adapter():
                    yield
            else:
                yield

    def add(self, adapter: str, base: str | None = None) -> None:
        """
        Takes one more adapter of this base.

        Args:
            adapter (`str`): folder or Hub id.
            base (`str`, *optional*): instead of the base that it names.

        Raises:
            UserError: if it is none, or one of another base, or cannot share it.
        """
        checkpoint = inspect_checkpoint(adapter, base=base)
        own = self._checkpoint
        if checkpoint.kind != "adapter" or (own and own.kind not in ("adapter", "model")):
            what = adapter if checkpoint.kind != "adapter" else own.path if own else "the model"
            raise UserError(f"--adapter {adapter}: {what} is no adapter that can share its base; ask it alone.")
        if own and not _is_same(checkpoint.base, own.base):
            raise UserError(
                f"--adapter {adapter} is of the base {checkpoint.base}, and the model is of {own.base}: adapters "
                f"share one base; if both are the same, say so with --base."
            )
        if own and own.revision and checkpoint.revision and own.revision != checkpoint.revision:
            raise UserError(
                f"--adapter {adapter} is of {checkpoint.base} at revision {checkpoint.revision}, and the model of "
                f"{own.revision}: adapters share one base; if both are the same, say so with --base."
            )
        if self._adapters and self.why_no_base:
            raise UserError(f"--adapter {adapter}: {self.why_no_base}")
        if changes_base(adapter):
            raise UserError(
                f"--adapter {adapter} brings biases or embeddings of its base, so that it can share it with no other: "
                f"give it as the only model, or merge it."
            )
        processor = load_processor(adapter, base=base)
        self._check(adapter, processor)
        called = f"adapter_{len(self._adapters)}" if self._adapters else "default"
        if self._adapters:
            add_adapter(self.model, adapter, called)
        else:
            self.model = with_adapter(self.model, adapter)
        self._adapters[self._add_name(Path(adapter).name or adapter, processor)] = called
        fit_to_processor(self.model.get_base_model(), processor)  # answers end where its template ends them, too

    def _check(self, adapter: str, processor: Any) -> None:
        """Another template is fine; other ids or pictures are not."""
        own = self._processors[self.names[0]]
        for what, given, has in (
            ("id of <image>", processor.image_token_id, own.image_token_id),
            ("number of tokens", len(processor.tokenizer), len(own.tokenizer)),
            ("way of opening pictures", processor.picture_opening, own.picture_opening),
        ):
            if given != has:
                raise UserError(f"--adapter {adapter} has {given} for the {what}, the model {has}; ask it alone.")

    def _add_name(self, name: str, processor: Any) -> str:
        number = 1
        found = name
        while found in self._processors:
            number += 1
            found = f"{name} ({number})"
        self._processors[found] = processor
        self.names.append(found)
        return found


def _is_same(one: str, other: str) -> bool:
    if Path(one).is_dir() and Path(other).is_dir():
        return Path(one).resolve() == Path(other).resolve()
    return one == other
