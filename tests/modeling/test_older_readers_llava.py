"""The settings of a native LLaVA, in the words of transformers 4 beside those of transformers 5. That both read the
same is in `tests/test_older_readers.py`."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import hf_llava_ft
from hf_llava_ft.modeling.older_readers_llava import rope_for_older_readers, write_config_for_older_readers


@pytest.mark.parametrize(
    ("parameters", "older"),
    [
        (None, {}),
        ({"rope_type": "default", "rope_theta": 1e6}, {"rope_theta": 1e6}),
        (
            {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
            {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 4.0}},
        ),
        (
            {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
            {"rope_theta": 1e4, "partial_rotary_factor": 0.5},
        ),
        (
            {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
            {
                "rope_theta": 1e6,
                "rope_local_base_freq": 1e4,
                "rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 8.0},
            },
        ),
    ],
)
def test_the_rotary_embedding_in_older_words(parameters, older):
    assert rope_for_older_readers(parameters) == older


def settings_of(folder) -> dict:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("tie", [False, True])
def test_both_levels_say_whether_embeddings_are_tied_and_which_dtype_it_is(tiny, tmp_path, tie):
    tiny.model(tie=tie).to(torch.bfloat16).save_pretrained(tmp_path)
    config = settings_of(tmp_path)
    assert config["tie_word_embeddings"] is config["text_config"]["tie_word_embeddings"] is tie
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    generation = json.loads((tmp_path / "generation_config.json").read_text(encoding="utf-8"))
    assert "_from_model_config" not in generation


def test_tied_embeddings_with_another_head_in_a_shard_of_its_own_are_not_tied(tiny, tmp_path):
    tiny.model(tie=True).save_pretrained(tmp_path)
    embeddings = load_file(tmp_path / "model.safetensors")["language_model.model.embed_tokens.weight"]
    head = {"language_model.lm_head.weight": embeddings.clone()}
    save_file(head, tmp_path / "model-2.safetensors")
    write_config_for_older_readers(tmp_path)
    assert settings_of(tmp_path)["tie_word_embeddings"] is True  # the same twice
    save_file({name: weight + 1 for name, weight in head.items()}, tmp_path / "model-2.safetensors")
    write_config_for_older_readers(tmp_path)
    config = settings_of(tmp_path)
    assert config["tie_word_embeddings"] is config["text_config"]["tie_word_embeddings"] is False


def test_the_same_rotary_embedding_is_read_again(tiny, tmp_path):
    rope = {"rope_type": "linear", "rope_theta": 5e4, "factor": 4.0}
    tiny.model(rope=rope).save_pretrained(tmp_path)
    read = hf_llava_ft.LlavaConfig.from_pretrained(tmp_path).text_config.rope_parameters
    assert {name: read[name] for name in rope} == rope


def test_our_own_format_and_the_original_are_left_alone(tiny, tmp_path):
    tiny.model(projector_type="linear").save_pretrained(tmp_path, checkpoint_format="nested")
    assert "rope_theta" not in settings_of(tmp_path)["text_config"]
