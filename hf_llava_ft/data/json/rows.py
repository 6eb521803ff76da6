"""The rows of a JSON file of any size, one after another.

A file is a JSON list of rows or one row per line (JSONL); its content decides, not its name. A BOM and CRLF are fine.
Rows are decoded one at a time from a small buffer: the released sets are up to gigabytes of JSON, and `json.load`
needs several times that in memory, in every process.
"""

import json
import os
import re
import stat
from collections.abc import Iterator
from typing import Any, TextIO

from hf_llava_ft.data.schema import json_type
from hf_llava_ft.errors import UserError

# A row longer than this is no conversation, and would have to fit in memory as a whole.
MAX_ROW_CHARS = 64 * 2**20

_CHUNK_CHARS = 2**20
# By one of these an object is a row, in any of the dialects of data/formats/.
_ROW_KEYS = {"conversations", "messages", "prompt", "question", "file_name", "image"}
_WHITESPACE = re.compile(r"[ \t\n\r]*")
# Where a number, a word or an escape (\ud83d\ude00) is cut by the buffer's end, the decoder stops this near to it.
_LONGEST_CUT = 16


def iter_json_rows(path: str) -> Iterator[tuple[int, Any]]:
    """
    The raw rows of a JSON list or of JSONL, with their numbers from 1, whatever they hold.

    Args:
        path (`str`): a UTF-8 file.

    Yields:
        `(number, value)`.

    Raises:
        UserError: if the file can't be read, isn't JSON (with line and column), isn't a list of rows, or has none.
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
