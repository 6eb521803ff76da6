"""The dropout of LoRA's inputs on a CPU, against what `torch.nn.Dropout` promises."""

import math

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from hf_llava_ft.training import lora_dropout
from hf_llava_ft.training.lora_dropout import LoraDropout, kept_elements


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_each_element_is_dropped_with_the_probability_asked_for(p):
    torch.manual_seed(0)
    kept = kept_elements(torch.Size((1000, 999)), p).double()
    error = math.sqrt(p * (1 - p))
    assert abs(kept.mean() - (1 - p)) < 5 * error / math.sqrt(kept.numel())
    # Nor does it depend on the place, or on a neighbour: rows, columns, and pairs in both directions.
    for mean in (kept.mean(0), kept.mean(1)):
        assert (mean - (1 - p)).abs().max() < 6 * error / math.sqrt(999)
    for step in range(1, 9):
        for one, other in ((kept[:, step:], kept[:, :-step]), (kept[step:], kept[:-step])):
            together = ((one - (1 - p)) * (other - (1 - p))).mean() / error**2
            assert abs(together) < 5 / math.sqrt(kept.numel())


def test_masks_of_one_generator_would_be_seen(monkeypatch):
    monkeypatch.setattr(torch, "randint", lambda *_: torch.tensor(3))
    one, other = (kept_elements(torch.Size((100, 100)), 0.5).double() for _ in range(2))
    assert ((one - 0.5) * (other - 0.5)).mean() == 0.25


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_what_is_kept_is_scaled_as_by_pytorch_and_so_is_its_gradient(dtype):
    torch.manual_seed(0)
    x = (torch.rand(37, 51) + 1).to(dtype).requires_grad_()
    dropped = LoraDropout(0.25)(x)
    dropped.backward(torch.full_like(dropped, 3))
    kept = dropped != 0
    assert dropped.dtype == x.grad.dtype == dtype and 0 < kept.float().mean() < 1
    torch.testing.assert_close(dropped, torch.where(kept, x / 0.75, 0).to(dtype))
    torch.testing.assert_close(x.grad, torch.where(kept, torch.tensor(4.0), 0.0).to(dtype))


def gradients(module: nn.Module, recompute: bool, seed: int = 1) -> torch.Tensor:
    torch.manual_seed(0)
    matrix = torch.rand(8, 8, requires_grad=True)
    torch.manual_seed(seed)
    torch.rand(2)  # the mask is of the generator's state, not of its seed
    block = lambda a: module(a).sin() @ a  # noqa: E731
    (checkpoint(block, matrix, use_reentrant=False) if recompute else block(matrix)).sum().backward()
    return matrix.grad


def test_computed_again_it_drops_the_same(monkeypatch):
    plain = gradients(LoraDropout(0.5), recompute=False)
    assert torch.equal(plain, gradients(LoraDropout(0.5), recompute=True))
    assert not torch.equal(plain, gradients(LoraDropout(0.5), recompute=False, seed=2))
    # The control: a generator that nobody winds back.
    elsewhere = torch.Generator().manual_seed(5)
    randint = torch.randint
    monkeypatch.setattr(lora_dropout.torch, "randint", lambda *args: randint(*args, generator=elsewhere))
    assert not torch.equal(plain, gradients(LoraDropout(0.5), recompute=True))


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_all_or_nothing_is_left_to_pytorch(p):
    x = torch.rand(5, 7)
    assert torch.equal(LoraDropout(p)(x), nn.Dropout(p)(x))


def test_evaluation_drops_nothing():
    x = torch.rand(5, 7)
    assert LoraDropout(0.5).eval()(x) is x


def test_compiled_layers_draw_as_pytorch_does(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    x = torch.rand(5, 7)
    torch.manual_seed(0)
    ours = LoraDropout(0.5)(x)
    torch.manual_seed(0)
    assert torch.equal(ours, nn.Dropout(0.5)(x))


def held_for_the_gradient(module: nn.Module) -> int:
    """Bytes, beside the input."""
    x, held = torch.rand(64, 32, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda kept: held.append(kept) or kept, lambda kept: kept):
        module(x)
    return sum(each.numel() * each.element_size() for each in held)


def test_a_byte_an_element_is_held_for_the_gradient_and_estimated_so():
    assert held_for_the_gradient(LoraDropout(0.5)) == 64 * 32
    assert held_for_the_gradient(nn.Dropout(0.5)) == 64 * 32 * 4
    with FakeTensorMode():
        assert held_for_the_gradient(LoraDropout(0.5)) == 64 * 32


def test_other_devices_draw_as_pytorch_does():
    assert not torch.equal(LoraDropout(0.5)(torch.ones(9, 9)), torch.ones(9, 9))
    assert LoraDropout(0.5)(torch.rand(5, 7, device="meta")).shape == (5, 7)


def test_an_empty_input_has_nothing_to_drop():
    assert LoraDropout(0.5)(torch.rand(0, 7)).shape == (0, 7)
