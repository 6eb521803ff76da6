"""`llava-ft init`: a data file of a folder of pictures with captions, and a first check of it."""

import json
import os
import shlex
from pathlib import Path

from rich.console import Console

from hf_llava_ft.checking.command import run_check
from hf_llava_ft.checking.preview import visible
from hf_llava_ft.checking.result import CheckResult
from hf_llava_ft.checkpoints.artifact import check_writable_file, told_of_a_full_disk
from hf_llava_ft.data.captioned_folder import CaptionedFolder, captioned_folder
from hf_llava_ft.data.formats.column_choice import SaidOfColumns
from hf_llava_ft.errors import UserError

DATA_FILE = "data.json"
_MODEL = "liuhaotian/llava-v1.5-7b"
_MAX_NAMED = 5


def run_init(
    folder: Path,
    output: Path | None = None,
    *,
    prompt: str | None = None,
    captions: str | None = None,
    columns: SaidOfColumns = None,
    num_proc: int | None = None,
    console: Console | None = None,
) -> CheckResult:
    """
    Write a data file, check it, and say what comes next.

    Args:
        folder, prompt, captions, columns: see `captioned_folder`.
        output (`Path`, *optional*): a new file; `data.json` in the folder by default.
        console (`rich.console.Console`, *optional*): where all is printed; stdout by default.

    Raises:
        UserError: if there is nothing to make it of, or the file is there already; then nothing is written.
    """
    console = console or Console()
    output = folder / DATA_FILE if output is None else output
    if os.path.lexists(output):
        raise UserError(f"{output} is there already, and is not written over; remove it, or give another --output.")
    found = captioned_folder(folder, prompt, captions, columns)
    check_writable_file(output)
    _write_new(output, json.dumps(found.rows, indent=1, ensure_ascii=False) + "\n")
    for line in _lines(found, folder, output):
        console.print(visible(line), highlight=False, markup=False, soft_wrap=True)
    result = run_check(str(output), str(folder), num_proc=num_proc, console=console)
    data = f"{shlex.quote(str(output))} --image_folder {shlex.quote(str(folder))}"
    following = [
        f"llava-ft check {data} --model {_MODEL} --preview 3",
        f"llava-ft train --model_name_or_path {_MODEL} --data_path {data} --output_dir my-adapter",
    ]
    if not result.trainable:
        following = [f"llava-ft check {data}   (when these are corrected)"]
    console.print("Next:", *following, sep="\n  ", highlight=False, markup=False, soft_wrap=True)
    return result


def _write_new(output: Path, text: str) -> None:
    """The whole file or none, and never over another, whoever made that meanwhile."""
    unfinished = output.with_name(f".{output.name}.incomplete-{os.getpid()}")
    try:
        with told_of_a_full_disk(output, "free some space, or choose another --output."):
            unfinished.write_text(text, encoding="utf-8")
            os.link(unfinished, output)  # which replaces nothing, as renaming would
    except FileExistsError:
        raise UserError(f"{output} is there already, and is not written over; give another --output.") from None
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror or error}.") from error
    finally:
        unfinished.unlink(missing_ok=True)


def _lines(found: CaptionedFolder, folder: Path, output: Path) -> list[str]:
    lines = [f"{folder}: captions from {found.captions}"]
    for paths, one, several in (
        (found.without_caption, "picture has no caption and is", "pictures have no caption and are"),
        (found.without_picture, "caption has no picture and is", "captions have no picture and are"),
    ):
        if paths:
            named = ", ".join(paths[:_MAX_NAMED]) + (", ..." if len(paths) > _MAX_NAMED else "")
            lines.append(f"{len(paths):,} {one if len(paths) == 1 else several} left out: {named}")
    if found.found_below:
        lines.append(f"{found.found_below:,} named without their folder, and found by the name alone")
    asked = f", each asked {found.asked!r} (--prompt asks otherwise)" if found.asked else ""
    lines.append(f"{output} is written: {len(found.rows):,} row{'' if len(found.rows) == 1 else 's'}{asked}")
    return lines
