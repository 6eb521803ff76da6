"""Head and loss a few rows at a time give the loss and all gradients of all rows at once."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

import hf_llava_ft.modeling.chunked_loss_llava as chunked
from hf_llava_ft.evaluation.token_losses import LossOverTokens


def small_pieces(monkeypatch, model, rows=2):
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 4 * rows * model.config.text_config.vocab_size)


def step(model, batch, **settings):
    """Loss, logits and gradients of a training step."""
    model.zero_grad()
    torch.manual_seed(0)
    outputs = model(**batch, supervised_logits_only=True, **settings)
    (3.0 * outputs.loss).backward()  # not 1: what comes in has to be multiplied
    gradients = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    return outputs, gradients


def assert_same(model, batch, monkeypatch, **settings):
    plain, expected = step(model, batch, **settings)
    assert plain.logits is not None and len(plain.logits) > 4
    with monkeypatch.context() as patch:
        small_pieces(patch, model)
        found, gradients = step(model, batch, **settings)
    assert found.logits is None  # it was in pieces
    torch.testing.assert_close(found.loss, plain.loss, rtol=1e-6, atol=1e-6)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=2e-6, msg=name)
    return gradients


@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(11)])
@pytest.mark.parametrize("smoothing", [None, 0.0, 0.1])
def test_pieces_give_loss_and_gradients_of_the_whole(tiny, monkeypatch, num_items, smoothing):
    model, batch = tiny.model().train(), tiny.batch()
    if smoothing is not None:
        model.loss_function = LossOverTokens(
            num_tokens=model.config.text_config.vocab_size - 2,
            image_token_id=model.config.image_token_id,
            label_smoothing=smoothing,
        )
    gradients = assert_same(model, batch, monkeypatch, num_items_in_batch=num_items)
    assert gradients["lm_head.weight"].any()


def test_a_head_that_is_frozen_tied_or_adapted(tiny, monkeypatch):
    frozen = tiny.model().train()
    frozen.lm_head.requires_grad_(False)
    assert "lm_head.weight" not in assert_same(frozen, tiny.batch(), monkeypatch)

    tied = tiny.model().train()
    tied.lm_head.weight = tied.get_input_embeddings().weight
    assert assert_same(tied, tiny.batch(), monkeypatch)["model.language_model.embed_tokens.weight"].any()

    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    adapted = get_peft_model(tiny.model(), config).train()
    gradients = assert_same(adapted, tiny.batch(), monkeypatch)
    assert any("lm_head.lora_B" in name and each.any() for name, each in gradients.items())


def test_gradients_add_up_over_micro_batches_and_in_bfloat16(tiny, monkeypatch):
    model, batch = tiny.model().train(), tiny.batch()
    small_pieces(monkeypatch, model)
    _, once = step(model, batch)
    outputs = model(**batch, supervised_logits_only=True)
    (3.0 * outputs.loss).backward()
    for name, each in model.named_parameters():
        if name in once:
            torch.testing.assert_close(each.grad, 2 * once[name], rtol=1e-5, atol=1e-6, msg=name)

    with torch.autocast("cpu", torch.bfloat16):
        outputs, half = step(model, batch)
    assert outputs.logits is None
    head, of_half = once["lm_head.weight"], half["lm_head.weight"]
    assert of_half.dtype == torch.float32 and (head - of_half).norm() < 0.03 * head.norm()


def test_only_large_steps_of_training_come_in_pieces(tiny, monkeypatch):
    assert chunked.rows_of_chunk(2000, 32_000) is None
    assert chunked.rows_of_chunk(3000, 32_000) == 1048
    assert chunked.rows_of_chunk(3, 2**40) == 1
    model, batch = tiny.model(), tiny.batch()
    small_pieces(monkeypatch, model)
    assert model.eval()(**batch, supervised_logits_only=True).logits is not None
    model.train()
    assert model(**batch).logits is not None
    with torch.no_grad():
        assert model(**batch, supervised_logits_only=True).logits is not None
    with torch.autocast("cpu", torch.float16):  # whose gradients are scaled in backward
        assert model(**batch, supervised_logits_only=True).logits is not None


def test_a_wrong_divisor_would_be_seen(tiny, monkeypatch):
    model, batch = tiny.model().train(), tiny.batch()
    plain, _ = step(model, batch)
    small_pieces(monkeypatch, model)
    whole = chunked.chunked_loss
    monkeypatch.setattr(  # each piece by its own number, as a mean of means has it
        "hf_llava_ft.modeling.modeling_llava.chunked_loss",
        lambda head, hidden, targets, loss, _, rows: whole(head, hidden, targets, loss, rows, rows),
    )
    assert not torch.isclose(step(model, batch)[0].loss, plain.loss, rtol=1e-3)
