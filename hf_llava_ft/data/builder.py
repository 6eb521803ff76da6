"""LLaVA JSON as a `datasets.Dataset`: checked as a whole once, then memory-mapped from the cache.

What may surprise:
* The cache holds paths of images, never their pixels. It is used again only while the files are what they were: the
  data files' contents and every named image's size and modification time are part of the cache's name.
* So making the builder already reads the data files, unless this very version of them was seen before: a small list of
  the images they name is kept beside the cache, and opening a known set costs one `stat` per image.
* A set with a wrong row or an unreadable image has no cache at all, half or whole.
* `datasets.Image` turns a picture the way its EXIF orientation says, which the original LLaVA does not. So
  `load_llava_json` leaves the images undecoded, and the collator opens them.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import datasets
import numpy as np
from datasets import Features, Image, List, Value
from datasets.data_files import DataFilesDict, DataFilesList
from datasets.exceptions import DatasetGenerationError
from filelock import FileLock

from hf_llava_ft.data.llava_json import ImageFolder, iter_json_rows, iter_llava_json, unreadable_images
from hf_llava_ft.data.schema import parse_llava_row, row_place
from hf_llava_ft.errors import UserError

FEATURES = Features(
    {
        "id": Value("string"),
        "messages": List(
            {"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}
        ),
        "images": List(Image()),
        "num_words": Value("int32"),
        "num_images": Value("int32"),
    }
)

_NUM_NAMED = 3  # unreadable images that a message names besides the first


@dataclass
class LlavaConversationsConfig(datasets.BuilderConfig):
    """
    Args:
        image_folder (`str`, *optional*):
            Folder that image paths are relative to; not needed for text alone.
        content_fingerprint (`str`, *optional*):
            Stands for the contents of the data files and the images, as `datasets` stands by it: equal means reuse the
            cache. Computed by [`LlavaConversations`] when not given.
    """

    image_folder: str | None = None
    content_fingerprint: str | None = None


class LlavaConversations(datasets.GeneratorBasedBuilder):
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
        `UserError`: here if a data file or the image folder can't be read, and from `download_and_prepare` if anything
            else is wrong with a row or an image.
    """

    VERSION = datasets.Version("1.0.0")  # raise it when the same files give other rows
    BUILDER_CONFIG_CLASS = LlavaConversationsConfig

    def __init__(
        self,
        cache_dir: str | None = None,
        data_files: str | os.PathLike | Sequence[str | os.PathLike] | DataFilesDict | None = None,
        image_folder: str | os.PathLike | None = None,
        **kwargs,
    ):
        paths = _absolute_paths(data_files)
        if image_folder is not None:
            image_folder = os.path.abspath(os.path.expanduser(image_folder))
        if kwargs.get("content_fingerprint") is None:
            root = os.path.expanduser(cache_dir or datasets.config.HF_DATASETS_CACHE)
            kwargs["content_fingerprint"] = _content_fingerprint(paths, image_folder, Path(root))
        kwargs.setdefault("dataset_name", "llava_conversations")
        super().__init__(
            cache_dir=cache_dir,
            # Made here, since `datasets` would take "[1].json" for a pattern. The fingerprint replaces time stamps.
            data_files=DataFilesDict({"train": DataFilesList(paths, origin_metadata=[])}),
            image_folder=image_folder,
            **kwargs,
        )

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=FEATURES)

    def _split_generators(self, dl_manager) -> list[datasets.SplitGenerator]:
        # A list in gen_kwargs is what `datasets` divides among processes.
        files = list(self.config.data_files["train"])
        return [datasets.SplitGenerator(name=datasets.Split.TRAIN, gen_kwargs={"files": files})]

    def _generate_examples(self, files: list[str]) -> Iterator[tuple[str, dict]]:
        images = ImageFolder(self.config.image_folder)
        for path in files:
            for number, row in enumerate(iter_llava_json(path, images), start=1):
                yield f"{path}:{number}", row

    def download_and_prepare(self, *args, **kwargs) -> None:
        """As in `datasets.DatasetBuilder`, except that a `UserError` arrives as one."""
        try:
            super().download_and_prepare(*args, **kwargs)
        except DatasetGenerationError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, UserError):
                cause = cause.__cause__ or cause.__context__
            if cause is None:
                raise
            raise cause from None

    def _download_and_prepare(self, *args, **kwargs) -> None:
        super()._download_and_prepare(*args, **kwargs)
        # Last, since it takes longest; still inside, so that a failure leaves no cache.
        self._refuse_unreadable_images()

    def _refuse_unreadable_images(self) -> None:
        files, images = self.config.data_files["train"], ImageFolder(self.config.image_folder)
        named = [(file, name) for file in files for name in _contents(file, Path(self._cache_dir_root))[1]]
        unreadable = unreadable_images(images.resolve(name, file) for file, name in named)
        if not unreadable:
            return
        for file in files:
            for number, raw in iter_json_rows(file):
                row, place = parse_llava_row(raw, file, number), row_place(file, number, raw.get("id"))
                for name in row["images"]:
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
    Open LLaVA JSON or JSONL as a data set on disk, after checking all of it, images included.

    The first time costs a full read and a full decode of each image; after that, one `stat` per image.

    Args:
        data_path (`str` or `list[str]`):
            The file or files.
        image_folder (`str`, *optional*):
            Folder that the image paths are relative to.
        cache_dir (`str`, *optional*):
            Where the data set is kept; the cache of `datasets` by default.

    Returns:
        `datasets.Dataset`, memory-mapped, with [`FEATURES`].

    Raises:
        `UserError`: at the first thing that is wrong; nothing is left in the cache then.
    """
    builder = LlavaConversations(
        cache_dir=None if cache_dir is None else os.fspath(cache_dir), data_files=data_path, image_folder=image_folder
    )
    builder.download_and_prepare()
    # Undecoded: the collator opens a picture as the original does, without its EXIF orientation.
    return builder.as_dataset(split="train").cast_column("images", List(Image(decode=False)))


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


def _nor_can(names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _NUM_NAMED} more" if len(names) > _NUM_NAMED else ""
    return f", nor can {', '.join(names[:_NUM_NAMED])}{more}"


def _absolute_paths(data_files) -> list[str]:
    if isinstance(data_files, DataFilesDict):
        data_files = [path for files in data_files.values() for path in files]
    elif isinstance(data_files, (str, os.PathLike)):
        data_files = [data_files]
    if not data_files:
        raise UserError("no data file is given; give the path of a LLaVA JSON or JSONL file.")
    return [os.path.abspath(os.path.expanduser(path)) for path in data_files]


def _content_fingerprint(paths: list[str], image_folder: str | None, cache_root: Path) -> str:
    """Digest of the data files' contents, of the folder, and each named image's path, size and modification time."""
    folder = ImageFolder(image_folder).real_path or ""
    digest = blake2b(os.fsencode(folder), digest_size=16)
    names: dict[str, None] = {}
    for path in paths:
        contents, named = _contents(path, cache_root)
        digest.update(contents.encode())
        names.update(dict.fromkeys(named))
    states = []
    for name in names:
        try:
            status = os.stat(f"{folder}/{name}")
            states.append(f"{name}\t{status.st_size}\t{status.st_mtime_ns}")
        except (OSError, ValueError):  # what is wrong with it is said with its row, when rows are read
            states.append(f"{name}\tmissing")
    digest.update("\n".join(states).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _contents(path: str, cache_root: Path) -> tuple[str, list[str]]:
    """Digest of a data file's bytes and the image names in it, remembered for as long as the file is the same."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror}); check the path.") from None
    # With ctime, which no program can set: a file that another of equal size and time was copied over is noticed too.
    identity = [path, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    kept = (
        cache_root
        / "llava_conversations_files"
        / f"{blake2b(repr(identity).encode(), digest_size=16).hexdigest()}.json"
    )
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{kept}.lock"):  # one process of many reads the file
            if not kept.exists():
                names: dict[str, None] = {}
                for _, row in iter_json_rows(path):
                    names.update(dict.fromkeys(_image_names(row)))
                digest = blake2b(digest_size=16)
                with open(path, "rb") as file:
                    while chunk := file.read(2**20):
                        digest.update(chunk)
                unfinished = kept.with_suffix(".incomplete")
                unfinished.write_text(
                    json.dumps({"digest": digest.hexdigest(), "images": list(names)}), encoding="utf-8"
                )
                unfinished.replace(kept)
    known = json.loads(kept.read_text(encoding="utf-8"))
    return known["digest"], known["images"]


def _image_names(row) -> list[str]:
    """Names of images in a row that has not been checked yet."""
    values = [row.get("image"), row.get("images")] if isinstance(row, dict) else []
    names = [name for value in values for name in (value if isinstance(value, list) else [value])]
    return [name for name in names if isinstance(name, str)]
