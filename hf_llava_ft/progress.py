"""The bar one watches while training: step, loss, speed and time left."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback


class LiveProgress(TrainerCallback):
    """
    A rich progress bar for the Trainer, and the list of logged losses.

    Args:
        console (`rich.console.Console`, *optional*): where to draw; without a terminal, one
            line a log is printed instead.
    """

    def __init__(self, console: Console | None = None):
        self.console = console or Console(stderr=True)
        self.losses: list[float] = []
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
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._samples_per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        self._task = self._progress.add_task(
            "", total=state.max_steps, completed=state.global_step, loss="-", speed=""
        )
        self._progress.start()

    def on_step_end(self, args, state, control, **kwargs):
        if self._progress is not None:
            task = self._progress.tasks[self._task]
            speed = f"{task.speed * self._samples_per_step:.1f} samples/s" if task.speed else ""
            self._progress.update(self._task, completed=state.global_step, speed=speed)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or "loss" not in (logs or {}):
            return
        self.losses.append(float(logs["loss"]))
        if self._progress is None:
            return
        self._progress.update(self._task, loss=f"{self.losses[-1]:.4f}")
        if not self.console.is_terminal:
            self.console.print(
                f"step {state.global_step}/{state.max_steps}  loss {self.losses[-1]:.4f}", highlight=False
            )

    def on_train_end(self, args, state, control, **kwargs):
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
