"""The folder that a push of a run is made from, which nothing changes while it leaves."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hf_llava_ft.checkpoints.run_files import TRAINER_STATE_NAME
from hf_llava_ft.hub.model_card import CARD_FILE
from hf_llava_ft.training.resuming.resume import SEAL, Run, seal


@dataclass(frozen=True)
class PushFolder:
    """
    A folder inside the output folder, so that files get a second name there instead of a copy.

    Args:
        root (`Path`): holds all of it.
    """

    root: Path

    @classmethod
    @contextmanager
    def new(cls, output_dir: Path) -> Iterator["PushFolder"]:
        """One that is removed if the block ends badly; else it is for the block to see to that."""
        push = cls(Path(tempfile.mkdtemp(prefix=".push-", dir=output_dir)))
        push.staged.mkdir()
        try:
            yield push
        except BaseException:
            push.remove()
            raise

    @property
    def staged(self) -> Path:
        """What goes."""
        return self.root / "staged"

    @property
    def kept(self) -> Path:
        """A checkpoint, which stays here when the Trainer deletes it."""
        return self.root / "checkpoint"

    def keep(self, checkpoint: Path) -> None:
        for file in checkpoint.rglob("*"):
            if file.is_file():
                _link(file, self.kept / file.relative_to(checkpoint))

    def remove(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)


def stage_state(checkpoint: Path, folder: Path) -> None:
    """Puts all of `checkpoint` into `folder`, but for the paths of this machine that its state holds."""
    for file in sorted(checkpoint.rglob("*")):
        if file.is_file() and file.name not in (SEAL, TRAINER_STATE_NAME, CARD_FILE):
            _link(file, folder / file.relative_to(checkpoint))
    state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    if state.get("best_model_checkpoint"):
        state["best_model_checkpoint"] = Path(state["best_model_checkpoint"]).name
    (folder / TRAINER_STATE_NAME).write_text(json.dumps(state, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    seal(folder, Run.of(checkpoint))


def _link(source: Path, target: Path) -> None:
    """A second name for the file, which stays when the first goes; a copy where the file system has none."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
