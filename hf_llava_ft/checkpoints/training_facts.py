"""`training.json`: what is known of how a model was trained, without a path of any machine, to go along with it.

A run leaves `train_summary.json`, which is for whoever ran it and names folders. `merge` and `convert` carry on what
of it others may know, and a card is written from the same. What is read, from here or from the Hub, goes through one
list of names and types; everything else stays behind.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_llava_ft.checkpoints.checked.json_values import (
    MAX_TEXT,
    commit_hash,
    count,
    each_known,
    flag,
    items,
    known,
    mapping,
    number,
    points,
    text,
    word,
)
from hf_llava_ft.checkpoints.files import read_json
from hf_llava_ft.checkpoints.run_files import PREFIX_CHECKPOINT_DIR, SUMMARY_FILE, TRAINER_STATE_NAME, TRAINING_FILE
from hf_llava_ft.errors import UserError
from hf_llava_ft.whole_files import write_atomically

# Of a longer run as many points are kept, evenly spaced.
MAX_LOGGED = 1000
_CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-\d+")
_OF_THE_WHOLE_RUN = ("samples", "tokens", "supervised_tokens", "seconds", "seconds_without_evaluation")


@dataclass(frozen=True)
class TrainingFacts:
    """
    Args:
        base (`list[dict]`): `name` and `commit` of the models on the Hub that training started from.
        settings (`dict`): of the run by name, where they are numbers or words.
        trained (`list[dict]`): `part`, `num_trainable`, `num_total`, `dtype` and `learning_rate`, a text.
        numbers (`dict`): `steps`, `epochs`, `rows_per_step`, `samples`, `tokens`, `supervised_tokens`, `seconds`,
            `tokens_per_second`, `num_processes`, `seed` and `peak_memory_bytes`, as far as they are known.
        device (`str`): name of the GPU, or `cpu`.
        losses (`list[list]`): step, loss and learning rate.
        evaluated (`list[list]`): step and loss.
        data (`dict`): `rows`, `rows_with_images`, `images`, `rows_evaluated`, `rows_left_out`, `rows_cut` and
            `fingerprint`.
        sources (`list[dict]`): of each dataset `name` without folders, `on_hub`, `format`, `weight`, `fingerprint`.
        versions (`dict[str, str]`): of the packages.
    """

    base: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    trained: list[dict[str, Any]] = field(default_factory=list)
    numbers: dict[str, float] = field(default_factory=dict)
    device: str = ""
    losses: list[list[float]] = field(default_factory=list)
    evaluated: list[list[float]] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    sources: list[dict[str, Any]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of_json(cls, content: Any) -> "TrainingFacts":
        """What of `content` has the right names and types."""
        content = mapping(content)
        return cls(
            base=each_known(content.get("base"), {"name": hub_id, "commit": commit_hash}),
            settings=known(content.get("settings"), _SETTINGS),
            trained=each_known(
                content.get("trained"),
                {
                    "part": word,
                    "num_trainable": count,
                    "num_total": count,
                    "dtype": text,
                    "learning_rate": word,
                },
            ),
            numbers=known(content.get("numbers"), dict.fromkeys(_NUMBERS, number)),
            device=text(content.get("device")) or "",
            losses=points(content.get("losses"), 3),
            evaluated=points(content.get("evaluated"), 2),
            data=known(content.get("data"), dict.fromkeys(_COUNTS_OF_ROWS, count) | {"fingerprint": word}),
            sources=[
                _source(each)
                for each in map(mapping, items(content.get("sources")))
                if isinstance(each.get("name"), str)
            ],
            versions={
                name: value
                for name, given in mapping(content.get("versions")).items()
                if word(name) and (value := word(given)) is not None
            },
        )

    @classmethod
    def of_run(cls, summary: dict[str, Any], log: list[dict[str, Any]]) -> "TrainingFacts":
        """
        Args:
            summary: the content of `train_summary.json`.
            log: the Trainer's `log_history`.
        """
        data = mapping(summary.get("data"))
        peak = mapping(summary.get("peak_memory"))
        seconds = summary.get("seconds_without_evaluation", summary.get("seconds"))
        sources = [
            source | {"name": source.get("where"), "on_hub": "Hub data set" in str(source.get("format"))}
            for source in map(mapping, items(data.get("sources")))
        ]
        logged = [entry for entry in log if "loss" in entry]
        return cls.of_json(
            summary
            | {
                "numbers": summary | {"seconds": seconds, "peak_memory_bytes": peak.get("bytes")},
                "losses": _thinned([[e.get("step"), e["loss"], e.get("learning_rate") or 0] for e in logged]),
                "evaluated": [[entry.get("step"), entry["eval_loss"]] for entry in log if "eval_loss" in entry],
                "sources": sources,
            }
        )

    def save(self, folder: str | Path) -> None:
        """Writes `training.json` into the folder, whole."""
        content = json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"
        write_atomically(
            Path(folder, TRAINING_FILE), lambda path: path.write_bytes(content.encode("utf-8", errors="replace"))
        )


_NUMBERS = (
    *("steps", "epochs", "rows_per_step", "samples", "tokens", "supervised_tokens", "seconds"),
    *("tokens_per_second", "num_processes", "seed", "peak_memory_bytes"),
)
_COUNTS_OF_ROWS = ("rows", "rows_with_images", "images", "rows_evaluated", "rows_left_out", "rows_cut")


def training_facts(path: str | Path, revision: str | None = None) -> TrainingFacts | None:
    """
    What is known of the training of the model, adapter or projector at `path`; None if that is nothing.

    Args:
        path (`str` or `Path`): folder of a run or of one of its checkpoints, folder with `training.json`, or Hub id.
        revision (`str`, *optional*): on the Hub.

    Raises:
        UserError: if a file is there and can't be read, or the Hub gives no answer.
    """
    folder = Path(path)
    if (folder / SUMMARY_FILE).is_file():
        state = read_json(str(path), TRAINER_STATE_NAME) or {}
        return TrainingFacts.of_run(read_json(str(path), SUMMARY_FILE) or {}, _log_of(state))
    if _CHECKPOINT.fullmatch(folder.resolve().name) and (folder / TRAINER_STATE_NAME).is_file():
        return _facts_of_checkpoint(folder)
    content = read_json(str(path), TRAINING_FILE, revision)
    return None if content is None else TrainingFacts.of_json(content)


def _facts_of_checkpoint(folder: Path) -> TrainingFacts:
    """Those of its run, as far as they were so when it was written."""
    state = read_json(str(folder), TRAINER_STATE_NAME) or {}
    summary = read_json(str(folder.resolve().parent), SUMMARY_FILE) or {}
    kept = {name: value for name, value in summary.items() if name not in _OF_THE_WHOLE_RUN}
    # Not the best weights, but those of its own step.
    kept["settings"] = {**mapping(summary.get("settings")), "load_best_model_at_end": False}
    return TrainingFacts.of_run(
        kept | {"steps": state.get("global_step"), "epochs": state.get("epoch")}, _log_of(state)
    )


def _log_of(state: dict[str, Any]) -> list[dict[str, Any]]:
    return [mapping(entry) for entry in items(state.get("log_history"))]


def hub_commit(name: str, revision: str | None = None) -> str | None:
    """The commit in the cache that `revision`, a branch, tag or commit, of the model `name` is; None for a folder."""
    if Path(name).exists() or hub_id(name) is None:
        return None
    file = try_to_load_from_cache(name, "config.json", revision=revision)
    # The cache has the files of a commit in snapshots/<commit>.
    return commit_hash(Path(file).parent.name) if isinstance(file, str) else None


def base_facts(names: list[str], revision: str | None = None) -> list[dict[str, str]]:
    """
    `name` and `commit` of those that came from the Hub, and for a folder of what that was made of.

    Args:
        names (`list[str]`): of a LLaVA, or of the parts of a new one; `revision` is that of the first.
    """
    found: list[dict[str, str]] = []
    for index, name in enumerate(names):
        commit = hub_commit(name, None if index else revision)
        if commit:
            found.append({"name": name, "commit": commit})
        elif Path(name).is_dir():
            try:
                facts = training_facts(name)
            except UserError:  # a damaged note beside a model that could be trained
                continue
            found += facts.base if facts else []
    return found


def hub_id(name: Any) -> str | None:
    """`name` if it is a name that the Hub takes, `user/name` or one of the few without a user."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def _thinned(points: list[list[Any]]) -> list[list[Any]]:
    stride = math.ceil(len(points) / MAX_LOGGED) or 1
    return points if stride == 1 else [*points[:-1:stride], points[-1]]


def _source(given: dict[str, Any]) -> dict[str, Any]:
    name, kinds = given["name"], {"format": text, "weight": number, "fingerprint": word}
    on_hub = given.get("on_hub") is True and hub_id(name.partition(":")[0]) is not None
    if not on_hub:  # a path, of this system or another
        name = PureWindowsPath(PurePosixPath(name).name).name
    return {"name": name[:MAX_TEXT], "on_hub": on_hub} | known(given, kinds)


# Of the settings those that say how it was trained, and none that may hold a path, an address or a secret.
_SETTINGS: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(
        (
            *("freeze_backbone", "freeze_mm_mlp_adapter", "lora_vision_tower", "use_dora", "use_rslora"),
            *("double_quant", "streaming", "bf16", "fp16", "tf32", "group_by_modality_length"),
            "load_best_model_at_end",
        ),
        flag,
    ),
    **dict.fromkeys(
        (
            *("train_type", "lora_bias", "quant_type", "version", "image_aspect_ratio", "dtype"),
            *("picture_opening",),
            *("lr_scheduler_type", "optim", "sampler_order", "loss_normalization"),
        ),
        word,
    ),
    **dict.fromkeys(
        (
            *("lora_r", "lora_alpha", "lora_dropout", "bits", "model_max_length", "eval_split", "learning_rate"),
            *("mm_projector_lr", "mm_vision_tower_lr", "warmup_steps", "num_train_epochs", "max_steps"),
            *("per_device_train_batch_size", "gradient_accumulation_steps", "weight_decay", "max_grad_norm"),
            *("neftune_noise_alpha", "data_seed", "early_stopping_patience"),
        ),
        number,
    ),
}
