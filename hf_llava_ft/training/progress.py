"""The bar one watches while training: step, loss, speed and time left."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import TrainerCallback

from hf_llava_ft.training.throughput import Counts, Throughput


class LiveProgress(TrainerCallback):
    """
    A rich progress bar for the Trainer, and the list of logged losses.

    Speed is that since the last log, and with several processes that of the first times their number: their exact sums
    are in the summary. Time left goes by the speed of the whole run so far, without the time in evaluation.

    Args:
        console (`rich.console.Console`, *optional*): where to draw; without a terminal, one
            line a log is printed instead.

    Attributes:
        throughput (`Throughput`, *optional*): the Trainer's; without it no speed is shown.
    """

    def __init__(self, console: Console | None = None):
        self.console = console or Console(stderr=True)
        self.losses: list[float] = []
        self.throughput: Throughput | None = None
        self._progress: Progress | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        self._progress = Progress(
            TextColumn("[bold]training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[speed]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._first_step = state.global_step
        self._seen, self._seconds = Counts(0, 0, 0), 0.0
        self._task = self._progress.add_task(
            "", total=state.max_steps, completed=state.global_step, loss="-", speed="", left=""
        )
        self._progress.start()

    def on_step_end(self, args, state, control, **kwargs):
        if self._progress is None:
            return
        self._progress.update(self._task, completed=state.global_step)
        if self.throughput is not None:
            self._progress.update(self._task, left=f"{duration(self._seconds_left(state))} left")

    def on_log(self, args, state, control, logs=None, **kwargs):
        logs = logs or {}
        if state.is_world_process_zero and "eval_loss" in logs:
            self.console.print(f"step {state.global_step}  evaluation loss {logs['eval_loss']:.4f}", highlight=False)
        if not state.is_world_process_zero or "loss" not in logs:
            return
        self.losses.append(float(logs["loss"]))
        if self._progress is None:
            return
        speed = self._speed(args.world_size)
        self._progress.update(self._task, loss=f"{self.losses[-1]:.4f}", speed=speed)
        if not self.console.is_terminal:
            shown = [f"step {state.global_step}/{state.max_steps}", f"loss {self.losses[-1]:.4f}"]
            if speed:
                shown += [speed, f"{duration(self._seconds_left(state))} left"]
            self.console.print("  ".join(shown), highlight=False, soft_wrap=True)

    def on_train_end(self, args, state, control, **kwargs):
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _speed(self, num_processes: int) -> str:
        if self.throughput is None:
            return ""
        now, seconds = self.throughput.local(), self.throughput.training_seconds()
        before, elapsed = self._seen, seconds - self._seconds
        self._seen, self._seconds = now, seconds
        if elapsed <= 0:
            return ""
        samples = num_processes * (now.samples - before.samples) / elapsed
        tokens = num_processes * (now.tokens - before.tokens) / elapsed
        return f"{samples:.3g} samples/s  {tokens:,.0f} tokens/s"

    def _seconds_left(self, state) -> float:
        done = max(1, state.global_step - self._first_step)
        return self.throughput.training_seconds() / done * (state.max_steps - state.global_step)


def duration(seconds: float) -> str:
    """`0:07`, `12:30`, `3:05:00`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
