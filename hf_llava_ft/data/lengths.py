"""How many tokens each row has, and how many of them are learned: for the whole set, on all cores, kept on disk.

The numbers are those of `LlavaProcessor.encode_conversation`, from text alone. A picture takes as many tokens as the
processor says for its size, which stands in the file's header: no pixel is decoded, and under LLaVA-1.5, where all
pictures take the same, no file is opened.

A large set is counted in parts: of a launcher's processes, on one node or several, each takes a part that nobody else
is counting, and all read all parts. What a killed run has counted stays.

What may surprise: the numbers are found again only for the same rows, tokenizer, chat template and image settings.
Rows are known by the dataset's fingerprint, which `load_llava_json` makes from the contents of the files; so a set
that is only in memory is counted each time.
"""

import io
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tokenizers
import transformers
from datasets import Dataset
from filelock import FileLock, Timeout
from PIL import Image

from hf_llava_ft.data.counting.counter import TokenCounter
from hf_llava_ft.data.counting.rendering import Rendered, turns_of
from hf_llava_ft.data.json.garbage import garbage_collection_paused
from hf_llava_ft.data.worker_pool import num_workers, results_in_order
from hf_llava_ft.errors import UserError
from hf_llava_ft.processing.picture_opening_llava import size_when_opened
from hf_llava_ft.processing.processing_llava import LlavaProcessor

_VERSION = 2  # raise it when the same rows give other numbers
_ROWS_AT_ONCE = 256
_ROWS_IN_PART = 200_000


@dataclass
class TokenCounts:
    """
    Args:
        num_tokens (`int64[N]`): length of each row, image tokens included; 0 for a refused one.
        num_supervised (`int64[N]`): how many of these tokens are learned.
        refused (`dict[int, str]`): row (from 0) -> why it can't be encoded: the chat template does not take it, its
            `<image>` places and images differ in number, or an image's header can't be read.
    """

    num_tokens: np.ndarray
    num_supervised: np.ndarray
    refused: dict[int, str] = field(default_factory=dict)


def token_counts(
    dataset: Dataset,
    processor: LlavaProcessor,
    num_proc: int | None = None,
    known: Callable[[], TokenCounts | None] = lambda: None,
) -> TokenCounts:
    """
    Args:
        dataset (`datasets.Dataset`): with the columns `messages` and `images`.
        processor (`LlavaProcessor`): encodes the rows.
        num_proc (`int`, *optional*): processes; by default one for each core.
        known: asked before anything is counted; gives the same numbers if somebody has counted them.

    Of several processes that ask for the same at once, as the ranks of a run do, each counts parts and waits for the
    others'. A set of one part is counted by one of them.
    """
    if _of_parts and (shared := _of_parts.get(_key(dataset, processor))) is not None:
        return shared
    if not dataset.cache_files:
        return _count(dataset, processor, num_proc)
    folder = Path(dataset.cache_files[0]["filename"]).parent
    if not os.access(folder, os.W_OK):  # a cache that is shared for reading
        return _count(dataset, processor, num_proc)
    name, starts = f"token-counts-{_key(dataset, processor)}", list(range(0, len(dataset), _ROWS_IN_PART)) or [0]
    if num_proc is None and len(starts) > 1:
        num_proc = max(1, num_workers() // min(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), len(starts)))
    known = cache(known)
    found: dict[int, TokenCounts] = {}
    # From a place of its own on, first what nobody is counting, then what others were.
    first = len(starts) * int(os.environ.get("RANK", "0")) // int(os.environ.get("WORLD_SIZE", "1"))
    for patience in (0, -1):
        for start in starts[first:] + starts[:first]:
            kept = folder / (f"{name}.npy" if len(starts) == 1 else f"{name}-{start}.npy")
            with suppress(Timeout):
                if start not in found:
                    with FileLock(f"{kept}.lock", timeout=patience):
                        found[start] = _kept_or_counted(kept, dataset, start, processor, num_proc, known)
    parts = [found[start] for start in starts]
    return TokenCounts(
        np.concatenate([part.num_tokens for part in parts]),
        np.concatenate([part.num_supervised for part in parts]),
        {start + place: why for start in starts for place, why in found[start].refused.items()},
    )


def _kept_or_counted(
    kept: Path,
    dataset: Dataset,
    start: int,
    processor: LlavaProcessor,
    num_proc: int | None,
    known: Callable[[], TokenCounts | None],
) -> TokenCounts:
    """Of the part that begins at a row; refused rows are named by their place in it."""
    if kept.exists():
        return TokenCounts(*np.load(kept, allow_pickle=False))
    stop = min(start + _ROWS_IN_PART, len(dataset))
    whole = known()
    if whole is None:
        part = dataset if stop - start == len(dataset) else dataset.select(range(start, stop))
        counts = _count(part, processor, num_proc)
    else:
        refused = {place - start: why for place, why in whole.refused.items() if start <= place < stop}
        counts = TokenCounts(whole.num_tokens[start:stop], whole.num_supervised[start:stop], refused)
    if not counts.refused:
        unfinished = kept.with_suffix(".incomplete")
        with open(unfinished, "wb") as file:
            np.save(file, np.stack([counts.num_tokens, counts.num_supervised]))
        unfinished.replace(kept)
    return counts


def share_counts(dataset: Dataset, processor: LlavaProcessor, counts: TokenCounts) -> None:
    """Has [`token_counts`] give these numbers in this process, for rows that are part of a set that was counted."""
    while len(_of_parts) >= _MAX_PARTS:
        del _of_parts[next(iter(_of_parts))]
    _of_parts[_key(dataset, processor)] = counts


_MAX_PARTS = 8  # those of a run are three, or six with rows to evaluate
_of_parts: dict[str, TokenCounts] = {}


def token_lengths(
    dataset: Dataset, processor: LlavaProcessor, where: str = "the dataset", num_proc: int | None = None
) -> np.ndarray:
    """
    The rows' lengths in tokens.

    Args:
        dataset, processor, num_proc: as in [`token_counts`].
        where (`str`): what messages call the dataset.

    Returns:
        `int64[N]`, for each row what `processor.num_tokens` gives.

    Raises:
        UserError: naming the first row that can't be encoded.
    """
    counts = token_counts(dataset, processor, num_proc)
    for index, reason in counts.refused.items():
        raise UserError(f"{where}: row {index + 1} (id {dataset[index].get('id')!r}): {reason}")
    return counts.num_tokens


def _count(dataset: Dataset, processor: LlavaProcessor, num_proc: int | None) -> TokenCounts:
    from datasets.utils import tqdm  # the bar that datasets' disable_progress_bars() silences

    # As it lies on the disk: no image is decoded, and where their sizes do not matter none is read.
    rows = dataset.select_columns(["messages", "images"]).with_format("arrow")
    if not processor.depends_on_image_size:
        _ = processor.num_image_tokens  # before processes fork: it takes an image processor, which takes torch
    count = _RowCounter(processor)
    counts = TokenCounts(np.zeros(len(rows), dtype=np.int64), np.zeros(len(rows), dtype=np.int64))
    starts = range(0, len(rows), _ROWS_AT_ONCE)
    with tqdm(total=len(rows), desc="Counting tokens", unit=" rows") as bar, _one_tokenizer_thread():
        found = results_in_order(lambda start: count(rows[start : start + _ROWS_AT_ONCE]), starts, num_proc)
        for start, (num_tokens, num_supervised, refused) in zip(starts, found, strict=True):
            stop = start + len(num_tokens)
            counts.num_tokens[start:stop] = num_tokens
            counts.num_supervised[start:stop] = num_supervised
            counts.refused.update((start + place, reason) for place, reason in refused.items())
            bar.update(len(num_tokens))
    return counts


class _RowCounter:
    """
    Counts some rows at a time.

    Args:
        processor (`LlavaProcessor`): encodes the rows.
    """

    def __init__(self, processor: LlavaProcessor):
        self.processor = processor
        self._counter = TokenCounter(processor)

    def __call__(self, rows: pa.Table) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
        """Of R rows, `num_tokens` and `num_supervised` `int64[R]` and `refused` by place among them."""
        with garbage_collection_paused():  # what it leaves is freed before the collector would look at it
            return self._counts(rows)

    def _counts(self, rows: pa.Table) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
        num_tokens, num_supervised = np.zeros((2, len(rows)), dtype=np.int64)
        refused: dict[int, str] = {}
        num_images = pc.list_value_length(rows["images"]).fill_null(0).to_pylist()
        images = rows["images"].to_pylist() if self.processor.depends_on_image_size else [None] * len(rows)
        places, rendered = self._rendered(rows["messages"], refused)
        for place, counted in zip(places, self._counter.count(rendered), strict=True):
            num_ids, num_places, num_supervised[place] = counted
            if num_places != num_images[place]:
                refused[place] = (
                    f"the conversation has {num_places} {self.processor.image_token} and there are "
                    f"{num_images[place]} images: the numbers must be equal."
                )
                continue
            try:
                num_image_tokens = _num_image_tokens(self.processor, num_places, images[place])
            except (OSError, ValueError, SyntaxError) as error:  # a header that Pillow can't read
                refused[place] = f"the size of an image can't be read ({error}); replace the file or remove the row."
                continue
            num_tokens[place] = num_ids - num_places + num_image_tokens
        for place in refused:
            num_supervised[place] = 0
        return num_tokens, num_supervised, dict(sorted(refused.items()))

    def _rendered(self, messages: pa.ChunkedArray, refused: dict[int, str]) -> tuple[list[int], list[Rendered]]:
        """Text and spans of the rows that the template takes, behind their places."""
        places, rendered = [], []
        turns = turns_of(messages)
        of_row: Callable[[int], Rendered]
        if turns is None:
            plain = messages.to_pylist()
            of_row = lambda place: self.processor.render(plain[place])  # noqa: E731
        else:
            of_row = lambda place: self._counter.render(turns[place])  # noqa: E731
        for place in range(len(messages)):
            try:
                rendered.append(of_row(place))
                places.append(place)
            except ValueError as error:
                refused[place] = str(error)
        return places, rendered


def _num_image_tokens(processor: LlavaProcessor, num_images: int, images: list[dict[str, Any]] | None) -> int:
    """Tokens of all images of a row together; `images` is needed only where their sizes matter."""
    if images is None:
        return num_images * processor.num_image_tokens if num_images else 0
    total = 0
    for image in images:
        with Image.open(io.BytesIO(image["bytes"]) if image.get("bytes") else image["path"]) as opened:
            total += processor.num_image_tokens_at(*size_when_opened(opened, processor.picture_opening))
    return total


def _key(dataset: Dataset, processor: LlavaProcessor) -> str:
    """Digest of everything that the numbers follow from."""
    parts = processor_parts(processor)
    parts.insert(3, dataset._fingerprint)
    return blake2b(json.dumps(parts, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def processor_parts(processor: LlavaProcessor) -> list[Any]:
    """All that the numbers follow from besides the rows."""
    tokenizer = processor.tokenizer.backend_tokenizer.to_str()
    # In front of the tokens stands what the last call with padding or truncation has left; each call sets its own.
    tokenizer = tokenizer[max(0, tokenizer.find('"added_tokens"')) :]
    return [
        _VERSION,
        transformers.__version__,
        tokenizers.__version__,
        tokenizer,
        processor.tokenizer.special_tokens_map,
        processor.chat_template,
        type(processor).__name__,
        processor.to_dict(),
    ]


@contextmanager
def _one_tokenizer_thread() -> Iterator[None]:
    # Our processes are as many as there are cores. And the library warns of every fork where this is not set.
    name = "TOKENIZERS_PARALLELISM"
    if name in os.environ:
        yield
        return
    os.environ[name] = "false"
    try:
        yield
    finally:
        del os.environ[name]
