"""The files of a processor, in the words of transformers 4 beside those of transformers 5. That both read the same is
in `tests/test_older_readers.py`."""

import json

import pytest

from hf_llava_ft.processing.older_readers_processing_llava import write_for_older_readers

ALONE = {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers", "extra_special_tokens": ["<image>"]}


def tokenizer_settings(folder) -> dict:
    return json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("kind", ["llama", "legacy", "byte-level"])
def test_a_processor_is_saved_for_both(processor_for, tmp_path, kind):
    processor = processor_for(kind, "chatml" if kind == "byte-level" else "v1")
    processor.save_pretrained(tmp_path)
    settings = tokenizer_settings(tmp_path)
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "<image>" in settings["additional_special_tokens"] and "extra_special_tokens" not in settings
    assert not settings.keys() & {"backend", "is_local", "local_files_only"}
    own = json.loads((tmp_path / "processor_config.json").read_text(encoding="utf-8"))["image_processor"]
    assert json.loads((tmp_path / "preprocessor_config.json").read_text(encoding="utf-8")) == own


def test_a_processor_opened_from_a_folder_does_not_name_it(processor_for, tmp_path):
    processor = processor_for("legacy", "v1")
    processor.save_pretrained(tmp_path / "first")
    type(processor).from_pretrained(tmp_path / "first", local_files_only=True).save_pretrained(tmp_path / "second")
    for path in (tmp_path / "second").glob("*.json"):
        text = path.read_text(encoding="utf-8")
        assert str(tmp_path) not in text and "local_files_only" not in text and "is_local" not in text, path.name


@pytest.mark.parametrize("in_front", [False, True])
def test_a_space_in_front_is_said_in_the_settings(tmp_path, in_front):
    state = {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": in_front}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(state), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(ALONE), encoding="utf-8")
    write_for_older_readers(tmp_path)
    assert tokenizer_settings(tmp_path)["add_prefix_space"] is in_front


@pytest.mark.parametrize(
    "more", [{"backend": "custom"}, {"auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}}, {}], ids=str
)
def test_what_is_not_read_from_tokenizer_json_keeps_its_class(tmp_path, more):
    if more:
        (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    settings = ALONE | {"tokenizer_class": "LlamaTokenizer", "is_local": True} | more
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    write_for_older_readers(tmp_path)
    written = tokenizer_settings(tmp_path)
    assert written["tokenizer_class"] == "LlamaTokenizer" and "is_local" not in written


def test_an_empty_folder_stays_empty(tmp_path):
    write_for_older_readers(tmp_path)
    assert not list(tmp_path.iterdir())
