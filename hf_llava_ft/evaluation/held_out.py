"""Which rows `--eval_split` holds out: in training, and again when the finished run is evaluated."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_llava_ft.checking.sound_rows import SoundRows, sound_rows
from hf_llava_ft.checkpoints.files import read_json
from hf_llava_ft.checkpoints.opening import load_config
from hf_llava_ft.checkpoints.run_files import SUMMARY_FILE
from hf_llava_ft.data.formats import Source
from hf_llava_ft.errors import UserError
from hf_llava_ft.processing.processing_llava import LlavaProcessor

Key = tuple[str, int]  # a row's file and number


def num_held_out(num_rows: int, share: float) -> int:
    """So many of the rows, rounded, at least one."""
    return max(1, round(share * num_rows))


def held_out_places(num_rows: int, number: int, seed: int) -> np.ndarray:
    """`int64[number]`, sorted: which of `num_rows` rows are held out under a seed."""
    return np.sort(np.random.default_rng(seed).permutation(num_rows)[:number])


@dataclass(frozen=True)
class HeldOut:
    """
    Args:
        sources (`list[Source]`): what the run was trained on, or evaluated on.
        keys (`set`, *optional*): the rows that it held out; None for all.
        name (`str`): of the data, without its folders.
    """

    sources: list[Source]
    keys: set[Key] | None
    name: str


def held_out_of(
    run: str | Path, processor: LlavaProcessor, facts_of: Callable[[list[Source]], dict[str, Any]]
) -> HeldOut:
    """
    The rows that a finished run did not train on: of its `--eval_split`, or its `--eval_data_path`.

    Args:
        run (`Path`): its folder, with `train_summary.json`.
        processor (`LlavaProcessor`): of its result; which rows were too long depends on it.
        facts_of: gives the `fingerprint` of files, as the run wrote it down.

    Raises:
        UserError: if it held out none, or its files are gone or not what they were.
    """
    summary = read_json(str(run), SUMMARY_FILE)
    if summary is None:
        raise UserError(f"--eval_split {run} is not the folder of a finished run: it has no {SUMMARY_FILE}.")
    said = summary.get("settings", {})
    is_other_data = said.get("eval_data_path") is not None
    if not is_other_data and said.get("eval_split") is None:
        raise UserError(f"{run} held out no rows: give other rows as --data_path, or train with --eval_split 0.05.")
    rows = _opened(said, "eval_data_path" if is_other_data else "data_path", str(run))
    sources = [part.source for part in rows.parts]
    name = ", ".join(Path(source.where).name for source in sources)
    if is_other_data:
        return HeldOut(sources, None, name)
    then = summary.get("data", {})
    if then.get("fingerprint") and facts_of(sources)["fingerprint"] != then["fingerprint"]:
        raise UserError(
            f"{name} is not what {run} was trained on, so the rows it held out are not known: give it back."
        )
    dataset = rows.that_fit(processor, said.get("model_max_length") or _longest(summary, run))
    places = held_out_places(len(dataset), num_held_out(len(dataset), said["eval_split"]), _seed(said))
    if then.get("rows_evaluated") not in (None, len(places)):
        raise UserError(
            f"{run} held out {then['rows_evaluated']} rows and {len(places)} are found: its pictures or settings have "
            f"changed."
        )
    known = rows.places()
    return HeldOut(sources, {known[place] for place in places.tolist()}, f"{name}, held out")


def _opened(said: dict[str, Any], which: str, run: str) -> SoundRows:
    is_other = which == "eval_data_path"
    folder = (said.get("eval_image_folder") if is_other else None) or said.get("image_folder")
    columns = (said.get("eval_columns") if is_other else None) or said.get("columns")
    try:
        return sound_rows(
            ",".join(os.path.expanduser(path) for path in str(said[which]).split(",")),
            None if folder is None else os.path.expanduser(folder),
            on_bad_row=said.get("on_bad_row") or "raise",
            allow_outside=bool(said.get("allow_images_outside")),
            allow_urls=bool(said.get("allow_image_urls")),
            seed=_seed(said),
            columns=columns,
        )
    except UserError as error:
        raise UserError(
            f"the rows of {run} can't be opened from {Path.cwd()}, by the paths that it was given: {error.sentence}"
        ) from error


def _seed(said: dict[str, Any]) -> int:
    seed = said.get("data_seed")
    return int(said.get("seed", 42) if seed is None else seed)


def _longest(summary: dict[str, Any], run: str | Path) -> int:
    base = summary.get("settings", {}).get("model_name_or_path")
    has_config = Path(run, "config.json").is_file()
    place = str(run) if has_config else os.path.expanduser(str(base))
    return int(load_config(place).text_config.max_position_embeddings)
