"""One training step of a LLaVA of random weights, as LlavaTrainer takes it, without data and Trainer around it."""

import gc
from dataclasses import dataclass
from typing import Any

import torch
from repeats import finished, spread
from torch import nn

from hf_llava_ft.estimate.memory import StateBytes
from hf_llava_ft.estimate.plan import Estimate, Estimator, Plan
from hf_llava_ft.estimate.trace import Batch, quantized_weights
from hf_llava_ft.evaluation.token_losses import LossOverTokens
from hf_llava_ft.modeling.modeling_llava import LlavaForCausalLM
from hf_llava_ft.settings.arguments import TuningArguments
from hf_llava_ft.training.tuning import with_tuning

MAX_GRAD_NORM = 1.0  # the Trainer's default


@dataclass(frozen=True)
class Case:
    """What is trained, and in what batches; `compute` is what autocast computes in."""

    config: Any
    tuning: TuningArguments
    batch: Batch
    gradient_checkpointing: bool
    device: torch.device
    attention: str = "sdpa"
    compute: torch.dtype = torch.bfloat16

    def estimate(self, gradient_checkpointing: bool | None = None) -> Estimate:
        """What `llava-ft estimate` says of it."""
        estimator = Estimator(self.config, self.tuning, self.compute, True, self.attention, "adamw_torch_fused")
        checkpointing = self.gradient_checkpointing if gradient_checkpointing is None else gradient_checkpointing
        return estimator.estimate(Plan("single", 1, 1, checkpointing, self.batch))


class TrainingStep:
    """
    A model of random weights in `case.compute` on `case.device`, its optimiser, and a batch.

    Attributes:
        measured: bytes on the device after the model was made, and after each part of the first step.
    """

    def __init__(self, case: Case):
        self.case, self.measured = case, {}
        before = allocated(case.device)
        with torch.device(case.device):
            model: Any = LlavaForCausalLM._from_config(
                case.config, dtype=case.compute, attn_implementation=case.attention
            )
            if case.tuning.bits == 4:
                quantize(model, case)
            self.model: Any = with_tuning(model, case.tuning, base="").train()
        model.loss_function = LossOverTokens(case.config.text_config.vocab_size, case.config.image_token_id)
        if case.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()
        self.trained = [each for each in self.model.parameters() if each.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, fused=True)
        self.inputs = inputs_of(case)
        self.before = before
        self.measured["weights"] = allocated(case.device) - before

    def loss(self) -> torch.Tensor:
        with torch.autocast(self.case.device.type, self.case.compute):
            return self.model(**self.inputs, use_cache=False, supervised_logits_only=True).loss

    def __call__(self) -> float:
        loss = self.loss()
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, MAX_GRAD_NORM)
        self.optimizer.step()
        if "states" not in self.measured:  # of the weights, gradients and optimiser
            self.measured["states"] = allocated(self.case.device) - self.before
        self.optimizer.zero_grad()
        return loss.item()

    def seconds(self, steps: int, warm_up: int) -> tuple[dict[str, float], list[float]]:
        """Seconds of a step, and the losses; the peak of memory is that of all of them."""
        if self.case.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.case.device)
        losses = [self() for _ in range(warm_up)]
        seconds = []
        for _ in range(steps):
            start = finished(self.case.device)
            losses.append(self())
            seconds.append(finished(self.case.device) - start)
        if self.case.device.type == "cuda":
            self.measured["peak"] = torch.cuda.max_memory_allocated(self.case.device) - self.before
            self.measured["reserved"] = torch.cuda.max_memory_reserved(self.case.device)
        return spread(seconds), losses


def inputs_of(case: Case) -> dict[str, torch.Tensor]:
    """Rows of one length: pictures' tokens, then text, whose last tokens are learned; random, the same every time."""
    batch, config = case.batch, case.config
    vision = config.vision_config
    features = (vision.image_size // vision.patch_size) ** 2 * batch.images
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 1000, (batch.size, features + batch.text_tokens), generator=generator)
    ids[:, :features] = config.image_token_id
    labels = torch.full_like(ids, -100)
    labels[:, -batch.supervised :] = ids[:, -batch.supervised :]
    shape = (batch.size * batch.images, 3, vision.image_size, vision.image_size)
    pixels = torch.randn(shape, generator=generator)
    inputs = {"input_ids": ids, "labels": labels} | ({"pixel_values": pixels} if batch.images else {})
    return {name: each.to(case.device) for name, each in inputs.items()}


def quantize(model: Any, case: Case) -> None:
    """Puts the linear layers of the language model into 4 bits, as transformers does when it reads a checkpoint."""
    import bitsandbytes as bnb

    for name in [name.removesuffix(".weight") for name, _ in quantized_weights(model)]:
        linear = model.get_submodule(name)
        packed = bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=False,
            compute_dtype=case.compute,
            compress_statistics=case.tuning.double_quant,
            quant_type=case.tuning.quant_type,
            device=case.device,
        )
        weight = linear.weight.data.cpu()  # packed on its way to the device
        packed.weight = bnb.nn.Params4bit(
            weight,
            requires_grad=False,
            compress_statistics=case.tuning.double_quant,
            quant_type=case.tuning.quant_type,
            module=packed,
        ).to(case.device)
        model.set_submodule(name, packed)
    model.is_loaded_in_4bit = True


def allocated(device: torch.device) -> int:
    """Bytes of tensors on a CUDA device; 0 on others, where nobody counts them."""
    if device.type != "cuda":
        return 0
    gc.collect()
    return torch.cuda.memory_allocated(device)


def states_of(states: StateBytes) -> float:
    return states.weights + states.gradients + states.optimizer
