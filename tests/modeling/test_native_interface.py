"""Whoever knows transformers' LLaVA finds the same calls, outputs and tuples here, in each release that we support."""

import inspect

import pytest
import torch
from transformers import LlavaForConditionalGeneration, LlavaModel
from transformers.utils import ModelOutput


@pytest.fixture
def both(llava, tmp_path):
    """Ours and the native model with the same weights, and a batch without labels."""
    model = llava.model()
    batch = llava.batch(model)
    del batch["labels"]
    return model, llava.native(model, tmp_path), batch


def assert_same(ours, theirs, at: str = ""):
    """Tensors, and tuples and lists of them, of equal type, length and value."""
    if isinstance(theirs, torch.Tensor):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5, msg=lambda text: f"{at}: {text}")
    elif isinstance(theirs, ModelOutput):
        assert isinstance(ours, ModelOutput), at
        assert list(ours.keys()) == list(theirs.keys()), at
        for name in theirs:
            assert_same(ours[name], theirs[name], f"{at}.{name}")
    elif isinstance(theirs, tuple | list):
        assert isinstance(ours, tuple | list) and not isinstance(ours, ModelOutput), at
        assert len(ours) == len(theirs), at
        for index, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_same(*pair, f"{at}[{index}]")
    else:  # a cache
        assert type(ours) is type(theirs), at


def test_a_comparison_of_other_tuples_fails():
    one = torch.ones(2)
    for ours, theirs in [((one,), (one, one)), (one + 1, one), ([one], (one + 1,)), (ModelOutput(a=one), (one,))]:
        with pytest.raises(AssertionError):
            assert_same(ours, theirs)


def without_pictures(outputs) -> list[str]:
    return [name for name in outputs.keys() if name not in ("image_outputs", "image_hidden_states")]


@torch.no_grad()
def test_outputs_have_the_names_and_values_of_native(both, llava):
    model, native, batch = both
    wanted = {"output_hidden_states": True, "output_attentions": True}
    model.set_attn_implementation("eager")
    native.set_attn_implementation("eager")
    for mine, theirs in [(model.model, native.model), (model, native)]:
        ours, other = mine(**batch, **wanted), theirs(**batch, **wanted)
        assert without_pictures(ours) == without_pictures(other)  # `cache` or `past_key_values` among them
        for name in without_pictures(other):
            assert_same(ours[name], other[name], name)
        if "image_outputs" in other:
            assert_same(list(ours.image_outputs.pooler_output), list(other.image_outputs.pooler_output))
        else:
            assert_same(ours.image_hidden_states, other.image_hidden_states)
        # Ours have it in all releases, picture by picture.
        assert len(ours.image_outputs.pooler_output) == 3
        assert ours.image_outputs.pooler_output[0].shape[1] == 64


@torch.no_grad()
@pytest.mark.parametrize("said_in", ["call", "config"])
def test_tuples_are_those_of_native(both, said_in):
    model, native, batch = both
    said = {"return_dict": False} if said_in == "call" else {}
    if said_in == "config":  # with which the native LLaVA-1.5 fails in 5.24: it reads fields of its own tuple
        model.config.return_dict = False
    for mine, theirs in [(model.model, native.model), (model, native)]:
        ours, other = mine(**batch, **said), theirs(**batch, return_dict=False)
        assert type(ours) is tuple and len(ours) == len(other)
        assert_same(ours[:-1], other[:-1])
        if isinstance(other[-1], tuple):  # since transformers 5.24; before it was one tensor
            assert_same(tuple(ours[-1][1]), tuple(other[-1][1]))
        else:
            assert_same(torch.cat(tuple(ours[-1][1])), other[-1])


@torch.no_grad()
def test_a_tuple_begins_with_the_loss_where_there_are_labels(both):
    model, native, batch = both
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels = labels.masked_fill(labels == model.config.image_token_id, -100)
    ours = model(**batch, labels=labels, return_dict=False)
    assert_same(ours[:2], native(**batch, labels=labels, return_dict=False)[:2])
    assert ours[0].dim() == 0


@torch.no_grad()
@pytest.mark.parametrize("head", [True, False])
def test_image_features_are_those_of_native(both, llava, head):
    model, native, batch = both
    pictures = llava.pictures(batch)
    mine, theirs = (model, native) if head else (model.model, native.model)
    ours, other = mine.get_image_features(**pictures), theirs.get_image_features(**pictures)
    assert_same(list(ours.pooler_output), list(other.pooler_output))
    as_tuple = mine.get_image_features(**pictures, return_dict=False)
    native_tuple = theirs.get_image_features(**pictures, return_dict=False)
    assert type(as_tuple) is tuple
    assert_same(as_tuple[0], ours.last_hidden_state)
    assert_same(list(as_tuple[1]), list(native_tuple[1]))
    assert_same(list(as_tuple[1]), list(ours.pooler_output))


@torch.no_grad()
def test_the_first_arguments_may_be_given_by_position(both, llava):
    model, native, batch = both
    positions = torch.arange(batch["input_ids"].shape[1])[None].expand_as(batch["input_ids"])
    first = ("input_ids", "pixel_values")
    if llava.kind == "square":  # the native LLaVA-1.6 has image_sizes in third place, where ours has the mask
        first += ("attention_mask", "position_ids")
        for mine, theirs in [
            (model.model.forward, LlavaModel.forward),
            (model.forward, LlavaForConditionalGeneration.forward),
        ]:
            assert list(inspect.signature(mine).parameters)[:4] == list(first)
            assert list(inspect.signature(theirs).parameters)[1:5] == list(first)
    given = {**batch, "position_ids": positions}
    by_position = [given.pop(name) for name in first]
    assert_same(model(*by_position, **given).logits, native(*by_position, **given).logits)


@torch.no_grad()
def test_image_outputs_may_be_given_instead_of_pictures(both, llava):
    model, _, batch = both
    pictures = llava.pictures(batch)
    text = {name: value for name, value in batch.items() if name not in pictures}
    found = model.get_image_features(**pictures)
    assert_same(model(**text, mm_encoder_outputs={"image": found}).logits, model(**batch).logits)
    with pytest.raises(ValueError, match="either pixel_values or"):
        model(**batch, mm_encoder_outputs={"image": found})


def test_a_trainer_finds_the_labels_that_it_finds_in_native_llava(tiny):
    """It takes every argument with "label" in its name for labels, and without one of them there is no eval_loss."""
    from transformers import LlavaForConditionalGeneration
    from transformers.utils.generic import find_labels

    assert find_labels(type(tiny.model())) == find_labels(LlavaForConditionalGeneration) == ["labels"]
