"""How much a run reads: samples, tokens and supervised tokens."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed


@dataclass(frozen=True)
class Counts:
    """
    Args:
        samples (`int`): rows.
        tokens (`int`): positions that are no padding, those of images among them.
        supervised_tokens (`int`): positions that the loss is of.
    """

    samples: int
    tokens: int
    supervised_tokens: int


class Throughput:
    """
    Counts what this process trains on, from when it was started.

    The sums are kept on the device of the batches, so that counting waits for nothing.

    Attributes:
        paused_seconds (`float`): spent in what is no training, evaluation above all.
    """

    def __init__(self):
        self.paused_seconds = 0.0
        self._samples = 0
        self._tokens: torch.Tensor | None = None  # int64[2]: tokens, supervised tokens
        self._started: float | None = None

    def start(self) -> None:
        """Begins the time that [`training_seconds`] counts; what was counted before is forgotten."""
        self.paused_seconds, self._samples, self._tokens = 0.0, 0, None
        self._started = time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The time inside is that of no training."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.paused_seconds += time.monotonic() - started

    def count(self, batch: dict[str, Any]) -> None:
        """
        Args:
            batch: with `input_ids`, `attention_mask` and `labels`, each `int64[B, T]`; one without them, of another
                collator, is not counted.
        """
        if not all(isinstance(batch.get(name), torch.Tensor) for name in ("input_ids", "attention_mask", "labels")):
            return
        mask, labels = batch["attention_mask"], batch["labels"]
        sums = torch.stack((mask.sum(), labels.ne(-100).sum()))
        self._samples += batch.get("num_rows", len(batch["input_ids"]))
        self._tokens = sums if self._tokens is None else self._tokens + sums.to(self._tokens.device)

    def local(self) -> Counts:
        """Of this process. Waits for the device."""
        tokens, supervised = (0, 0) if self._tokens is None else self._tokens.tolist()
        return Counts(self._samples, tokens, supervised)

    def total(self, device: torch.device) -> Counts:
        """Of all processes, each of which has to call it; `device` is where they can talk to each other."""
        local = self.local()
        sums = torch.tensor([local.samples, local.tokens, local.supervised_tokens], device=device)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        return Counts(*sums.tolist())

    def training_seconds(self) -> float:
        """Since the start, without the pauses."""
        return 0.0 if self._started is None else time.monotonic() - self._started - self.paused_seconds
