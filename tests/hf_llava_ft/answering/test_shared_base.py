"""Adapters of one base in one memory answer as each does alone, and the base as without them."""

import threading

import pytest
import torch
from PIL import Image

from hf_llava_ft.answering.conversation import Conversation
from hf_llava_ft.answering.loading import load_for_answering
from hf_llava_ft.answering.prompts import encode_prompt, question_content
from hf_llava_ft.answering.shared_base import BASE, SharedBase
from hf_llava_ft.checkpoints.inspection import inspect_checkpoint
from hf_llava_ft.errors import UserError

PICTURE = Image.linear_gradient("L").convert("RGB")


def loaded(folder):
    return SharedBase(*load_for_answering(str(folder), device="cpu"), inspect_checkpoint(str(folder)))


def logits(models, name, image):
    processor = models.processor(name)
    asked = [{"role": "user", "content": question_content("What is it?", 1)}]
    with models.active(name), torch.inference_mode():
        return models.model(**encode_prompt(models.model, processor, asked, [image])).logits


@pytest.mark.parametrize("first", ["one", "two", "the base"])
def test_each_answers_as_it_does_alone(adapters_of_one_base, tiny_checkpoint, first):
    start = tiny_checkpoint if first == "the base" else adapters_of_one_base / first
    models = loaded(start)
    for name in ("one", "two"):
        if name != first:
            models.add(str(adapters_of_one_base / name))
    base = tiny_checkpoint.name if first == "the base" else BASE
    assert set(models.names) == {"one", "two", base} and models.names[0] == start.name
    alone = {
        "one": loaded(adapters_of_one_base / "one"),
        "two": loaded(adapters_of_one_base / "two"),
        base: loaded(tiny_checkpoint),
    }
    expected = {name: logits(each, each.names[0], PICTURE) for name, each in alone.items()}
    assert not torch.equal(expected["one"], expected["two"]) and not torch.equal(expected["one"], expected[base])
    for name in ("two", "one", base, "one", "two", base, base, "two"):
        torch.testing.assert_close(logits(models, name, PICTURE), expected[name], rtol=0, atol=0)


def test_who_asks_meanwhile_waits(adapters_of_one_base):
    models = loaded(adapters_of_one_base / "one")
    found = []

    def ask():
        with models.active("one"):
            found.append("answered")

    with models.active(BASE):
        other = threading.Thread(target=ask)
        other.start()
        other.join(0.05)
        assert other.is_alive() and not found
    other.join(5)
    assert found == ["answered"]


def test_an_answer_that_nobody_reads_further_lets_others_ask(adapters_of_one_base):
    models = loaded(adapters_of_one_base / "one")

    def pieces():
        with models.active("one"):
            yield from Conversation(models.model, models.processor("one")).stream("Hello", max_new_tokens=50)

    abandoned = pieces()
    next(abandoned)
    del abandoned
    with models.active(BASE):
        pass


def test_what_cannot_share_a_base_is_refused(adapters_of_one_base, tiny_checkpoint, own_checkpoint):
    models = loaded(adapters_of_one_base / "one")
    for name in ("biased", "with_embeddings"):
        with pytest.raises(UserError, match="biases or embeddings of its base"):
            models.add(str(adapters_of_one_base / name))
    with pytest.raises(UserError, match="is no adapter that can share its base"):
        models.add(str(tiny_checkpoint))
    with pytest.raises(UserError, match="adapters share one base"):
        models.add(str(adapters_of_one_base / "two"), base=str(own_checkpoint))
    assert models.names == ["one", BASE]
    whole = loaded(tiny_checkpoint)
    for name in ("biased", "with_embeddings"):  # as the only model each answers, and there is no base beside it
        alone = loaded(adapters_of_one_base / name)
        assert alone.names == [name] and "changes biases or embeddings" in alone.why_no_base
        with pytest.raises(UserError, match="changes biases or embeddings"):
            alone.add(str(adapters_of_one_base / "two"))
        with pytest.raises(UserError, match="biases or embeddings of its base"):
            whole.add(str(adapters_of_one_base / name))
    assert whole.names == [tiny_checkpoint.name]
    models.add(str(adapters_of_one_base / "one"))
    assert models.names == ["one", BASE, "one (2)"]
