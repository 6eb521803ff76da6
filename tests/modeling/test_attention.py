"""Eager attention and sdpa give the same logits and gradients, with pictures, in every dtype and padding.

transformers' own tests compare them on placeholders without pictures, which our model refuses.
"""

import pytest
import torch

# Largest difference of a logit, and of a gradient to the largest one of its parameter. Both attentions round
# differently; logits are about 5 wide here. See the negative control for what a wrong mask does.
TOLERANCES = {torch.float32: (2e-5, 2e-5), torch.bfloat16: (0.15, 0.1), torch.float16: (0.03, 0.03)}


def results(model, batch: dict, attention: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits where there is a token, and gradients of the loss."""
    model.set_attn_implementation(attention)
    model.zero_grad()
    outputs = model(**batch)
    outputs.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return outputs.logits.detach().float(), {name: gradient.float().clone() for name, gradient in gradients.items()}


def differences(ours, theirs, tokens: torch.Tensor) -> tuple[float, float]:
    logits = (ours[0] - theirs[0])[tokens].abs().max().item()
    assert ours[1].keys() == theirs[1].keys()
    gradients = [
        (ours[1][name] - wanted).abs().max() / wanted.abs().max()
        for name, wanted in theirs[1].items()
        if wanted.abs().max() > 1e-4
    ]
    assert len(gradients) > 50
    return logits, max(gradients).item()


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"])
def dtype(request):
    return request.param


@pytest.fixture(params=["left", "right"])
def case(request, llava, dtype):
    """A model in training and a batch for it, and where the batch holds tokens."""
    model = llava.model().train()
    batch = llava.batch(model, padding_side=request.param)
    tokens = batch["attention_mask"].bool()
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    return model.to(dtype), batch, tokens


def test_eager_and_sdpa_agree(case, dtype):
    model, batch, tokens = case
    eager = results(model, batch, "eager")
    assert model.model.language_model.config._attn_implementation == "eager"
    assert model.model.vision_tower.config._attn_implementation == "eager"
    sdpa = results(model, batch, "sdpa")
    assert model.model.language_model.config._attn_implementation == "sdpa"
    logits, gradients = differences(sdpa, eager, tokens)
    assert logits <= TOLERANCES[dtype][0] and gradients <= TOLERANCES[dtype][1]


@pytest.mark.parametrize("llava", ["square"], indirect=True)
def test_a_mask_that_lets_one_position_too_many_through_is_noticed(case, dtype):
    model, batch, tokens = case
    eager = results(model, batch, "eager")
    length = tokens.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool).tril(diagonal=1) & tokens[:, None, :]
    leaking = {**batch, "attention_mask": seen[:, None] | torch.eye(length, dtype=torch.bool)}
    logits, gradients = differences(results(model, leaking, "sdpa"), eager, tokens)
    assert logits > 2 * TOLERANCES[dtype][0] and gradients > 2 * TOLERANCES[dtype][1]


@pytest.mark.parametrize("llava", ["square"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32], ids=["float32"], indirect=True)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_is_not_seen(case, attention):
    model, batch, tokens = case
    other = {**batch, "input_ids": batch["input_ids"].masked_fill(~tokens, 7)}
    logits, gradients = differences(results(model, other, attention), results(model, batch, attention), tokens)
    assert logits <= 1e-6 and gradients <= 1e-6
