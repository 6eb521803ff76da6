"""Ctrl-C, and the signals by which a cluster takes a machine back: the run saves a checkpoint and ends."""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed
from transformers import TrainerCallback

from hf_llava_ft.termination import TERMINATION_SIGNALS

SIGNALS = (signal.SIGINT, *TERMINATION_SIGNALS)


class EvaluationStopped(Exception):
    """An evaluation was cut short: by its end the process would have been killed."""


class TrainingInterrupted(Exception):
    """
    A run ended early, with a checkpoint unless it was before the first step.

    Attributes:
        exit_code (`int`): as a shell counts it, 128 and the signal's number.
    """

    def __init__(self, step: int, output_dir: str | Path, signal_number: int, missing: str | None = None):
        what = f"with a checkpoint in {output_dir}" if missing is None else f"with the result, but without {missing}"
        to_go_on = "To go on, give the same command with --resume_from_checkpoint True."
        super().__init__(
            f"Stopped after step {step}, {what}. {to_go_on}"
            if step
            else "Stopped before the first step, without a checkpoint."
        )
        self.exit_code = 128 + signal_number


class Interruption(TrainerCallback):
    """
    Notes that a signal came; [`CheckpointingTrainer`] then ends training after the step, with a checkpoint.

    An evaluation of that step is left out or cut short, and made up for when the run goes on. All processes stop at
    the same place, whichever of them the signal reached. After training, what is being written is written. A second
    Ctrl-C ends at once. At the end of the context the signals are given back: processes that are forked later would
    not end at SIGTERM, and a pool of them would be waited for for ever.

    Args:
        tell: prints a sentence when the signal comes.

    Attributes:
        signal_number (`int`, *optional*): what stopped the run.
    """

    def __init__(self, tell: Callable[[str], None]):
        self.tell = tell
        self.signal_number: int | None = None
        self._received = 0
        self._is_trained = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Interruption":
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}
        _in_training.discard(self)

    def on_train_begin(self, args, state, control, **kwargs):
        try:
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
            _in_training.add(self)
        except ValueError:  # not the main thread, in which alone a handler can be set: a notebook's business then
            self._before = {}

    def on_train_end(self, args, state, control, **kwargs):
        self._is_trained = True

    def on_step_end(self, args, state, control, **kwargs):
        # After the last step there is an end to be written, unless it would be kept waiting by an evaluation.
        if self.received(args) and (state.global_step < state.max_steps or control.should_evaluate):
            self._stop()
            control.should_evaluate = False

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.received(args) and control.should_evaluate:
            self._stop()
            control.should_evaluate = False

    def on_save(self, args, state, control, **kwargs):
        if self.received(args) and state.global_step < state.max_steps:
            self._stop()

    def on_prediction_step(self, args, state, control, **kwargs):
        if self.received(args):
            self._stop()
            raise EvaluationStopped

    def received(self, args: Any) -> int:
        """The number of the signal that has come to any of the processes, or 0."""
        received = self._received
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            numbers = torch.tensor([received], device=args.device)
            torch.distributed.all_reduce(numbers, op=torch.distributed.ReduceOp.MAX)
            received = int(numbers)
        self._received = received
        return received

    def is_over(self, args: Any) -> bool:
        """Whether a signal has come, so that nothing long is begun any more."""
        if self.received(args):
            self._stop()
        return self.signal_number is not None

    def _stop(self) -> None:
        self.signal_number = self._received

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = number
        when = "when the result is written" if self._is_trained else "after this step, with a checkpoint to go on from"
        self.tell(f"Stopping {when}. Ctrl-C again stops at once, without it.")


# Schedulers send a signal to all processes of a job. A DataLoader worker that died of it would end the training that
# is about to save, with an error; so those that are forked meanwhile end when their parent says so.
_in_training: set[Interruption] = set()


def _leave_to_the_parent() -> None:
    if not _in_training:
        return
    for number in SIGNALS:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    # PyTorch puts a handler for SIGTERM in, which kills a worker whoever sent it: so it is kept from it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_when_the_parent_says, daemon=True).start()


def _end_when_the_parent_says() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


if hasattr(os, "register_at_fork") and hasattr(signal, "sigwaitinfo"):
    os.register_at_fork(after_in_child=_leave_to_the_parent)
