"""Under `torch.compile(fullgraph=True)` the model gives what it gives without: decoding with a static cache, and a
training step of fixed shape as one graph.

The model runs once without the compiler first: in its first run transformers installs hooks into the tower, under a
lock that no graph can hold.
"""

from copy import deepcopy

import pytest
import torch
from transformers import GenerationConfig


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def static_generation(model, batch) -> torch.Tensor:
    settings = GenerationConfig(
        max_new_tokens=6, min_new_tokens=6, do_sample=False, cache_implementation="static", pad_token_id=0
    )
    return model.generate(**batch, generation_config=settings)


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("has_pictures", [True, False])
def test_decoding_with_a_static_cache_compiles_as_one_graph(llava, backend, has_pictures):
    model = llava.model()
    batch = llava.batch(model, padding_side="left")
    del batch["labels"]
    if not has_pictures:
        batch = {name: batch[name][1:2] for name in ("input_ids", "attention_mask")}
    expected = static_generation(model, batch)
    eager_forward, steps = model.forward, []
    decode = torch.compile(eager_forward, backend=backend, fullgraph=True)

    def forward(*args, **kwargs):  # the first step, whose length is another each time, stays eager, as in transformers
        length = kwargs["input_ids"].shape[1]
        steps.append(length)
        return (eager_forward if length > 1 else decode)(*args, **kwargs)

    forward.__wrapped__ = eager_forward  # generate() reads the signature
    model.forward = forward
    assert torch.equal(static_generation(model, batch), expected)
    assert steps == [batch["input_ids"].shape[1], 1, 1, 1, 1, 1]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("has_pictures", [True, False])
def test_a_training_step_of_fixed_shape_compiles_as_one_graph(tiny, backend, has_pictures):
    model = tiny.model().train()
    batch = tiny.batch()
    batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
    if not has_pictures:
        batch = {name: batch[name][1:2] for name in ("input_ids", "attention_mask", "labels")}
    eager = model(**batch)
    eager.loss.backward()
    expected = gradients(model)
    assert len(expected) > 50
    model.zero_grad()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    outputs = compiled(**batch)
    outputs.loss.backward()
    torch.testing.assert_close(outputs.loss, eager.loss, rtol=1e-6, atol=0)
    found = gradients(model)
    assert found.keys() >= expected.keys()
    for name, gradient in found.items():  # zero instead of none where the loss does not depend on a parameter
        wanted = expected.get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: name + text)
    # Negative control: the comparison sees other pictures, and other words.
    model.zero_grad()
    other = deepcopy(batch)
    other["input_ids"][0, 2] += 1
    if has_pictures:
        other["pixel_values"] = other["pixel_values"].flip(0)
    compiled(**other).loss.backward()
    changed = gradients(model)
    assert any((changed[name] - wanted).abs().max() > 1e-3 for name, wanted in expected.items())


def test_wrong_counts_are_still_refused_without_the_compiler(tiny):
    model, batch = tiny.model(), tiny.batch()
    model(**batch)
    torch.compile(model, backend="eager", fullgraph=True)(**batch)
    batch["input_ids"][0, 5] = 7
    with pytest.raises(ValueError, match="47 image placeholders, but 3 images give 48 features"):
        model(**batch)
    del batch["pixel_values"]
    with pytest.raises(ValueError, match="47 image placeholders, but there are no pixel_values"):
        model(**batch)
