"""Several datasets as one: `--data_path a.json:0.3,user/name:train,b.parquet:2`.

A weight is the share of that set's rows that the mixture holds. 0.3 draws 30% of them without replacement, by the seed
alone, and the same ones in every epoch; 2 holds every row twice, and 2.5 every row twice and half of them once more.
Without a weight it is 1. So weights are no probabilities and need not add up to anything. That is the fraction of the
alignment handbook's `dataset_mixer`, and the percentage of LLaVA-NeXT's `sampling_strategy`.
"""

import os
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hf_llava_ft.errors import UserError

MAX_WEIGHT = 1000

_WEIGHT = re.compile(r"\d+(\.\d*)?|\.\d+")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# With one of these, a name that leads nowhere is a file that is missing, and not worth a question to the Hub.
_FILE_ENDINGS = (".json", ".jsonl", ".yaml", ".yml", ".parquet", ".csv", ".arrow", ".txt", ".zip", ".tar", ".gz")


class DataPath(NamedTuple):
    """
    One set of `--data_path`.

    Args:
        path (`str`): a file or folder that is there, or a Hub id.
        is_hub (`bool`): which of them.
        split (`str`, *optional*): what follows it behind a colon.
        weight (`float`): share of the rows, above 0.
    """

    path: str
    is_hub: bool
    split: str | None
    weight: float


def parse_data_path(data_path: str | os.PathLike | Sequence[str | os.PathLike]) -> list[DataPath]:
    """
    Args:
        data_path (`str` or `list`):
            `NAME[:SPLIT][:WEIGHT]`, several of them separated by commas, or a list of such. What is there as it stands
            is taken as it stands, whatever commas and colons its name has.

    Raises:
        UserError: if one leads nowhere, or a weight is none.
    """
    if isinstance(data_path, os.PathLike):
        data_path = [data_path]
    if isinstance(data_path, str):
        data_path = [data_path] if _exists(data_path) else [item for item in _items(data_path) if item.strip()]
    if not data_path:
        raise UserError("no data is given; give the path of a file or folder, or a dataset of the Hub, user/name.")
    return [_parse_item(os.fspath(item).strip()) for item in data_path]


def _items(data_path: str) -> list[str]:
    """Between commas; `{a,b}.json` is `a.json,b.json`, as LLaVA-NeXT has it."""
    if braces := re.fullmatch(r"([^{},]*)\{([^{}]*)\}([^{},]*)", data_path):
        return [f"{braces[1]}{name.strip()}{braces[3]}" for name in braces[2].split(",")]
    return data_path.split(",")


def draw_rows(num_rows: int, weight: float, seed: int, position: int = 0) -> np.ndarray:
    """
    The rows of one set that a mixture holds.

    Args:
        num_rows (`int`): how many the set has.
        weight (`float`): share of them; the whole part says how often each is there.
        seed (`int`): of the mixture.
        position (`int`): the set's place in the mixture, so that two equal sets draw different rows.

    Returns:
        `int64[round(weight * num_rows)]`: indices from 0, ascending; at least one. The same for ever for the same
        arguments, since numpy keeps the streams of `RandomState`.
    """
    wanted = max(1, int(weight * num_rows + 0.5))
    repeats, rest = divmod(wanted, num_rows)
    drawn = np.random.RandomState([seed % 2**32, position]).permutation(num_rows)[:rest]
    return np.sort(np.concatenate([np.repeat(np.arange(num_rows), repeats), drawn])).astype(np.int64)


def _parse_item(item: str) -> DataPath:
    if _exists(item):
        return DataPath(os.path.expanduser(item), False, None, 1.0)
    name, weight = item, 1.0
    head, colon, tail = item.rpartition(":")
    if colon and _WEIGHT.fullmatch(tail):
        name, weight = head, float(tail)
        if not 0 < weight <= MAX_WEIGHT:
            raise UserError(f"{item}: the weight {tail} is not above 0 and up to {MAX_WEIGHT}; correct it.")
        if _exists(name):
            return DataPath(os.path.expanduser(name), False, None, weight)
    # A Hub id has no colon, and a split may have one: train[:10%].
    path, colon, split = name.partition(":")
    if colon and not split:
        raise UserError(f"{item}: nothing follows the colon; write a split or a weight there.")
    if _exists(path):
        return DataPath(os.path.expanduser(path), False, split or None, weight)
    if _HUB_ID.fullmatch(path) and not path.endswith(_FILE_ENDINGS) and not os.path.exists(path.split("/")[0]):
        return DataPath(path, True, split or None, weight)
    raise UserError(f"{path} can't be read (No such file or directory); check the path.")


def _exists(path: str) -> bool:
    return bool(path) and "\0" not in path and os.path.exists(os.path.expanduser(path))
