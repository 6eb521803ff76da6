"""What a check found, kept beside the cache of `datasets` until anything that it follows from has changed.

A second check of the same data under the same settings reads no row: it compares the state (size, times, inode) of the
data files and of every image file. Training takes the token counts from here too, so that rows are tokenised once.

What may surprise:
* Nothing is kept of a check during which a file was written, or that found an image missing or refused, or that
  reached one through a link: what would mend these is not among the files that are compared.
* The last check of each data and settings is kept, and no older one.
"""

import base64
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import PIL

from hf_llava_ft import __version__
from hf_llava_ft.checking.collected import Collected
from hf_llava_ft.checking.result import CheckResult
from hf_llava_ft.checking.rows import Sample
from hf_llava_ft.data.decoded import DecodedPictures
from hf_llava_ft.data.formats import Source
from hf_llava_ft.data.formats.dataset import files_state
from hf_llava_ft.data.lengths import TokenCounts, processor_parts
from hf_llava_ft.data.problems import Problem
from hf_llava_ft.processing.processing_llava import LlavaProcessor

_VERSION = 1  # raise it when the same data give another result
_NOT_AMONG_THE_FILES = {"missing_image", "refused_image"}
_MAX_SAMPLE_BYTES = 16 * 2**20  # of pictures that the shown rows hold


class KeptCheck:
    """
    Where the result of one check is kept. Made before the check begins, so that it knows what is younger.

    Args:
        root (`Path`): of the cache.
        sources, processor, settings: all that the result follows from besides the files.

    Attributes:
        decoded (`DecodedPictures`): what training need not decode again.
    """

    def __init__(self, root: Path, sources: list[Source], processor: LlavaProcessor | None, **settings: Any):
        self._sources, self._processor = sources, processor
        self._root = root / "llava_checks"
        said = [[source.weight, source.dialect.columns and source.dialect.columns.told()] for source in sources]
        self._files = [files_state(source) for source in sources]
        # Of the state of files only what does not change with them, so that a new check takes the place of the old.
        names = [[source.where, source.reading] for source in sources]
        images = [[each.images.folder, each.images.allow_outside, each.images.allow_urls] for each in sources]
        identity = [names, images, said, _processor_key(processor), settings]
        self._path = self._root / f"{_digest(identity)}.json"
        self._began = _clock_of(self._root)
        self.decoded = DecodedPictures(root)

    def load(self) -> CheckResult | None:
        """The result, if all files are what they were."""
        try:
            kept = json.loads(self._path.read_text(encoding="utf-8"))
            if kept["files"] != self._files or kept["images_state"] != _images_state(kept["images"])[0]:
                return None
            return _result(kept["result"])
        except (OSError, ValueError, KeyError, TypeError):  # none, or one that something else wrote
            return None

    def store(self, collected: Collected, result: CheckResult) -> None:
        """Keeps the result, and of each source the token counts, where there is room for it."""
        with suppress(OSError):
            self._store(collected, result)

    def _store(self, collected: Collected, result: CheckResult) -> None:
        if self._files != [files_state(source) for source in self._sources]:
            return
        if collected.has_links or any(problem.kind in _NOT_AMONG_THE_FILES for problem in result.problems):
            return
        if any(problem.kind == "broken_file" for problem in result.problems):
            return
        images = list(collected.paths)
        state, youngest = _images_state(images)
        of_files = [os.stat(path).st_ctime_ns for source in self._sources for path in source.container.files]
        if max([youngest, *of_files]) >= self._began:
            return
        if self._processor is not None and not self._processor.depends_on_image_size:
            for index, source in enumerate(self._sources):
                _store_counts(self._root, source, self._processor, collected, index)
        as_json = _as_json(result)
        if as_json is not None:
            kept = {"files": self._files, "images": images, "images_state": state, "result": as_json}
            _write(self._path, json.dumps(kept).encode())


def known_counts(root: Path, source: Source, numbers: np.ndarray, processor: LlavaProcessor) -> TokenCounts | None:
    """
    What a check has counted of some rows.

    Args:
        root (`Path`): of the cache.
        source (`Source`): whose rows they are; its files must be what they were.
        numbers (`int64[N]`): the rows, from 1.
        processor (`LlavaProcessor`): that of the check.

    Returns:
        `TokenCounts` as `token_counts` gives them; None if they are not known of every row.
    """
    if processor.depends_on_image_size:  # then they follow from the images, too
        return None
    try:
        with np.load(_counts_path(root / "llava_checks", source, processor), allow_pickle=False) as kept:
            if str(kept["state"]) != files_state(source):
                return None
            lengths, supervised = kept["lengths"], kept["supervised"]
    except (OSError, ValueError, KeyError):
        return None
    if len(numbers) and numbers[-1] > len(lengths):
        return None
    lengths, supervised = (of_all[numbers - 1].astype(np.int64) for of_all in (lengths, supervised))
    return None if (lengths <= 0).any() or (supervised < 0).any() else TokenCounts(lengths, supervised)


def _store_counts(root: Path, source: Source, processor: LlavaProcessor, collected: Collected, index: int) -> None:
    of_source = collected.column("source") == index
    if not (collected.column("numbers")[of_source] == np.arange(1, of_source.sum() + 1)).all():
        return
    path = _counts_path(root, source, processor)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.npz")
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    np.savez(
        unfinished,
        state=np.array(files_state(source)),
        lengths=collected.column("lengths")[of_source],
        supervised=collected.column("supervised")[of_source],
    )
    unfinished.replace(path)


def _counts_path(root: Path, source: Source, processor: LlavaProcessor) -> Path:
    return root / f"{_digest([source.where, source.reading, _processor_key(processor)])}-counts.npz"


def _processor_key(processor: LlavaProcessor | None) -> Any:
    ours = [_VERSION, __version__, PIL.__version__]
    if processor is None:
        return ours
    return [*ours, processor_parts(processor), processor.stop_string, processor.stop_token_id]


def _clock_of(folder: Path) -> int:
    """Now, in nanoseconds, as the disk's clock has it; 0, before which no file is, where nothing can be kept."""
    probe = folder / f".clock-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        now = probe.stat().st_mtime_ns
        probe.unlink()
    except OSError:
        return 0
    return now


def _images_state(paths: Iterable[str]) -> tuple[str, int]:
    """Digest of the state of some files, and when the youngest of them was changed."""
    digest, youngest = blake2b(digest_size=16), 0
    for path in paths:
        try:
            status = os.stat(path)
        except OSError:
            digest.update(b"missing\n")
            continue
        state = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
        digest.update(f"{state}\n".encode())
        youngest = max(youngest, status.st_ctime_ns)
    return digest.hexdigest(), youngest


def _as_json(result: CheckResult) -> dict[str, Any] | None:
    """None for one whose samples take too much room."""
    fields = dict(vars(result))
    samples = {}
    for name, sample in result.samples.items():
        images = [image | {"bytes": _text_of(image["bytes"])} for image in sample.images]
        samples[name] = [sample.number, _row_with(sample.row, _text_of), images]
    fields["samples"] = samples
    if sum(len(image["bytes"] or "") for _, _, images in samples.values() for image in images) > _MAX_SAMPLE_BYTES:
        return None
    return fields


def _result(fields: dict[str, Any]) -> CheckResult:
    for name in ("problems", "warnings"):
        fields[name] = [Problem(*each) for each in fields[name]]
    fields["samples"] = {
        name: Sample(
            number,
            _row_with(row, _bytes_of),
            [image | {"bytes": _bytes_of(image["bytes"])} for image in images],
        )
        for name, (number, row, images) in fields["samples"].items()
    }
    return CheckResult(**fields)


def _row_with(row: Any, change: Any) -> Any:
    """A row whose embedded pictures are changed to text, or back."""
    images = [
        image if isinstance(image, str) else image | {"bytes": change(image["bytes"])} for image in row["images"]
    ]
    return row | {"images": images}


def _text_of(content: bytes | None) -> str | None:
    return None if content is None else base64.b64encode(content).decode()


def _bytes_of(text: str | None) -> bytes | None:
    return None if text is None else base64.b64decode(text)


def _digest(identity: Any) -> str:
    return blake2b(json.dumps(identity, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def _write(path: Path, content: bytes) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished.write_bytes(content)
    unfinished.replace(path)
