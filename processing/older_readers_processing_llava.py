"""The files of a processor as transformers 4 finds them too, beside what transformers 5 looks for.

transformers 5 names a tokenizer class that transformers 4 does not have, keeps the special tokens under another name,
and puts the image processor's settings into processor_config.json. `tokenizer.json` says all that makes ids, so the
general class reads it the same in every version; a class of one model's own would build parts of it again, and not all
in the same way. For processors inside models and alone, as in the folder of an adapter.
"""

import json
from pathlib import Path
from typing import Any

TOKENIZER_CLASS = "PreTrainedTokenizerFast"
# How the tokenizer was opened on the machine that writes; transformers 5 writes it down.
_OF_THIS_MACHINE = ("is_local", "local_files_only", "name_or_path", "_commit_hash", "tokenizer_file")


def write_for_older_readers(folder: str | Path) -> None:
    """
    Writes the settings of tokenizer and image processor in `folder`, as transformers 5 left them, for transformers 4
    too, and without names of this machine. Does nothing to files that are not there, or that need nothing.
    """
    folder = Path(folder)
    settings = _read(folder / "tokenizer_config.json")
    state = _read(folder / "tokenizer.json")
    if settings is not None:
        _write(folder / "tokenizer_config.json", _tokenizer_settings(settings, state), settings)
    processor = _read(folder / "processor_config.json") or {}
    image_processor = processor.get("image_processor")
    if isinstance(image_processor, dict):
        # transformers 5 reads it in processor_config.json, where it stands too.
        _write(folder / "preprocessor_config.json", image_processor, _read(folder / "preprocessor_config.json"))


def _tokenizer_settings(settings: dict[str, Any], state: dict[str, Any] | None) -> dict[str, Any]:
    written = {name: value for name, value in settings.items() if name not in _OF_THIS_MACHINE}
    # "custom" is a tokenizer that is not that of the library `tokenizers`, or one that brings its code.
    if state is None or written.pop("backend", "tokenizers") != "tokenizers" or "auto_map" in written:
        return written
    written["tokenizer_class"] = TOKENIZER_CLASS
    written.setdefault("model_input_names", ["input_ids", "attention_mask"])
    if isinstance(written.get("extra_special_tokens"), list):
        written["additional_special_tokens"] = written.pop("extra_special_tokens")
    # transformers 4 sets this in a byte-level tokenizer, to false where it is not told.
    byte_level = state.get("pre_tokenizer") or {}
    if "add_prefix_space" in byte_level:
        written["add_prefix_space"] = byte_level["add_prefix_space"]
    return written


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _write(path: Path, settings: dict[str, Any], before: dict[str, Any] | None) -> None:
    if settings != before:
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
