"""Loss and gradients of one optimiser step of a `LlavaTrainer`, and whether two are the same."""

import torch


def step_of(trainer, batches, items=None):
    """Loss and gradients of a step of these micro-batches, as the Trainer accumulates them."""
    trainer.model.train()
    trainer.model.zero_grad()
    items = sum((batch["labels"] != -100).sum() for batch in batches) if items is None else items
    losses = []
    for batch in batches:
        loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch), num_items_in_batch=items)
        loss.backward()
        losses.append(loss.detach())
    weights = trainer.model.named_parameters()
    return sum(losses), {name: each.grad.clone() for name, each in weights if each.grad is not None}


def assert_same(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-6)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in found[1].items():
        scale = float(expected[1][name].abs().max())
        torch.testing.assert_close(gradient, expected[1][name], rtol=1e-4, atol=2e-5 * scale + 1e-9, msg=name)


def is_same(found, expected):
    try:
        assert_same(found, expected)
    except AssertionError:
        return False
    return True
