"""Sources of any format as one `datasets.Dataset`: checked as a whole once, then memory-mapped from the cache.

What may surprise:
* LLaVA JSON that only names files goes to `LlavaConversations` of `data/builder.py`, which is made for its size.
* The cache of every other source is named by the state (size and times) of its files. It is used again only while the
  image files that its rows name are what they were, too.
* Embedded pictures are copied into the cache, once.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow.compute as pc
from datasets.exceptions import DatasetGenerationError
from filelock import FileLock

from hf_llava_ft.data.builder import load_llava_json, undecoded
from hf_llava_ft.data.features import FEATURES
from hf_llava_ft.data.formats.checked_rows import checked_rows
from hf_llava_ft.data.formats.column_choice import SaidOfColumns
from hf_llava_ft.data.formats.containers import JsonFile
from hf_llava_ft.data.formats.dialects import LLAVA, SHAREGPT
from hf_llava_ft.data.formats.mixture import draw_rows
from hf_llava_ft.data.formats.source import Source, open_source, refuse_preferences
from hf_llava_ft.data.image_folder import ImageAddressError
from hf_llava_ft.errors import UserError, user_error_behind

_ROWS_LOOKED_AT = 32


@dataclass
class SourceConfig(datasets.BuilderConfig):
    """
    Args:
        source (`Source`): what is read.
        state (`str`): stands for the contents of its files and images, as `datasets` stands by it.
    """

    source: Source | None = None
    state: str = ""

    def create_config_id(self, config_kwargs, custom_features=None) -> str:
        return f"{self.name}-{self.state}"


class SourceRows(datasets.GeneratorBasedBuilder):
    """
    The `datasets` builder of a [`Source`] of any format, with one split, `train`, and the rows of
    `LlavaConversations`. Every image is decoded once, on as many threads as there are cores.

    Args:
        source (`Source`): see `open_source`.
        state (`str`): other contents have another one.
        kwargs: for `datasets.DatasetBuilder`.

    Raises:
        UserError: from `download_and_prepare`, at the first row or image that is wrong; no cache is left then.
    """

    VERSION = datasets.Version("1.0.0")  # raise it when the same files give other rows
    BUILDER_CONFIG_CLASS = SourceConfig

    def __init__(self, source: Source, state: str = "", cache_dir: str | None = None, **kwargs):
        super().__init__(cache_dir=cache_dir, dataset_name="llava_rows", source=source, state=state, **kwargs)

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=FEATURES)

    def _split_generators(self, dl_manager) -> list[datasets.SplitGenerator]:
        return [datasets.SplitGenerator(name=datasets.Split.TRAIN, gen_kwargs={"source": self.config.source})]

    def _generate_examples(self, source: Source) -> Iterator[tuple[int, dict]]:
        yield from checked_rows(source)

    def download_and_prepare(self, *args, **kwargs) -> None:
        """As in `datasets.DatasetBuilder`, except that a `UserError` arrives as one."""
        try:
            super().download_and_prepare(*args, **kwargs)
        except DatasetGenerationError as error:
            cause = user_error_behind(error)
            if cause is None:
                raise
            raise cause from None


def load_data(
    data_path: str | os.PathLike | Sequence[str | os.PathLike],
    image_folder: str | os.PathLike | None = None,
    *,
    allow_outside: bool = False,
    allow_urls: bool = False,
    seed: int = 42,
    cache_dir: str | os.PathLike | None = None,
    columns: SaidOfColumns = None,
) -> datasets.Dataset:
    """
    Open data of any format as one dataset on disk, after checking all of it, images included.

    Args:
        data_path, image_folder, allow_outside, allow_urls, cache_dir, columns: see [`open_source`].
        seed (`int`, defaults to 42): decides which rows a weight below 1 draws.

    Returns:
        `datasets.Dataset`, memory-mapped, with `FEATURES` of `data/builder.py`, images undecoded. The sets of a
        mixture follow one another in the order given, rows in the order of their files.

    Raises:
        UserError: at the first thing that is wrong. `sound_rows.sound_rows` opens a set without its wrong rows.
    """
    sources = open_source(
        data_path,
        image_folder,
        allow_outside=allow_outside,
        allow_urls=allow_urls,
        cache_dir=cache_dir,
        columns=columns,
    )
    refuse_preferences(sources)
    root = os.path.expanduser(cache_dir or datasets.config.HF_DATASETS_CACHE)
    parts = []
    for position, source in enumerate(sources):
        part = load_source(source, root)
        if source.weight != 1:
            part = part.select(draw_rows(len(part), source.weight, seed, position))
        parts.append(part)
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


def load_source(source: Source, cache_dir: str | os.PathLike) -> datasets.Dataset:
    """One source as [`load_data`] gives it, whatever its weight."""
    if _only_names_files(source):
        try:
            return load_llava_json(source.where, source.images.folder, cache_dir)
        except ImageAddressError:
            pass  # a later row holds a picture after all, or its sentence is for the store of images to say
    root = Path(cache_dir) / "llava_rows_states"
    files = blake2b(files_state(source).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    known = root / f"{files}.json"
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{known}.lock"):  # one process of many builds
        state = f"{files}-new"
        if known.exists():
            kept = json.loads(known.read_text(encoding="utf-8"))
            builder = SourceRows(source, kept["state"], os.fspath(cache_dir))
            if os.path.isdir(builder.cache_dir):
                dataset = builder.as_dataset(split="train")
                images = _images_state(dataset)
                if images == kept["images"]:
                    return undecoded(dataset)
                state = f"{files}-{images}"
        builder = SourceRows(source, state, os.fspath(cache_dir))
        builder.download_and_prepare()
        dataset = builder.as_dataset(split="train")
        unfinished = known.with_suffix(".incomplete")
        unfinished.write_text(json.dumps({"state": state, "images": _images_state(dataset)}), encoding="utf-8")
        unfinished.replace(known)
    return undecoded(dataset)


def _only_names_files(source: Source) -> bool:
    """Whether a source is LLaVA JSON of the plain kind, as far as its first rows tell."""
    if not isinstance(source.container, JsonFile) or source.dialect not in (LLAVA, SHAREGPT):
        return False
    if source.images.allow_outside or source.images.allow_urls:
        return False
    for number, raw in islice(source.iter_raw(), _ROWS_LOOKED_AT):
        try:
            images = source.parse(raw, number)["images"]
        except UserError:
            continue  # said when all rows are read
        written = raw.get("images", raw.get("image"))
        in_objects = isinstance(written, dict) or (
            isinstance(written, list) and any(isinstance(i, dict) for i in written)
        )
        if in_objects or any(isinstance(image, str) and image.startswith(("data:", "file:")) for image in images):
            return False
    return True


def files_state(source: Source) -> str:
    """What the cache of a source depends on, apart from the images: its files, and how it is read."""
    states: list[Any] = [source.container.fingerprint]
    for path in source.container.files:
        status = os.stat(path)
        # With ctime, which no program can set.
        states.append([path, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino])
    images = source.images
    folder = None if images.folder is None else os.path.realpath(images.folder)
    return json.dumps([source.where, source.reading, states, folder, images.allow_outside, images.allow_urls])


def _images_state(dataset: datasets.Dataset) -> str:
    """Digest of path, size and time of every image file that the rows name."""
    digest = blake2b(digest_size=16)
    for chunk in dataset.data.column("images").chunks:
        # Only files: an embedded picture's path is a name that it once had.
        images = pc.list_flatten(chunk)
        names = images.filter(pc.is_null(pc.struct_field(images, "bytes"))).field("path")
        for path in pc.unique(names).to_pylist():
            try:
                status = os.stat(path)
                state = f"{path}\t{status.st_size}\t{status.st_mtime_ns}\n"
            except OSError:
                state = f"{path}\tmissing\n"
            digest.update(state.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
