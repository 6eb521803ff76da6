"""A file of answers that a killed command leaves as whole lines, and the same command finishes.

Beside it lies meanwhile what the answers follow from, in a hidden file, by which other settings are refused. For an
evaluation it stays, and a finished file is not made again.

Under a launcher each process writes a hidden part of its own beside the file, and the first moves them into it, in the
end or when the command is given again; it may then have any number of processes.
"""

import glob
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_llava_ft.answering.ranks import ALONE, Ranks
from hf_llava_ft.answering.rows import AskedRow
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
        ranks (`Ranks`): the processes that share the rows.

    Attributes:
        done (`set[Key]`): the rows that the file holds already.

    Raises:
        UserError: if the file is there and was not begun with `settings`.
    """

    def __init__(
        self,
        path: Path,
        settings: dict[str, Any],
        files: list[str],
        *,
        flag: str = "--output",
        stays: bool = False,
        ranks: Ranks = ALONE,
    ):
        self.path, self.files, self._flag, self._stays, self._ranks = path, files, flag, stays, ranks
        self._note = path.with_name(f".{path.name}.begun")
        self.done: set[Key] = ranks.from_first(lambda: self._begun(json.loads(json.dumps(settings))))

    def _begun(self, settings: dict[str, Any]) -> set[Key]:
        if any(path.exists() and path.stat().st_size for path in (self.path, *self._parts())):
            self._check(settings)
            self._take_parts()
        else:
            self._note.write_text(json.dumps(settings), encoding="utf-8")
        return {key for key, *_ in self._places(self.path)}

    def missing(self, rows: Iterable[AskedRow]) -> Iterator[AskedRow]:
        """Of all rows, those that are this process' to answer."""
        return self._ranks.share(row for row in rows if (row.file, row.number) not in self.done)

    def num_mine(self, total: int) -> int:
        """How many of `total` rows are done already, or this process' to answer."""
        return len(self.done) + self._ranks.size_of_share(total - len(self.done))

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

    def _parts(self) -> list[Path]:
        return sorted(self.path.parent.glob(f".{glob.escape(self.path.name)}.part*"))

    def _take_parts(self) -> None:
        """Moves what the processes of a launcher wrote into the file; a line that is there already is none of its."""
        _cut_what_is_no_line(self.path)
        done = {key for key, *_ in self._places(self.path)}
        for part in self._parts():
            _cut_what_is_no_line(part)
            with part.open("rb") as lines, self.path.open("ab") as into:
                for (key, *_), text in zip(self._places(part), lines, strict=True):
                    if key not in done:
                        into.write(text)
                into.flush()
                os.fsync(into.fileno())
            part.unlink()

    def _places(self, path: Path) -> Iterator[tuple[Key, int, bool]]:
        """Of each line of a file: its row, where it begins, and whether it holds no answer."""
        if not path.exists():
            return
        start = 0
        with path.open("rb") as file:
            for text in file:
                line = json.loads(text)
                yield (line.get("file", self.files[0]), line["row"]), start, "error" in line
                start += len(text)

    @contextmanager
    def writing(self) -> Iterator[Any]:
        """Gives a function that adds a line, in one call of the system."""
        part = self.path.with_name(f".{self.path.name}.part{self._ranks.rank}")
        with (self.path if self._ranks.count == 1 else part).open("ab", buffering=0) as file:

            def write(line: dict[str, Any]) -> None:
                named = {"file": line["file"]} if len(self.files) > 1 else {}
                line = named | {name: value for name, value in line.items() if name != "file"}
                text = (json.dumps(line, ensure_ascii=False) + "\n").encode("utf-8", "replace")
                if file.write(text) != len(text):
                    raise OSError(28, "No space left on device")

            yield write

    def finish(self) -> int:
        """Puts the lines of all processes in the order of the rows; gives how many hold no answer."""
        self._ranks.wait()
        return int(self._ranks.from_first(self._finished))

    def _finished(self) -> int:
        self._take_parts()
        order = {file: place for place, file in enumerate(self.files)}
        places = sorted(self._places(self.path), key=lambda place: (order[place[0][0]], place[0][1]))
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


def _cut_what_is_no_line(path: Path) -> None:
    """What a kill or a full disk left of a line."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        whole = 0
        for line in file:
            whole += len(line) if line.endswith(b"\n") else 0
        file.truncate(whole)
