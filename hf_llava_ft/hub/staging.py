"""The folder that goes to the Hub: what belongs to an artefact of its kind, and nothing else.

A list of names says what is uploaded; everything else stays here: optimiser states, checkpoints, logs, rows of data.
Settings that name a folder of this machine are rewritten; weights are links, so that nothing large is copied.
"""

import json
import re
import shutil
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import safe_open

from hf_llava_ft.checkpoints.checked.folder import UNREADABLE, reason_of
from hf_llava_ft.checkpoints.files import first_line
from hf_llava_ft.checkpoints.inspection import ADAPTER_CONFIG, Kind
from hf_llava_ft.checkpoints.original_folders import NON_LORA_FILE, PROJECTOR_FILE, read_weights
from hf_llava_ft.checkpoints.reload import NATIVE_MODEL_TYPES
from hf_llava_ft.checkpoints.remote_code import own_code, runs_only_our_code
from hf_llava_ft.checkpoints.run_files import TRAINING_FILE
from hf_llava_ft.checkpoints.training_facts import hub_id
from hf_llava_ft.errors import UserError
from hf_llava_ft.modeling.older_readers_llava import write_config_for_older_readers
from hf_llava_ft.modeling.original_config_llava import is_original
from hf_llava_ft.processing.older_readers_processing_llava import write_for_older_readers

CONFIG = "config.json"
_INDEX = "model.safetensors.index.json"
_TOKENIZER_AND_PROCESSOR = (
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "sentencepiece.bpe.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt"),
    TRAINING_FILE,
)
# They go along, and stay when a later version has none.
_TERMS = ("LICENSE*", "NOTICE*")
_MODEL_WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors")
_ADAPTER_WEIGHTS = ("adapter_model.safetensors",)
_GOES: dict[Kind, tuple[str, ...]] = {
    "model": (CONFIG, "generation_config.json", _INDEX, *_MODEL_WEIGHTS, *sorted(own_code())),
    "adapter": (ADAPTER_CONFIG, *_ADAPTER_WEIGHTS, *sorted(own_code())),
    "original_lora": (ADAPTER_CONFIG, CONFIG, *_ADAPTER_WEIGHTS, NON_LORA_FILE),
    "projector": (CONFIG, PROJECTOR_FILE),
}
# Older weights of the same kind: next to newer ones, some programs would take them.
_SUPERSEDED = {"model": ("pytorch_model*.bin", "pytorch_model.bin.index.json"), "adapter": ("adapter_model.bin",)}
# How a file was opened here, which transformers writes down.
_OF_THIS_MACHINE = ("is_local", "local_files_only", "_commit_hash")
# The card and its pictures, which are written into the staged folder.
_CARD = ("README.md", "assets/*")
_DATASET = ("README.md", "data/train-*-of-*.parquet")


@dataclass(frozen=True)
class Staged:
    """
    Args:
        kind (`Kind`): what the folder holds.
        sent (`list[str]`): the files that were staged, by their path in the repository.
        left_out (`list[str]`): what lies beside them and stays here; folders end in a slash.
    """

    kind: Kind
    sent: list[str]
    left_out: list[str]


def stage(source: Path, kind: Kind, staged: Path, base: str | None = None, base_revision: str | None = None) -> Staged:
    """
    Puts what belongs to the artefact at `source` into the empty folder `staged`.

    Args:
        base (`str`, *optional*): Hub id that an adapter or a projector is to name; `base_revision` is its commit.

    Raises:
        UserError: if something is missing or damaged, or would not work for anybody else.
    """
    everything = sorted(path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file())
    sent = [name for name in everything if goes(name, kind)]
    _check_complete(source, kind, sent)
    for name in sent:
        file = _inside(source, name)
        target = staged / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith((".safetensors", ".bin")):
            _check_weights(file, name)
            _link(file, target)
        elif name.endswith(".json"):
            _write_settings(file, name, target, base, base_revision)
        else:
            shutil.copyfile(file, target)
    if kind in ("model", "adapter") and not runs_only_our_code(staged):
        raise UserError(
            f"{source} holds code that is not of this version of this package, and others would run it with "
            f"trust_remote_code=True: write the folder again (llava-ft convert or merge), or remove the code."
        )
    config = _read(staged / CONFIG)
    try:
        _say_it_to_older_readers(staged, kind, config)
    except UserError:
        raise
    except UNREADABLE as error:
        raise UserError(f"{source}: its settings contradict themselves: {reason_of(error)}") from error
    if is_original(config) and kind != "adapter":
        _check_tower(source, config)
    top = {PurePosixPath(name).parts[0] for name in sent}
    left_out = [f"{path.name}/" if path.is_dir() else path.name for path in source.iterdir() if path.name not in top]
    return Staged(kind, sent, sorted(name for name in left_out if name not in _CARD and name != "assets/"))


def goes(name: str, kind: Kind) -> bool:
    """Whether a file of this path belongs to an artefact of this kind."""
    return any(_matches(name, pattern) for pattern in (*_GOES[kind], *_TOKENIZER_AND_PROCESSOR, *_TERMS))


def replaced_by(kind: Kind | None, name: str) -> bool:
    """
    Whether a file on the Hub goes with the version it is of, so that it is deleted when a new one has none of that
    name: an old shard beside new ones breaks loading.

    Args:
        kind (`Kind`, *optional*): of the artefact; `None` is a dataset.
    """
    if kind is None:
        return any(_matches(name, pattern) for pattern in _DATASET)
    ours = (*_GOES[kind], *_TOKENIZER_AND_PROCESSOR, *_CARD, *_SUPERSEDED.get(kind, ()))
    return any(_matches(name, pattern) for pattern in ours)


def is_of_card(name: str) -> bool:
    """Whether a file on the Hub is the card, one of its pictures, or what it tells of the training."""
    return any(_matches(name, pattern) for pattern in (*_CARD, TRAINING_FILE))


def kind_on_the_hub(names: set[str]) -> str | None:
    """What the files of a repository make it: "adapter", "model" or "projector"; `None` if it is none of these."""
    if ADAPTER_CONFIG in names:
        return "adapter"
    if PROJECTOR_FILE in names:
        return "projector"
    return "model" if CONFIG in names else None


def _matches(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/") and fnmatch(name, pattern)


def _check_complete(source: Path, kind: Kind, sent: list[str]) -> None:
    if kind in ("adapter", "original_lora"):
        weights = _ADAPTER_WEIGHTS[0] in sent
    elif kind == "projector":
        weights = PROJECTOR_FILE in sent
    else:
        weights = any(_matches(name, pattern) for name in sent for pattern in _MODEL_WEIGHTS)
    if not weights:
        raise UserError(
            f"{source} has no weights in safetensors, and pickles are not uploaded: llava-ft convert writes the "
            f"folder anew without them."
        )
    if kind == "model" and _INDEX in sent:
        shards = set((_read(source / _INDEX).get("weight_map") or {}).values())
        missing = sorted(shards - set(sent))
        if missing:
            raise UserError(f"{source} lacks {missing[0]}, which {_INDEX} names: write the folder again.")
        unnamed = sorted(name for name in sent if fnmatch(name, "model*.safetensors") and name not in shards)
        if unnamed:
            raise UserError(f"{source}: {unnamed[0]} is not named by {_INDEX}: remove it, it is of another model.")


def _inside(source: Path, name: str) -> Path:
    file = (source / name).resolve()
    if not file.is_relative_to(source.resolve()):
        raise UserError(f"{source}: {name} is a link that leaves the folder: put the file itself there.")
    return file


def _check_weights(file: Path, name: str) -> None:
    if name.endswith(".bin"):
        read_weights(file)  # raises if it holds anything but tensors
        return
    try:
        with safe_open(file, framework="pt") as tensors:
            tensors.keys()
    except UNREADABLE as error:
        raise UserError(f"{file} is not a readable weights file: {first_line(error)}.") from error


def _link(file: Path, target: Path) -> None:
    try:
        target.symlink_to(file)
    except OSError:  # where links are not allowed
        shutil.copyfile(file, target)


def _write_settings(file: Path, name: str, target: Path, base: str | None, base_revision: str | None) -> None:
    """A JSON file of settings, with the name of the base as it is on the Hub, and without folders of this machine."""
    if name in ("tokenizer.json", "vocab.json", "added_tokens.json"):
        shutil.copyfile(file, target)
        return
    content = _read(file)
    cleaned = _without_folders(content)
    if base is not None and name == ADAPTER_CONFIG:
        cleaned |= {"base_model_name_or_path": base, "revision": base_revision}
    if base is not None and name == CONFIG and "_name_or_path" in content:
        cleaned["_name_or_path"] = base
    if cleaned == content:
        shutil.copyfile(file, target)
    else:
        target.write_text(json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _say_it_to_older_readers(staged: Path, kind: Kind, config: dict[str, Any]) -> None:
    """For what transformers 5 wrote without us. A tokenizer of another class may do more than its file says."""
    if _read(staged / "tokenizer_config.json").get("tokenizer_class") == "TokenizersBackend":
        write_for_older_readers(staged)
    if kind == "model" and config.get("model_type") in NATIVE_MODEL_TYPES and "vision_config" in config:
        write_config_for_older_readers(staged)


def _without_folders(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_folders(each) for each in value]
    if not isinstance(value, dict):
        return value
    where = ("_name_or_path", "name_or_path")
    kept = {
        key: each
        for key, each in value.items()
        if key not in _OF_THIS_MACHINE and (key not in where or not isinstance(each, str) or hub_name(each))
    }
    return {key: _without_folders(each) for key, each in kept.items()}


def hub_name(name: str) -> str | None:
    """`name` if it can only mean a repository on the Hub, and no folder of this machine."""
    return name if hub_id(name) and not Path(name).exists() else None


def id_of_cached(folder: str) -> tuple[str, str] | None:
    """Hub id and commit of a folder in the Hub's cache; `None` for any other."""
    match = re.search(r"models--([\w.-]+?)--([\w.-]+)/snapshots/([0-9a-f]{40})/?$", Path(folder).as_posix())
    return (f"{match[1]}/{match[2]}", match[3]) if match else None


def _check_tower(source: Path, config: dict[str, Any]) -> None:
    tower = config.get("mm_vision_tower")
    if isinstance(tower, str) and hub_name(tower) is None:
        raise UserError(
            f"{source}: {CONFIG} names the vision tower by a folder of this machine, where nobody else finds it: "
            f"write the folder again with llava-ft convert --format llava --vision_tower and the tower's name on the "
            f"Hub, such as openai/clip-vit-large-patch14-336."
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object.")
    return content
