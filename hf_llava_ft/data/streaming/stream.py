"""`LlavaStream`: which row comes when, for each rank and worker, and how to go on in the middle.

The order is a function of seed and epoch. The blocks of all sources (`formats/blocks.py`), large ones in pieces, are
shuffled and laid one after the other. Each rank takes a run of that, and each of its DataLoader workers a run of the
rank's; a run is shuffled buffer by buffer. So to go on in the middle, a worker reads one buffer again and no row
before it. `datasets.IterableDataset` shuffles likewise, but what is in its buffer is not in its state and so is lost
on resume; hence a class of its own.

What may surprise:
* The order depends on the numbers of ranks and workers and on the batch size. A run is resumed with those it had.
* All ranks take equally many rows. Where they do not divide evenly, the epoch's order begins again at its end, and
  some rows, fewer than there are ranks, are trained twice, as accelerate has it for data in memory.
* With `on_bad_row="skip"` the next good row of the buffer is trained twice in place of a bad one, because ranks that
  take different numbers of steps wait for each other for ever.
"""

import copy
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from itertools import chain, repeat
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from hf_llava_ft.data.formats import Source
from hf_llava_ft.data.formats.blocks import Piece, RawRow, RowReader, blocks_of
from hf_llava_ft.data.formats.mixture import draw_rows
from hf_llava_ft.data.problems import problem_of
from hf_llava_ft.data.skipped_rows import add_left_out
from hf_llava_ft.data.streaming.decoding import decoded_row
from hf_llava_ft.data.unchanged import FileChanged, FilesAsTheyWere
from hf_llava_ft.errors import UserError
from hf_llava_ft.processing.picture_opening_llava import PictureOpening

logger = logging.getLogger(__name__)

PASSED = object()  # stands for a row of a batch that was trained before; see `LlavaStream.pass_over`

# A block is read once for each of its pieces: more of them mix better, and cost more reading.
_PIECE_ROWS = 256
_MAX_PIECES = 16
_MAX_DIVIDED_BYTES = 16 * 2**20
_UNSHUFFLED_ROWS = 256  # read at once


class LlavaStream(IterableDataset):
    """
    The rows of `FEATURES` in `data/builder.py`, with `images` as decoded RGB pictures.

    Args:
        sources (`list[Source]`):
            Of `open_source`. A weight decides which rows are there, as in `load_data`: the same in each epoch.
        shuffle_buffer_size (`int`, defaults to 1000):
            Rows, as they are in the file, that each worker holds and draws from. 0: the order of the files.
        seed (`int`, defaults to 42):
            Of the order, and of the rows that a weight draws.
        on_bad_row (`"raise"` or `"skip"`):
            What a row that can't be trained on does: end the run with its sentence, or be listed.
        skipped_file (`str`, *optional*):
            Where such rows are listed, a line of JSON each, whenever one is met; the log by default.
        row_check (`Callable`, *optional*):
            Called with each row; a `ValueError` from it makes the row a bad one.
        since (`int`, *optional*):
            When the run began, in nanoseconds since 1970: images may not be younger. Now, by default.
        picture_opening (`"upright"` or `"original"`):
            How pictures are opened; a model's own is `processor.picture_opening`.
        cache_dir (`str`, *optional*):
            Where it is remembered how a JSON file can be read in parts; the cache of `datasets` by default.

    Raises:
        UserError: here if a file is broken; from iterating, at a bad row.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        shuffle_buffer_size: int = 1000,
        seed: int = 42,
        on_bad_row: Literal["raise", "skip"] = "raise",
        skipped_file: str | os.PathLike | None = None,
        row_check: Callable[[dict[str, Any]], None] | None = None,
        since: int | None = None,
        picture_opening: PictureOpening = "upright",
        cache_dir: str | os.PathLike | None = None,
    ):
        if shuffle_buffer_size < 0:
            raise UserError(f"--shuffle_buffer_size is {shuffle_buffer_size}; give a number of rows, or 0.")
        self.sources = list(sources)
        self.shuffle_buffer_size = shuffle_buffer_size
        self.seed = seed
        self.on_bad_row = on_bad_row
        self.skipped_file = skipped_file
        self.row_check = row_check
        self.since = time.time_ns() if since is None else since
        self._files = FilesAsTheyWere(str(file) for source in self.sources for file in source.container.files)
        self.picture_opening: PictureOpening = picture_opening
        self.rank, self.world_size, self.batch_size = 0, 1, 1
        self._drawn: list[np.ndarray | None] = []  # of a weighted source, its rows in the mixture
        self._pieces: list[Piece] = []
        for position, source in enumerate(self.sources):
            self._add(source, position, cache_dir)
        self._sizes = np.array([piece.stop - piece.start for piece in self._pieces], dtype=np.int64)
        self._share_memory()

    def _add(self, source: Source, position: int, cache_dir: str | os.PathLike | None) -> None:
        blocks = blocks_of(source.container, cache_dir)
        drawn = None
        if source.weight != 1:
            drawn = draw_rows(sum(block.num_rows for block in blocks), source.weight, self.seed, position)
        self._drawn.append(drawn)
        for block in blocks:
            size = block.num_rows
            if drawn is not None:
                size = int(np.diff(np.searchsorted(drawn, [block.first_row - 1, block.first_row - 1 + size]))[0])
            step = size
            if block.num_bytes <= _MAX_DIVIDED_BYTES:
                step = max(_PIECE_ROWS, -(-size // _MAX_PIECES))
            starts = range(0, size, max(step, 1))
            self._pieces += [Piece(position, block, start, min(start + step, size)) for start in starts]

    def _share_memory(self) -> None:
        # Workers that outlive an epoch see what is set here.
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._passed = torch.full((2,), -1, dtype=torch.int64).share_memory_()  # epoch, batches

    def for_rank(self, rank: int, world_size: int, batch_size: int) -> "LlavaStream":
        """This stream as one of `world_size` processes reads it, in batches of `batch_size` rows."""
        stream = copy.copy(self)
        stream.rank, stream.world_size, stream.batch_size = rank, world_size, batch_size
        stream._share_memory()
        return stream

    @property
    def num_rows(self) -> int:
        """Rows of the mixture."""
        return int(self._sizes.sum())

    def __len__(self) -> int:
        """Rows that each rank takes in an epoch."""
        return -(-self.num_rows // self.world_size)

    @property
    def order(self) -> dict[str, Any]:
        """What the order of the rows follows from, besides epoch and number of workers."""
        digest = blake2b(digest_size=8)
        for source, drawn in zip(self.sources, self._drawn, strict=True):
            digest.update(f"{source.reading}\t{source.weight}\t{drawn is None}\n".encode())
        for piece in self._pieces:
            lies = (piece.source, piece.block.first_row, piece.block.num_bytes, piece.start, piece.stop)
            digest.update(repr(lies).encode())
        return {
            "data": f"{self.num_rows:,} rows, digest {digest.hexdigest()}",
            "seed": self.seed,
            "shuffle_buffer_size": self.shuffle_buffer_size,
            "processes": self.world_size,
            "per_device_train_batch_size": self.batch_size,
        }

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next `iter()` gives; Trainer and accelerate call it."""
        self._epoch.fill_(epoch)

    def pass_over(self, epoch: int, num_batches: int) -> None:
        """In `epoch`, give `PASSED` in place of each row of this rank's first `num_batches` batches, reading
        nothing."""
        self._passed.copy_(torch.tensor([epoch, num_batches]))

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        worker, num_workers = (0, 1) if info is None else (info.id, info.num_workers)
        epoch = int(self._epoch)
        passed_epoch, num_batches = self._passed.tolist()
        first, stop = self._run(worker, num_workers)
        num_passed = 0
        if epoch == passed_epoch:
            num_passed = min(len(range(worker, num_batches, num_workers)) * self.batch_size, stop - first)
        yield from repeat(PASSED, num_passed)
        plan = self._plan(epoch)
        reader = RowReader(self.sources, self._drawn)
        size = self.shuffle_buffer_size or _UNSHUFFLED_ROWS
        done = first + num_passed
        for start in range(first + num_passed // size * size, stop, size):
            end = min(start + size, stop)
            buffer = list(self._read(reader, plan, start, end))
            if self.shuffle_buffer_size:
                shuffled = self._random(epoch, start).permutation(len(buffer))
                buffer = [buffer[place] for place in shuffled]
            for place in range(max(done - start, 0), len(buffer)):
                yield self._good_row(buffer, place, plan, end)

    def _run(self, worker: int, num_workers: int) -> tuple[int, int]:
        """Start and end of a worker's run in the epoch's order. The DataLoader takes a batch of each worker by turns;
        only the rank's last batch can be short."""
        num_rows, size = len(self), self.batch_size
        num_batches = -(-num_rows // size)
        batches = [len(range(other, num_batches, num_workers)) for other in range(num_workers)]
        start = sum(batches[:worker]) * size
        stop = start + batches[worker] * size
        short = num_batches * size - num_rows
        last = (num_batches - 1) % num_workers
        start, stop = start - short * (worker > last), stop - short * (worker >= last)
        return self.rank * num_rows + start, self.rank * num_rows + stop

    def _plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The pieces in the epoch's order, and where each ends in it."""
        order = np.arange(len(self._pieces))
        if self.shuffle_buffer_size:
            order = self._random(epoch).permutation(len(self._pieces))
        return order, np.cumsum(self._sizes[order])

    def _random(self, *numbers: int) -> np.random.RandomState:
        # RandomState, whose streams numpy keeps the same for ever.
        return np.random.RandomState([number % 2**32 for number in (self.seed, *numbers)])

    def _read(self, reader: RowReader, plan: tuple[np.ndarray, np.ndarray], start: int, stop: int) -> Iterator[RawRow]:
        """The raw rows from `start` to `stop` of the epoch's order; behind its end, it begins again."""
        order, ends = plan
        while start < stop:
            place = start % self.num_rows
            index = int(np.searchsorted(ends, place, side="right"))
            piece, end = self._pieces[order[index]], int(ends[index])
            num_rows = min(stop - start, end - place)
            skipped = piece.stop - piece.start - (end - place)
            self._check_files(piece)
            try:
                yield from reader.read(piece, skipped, num_rows)
            except UserError:
                self._check_files(piece)  # rows of a file that is written to are wrong for this reason
                raise
            start += num_rows

    def _check_files(self, piece: Piece) -> None:
        source, part = self.sources[piece.source], piece.block.part
        for file in source.container.files if part is None else [part.path]:
            self._files.check(str(file), f"{source.where}: row {piece.block.first_row + piece.start}")

    def _good_row(
        self, buffer: list[RawRow], place: int, plan: tuple[np.ndarray, np.ndarray], end: int
    ) -> dict[str, Any]:
        """The row at `place` of the buffer. Where bad ones are skipped, the next good one behind it: from the buffer,
        which is taken round, or else from what follows its `end` in the epoch's order."""
        try:
            return self._checked(*buffer[place])
        except UserError as error:
            if self.on_bad_row == "raise" or isinstance(error, FileChanged):
                raise
            self._list(buffer[place], error)
        behind = self._read(RowReader(self.sources, self._drawn), plan, end, end + self.num_rows)
        for row in chain(buffer[place + 1 :], buffer[:place], behind):
            try:
                return self._checked(*row)
            except FileChanged:
                raise
            except UserError:
                continue  # listed in its own place
        raise UserError(f"{self.sources[0].where}: no row can be trained on; llava-ft check says why.")

    def _list(self, row: RawRow, error: UserError) -> None:
        if self.skipped_file is None:
            logger.warning("skipped: %s", error.sentence)
            return
        source, given_id = self.sources[row.source], row.raw.get("id") if isinstance(row.raw, dict) else None
        problem = problem_of(error, source.where, row.number, given_id, source.place(row.raw, row.number))
        add_left_out(Path(self.skipped_file), problem)

    def _checked(self, source_index: int, number: int, raw: Any) -> dict[str, Any]:
        opening, check = self.picture_opening, self.row_check
        return decoded_row(self.sources[source_index], number, raw, since=self.since, opening=opening, check=check)
