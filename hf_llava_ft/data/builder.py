"""LLaVA JSON as a `datasets.Dataset`: checked as a whole once, then memory-mapped from the cache.

What may surprise:
* The cache holds paths of images, never their pixels. It is used again only while the files are what they were: the
  data files' contents and every named image's size and modification time are part of the cache's name.
* So making the builder already reads the data files, unless this very version of them was seen before
  (`file_index.py`); opening a known set costs one `stat` per image.
* A large file is read by several processes, a part each. What they write and the first error are those of one process.
* A set with a wrong row or an unreadable image has no cache at all, half or whole.
* `datasets.Image` decodes a picture in one way only, turned as its EXIF data say. So `load_llava_json` leaves the
  images undecoded, and the collator opens them as the model's processor says.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import datasets
import numpy as np
import pyarrow as pa
from datasets import Features, Image, List

from hf_llava_ft.data.decoded import DecodedPictures
from hf_llava_ft.data.features import FEATURES
from hf_llava_ft.data.image_folder import ImageFolder
from hf_llava_ft.data.json.file_index import FileIndex, columns_folder, content_fingerprint, file_index
from hf_llava_ft.data.json.named_images import NamedImages
from hf_llava_ft.data.json.parts import JsonPart
from hf_llava_ft.data.json.rows import iter_json_rows
from hf_llava_ft.data.json.tables import TABLE_ROWS, tables_of_part
from hf_llava_ft.data.pictures import unreadable_images
from hf_llava_ft.data.schema import parse_llava_row, row_place
from hf_llava_ft.data.worker_pool import num_workers, results_in_order
from hf_llava_ft.errors import UserError, user_error_behind

_NUM_NAMED = 3  # unreadable images that a message names besides the first


@dataclass
class LlavaConversationsConfig(datasets.BuilderConfig):
    """
    Args:
        files (`tuple[str]`):
            Absolute paths of the data files. Not the `data_files` of `datasets`, which would take "[1].json" for a
            pattern.
        image_folder (`str`, *optional*):
            Folder that image paths are relative to; not needed for text alone.
        content_fingerprint (`str`, *optional*):
            Stands for the contents of the data files and the images, as `datasets` stands by it: equal means reuse the
            cache. Computed by [`LlavaConversations`] when not given.
    """

    files: tuple[str, ...] = ()
    image_folder: str | None = None
    content_fingerprint: str | None = None


class LlavaConversations(datasets.ArrowBasedBuilder):
    """
    The `datasets` builder of LLaVA JSON and JSONL files, with one split, `train`.

    Rows are as in `hf_llava_ft.data.schema`; besides, `num_images`, and `num_words`, the original's measure of length
    (`count_words`).

    Args:
        cache_dir (`str`, *optional*):
            Root of the cache; the cache of `datasets` (HF_DATASETS_CACHE, HF_HOME) by default.
        data_files (`str` or `list[str]`):
            The files, whose rows follow one another. No patterns: a path is a path, whatever characters it has.
        image_folder (`str`, *optional*):
            Folder that the image paths are relative to.
        kwargs:
            For `datasets.DatasetBuilder`.

    Raises:
        UserError: here if a data file or the image folder can't be read, and from `download_and_prepare` if anything
            else is wrong with a row or an image.
    """

    VERSION = datasets.Version("1.0.0")  # raise it when the same files give other rows
    BUILDER_CONFIG_CLASS = LlavaConversationsConfig
    DEFAULT_WRITER_BATCH_SIZE = TABLE_ROWS  # `datasets` takes 100 where there are images, but here are only paths

    def __init__(
        self,
        cache_dir: str | None = None,
        data_files: str | os.PathLike | Sequence[str | os.PathLike] | None = None,
        image_folder: str | os.PathLike | None = None,
        **kwargs,
    ):
        paths = _absolute_paths(data_files)
        if image_folder is not None:
            image_folder = os.path.abspath(os.path.expanduser(image_folder))
        self._index_root = Path(os.path.expanduser(cache_dir or datasets.config.HF_DATASETS_CACHE))
        indexes = [file_index(path, self._index_root) for path in paths]
        # All rows, in parts of some megabytes that can be read each on its own.
        self.parts: list[JsonPart] = [part for index in indexes for part in index.parts]
        self._named = _named_images(indexes, ImageFolder(image_folder))
        if kwargs.get("content_fingerprint") is None:
            kwargs["content_fingerprint"] = content_fingerprint(indexes, self._named)
        kwargs.setdefault("dataset_name", "llava_conversations")
        super().__init__(
            cache_dir=cache_dir,
            files=tuple(paths),
            image_folder=image_folder,
            **kwargs,
        )

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=FEATURES)

    def _split_generators(self, dl_manager) -> list[datasets.SplitGenerator]:
        # A list in gen_kwargs is what `datasets` divides among processes.
        return [datasets.SplitGenerator(name=datasets.Split.TRAIN, gen_kwargs={"parts": self.parts})]

    def _generate_tables(self, parts: list[JsonPart]) -> Iterator[tuple[str, pa.Table]]:
        images = ImageFolder(self.config.image_folder)
        for part in parts:
            columns = columns_folder(part.path, self._index_root)
            for number, table in enumerate(tables_of_part(part, images, self._named, columns)):
                yield f"{part.path}:{part.first_row}:{number}", table

    def download_and_prepare(self, *args, num_proc: int | None = None, **kwargs) -> None:
        """As in `datasets.DatasetBuilder`, except that a `UserError` arrives as one, and is that of the first wrong
        row."""
        try:
            super().download_and_prepare(*args, num_proc=num_proc, **kwargs)
        except UserError:
            raise
        except Exception as error:  # a pool that is torn down over a wrong row may raise something of its own
            if num_proc and num_proc > 1:
                # Another process has met it, and there may be one before it.
                for _ in results_in_order(self._read_to_the_end, self.parts, num_proc):
                    pass
            cause = user_error_behind(error)
            if cause is None:
                raise
            raise cause from None

    def _read_to_the_end(self, part: JsonPart) -> None:
        for _ in self._generate_tables([part]):
            pass

    def _download_and_prepare(self, *args, **kwargs) -> None:
        super()._download_and_prepare(*args, **kwargs)
        # Last, since it takes longest; still inside, so that a failure leaves no cache.
        self._refuse_unreadable_images()

    def _refuse_unreadable_images(self) -> None:
        files, images = self.config.files, ImageFolder(self.config.image_folder)
        # All of them are inside the folder, links followed: the rows have been read. So no need to do it again.
        named = self._named
        unreadable = unreadable_images(named.paths, DecodedPictures(self._index_root), named.states)
        if not unreadable:
            return
        unreadable = {os.path.realpath(path): reason for path, reason in unreadable.items()}
        for file in files:
            for number, raw in iter_json_rows(file):
                row, place = parse_llava_row(raw, file, number), row_place(file, number, raw.get("id"))
                for name in cast(list[str], row["images"]):
                    reason = unreadable.pop(images.resolve(name, place), None)
                    if reason is not None:
                        others = _nor_can([os.path.relpath(path, images.real_path) for path in unreadable])
                        raise UserError(
                            f"{place}: image {name!r} can't be decoded ({reason}){others}; "
                            "replace the file or remove the row."
                        )


def load_llava_json(
    data_path: str | os.PathLike | Sequence[str | os.PathLike],
    image_folder: str | os.PathLike | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> datasets.Dataset:
    """
    Open LLaVA JSON or JSONL as a dataset on disk, after checking all of it, images included.

    The first time costs a full read and a full decode of each image, on all cores; after that, one `stat` per image.

    Args:
        data_path (`str` or `list[str]`):
            The file or files.
        image_folder (`str`, *optional*):
            Folder that the image paths are relative to.
        cache_dir (`str`, *optional*):
            Where the dataset is kept; the cache of `datasets` by default.

    Returns:
        `datasets.Dataset`, memory-mapped, with `FEATURES`.

    Raises:
        UserError: at the first thing that is wrong; nothing is left in the cache then.
    """
    root = Path(os.path.expanduser(cache_dir or datasets.config.HF_DATASETS_CACHE))
    paths = _absolute_paths(data_path)
    try:
        for path in paths:
            file_index(path, root, keep_columns=True)
        builder = LlavaConversations(
            cache_dir=None if cache_dir is None else os.fspath(cache_dir), data_files=paths, image_folder=image_folder
        )
        builder.download_and_prepare(num_proc=max(1, min(num_workers(), len(builder.parts))))
    finally:
        for path in paths:
            with suppress(UserError):
                shutil.rmtree(columns_folder(path, root), ignore_errors=True)
    return undecoded(builder.as_dataset(split="train"))


def undecoded(dataset: datasets.Dataset) -> datasets.Dataset:
    """`dataset`, of `FEATURES`, with its images as they are stored: the collator opens them as the model's processor
    says."""
    # Said of the rows as they lie on the disk; cast_column would write them all a second time, embedded pictures
    # included.
    info = dataset.info.copy()
    info.features = Features({**FEATURES, "images": List(Image(decode=False))})
    return datasets.Dataset(dataset.data, info=info, split=dataset.split, fingerprint=dataset._fingerprint)


def modality_lengths(dataset: datasets.Dataset) -> np.ndarray:
    """
    The rows' lengths with the original's sign, for `hf_llava_ft.data.sampler`.

    Args:
        dataset (`datasets.Dataset`): with the columns `num_words` and `num_images`.

    Returns:
        `int64[N]`: `num_words`, negative for rows without images.
    """
    columns = dataset.select_columns(["num_words", "num_images"]).with_format("numpy")[:]
    return np.where(columns["num_images"] > 0, 1, -1) * columns["num_words"].astype(np.int64)


def _named_images(indexes: Sequence[FileIndex], folder: ImageFolder) -> NamedImages:
    return NamedImages(dict.fromkeys(name for index in indexes for name in index.images), folder)


def _nor_can(names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _NUM_NAMED} more" if len(names) > _NUM_NAMED else ""
    return f", nor can {', '.join(names[:_NUM_NAMED])}{more}"


def _absolute_paths(data_files) -> list[str]:
    if isinstance(data_files, (str, os.PathLike)):
        data_files = [data_files]
    if not data_files:
        raise UserError("no data file is given; give the path of a LLaVA JSON or JSONL file.")
    return [os.path.abspath(os.path.expanduser(path)) for path in data_files]
