"""Ctrl-C, and the signals by which a cluster takes a machine back: the run saves a checkpoint and ends."""

import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import torch
import torch.distributed
from transformers import TrainerCallback

# SIGTERM comes before a SLURM job is killed, SIGUSR1 if asked for with `sbatch --signal=USR1@120`.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


class TrainingInterrupted(Exception):
    """
    Training ended early, with a checkpoint.

    Attributes:
        exit_code (`int`): as a shell counts it, 128 and the signal's number.
    """

    def __init__(self, step: int, output_dir: str | Path, signal_number: int):
        super().__init__(
            f"Stopped after step {step}, with a checkpoint in {output_dir}. To go on, give the same command with "
            f"--resume_from_checkpoint True."
        )
        self.exit_code = 128 + signal_number


class Interruption(TrainerCallback):
    """
    Ends training at the end of the step in which a signal came, with a checkpoint.

    All processes stop after the same step, whichever of them the signal reached. A second Ctrl-C ends at once.

    Args:
        tell: prints a sentence when the signal comes.

    Attributes:
        signal_number (`int`, *optional*): what stopped the run.
    """

    def __init__(self, tell: Callable[[str], None]):
        self.tell = tell
        self.signal_number: int | None = None
        self._received = 0
        self._before: dict[int, object] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        try:
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        except ValueError:  # not the main thread, in which alone a handler can be set: a notebook's business then
            self._before = {}

    def on_train_end(self, args, state, control, **kwargs):
        self.restore()

    def restore(self) -> None:
        """Gives the signals back. For training that ends with an exception, after which no callback is called:
        processes that are forked later would not end at SIGTERM, and a pool of them would be waited for for ever."""
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}

    def on_step_end(self, args, state, control, **kwargs):
        received = self._received
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            numbers = torch.tensor([received], device=args.device)
            torch.distributed.all_reduce(numbers, op=torch.distributed.ReduceOp.MAX)
            received = int(numbers)
        if received and state.global_step < state.max_steps:
            self.signal_number = received
            control.should_save = control.should_training_stop = True

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = number
        self.tell(
            "Stopping after this step, with a checkpoint to go on from. Ctrl-C again stops at once, without one."
        )
