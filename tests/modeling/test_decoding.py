"""Pictures are seen once, in the first step; what the model generates after it is text, whatever id it has."""

import pytest
import torch
from transformers import GenerationConfig

NEW_TOKENS = 5


@pytest.fixture
def case(llava):
    """A model and its batch, without labels and padded on the left."""
    model = llava.model()
    batch = llava.batch(model, padding_side="left")
    del batch["labels"]
    return model, batch


@pytest.fixture
def tower_runs():
    """Counts the calls of a model's tower: `runs = tower_runs(model)`, then `len(runs)`."""

    def count(model) -> list[int]:
        runs: list[int] = []
        model.model.vision_tower.register_forward_hook(lambda module, inputs, outputs: runs.append(1))
        return runs

    return count


def generate(model, batch, **settings) -> torch.Tensor:
    """The new ids, greedy unless `settings` say otherwise."""
    settings = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, **settings}
    settings |= {"pad_token_id": 0, "eos_token_id": 2}
    return model.generate(**batch, generation_config=GenerationConfig(**settings))[:, batch["input_ids"].shape[1] :]


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"cache_implementation": "static"}], ids=str)
def test_a_generated_image_token_is_decoded_like_a_word(case, settings):
    model, batch = case
    image = model.config.image_token_id
    ids = generate(model, batch, sequence_bias=[[[image], 1e4]], **settings)
    assert (ids == image).all()
    assert not (generate(model, batch, **settings) == image).all()  # it is the bias that makes it do so


@pytest.mark.parametrize("num_beams", [1, 2])
def test_the_tower_runs_once_while_decoding(case, tower_runs, num_beams):
    model, batch = case
    runs = tower_runs(model)
    image = model.config.image_token_id
    for count, settings in enumerate([{}, {"sequence_bias": [[[image], 1e4]]}], start=1):
        generate(model, batch, num_beams=num_beams, **settings)
        assert len(runs) == count


@pytest.mark.parametrize("num_beams", [1, 2])
def test_the_tower_never_runs_for_text(case, tower_runs, num_beams):
    model, batch = case
    text = {name: batch[name][1:2] for name in ("input_ids", "attention_mask")}
    for training in (False, True):  # where a tower that trains would be tied into the graph, were there gradients
        runs = tower_runs(model.train(training))
        generate(model, text, num_beams=num_beams)
        assert not runs


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
def test_rows_of_a_batch_are_answered_as_alone(case, llava, settings):
    """Rows have one picture, none and two, so that each must find its own."""
    model, batch = case
    together = generate(model, batch, **settings)
    pictures = llava.pictures(batch)
    for row, which in enumerate([slice(0, 1), slice(0, 0), slice(1, 3)]):
        kept = batch["attention_mask"][row].bool()
        alone = {name: batch[name][row : row + 1, kept] for name in ("input_ids", "attention_mask")}
        if which.stop:
            alone |= {name: value[which] for name, value in pictures.items()}
        assert torch.equal(generate(model, alone, **settings)[0], together[row]), row
        if row == 2:  # negative control: its pictures in the other order give another answer
            alone["pixel_values"] = alone["pixel_values"].flip(0) + 1
            assert not torch.equal(generate(model, alone, **settings)[0], together[row])


def test_an_assistant_model_sees_the_pictures(tiny):
    model, assistant = tiny.model(), tiny.model()
    batch = tiny.batch()
    asked = {"input_ids": batch["input_ids"][:1], "pixel_values": batch["pixel_values"][:1]}
    asked["attention_mask"] = batch["attention_mask"][:1]
    seen = []

    def look(module, args, kwargs):
        seen.append(kwargs["pixel_values"] is not None or bool((kwargs["mm_encoder_outputs"] or {}).get("image")))

    assistant.model.register_forward_pre_hook(look, with_kwargs=True)
    alone = model.generate(**asked, max_new_tokens=8, do_sample=False)
    assisted = model.generate(**asked, max_new_tokens=8, do_sample=False, assistant_model=assistant)
    assert torch.equal(alone, assisted)
    assert seen[0] and not all(seen)  # in its first step alone


def test_shifted_labels_are_taken_as_they_are(tiny):
    model, batch = tiny.model(), tiny.batch()
    labels = batch.pop("labels")
    shifted = model.next_token_targets(labels, batch["input_ids"], batch["attention_mask"])
    with torch.no_grad():
        expected = model(**batch, labels=labels).loss
        torch.testing.assert_close(model(**batch, shift_labels=shifted).loss, expected, rtol=0, atol=0)
        assert model(**batch, shift_labels=shifted.roll(1, dims=1)).loss != expected
