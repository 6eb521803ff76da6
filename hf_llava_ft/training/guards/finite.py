"""A run whose loss, gradients or weights are no numbers any more ends, and saves nothing of it.

transformers goes on: its log leaves such losses out ("loss 0.0000"), and the weights of NaN become the result.

What may surprise: the one look at the device that a step costs replaces that of `logging_nan_inf_filter`, which looks
after each micro-batch. The optimizer has not stepped yet when a step is refused, so that the weights in memory are
good; not so under DeepSpeed, which steps in its backward pass. A step that fp16's scaler skips changes no weight and
is let pass, but not `MOST_SKIPPED` of them in a row, which no scale mends.
"""

import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from transformers import TrainerCallback

from hf_llava_ft.checkpoints.run_files import PREFIX_CHECKPOINT_DIR
from hf_llava_ft.training.guards.moved_weights import held_here
from hf_llava_ft.training.resuming.resume import SEAL

# From 2^16, at which PyTorch and DeepSpeed begin, down to 2^-16; DeepSpeed waits once before it halves.
MOST_SKIPPED = 33


class NotFinite(RuntimeError):
    """Training gave NaN or infinity: its result would be none."""


class FiniteTraining(TrainerCallback):
    """
    Ends a run, in all processes together, at the first loss or gradient norm that is not finite.

    Args:
        trainer (`LlavaTrainer`): hands over its losses, gradient norms, metrics, and the weights that it saves.

    Raises:
        NotFinite: with step, learning rate, dtypes, what to try, and the last good checkpoint.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self._losses: torch.Tensor | None = None
        self._is_bad = False
        self._num_skipped = 0

    def on_step_begin(self, args, state, control, **kwargs):
        self._losses = None

    def see_loss(self, loss: torch.Tensor) -> None:
        """Of a micro-batch, `float[]`; stays on its device."""
        loss = loss.detach().float()
        self._losses = loss if self._losses is None else self._losses + loss

    def see_gradients(self, norm: Any) -> None:
        """Of the step, before it is taken: `float[]`, a number, or None where the engine has none."""
        device = self.trainer.args.device
        losses = torch.zeros((), device=device) if self._losses is None else self._losses
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        norm = torch.as_tensor(0.0 if norm is None else norm, dtype=torch.float32, device=device)
        bad_loss, bad_norm = _of_all_processes(~torch.stack((losses.to(device), norm)).isfinite())
        self._losses, self._is_bad = None, bad_loss or bad_norm
        if self._is_bad and not self.trainer.args.fp16:
            self._refuse("loss" if bad_loss else "gradient norm")

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        was_skipped = bool(getattr(optimizer, "step_was_skipped", False))
        self._num_skipped = self._num_skipped + 1 if was_skipped else 0
        # DeepSpeed skips such steps in every dtype, and then tells the norm of an earlier one.
        if was_skipped and not args.fp16 or self._is_bad and not was_skipped:
            self._refuse("gradient norm", state.global_step)
        if self._num_skipped >= MOST_SKIPPED:
            self._refuse(
                f"gradient norm, as that of the {MOST_SKIPPED - 1} steps before it, which fp16 skipped,",
                state.global_step,
            )

    def see_metrics(self, metrics: dict[str, float] | None, name: str) -> None:
        """Of an evaluation, the same in all processes."""
        value = (metrics or {}).get(name)
        if value is not None and not math.isfinite(value):
            self._refuse(f"evaluation loss ({name})", self.trainer.state.global_step)

    def see_weights(self, model: torch.nn.Module) -> None:
        """What is about to be saved: those that train, each read once."""
        trainer = self.trainer
        held = [held_here(each) for each in model.parameters() if each.requires_grad]
        bad = ~are_finite([each for each in held if each is not None])
        # Otherwise each process holds all of them, and the first may be the only one that saves.
        if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
            bad = torch.tensor(_of_all_processes(bad.to(trainer.args.device).reshape(1)))
        if bool(bad.any()):
            named = [name for name, each in model.named_parameters() if each.requires_grad and _is_bad(each)]
            where = f" ({named[0]} and {len(named) - 1} more)" if len(named) > 1 else "".join(f" ({n})" for n in named)
            self._refuse(f"what the weights hold{where}", trainer.state.global_step)

    def _refuse(self, what: str, step: int | None = None) -> None:
        trainer, args = self.trainer, self.trainer.args
        step = trainer.state.global_step + 1 if step is None else step
        groups = getattr(trainer.optimizer, "param_groups", None) or [{"lr": args.learning_rate}]
        rate = max(float(group["lr"]) for group in groups)
        peak = f" (peak {args.learning_rate:g})" if rate != args.learning_rate else ""
        held = sorted({_name(each.dtype) for each in trainer.model.parameters() if each.requires_grad})
        computed = "bfloat16" if args.bf16 else "float16" if args.fp16 else "no other dtype than the weights"
        raise NotFinite(
            f"the {what} is not finite in step {step}, at learning rate {rate:g}{peak}, with weights that train in "
            f"{' and '.join(held)}, computed in {computed}. The run ends here, because its result would be none. Try "
            f"{_what_to_try(args)}. {self._last_good()}"
        )

    def _last_good(self) -> str:
        folder, reached = Path(str(self.trainer.args.output_dir)), self.trainer.state.global_step
        steps = {
            path.parent: path.parent.name.rpartition("-")[2]
            for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{SEAL}")
        }
        good = {int(step): path for path, step in steps.items() if step.isdecimal() and int(step) <= reached}
        if not good:
            return "There is no checkpoint of an earlier step."
        return f"The last good checkpoint is {good[max(good)]}; it can be gone on from with --resume_from_checkpoint."


def are_finite(tensors: list[torch.Tensor]) -> torch.Tensor:
    """`bool[]`, whether all weights are; read once and never copied."""
    tensors = [each.detach() for each in tensors if each.numel() and each.is_floating_point()]
    if not tensors:
        return torch.tensor(True)
    device = tensors[0].device
    # NaN goes through minimum and maximum.
    ends = [end.float().to(device) for each in tensors for end in torch.aminmax(each)]
    return torch.stack(ends).isfinite().all()


def _is_bad(parameter: torch.nn.Parameter) -> bool:
    held = held_here(parameter)
    return held is not None and not bool(are_finite([held]))


def _of_all_processes(found: torch.Tensor) -> list[bool]:
    """`bool[N]`, each true if it is so in any process."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        found = found.float()
        torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
    return [bool(each) for each in found.tolist()]


def _what_to_try(args: Any) -> str:
    ways = ["a lower --learning_rate"]
    if not args.warmup_steps:
        ways.append("--warmup_steps 0.03")
    if not args.max_grad_norm:
        ways.append("--max_grad_norm 1")
    if args.fp16:
        ways.append("--bf16 True in place of --fp16")
    ways.append("and, where it is so from the first step on, llava-ft check of the data and another copy of the model")
    return ", ".join(ways)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
