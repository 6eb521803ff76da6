"""A file of answers that a killed command leaves as whole lines, and the same command finishes.

Beside it lies meanwhile what the answers follow from, in a hidden file, by which other settings are refused. For an
evaluation it stays, and a finished file is not made again.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_llava_ft.errors import UserError

Key = tuple[str, int]  # a row's file and number


class AnswerLines:
    """
    Args:
        path (`Path`): JSON Lines with `row` in each, and `file` where there are several.
        settings (`dict`): what the answers follow from, as JSON has it.
        files (`list[str]`): those that the rows are from, in order.
        flag (`str`): what names the file, or its folder, on the command line.
        stays (`bool`): whether the finished file is taken as it is by the same command.

    Attributes:
        done (`set[Key]`): the rows that the file holds already.

    Raises:
        UserError: if the file is there and was not begun with `settings`.
    """

    def __init__(
        self, path: Path, settings: dict[str, Any], files: list[str], *, flag: str = "--output", stays: bool = False
    ):
        self.path, self.files, self._flag, self._stays = path, files, flag, stays
        self._note = path.with_name(f".{path.name}.begun")
        settings = json.loads(json.dumps(settings))
        if path.exists() and path.stat().st_size:
            self._check(settings)
            self._cut_what_is_no_line()
        else:
            self._note.write_text(json.dumps(settings), encoding="utf-8")
        self.done = {key for key, *_ in self._places()}

    def _check(self, settings: dict[str, Any]) -> None:
        try:
            before = json.loads(self._note.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path} is there already: remove it, or choose another {self._flag}.") from error
        changed = [name for name in settings | before if settings.get(name) != before.get(name)]
        if changed:
            raise UserError(
                f"{self.path} was begun with another {' and another '.join(changed)}: give the same command again, "
                f"remove the file, or choose another {self._flag}."
            )

    def _cut_what_is_no_line(self) -> None:
        """What a full disk left of a line."""
        with self.path.open("rb+") as file:
            whole = 0
            for line in file:
                whole += len(line) if line.endswith(b"\n") else 0
            file.truncate(whole)

    def _places(self) -> Iterator[tuple[Key, int, bool]]:
        """Of each line: its row, where it begins, and whether it holds no answer."""
        if not self.path.exists():
            return
        start = 0
        with self.path.open("rb") as file:
            for text in file:
                line = json.loads(text)
                yield (line.get("file", self.files[0]), line["row"]), start, "error" in line
                start += len(text)

    @contextmanager
    def writing(self) -> Iterator[Any]:
        """Gives a function that adds a line, in one call of the system."""
        with self.path.open("ab", buffering=0) as file:

            def write(line: dict[str, Any]) -> None:
                named = {"file": line["file"]} if len(self.files) > 1 else {}
                line = named | {name: value for name, value in line.items() if name != "file"}
                text = (json.dumps(line, ensure_ascii=False) + "\n").encode("utf-8", "replace")
                if file.write(text) != len(text):
                    raise OSError(28, "No space left on device")

            yield write

    def finish(self) -> int:
        """Puts the lines in the order of the rows; gives how many hold no answer."""
        order = {file: place for place, file in enumerate(self.files)}
        places = sorted(self._places(), key=lambda place: (order[place[0][0]], place[0][1]))
        self.path.touch()
        sorted_file = self.path.with_name(f".{self.path.name}.sorted")
        with self.path.open("rb") as file, sorted_file.open("wb") as into:
            for _, start, _ in places:
                file.seek(start)
                into.write(file.readline())
            into.flush()
            os.fsync(into.fileno())
        sorted_file.replace(self.path)
        if not self._stays:
            self._note.unlink(missing_ok=True)
        return sum(has_none for *_, has_none in places)
