"""Which checkpoint a run goes on from: the last one that was written to its end.

A process can be killed, and a disk can be full, in the middle of writing a checkpoint. What the Trainer leaves then
looks like one and loads with an error, or with other weights. So the last thing written into a checkpoint is a list of
its files with their sizes (`seal`), and only a checkpoint that has all of them counts.
"""

import json
import os
from pathlib import Path

from hf_llava_ft.checkpoints.run_files import PREFIX_CHECKPOINT_DIR, TRAINER_STATE_NAME
from hf_llava_ft.errors import UserError
from hf_llava_ft.processing.picture_opening_llava import PictureOpening

SEAL = "complete.json"


def seal(checkpoint: str | Path) -> None:
    """Writes the list of the files of a checkpoint that is complete."""
    folder = Path(checkpoint)
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != SEAL)
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    partial = folder / f".{SEAL}-{os.getpid()}"
    partial.write_text(json.dumps({"files": sizes}, indent=1) + "\n", encoding="utf-8")
    partial.replace(folder / SEAL)


def what_is_missing(checkpoint: str | Path) -> str | None:
    """Why a checkpoint is not whole, in words; `None` if it is."""
    folder = Path(checkpoint)
    try:
        sizes = json.loads((folder / SEAL).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return "it was not written to its end"
    except (ValueError, KeyError, OSError):
        return f"its {SEAL} cannot be read"
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            return f"its file {name} is missing"
        if path.stat().st_size != size:
            return f"its file {name} has {path.stat().st_size} bytes instead of {size}"
    return None


def checkpoint_to_resume(wanted: str | bool | None, output_dir: str | Path) -> tuple[str | None, list[str]]:
    """
    The checkpoint that `--resume_from_checkpoint` means.

    Args:
        wanted: a folder; `True` for the last whole checkpoint in `output_dir`; `auto` for the same if there is one,
            else for a new run, which suits jobs that a cluster starts again; `False` or `None` for none.

    Returns:
        The folder, or `None` to begin anew, and one sentence for each later checkpoint that was passed over.

    Raises:
        UserError: if there is none, or the folder named is not a whole checkpoint.
    """
    if wanted is None or str(wanted).lower() == "false":
        return None, []
    if str(wanted).lower() not in ("true", "auto"):
        named = Path(str(wanted))
        if not (named / TRAINER_STATE_NAME).is_file():
            raise UserError(f"{wanted} is not a checkpoint to resume from: it has no {TRAINER_STATE_NAME}.")
        # A checkpoint of another Trainer has no seal; who names it knows what it is.
        missing = what_is_missing(named) if (named / SEAL).is_file() else None
        if missing:
            raise UserError(f"{wanted} cannot be resumed from: {missing}; name an earlier checkpoint.")
        return str(named), []
    passed_over: list[str] = []
    for step in sorted(_steps(output_dir), reverse=True):
        folder = Path(output_dir, f"{PREFIX_CHECKPOINT_DIR}-{step}")
        missing = what_is_missing(folder)
        if missing is None:
            return str(folder), passed_over
        passed_over.append(f"{folder} is passed over: {missing}.")
    if str(wanted).lower() == "auto":
        return None, passed_over
    found = " ".join(["", *passed_over])
    raise UserError(f"--resume_from_checkpoint: {output_dir} holds no whole checkpoint.{found}")


def opening_to_resume(wanted: PictureOpening | None, checkpoint: str | None) -> PictureOpening | None:
    """
    How a run that goes on from `checkpoint` opens pictures: as it began. `wanted` where there is none.

    Raises:
        UserError: if `wanted` is another way.
    """
    path = Path(checkpoint or "", "processor_config.json")
    if checkpoint is None or not path.is_file():
        return wanted
    try:
        # Before it was written down, there was one way.
        began: PictureOpening = json.loads(path.read_text(encoding="utf-8")).get("picture_opening", "original")
    except (ValueError, AttributeError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    if wanted not in (None, began):
        raise UserError(
            f"--picture_opening {wanted}: the run that {checkpoint} is of opens pictures the way {began}, and would "
            f"see others from here on; leave the flag out (--picture_opening {began}), or begin a new run."
        )
    return began


def _steps(output_dir: str | Path) -> list[int]:
    names = [
        path.name.rpartition("-") for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()
    ]
    return [int(step) for prefix, _, step in names if prefix == PREFIX_CHECKPOINT_DIR and step.isdecimal()]
