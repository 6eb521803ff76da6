"""Gradient checkpointing does not send a gradient through a tower that does not train."""

import pytest
import torch
from transformers import PreTrainedModel
from transformers.models.clip.modeling_clip import CLIPEncoderLayer


def layers_run(model, batch: dict, monkeypatch) -> tuple[int, dict[str, torch.Tensor]]:
    """How often layers of the tower run in a step, and the gradients of the step."""
    runs = []
    for layer in model.modules():
        if isinstance(layer, CLIPEncoderLayer):
            monkeypatch.setattr(layer.mlp, "forward", counted(layer.mlp.forward, runs))
    model.zero_grad()
    model(**batch, use_cache=False).loss.backward()
    return len(runs), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def counted(forward, runs: list):
    def run(*args, **kwargs):
        runs.append(None)
        return forward(*args, **kwargs)

    return run


def frozen(model):
    model.model.vision_tower.requires_grad_(False)
    return model.train()


def test_a_frozen_tower_runs_once_and_the_gradients_are_the_same(tiny, monkeypatch):
    plain, expected = layers_run(frozen(tiny.model()), tiny.batch(), monkeypatch)
    model = frozen(tiny.model())
    model.gradient_checkpointing_enable()
    once, found = layers_run(model, tiny.batch(), monkeypatch)
    assert once == plain == 3 and found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)

    # Without ours, transformers runs the layers again that a gradient reaches: all but the last.
    theirs = frozen(tiny.model())
    monkeypatch.setattr(type(theirs), "enable_input_require_grads", PreTrainedModel.enable_input_require_grads)
    theirs.gradient_checkpointing_enable()
    assert layers_run(theirs, tiny.batch(), monkeypatch)[0] == 5


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_tower_that_trains_gets_its_gradients(tiny, monkeypatch, reentrant):
    _, expected = layers_run(tiny.model().train(), tiny.batch(), monkeypatch)
    model = tiny.model().train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    runs, found = layers_run(model, tiny.batch(), monkeypatch)
    assert runs == 5 and found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_gradient_of_the_pictures_flows_through_a_frozen_tower(tiny):
    model, batch = frozen(tiny.model()), tiny.batch()
    model.gradient_checkpointing_enable()
    batch["pixel_values"].requires_grad_(True)
    model(**batch, use_cache=False).loss.backward()
    assert batch["pixel_values"].grad.any()
    model.disable_input_require_grads()
    assert not model.model.vision_tower.get_input_embeddings()._forward_hooks
