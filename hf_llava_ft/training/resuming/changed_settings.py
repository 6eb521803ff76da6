"""What is changed on resume takes effect.

A Trainer that resumes takes over the optimiser's groups and the scheduler with the learning rates, decay and momenta
that they had, and how often it logged, saved and evaluated. What it was told now, it would only repeat in its summary.
The length and the kind of the schedule, on the other hand, are always those of now.
"""

from typing import TYPE_CHECKING, Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback

from hf_llava_ft.errors import UserError
from hf_llava_ft.training.resuming.fingerprint import TAKE_EFFECT, changes_between

if TYPE_CHECKING:
    from hf_llava_ft.training.trainer import LlavaTrainer

# Of an optimiser's groups, beside the learning rate.
_OF_GROUPS = ("weight_decay", "betas", "eps")


def settings_of_groups(optimizer: Any) -> list[dict[str, Any]]:
    """What the groups of a new optimiser are told."""
    return [{name: group[name] for name in ("lr", *_OF_GROUPS) if name in group} for group in optimizer.param_groups]


class ChangedSettings(TrainerCallback):
    """
    Holds what was given for the rest of a resumed run against what was taken over.

    Raises:
        UserError: when a run begins that ends behind where it is to begin.
    """

    def __init__(self, trainer: "LlavaTrainer"):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, optimizer=None, lr_scheduler=None, **kwargs):
        run = self.trainer.run
        if not state.global_step or run.resumed_from is None:
            return
        if state.global_step > state.max_steps and not args.resume_anyway:
            raise UserError(
                f"{run.resumed_from} is of step {state.global_step}, and the run is to end at {state.max_steps}: give "
                "more --num_train_epochs or --max_steps, or an earlier checkpoint."
            )
        state.compute_steps(args, state.max_steps)
        was = self.trainer.course_before
        if was is None or not TAKE_EFFECT & set(changes_between(was, run.course or {})):
            return
        told = self.trainer.told_of_groups
        scheduler = getattr(lr_scheduler, "scheduler", lr_scheduler)  # accelerate's is around it
        if told is None or len(told) != len(optimizer.param_groups) or not isinstance(scheduler, LambdaLR):
            return
        rates = [each["lr"] for each in told]
        now = [rate * share(scheduler.last_epoch) for rate, share in zip(rates, scheduler.lr_lambdas, strict=True)]
        for group, each, rate in zip(optimizer.param_groups, told, now, strict=True):
            group.update({**each, "lr": rate, "initial_lr": each["lr"]})
        scheduler.load_state_dict({**scheduler.state_dict(), "base_lrs": rates, "_last_lr": now})
