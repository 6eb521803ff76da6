"""The settings of a native LLaVA where transformers 4 finds them too, beside where transformers 5 looks for them.

transformers 4 takes what it does not find for the default, without a word: 10,000 for the base of the rotary
embedding, no scaling of it. And it ties embeddings by `text_config`, transformers 5 by the settings around it, so that
a model whose two say different things is another one there.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

# Of a native LLaVA on disk.
_EMBEDDINGS, _HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
_OF_THIS_MACHINE = ("_name_or_path", "_commit_hash", "is_local", "local_files_only")


def write_config_for_older_readers(folder: str | Path) -> None:
    """Rewrites the settings of the native LLaVA in `folder`, whose weights are written already; see the module."""
    path = Path(folder, "config.json")
    before = json.loads(path.read_text(encoding="utf-8"))
    written = _without_this_machine(before)
    text_config = written["text_config"]
    text_config |= rope_for_older_readers(text_config.get("rope_parameters"))
    # At both levels, and a false too, which is not every version's default.
    tied = bool(written.get("tie_word_embeddings")) and not _has_another_head(Path(folder))
    written["tie_word_embeddings"] = text_config["tie_word_embeddings"] = tied
    for part in (written, text_config, written["vision_config"]):
        if part.get("dtype") is not None:
            part["torch_dtype"] = part["dtype"]
    _write(path, written, before)
    path = Path(folder, "generation_config.json")
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        # By it transformers 4 takes the stop tokens of config.json instead, where that says anything of generation.
        _write(path, {name: value for name, value in before.items() if name != "_from_model_config"}, before)


def rope_for_older_readers(rope_parameters: dict[str, Any] | None) -> dict[str, Any]:
    """`rope_theta`, `rope_scaling` and the like, as transformers 4 calls what is in `rope_parameters`; empty where it
    has no word for them."""
    parameters = {name: value for name, value in (rope_parameters or {}).items() if value is not None}
    older = {}
    if set(parameters) == {"full_attention", "sliding_attention"}:  # Gemma 3
        older["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
        parameters = dict(parameters["full_attention"])
    if any(isinstance(value, dict) for value in parameters.values()):
        return {}
    older |= {name: parameters.pop(name) for name in ("rope_theta", "partial_rotary_factor") if name in parameters}
    if parameters.get("rope_type", "default") != "default":
        # Before transformers 4.43 `rope_type` was `type`.
        older["rope_scaling"] = {"type": parameters["rope_type"], **parameters}
    return older


def _write(path: Path, settings: dict[str, Any], before: dict[str, Any]) -> None:
    if settings != before:
        path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _has_another_head(folder: Path) -> bool:
    """Whether the weights in `folder` hold an output embedding that is not the input embedding."""
    places = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            places |= {name: file for name in tensors.keys() if name in (_EMBEDDINGS, _HEAD)}
    if len(places) < 2:
        return False
    weights = []
    for name, file in places.items():
        with safe_open(file, framework="pt") as tensors:
            weights.append(tensors.get_tensor(name))
    return not torch.equal(*weights)


def _without_this_machine(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_this_machine(each) for key, each in value.items() if key not in _OF_THIS_MACHINE}
    return [_without_this_machine(each) for each in value] if isinstance(value, list) else value
