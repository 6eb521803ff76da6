"""Which checkpoint a run goes on from: the last one that was written to its end.

A process can be killed, and a disk can be full, in the middle of writing a checkpoint. What the Trainer leaves then
looks like one and loads with an error, or with other weights. So the last thing written into a checkpoint is a list of
its files with their sizes (`seal`), and only a checkpoint that has all of them counts. The seal also says whose run it
is, and what that run's course followed from (`fingerprint.py`).
"""

import json
import os
import shutil
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_llava_ft.checkpoints.run_files import PREFIX_CHECKPOINT_DIR, RUN_FILE, TRAINER_STATE_NAME
from hf_llava_ft.errors import UserError
from hf_llava_ft.processing.picture_opening_llava import PictureOpening

SEAL = "complete.json"
# In a checkpoint that is being written: it is ours, and may be written anew.
UNFINISHED = ".unfinished.json"


@dataclass
class Run:
    """
    One run, however often it was resumed.

    Args:
        id (`str`): in the seals of its checkpoints, and in `run.json` of its folder.
        started (`int`): when it began, in nanoseconds since 1970.
        course (`dict`, *optional*): what its course follows from (`fingerprint.py`).
        resumed_from (`str`, *optional*): the checkpoint that this process goes on from.
    """

    id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    started: int = field(default_factory=time.time_ns)
    course: dict[str, Any] | None = None
    resumed_from: str | None = None

    @classmethod
    def of(cls, checkpoint: str | Path) -> "Run":
        """The run that a checkpoint is of; a new one if the checkpoint does not say, as those of other Trainers and of
        hf_llava_ft 0.1."""
        told = read_seal(checkpoint)
        run_told = told.get("run")
        known = run_told if isinstance(run_told, dict) else {}
        run = cls(resumed_from=str(checkpoint))
        if isinstance(known.get("id"), str) and isinstance(known.get("started"), int):
            run.id, run.started = known["id"], known["started"]
        run.course = told["course"] if isinstance(told.get("course"), dict) else None
        return run

    def as_json(self) -> dict[str, Any]:
        return {"id": self.id, "started": self.started}


def read_seal(checkpoint: str | Path) -> dict[str, Any]:
    """The content of a seal; empty where there is none that can be read."""
    try:
        told = json.loads(Path(checkpoint, SEAL).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return told if isinstance(told, dict) else {}


def run_id_of(checkpoint: str | Path) -> str | None:
    """Whose a sealed checkpoint is, or one that was being written; None if it does not say."""
    told = read_seal(checkpoint).get("run")
    if told is None:
        try:
            told = json.loads(Path(checkpoint, UNFINISHED).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
    return told.get("id") if isinstance(told, dict) else None


def begin(checkpoint: Path, run: Run) -> str | None:
    """
    Makes the folder of a checkpoint that is to be written. What a process left there that was killed while it wrote is
    removed; what is there of others is moved to a folder beside it.

    Returns:
        A sentence on what was moved, or None.
    """
    told = None
    if (checkpoint / UNFINISHED).is_file():
        shutil.rmtree(checkpoint)
    elif checkpoint.is_dir() and any(checkpoint.iterdir()) and run_id_of(checkpoint) != run.id:
        aside = free_name(checkpoint, "of-another-run")
        checkpoint.rename(aside)
        told = f"{checkpoint} was there, and is not of this run: it is {aside} now."
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / UNFINISHED).write_text(json.dumps(run.as_json()), encoding="utf-8")
    (checkpoint / SEAL).unlink(missing_ok=True)
    return told


def free_name(path: Path, word: str) -> Path:
    """A name beside `path` that nothing has."""
    number = 1
    while (found := path.with_name(f"{path.name}.{word}-{number}")).exists():
        number += 1
    return found


def seal(checkpoint: str | Path, run: Run | None = None) -> None:
    """Writes the list of the files of a checkpoint that is complete, and whose it is."""
    folder = Path(checkpoint)
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in (SEAL, UNFINISHED))
    told: dict[str, Any] = {
        "files": {path.relative_to(folder).as_posix(): path.stat().st_size for path in files},
    }
    if run is not None:
        told |= {"run": run.as_json(), "course": run.course}
    partial = folder / f".{SEAL}-{os.getpid()}"
    partial.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    partial.replace(folder / SEAL)
    (folder / UNFINISHED).unlink(missing_ok=True)  # last, so that the folder says at each moment that it is ours


def what_is_missing(checkpoint: str | Path) -> str | None:
    """Why a checkpoint is not whole, in words; `None` if it is."""
    folder = Path(checkpoint)
    try:
        sizes = dict(json.loads((folder / SEAL).read_text(encoding="utf-8"))["files"])
    except FileNotFoundError:
        return "it was not written to its end"
    except (ValueError, KeyError, TypeError, OSError, RecursionError):
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
        wanted: a folder; `True` for the last whole checkpoint in `output_dir` that is of its run; `auto` for the same
            if there is one, else for a new run, which suits jobs that a cluster starts again; `False` or `None` for
            none.

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
    own = _run_of_folder(output_dir)
    for _, folder in sorted(checkpoints_in(output_dir).items(), reverse=True):
        missing = what_is_missing(folder)
        if missing is None and own is not None and run_id_of(folder) not in (None, own):
            missing = f"it is of run {run_id_of(folder)}, and this folder is that of run {own}"
        if missing is None:
            return str(folder), passed_over
        passed_over.append(f"{folder} is passed over: {missing}.")
    if str(wanted).lower() == "auto":
        return None, passed_over
    found = " ".join(["", *passed_over])
    raise UserError(f"--resume_from_checkpoint: {output_dir} holds no whole checkpoint.{found}")


def checkpoints_in(folder: str | Path) -> dict[int, Path]:
    """The checkpoints in a folder, whole or not, by their step."""
    names = [(path, path.name.rpartition("-")) for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")]
    return {
        int(step): path
        for path, (prefix, _, step) in names
        if prefix == PREFIX_CHECKPOINT_DIR and step.isdecimal() and path.is_dir()
    }


def remove_older(sealed: Path, run: Run, limit: int | None, best: str | None) -> None:
    """
    Removes checkpoints of `run` beside the one that was just sealed, lowest step first, until `limit` are left.

    By step, whatever the clock says. What was just sealed, what the run was resumed from, the best, and all of a later
    step stay; those of other runs are not looked at.
    """
    if not limit or limit < 0:
        return
    kept = {os.path.realpath(each) for each in (sealed, run.resumed_from, best) if each is not None}
    now = int(sealed.name.rpartition("-")[2])
    own = {
        step: path
        for step, path in sorted(checkpoints_in(sealed.parent).items())
        if step <= now and (path / SEAL).is_file() and run_id_of(path) == run.id
    }
    surplus = len(own) - limit
    for path in own.values():
        if surplus > 0 and os.path.realpath(path) not in kept:
            # Without its seal first: what a killed process leaves of it is no checkpoint then.
            (path / SEAL).replace(path / UNFINISHED)
            shutil.rmtree(path, ignore_errors=True)
            surplus -= 1


def _run_of_folder(folder: str | Path) -> str | None:
    """
    The run that a folder is of. Where its `run.json` is missing, that of its checkpoints.

    Raises:
        UserError: if these are of several.
    """
    try:
        told = json.loads(Path(folder, RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        told = None
    if isinstance(told, dict) and isinstance(told.get("id"), str):
        return str(told["id"])
    found: dict[str, Path] = {}
    for path in checkpoints_in(folder).values():
        run_id = run_id_of(path)
        if run_id is not None and what_is_missing(path) is None:
            found.setdefault(run_id, path)
    if len(found) > 1:
        named = " and ".join(path.name for path in list(found.values())[:2])
        raise UserError(
            f"{folder} holds checkpoints of {len(found)} runs, {named} among them: name the one to go on from with "
            "--resume_from_checkpoint."
        )
    return next(iter(found), None)


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
