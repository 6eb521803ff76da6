"""Folders that appear whole or not at all."""

import glob
import logging
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hf_llava_ft.checkpoints.folder_lock import locked_folder
from hf_llava_ft.errors import UserError

logger = logging.getLogger(__name__)


@contextmanager
def staged_folder(output_dir: str | Path) -> Iterator[Path]:
    """
    Gives a folder beside `output_dir` to write into, and renames it to `output_dir` when the block ends well. When it
    does not, nothing is left behind; what a killed command left of the same output is removed, and said.

    Raises:
        UserError: if `output_dir` already holds something, cannot be written, has no room, or another command is
            writing it.
    """
    final = Path(output_dir)
    check_writable(final)
    with locked_folder(final) as is_locked:
        if final.is_dir() and any(final.iterdir()):
            raise UserError(f"{final} is not empty: choose another output folder or remove it first.")
        if is_locked:  # so nobody is writing these
            _remove_what_was_left(final.parent.glob(f".{glob.escape(final.name)}.partial-*"))
        staged = final.with_name(f".{final.name}.partial-{secrets.token_hex(8)}")
        staged.mkdir()
        try:
            with told_of_a_full_disk(final, "free some space, or choose another output folder."):
                yield staged
            if final.is_dir():
                final.rmdir()
            staged.rename(final)
        finally:
            shutil.rmtree(staged, ignore_errors=True)


@contextmanager
def staged_files(output_dir: str | Path, last: str, name: str | None = None) -> Iterator[Path]:
    """
    Gives a folder inside `output_dir` to write into, and moves its files up when the block ends well, the one called
    `last` at the end: where it stands, the others are whole. For a folder that also holds other things, such as
    checkpoints, and that nobody else is writing.

    Args:
        name (`str`, *optional*): of the folder, by [`staged_name`], where other processes have to know it.
    """
    final = Path(output_dir)
    final.mkdir(parents=True, exist_ok=True)
    _remove_what_was_left(final.glob(".partial-*"))
    staged = final / (name or staged_name())
    staged.mkdir()
    try:
        yield staged
        for path in sorted(staged.iterdir(), key=lambda path: path.name == last):
            path.replace(final / path.name)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def staged_name() -> str:
    """For a folder of [`staged_files`]; no other process has the same."""
    return f".partial-{secrets.token_hex(8)}"


def _remove_what_was_left(folders: Iterable[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
        logger.warning("%s was left by a command that was killed; it is removed.", folder)


_OF_A_RUN = (
    "free some space, or give another --output_dir. Checkpoints that were whole are still there; "
    "--resume_from_checkpoint True goes on from the last."
)


@contextmanager
def told_of_a_full_disk(folder: str | Path, what_to_do: str = _OF_A_RUN) -> Iterator[None]:
    """Turns what the libraries raise when there is no room for a file into a `UserError`."""
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # FSDP's CheckpointException is no `Exception`
        if not any(sign in each for each in _messages(error) for sign in _NO_ROOM):
            raise
        raise UserError(f"there is no room for what is written to {folder}: {what_to_do}") from error


# ENOSPC, EDQUOT and EFBIG as the system, Rust and PyTorch's zip writer say them; the last at the end of a file that it
# could not write.
_NO_ROOM = (
    *("No space left on device", "Disk quota exceeded", "File too large"),
    *("PytorchStreamWriter failed writing", "iostream error", "unexpected pos"),
)


def _messages(error: BaseException | None) -> Iterator[str]:
    """Of an error and those it was raised from; FSDP's holds those of all ranks."""
    while error is not None:
        yield str(error)
        error = error.__cause__ or error.__context__


def check_writable(folder: str | Path) -> None:
    """
    Makes the parents of `folder`, and tries whether a file can be written there.

    Raises:
        UserError: if not.
    """
    folder = Path(folder)
    try:
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError("there is a file of that name")
        _try_to_write_into(folder if folder.is_dir() else folder.parent)
    except OSError as error:
        raise UserError(f"the output folder {folder} cannot be written: {error.strerror or error}.") from error


def check_writable_file(path: str | Path) -> None:
    """
    Makes the parents of `path`, and tries whether a file can be written beside it, so that long work does not find
    out at its end.

    Raises:
        UserError: if not, or if there is a folder of that name.
    """
    if str(path) == "-":
        raise UserError("- does not stand for standard output, which holds the text: give the path of a file.")
    path = Path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError("there is a folder of that name")
        _try_to_write_into(path.parent)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}.") from error


def _try_to_write_into(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".write-test-{os.getpid()}"
    probe.touch()
    probe.unlink()
