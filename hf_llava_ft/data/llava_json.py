"""Reading LLaVA JSON files and the images they name.

A file is a JSON list of rows or one row per line (JSONL); its content decides, not its name. A BOM and CRLF are fine.

What may surprise:
* Rows are decoded one at a time from a small buffer. The released sets are up to gigabytes of JSON, and `json.load`
  needs several times that in memory, in every process.
* An image must lie inside the image folder once `..` and symbolic links are followed: a data set from elsewhere could
  name any file of this computer otherwise. Absolute paths are refused even when they point inside, since they tie the
  data to one computer.
* Decoding every image before training costs minutes on a large set, once. Meeting a truncated one in hour nine costs
  more.
"""

import json
import os
import re
import stat
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, TextIO, cast

from hf_llava_ft.data.pictures import decode_failure
from hf_llava_ft.data.schema import count_words, json_type, parse_llava_row, row_place
from hf_llava_ft.data.worker_pool import results_in_order
from hf_llava_ft.errors import UserError

# A row longer than this is no conversation, and would have to fit in memory as a whole.
MAX_ROW_CHARS = 64 * 2**20

_CHUNK_CHARS = 2**20
# By one of these an object is a row, in any of the dialects of data/formats/.
_ROW_KEYS = {"conversations", "messages", "prompt", "file_name", "image"}
_DECODED_AT_ONCE = 64
_WHITESPACE = re.compile(r"[ \t\n\r]*")
# Where a number, a word or an escape (\ud83d\ude00) is cut by the buffer's end, the decoder stops this near to it.
_LONGEST_CUT = 16


def iter_llava_json(path: str, images: "ImageFolder") -> Iterator[dict[str, Any]]:
    """
    The rows of a LLaVA JSON or JSONL file, checked, with image paths that exist.

    Args:
        path (`str`):
            The file.
        images (`ImageFolder`):
            Where its image paths lead.

    Yields:
        What [`checked_row`] returns.

    Raises:
        `UserError`: at the first row that is wrong.
    """
    for number, value in iter_json_rows(path):
        yield checked_row(value, path, number, images)


def checked_row(value: Any, path: str, number: int, images: "ImageFolder") -> dict[str, Any]:
    """
    Returns:
        [`parse_llava_row`]'s `Row` with absolute `images`; besides, `num_words` ([`count_words`]) and `num_images`.

    Raises:
        `UserError`: if the row is wrong.
    """
    row = parse_llava_row(value, path, number)
    if row["images"]:
        place = row_place(path, number, value.get("id"))
        names = cast(list[str], row["images"])  # JSON holds no bytes
        row["images"] = [images.resolve(name, place) for name in names]
    return {**row, "num_words": count_words(value), "num_images": len(row["images"])}


def iter_json_rows(path: str) -> Iterator[tuple[int, Any]]:
    """
    The raw rows of a JSON list or of JSONL, with their numbers from 1, whatever they hold.

    Args:
        path (`str`): a UTF-8 file.

    Yields:
        `(number, value)`.

    Raises:
        `UserError`: if the file can't be read, isn't JSON (with line and column), isn't a list of rows, or has none.
    """
    number = 0
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would block, and rows are read twice
            raise UserError(f"{path} is not a file; give a LLaVA JSON or JSONL file.")
        with open(path, encoding="utf-8-sig") as file:
            for number, value in enumerate(_json_rows(_JsonStream(file, path)), start=1):
                yield number, value
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} after row {number}); save it as UTF-8.") from None
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror or error}); check the path.") from None
    if not number:
        raise UserError(f"{path} has no rows; write at least one conversation into it, [{{...}}] or one per line.")


def _json_rows(stream: "_JsonStream") -> Iterator[Any]:
    start = stream.peek()
    if start == "[":
        stream.skip()
        if stream.peek() == "]":
            stream.skip()
        else:
            while True:
                yield stream.value()
                separator = stream.peek()
                if separator not in (",", "]"):
                    raise stream.error("expected ',' or ']' after a row")
                stream.skip()
                if separator == "]":
                    break
        if stream.peek():
            raise stream.error("there is text after the list's closing ']'")
    elif start:
        value = stream.value()
        # One object is a one-row JSONL file only if it is a row.
        if not isinstance(value, dict) or (_ROW_KEYS.isdisjoint(value) and not stream.peek()):
            raise UserError(
                f"{stream.name}: the top level is {json_type(value)}, not a list of rows; "
                'write [{"id": ..., "conversations": [...]}, ...], or one such row per line.'
            )
        yield value
        while stream.peek():
            yield stream.value()


class _JsonStream:
    """JSON values read one after another from a file, through a buffer that holds little more than one of them."""

    def __init__(self, file: TextIO, name: str):
        self.name = name
        self._file = file
        self._decode = json.JSONDecoder().raw_decode
        self._text, self._position, self._ended = "", 0, False
        self._line, self._column = 1, 1  # of the first character of _text

    def peek(self) -> str:
        """The next character that is not white space, not consumed; "" at the end."""
        while True:
            self._position = _WHITESPACE.match(self._text, self._position).end()
            if self._position < len(self._text):
                return self._text[self._position]
            if self._ended:
                return ""
            self._read_more()

    def skip(self) -> None:
        """Consume the character that `peek` gave."""
        self._position += 1

    def value(self) -> Any:
        """Consume the next JSON value."""
        self.peek()
        while True:
            try:
                value, end = self._decode(self._text, self._position)
                # Only a number still has a value when its end is cut off.
                whole = self._ended or not isinstance(value, (int, float)) or end < len(self._text) - _LONGEST_CUT
                if whole:
                    self._position = end
                    return value
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - _LONGEST_CUT
                if self._ended or not cut:
                    raise self.error(error.msg, error.pos) from None
            except RecursionError:
                raise self.error("brackets are nested too deeply") from None
            except ValueError:  # int() refuses numbers of more than 4300 digits
                raise self.error("a number in this row is too long") from None
            if len(self._text) - self._position > MAX_ROW_CHARS:
                raise self.error(f"a row is longer than {MAX_ROW_CHARS} characters")
            self._read_more()

    def error(self, message: str, position: int | None = None) -> UserError:
        line, column = self._place(self._position if position is None else position)
        reason = message[:1].lower() + message[1:]
        return UserError(f"{self.name}: not valid JSON at line {line}, column {column} ({reason}); correct it there.")

    def _place(self, position: int) -> tuple[int, int]:
        newlines = self._text.count("\n", 0, position)
        if newlines:
            return self._line + newlines, position - self._text.rfind("\n", 0, position)
        return self._line, self._column + position

    def _read_more(self) -> None:
        self._line, self._column = self._place(self._position)
        rest = self._text[self._position :]
        # At least doubling keeps the work for one long row proportional to its length.
        more = self._file.read(max(_CHUNK_CHARS, len(rest)))
        self._text, self._position, self._ended = rest + more, 0, not more


class ImageAddressError(UserError):
    """An image is given by an address, of the web or one that holds the picture itself, where a path is read."""


class MissingImageError(UserError):
    """An image's file is not there."""


class ImageFolder:
    """
    The folder that image paths of a data file are relative to.

    Args:
        folder (`str`, *optional*): None if the data has no images.

    Raises:
        `UserError`: if it is given and is no folder.
    """

    def __init__(self, folder: str | None):
        if folder is not None and not os.path.isdir(folder):
            raise UserError(f"{folder} is not a folder; give the one that the data's image paths are relative to.")
        self.folder = folder
        self.real_path = None if folder is None else os.path.realpath(folder)
        # Files share few directories: resolving these once leaves one lstat per file.
        self._real_directories: dict[str, str] = {}

    def resolve(self, name: str, place: str) -> str:
        """
        The real path of image `name`.

        Args:
            name (`str`): as the row has it.
            place (`str`): the row, for messages.

        Returns:
            `str`: absolute, free of links.

        Raises:
            `UserError`: if there is no such file, or it lies outside the folder.
        """
        image = f"{place}: image {name!r}"
        if "://" in name or name.startswith("data:"):
            raise ImageAddressError(
                f"{image} is an address; download the file into the image folder and write its path."
            )
        if self.real_path is None:
            raise UserError(f"{image} has no folder to be looked up in; give the image folder.")
        if os.path.isabs(name):
            raise UserError(
                f"{image} is an absolute path; write it relative to the image folder {self.folder}, "
                "or allow it with --allow_images_outside."
            )
        try:
            directory, base = os.path.split(os.path.join(self.real_path, name))
            if directory not in self._real_directories:
                self._real_directories[directory] = os.path.realpath(directory)
            path = os.path.join(self._real_directories[directory], base)
            if base == ".." or os.path.islink(path):
                path = os.path.realpath(path)
            # Before any look at the file itself: whether something outside exists is nobody's business.
            if not path.startswith(os.path.join(self.real_path, "")):
                raise UserError(
                    f"{image} leaves the image folder {self.folder} (through '..' or a link); "
                    "copy the file into it, give the folder that holds all images, or allow it with "
                    "--allow_images_outside."
                )
            mode = os.stat(path).st_mode
        except FileNotFoundError:
            raise MissingImageError(
                f"{image} is missing from {self.folder}; add the file or remove the row."
            ) from None
        except OSError as error:
            raise UserError(f"{image} can't be opened in {self.folder} ({error.strerror}); check it.") from None
        if not stat.S_ISREG(mode):
            raise UserError(f"{image} is not a file; give the path of a picture in {self.folder}.")
        return path


def unreadable_images(paths: Iterable[str]) -> dict[str, str]:
    """
    Decode every distinct image completely and keep those that fail, on all cores, behind a progress bar.

    A picture of more than `PIL.Image.MAX_IMAGE_PIXELS` pixels counts as unreadable: kilobytes can unpack to gigabytes.

    Args:
        paths (`Iterable[str]`): image files; repeated ones are decoded once.

    Returns:
        `dict[str, str]`: path -> reason, in the order given; empty when all is well.
    """
    from datasets.utils import tqdm  # the bar that datasets' disable_progress_bars() silences

    paths = list(dict.fromkeys(paths))
    groups = [paths[start : start + _DECODED_AT_ONCE] for start in range(0, len(paths), _DECODED_AT_ONCE)]
    unreadable: dict[str, str] = {}
    with tqdm(total=len(paths), desc="Checking images", unit=" images") as bar:
        for group, failures in zip(groups, results_in_order(_decode_failures, groups), strict=True):
            unreadable.update(failures)
            bar.update(len(group))
    return unreadable


def _decode_failures(paths: list[str]) -> dict[str, str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Pillow only warns of, decode_failure reports or the picture survives
        reasons = ((path, decode_failure(path)) for path in paths)
        return {path: reason for path, reason in reasons if reason is not None}
