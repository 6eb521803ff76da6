"""How many bytes of tensors are alive, now and at most, while a model runs."""

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary


class BytesAlive(TorchDispatchMode):
    """Sums the storages that operations make and that something still holds; those of `model` do not count."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.now = self.peak = 0.0
        # Fake tensors that are computed again in the backward pass end in cycles; real ones are freed at once.
        self.collects = False
        self._known = WeakIdKeyDictionary()
        for tensor in (*model.parameters(), *model.buffers()):
            self._known[tensor.untyped_storage()] = True

    def start_peak_anew(self) -> float:
        """Returns the peak so far."""
        peak, self.peak = self.peak, self.now
        return peak

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for result in _tensors(results):
            self._hold(result.untyped_storage())
        return results

    def _hold(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known[storage] = True
        size = storage.nbytes()
        self.now += size
        if self.now > self.peak:
            if self.collects:
                gc.collect()
            self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.now -= size


def _tensors(results: Any) -> Iterator[torch.Tensor]:
    """Those that an operation returns: one, or several in a tuple or list."""
    if isinstance(results, torch.Tensor):
        yield results
    elif isinstance(results, tuple | list):
        for result in results:
            yield from _tensors(result)
