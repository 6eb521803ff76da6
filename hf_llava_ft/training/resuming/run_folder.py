"""The folder of a run: one run at a time, one run in it, and nothing of anybody else."""

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import TrainerState

from hf_llava_ft.checkpoints.artifact import check_writable, staged_files
from hf_llava_ft.checkpoints.folder_lock import locked_folder
from hf_llava_ft.checkpoints.run_files import (
    ANSWERS_FILE,
    EVALUATION_FILE,
    PICTURES_FOLDER,
    RETENTION_FILE,
    RUN_FILE,
    SUMMARY_FILE,
    TRAINER_STATE_NAME,
    TRAINING_FILE,
)
from hf_llava_ft.checkpoints.starting.starting_point import COMPOSED
from hf_llava_ft.data.skipped_rows import SKIPPED_FILE
from hf_llava_ft.errors import UserError
from hf_llava_ft.hub.model_card import ASSETS_FOLDER, CARD_FILE
from hf_llava_ft.reports.run_report import PLOT_FILE, REPORT_FILE
from hf_llava_ft.settings.training_arguments import LlavaTrainingArguments
from hf_llava_ft.training.first_process import in_first_process
from hf_llava_ft.training.resuming.fingerprint import refuse_another_course
from hf_llava_ft.training.resuming.resume import SEAL, UNFINISHED, Run, checkpoints_in

# What others put there while a run goes on, or before it: nothing of ours has such a name.
_LOGS = re.compile(
    r".*\.(log|out|err)|slurm-.*|wandb|mlruns|runs|\.git.*|lost\+found|\.DS_Store|\.nfs.*|\..*\.lock(\.json)?"
)
_OURS = re.compile(
    "|".join(
        (
            *map(re.escape, (RUN_FILE, SUMMARY_FILE, TRAINING_FILE, ANSWERS_FILE, PICTURES_FOLDER, SKIPPED_FILE)),
            *map(re.escape, (REPORT_FILE, PLOT_FILE, CARD_FILE, ASSETS_FOLDER, COMPOSED, TRAINER_STATE_NAME)),
            *map(re.escape, (EVALUATION_FILE, RETENTION_FILE)),
            # The model, its configuration and its processor, as transformers and PEFT call them.
            r"adapter_(config|model)\..*|(generation_|processor_|preprocessor_|video_preprocessor_)?config\.json",
            r"model.*\.safetensors(\.index\.json)?|.*token.*\.json|tokenizer\.model|special_tokens_map\.json",
            r"chat_template\..*|vocab\.(json|txt)|merges\.txt|\w+_llava\.py|(all|train|eval)_results\.json",
            r"zero_to_fp32\.py|checkpoint-\d+(\.of-another-run-\d+)?|lowest_eval|\.partial-.*|\.push-.*|\.write-test.*",
            r"\..*\.(incomplete|partial-.*)",
        )
    )
)


@contextmanager
def one_run_at_a_time(args: LlavaTrainingArguments) -> Iterator[None]:
    """
    The first process holds the lock of the output folder.

    Raises:
        UserError: in all processes, if another command is writing it, or nobody can.
    """
    check_writable(str(args.output_dir))
    lock = locked_folder(str(args.output_dir))
    in_first_process(args, lock.__enter__)
    try:
        yield
    finally:
        if args.process_index == 0:
            lock.__exit__(None, None, None)


def open_run_folder(
    args: LlavaTrainingArguments, checkpoint: str | None, tell: Callable[[str], None], starts_from: str | None = None
) -> Run:
    """
    The run that goes on from `checkpoint`, or a new one, whose folder holds nothing of another. All processes get the
    same.

    Args:
        starts_from (`str`, *optional*): the model that is trained, which is not the place for the result.

    Raises:
        UserError: in all of them, if the folder holds checkpoints of another run or what no run wrote, and
            `overwrite_output_dir` was not given.
    """
    if starts_from is not None and os.path.realpath(starts_from) == os.path.realpath(str(args.output_dir)):
        raise UserError(f"{starts_from} is the model that training starts from: choose another --output_dir.")
    run, told = in_first_process(args, lambda: _opened(Path(str(args.output_dir)), checkpoint, args))
    if told is not None:
        tell(told)
    return run


def compared_with_before(
    run: Run, course: dict[str, Any], args: LlavaTrainingArguments, tell: Callable[[str], None]
) -> Run:
    """
    `run` with `course`, which is held against that of the checkpoint that it goes on from. The folder is the run's
    from then on.

    Raises:
        UserError: in all processes, if it would be another run.
    """

    def note() -> str | None:
        told = None
        if run.resumed_from is not None:
            state = TrainerState.load_from_json(os.path.join(run.resumed_from, TRAINER_STATE_NAME))
            told = refuse_another_course(run.resumed_from, run.course, course, state.global_step, args)
        _write_run(Path(str(args.output_dir)), run)  # now that nothing is left to refuse
        return told

    told = in_first_process(args, note)
    if told is not None:
        tell(told)
    return replace(run, course=course)


def _opened(folder: Path, checkpoint: str | None, args: LlavaTrainingArguments) -> tuple[Run, str | None]:
    is_own = checkpoint is not None and Path(os.path.realpath(checkpoint)).parent == Path(os.path.realpath(folder))
    told = None
    if args.overwrite_output_dir and str(args.resume_from_checkpoint).lower() == "true":
        raise UserError(
            "--overwrite_output_dir moves the checkpoints away that --resume_from_checkpoint True goes on from: give "
            "one of them."
        )
    run = Run() if checkpoint is None else Run.of(checkpoint)
    if args.resume_anyway:
        run.started = time.time_ns()  # of files that are younger, no more is said
    reason = None if is_own else _in_the_way(folder)
    if reason is not None and not args.overwrite_output_dir:
        go_on = "" if checkpoint is not None or not _whole(folder) else "go on from them with "
        go_on += "--resume_from_checkpoint True, " if go_on else ""
        raise UserError(
            f"{folder} {reason}: {go_on}choose another --output_dir, or give --overwrite_output_dir, which moves what "
            "is there to a folder beside it."
        )
    if reason is not None:
        told = f"What was in {folder} is in {_moved_aside(folder)} now."
    return run, told


def _in_the_way(folder: Path) -> str | None:
    """What is in the folder that a new run must not mix with, in words."""
    if not folder.is_dir():
        return None
    names = sorted(path.name for path in folder.iterdir() if not _LOGS.fullmatch(path.name))
    # What was being written when its process was killed is nothing to go on from.
    checkpoints = [
        path
        for _, path in sorted(checkpoints_in(folder).items())
        if (path / SEAL).is_file() or (any(path.iterdir()) and not (path / UNFINISHED).is_file())
    ]
    if checkpoints:
        more = f" and {len(checkpoints) - 1} more" if len(checkpoints) > 1 else ""
        return f"holds the checkpoints of another run ({checkpoints[-1].name}{more})"
    is_of_a_run = any((folder / name).is_file() for name in (RUN_FILE, SUMMARY_FILE))
    # A model of somebody has the names of ours.
    foreign = [name for name in names if not is_of_a_run or not _OURS.fullmatch(name)]
    foreign = [name for name in foreign if name != COMPOSED and not name.startswith((".partial-", ".write-test"))]
    return f"holds {foreign[0]}, which no training run wrote" if foreign else None


def _whole(folder: Path) -> bool:
    return any((path / SEAL).is_file() for path in checkpoints_in(folder).values())


def _moved_aside(folder: Path) -> Path:
    """Moves all but logs, to which somebody may be writing, into a new folder beside `folder`."""
    name = f"{folder.name}.before-{time.strftime('%Y%m%d-%H%M%S')}"
    aside, number = folder.with_name(name), 1
    try:
        while aside.exists():
            aside, number = folder.with_name(f"{name}-{number}"), number + 1
        aside.mkdir()
        for path in sorted(folder.iterdir()):
            if not _LOGS.fullmatch(path.name):
                path.rename(aside / path.name)
    except OSError as error:
        raise UserError(f"what is in {folder} cannot be moved to {aside}: {error.strerror or error}.") from error
    return aside


def _write_run(folder: Path, run: Run) -> None:
    with staged_files(folder, last=RUN_FILE) as staged:
        (staged / RUN_FILE).write_text(json.dumps(run.as_json()) + "\n", encoding="utf-8")
