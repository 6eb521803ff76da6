"""Any two settings together are settings, or one sentence."""

import dataclasses
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_llava_ft.errors import UserError
from hf_llava_ft.settings.parsing import resolve
from hf_llava_ft.settings.resolved import ARGUMENT_CLASSES
from tests.examples import examples

MINIMAL = ("--model_name_or_path", "m", "--data_path", "d.json", "--output_dir", "o")
FIELDS = sorted({field.name for kind in ARGUMENT_CLASSES for field in dataclasses.fields(kind) if field.init})
# What a value may look like, whatever the setting takes.
WORDS = st.sampled_from(
    ["True", "False", "no", "0", "1", "2", "-1", "0.5", "1e-4", "1e400", "nan", "", "auto", "steps", "epoch", "best"]
    + ["lora", "qlora", "full", "float32", "bfloat16", "adamw_torch", "cosine", "pad", "none", "all", "{}", "[1]", "ü"]
    + ["random", "length", "original", "micro_batch", "upright", "1,2", "/", "--", "\x00", "9" * 30]
)


def values_of(name: str):
    """Words that the setting takes where its type names them, and any."""
    for kind in ARGUMENT_CLASSES:
        named = typing.get_type_hints(kind).get(name)
        words = [word for part in (named, *typing.get_args(named)) for word in typing.get_args(part)]
        words = [str(word) for word in words if isinstance(word, str)]
        if words:
            return st.one_of(st.sampled_from(words), WORDS)
    return WORDS


PAIRS = st.lists(st.sampled_from(FIELDS).flatmap(lambda name: st.tuples(st.just(name), values_of(name))), max_size=2)


@examples(150)
@given(pairs=PAIRS)
def test_any_two_settings_are_taken_or_refused_in_a_sentence(pairs):
    words = [word for name, value in pairs for word in (f"--{name}={value}",)]
    try:
        shown = resolve([*MINIMAL, *words])
        text = shown.to_json()
    except UserError as error:
        assert error.sentence and "\n" not in error.sentence
        return
    other_way = resolve([*MINIMAL, *reversed(words)])
    assert len({name for name, _ in pairs}) < len(pairs) or other_way.to_json() == text


def test_two_that_contradict_each_other_are_among_them():
    with pytest.raises(UserError, match="At most one of fp16 and bf16"):
        resolve([*MINIMAL, "--bf16=True", "--fp16=True"]).to_json()
