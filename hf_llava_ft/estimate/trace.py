"""What one micro-batch of training costs beyond the states: bytes and floating point operations.

The model runs forward and backward on fake tensors, which have shapes but no data. So nothing is modelled by hand:
what autograd keeps, what autocast casts, and what gradient checkpointing computes again, is what PyTorch, PEFT and
transformers do. The layers of a language model are equal, so that two and three of them are run, and the rest follows.
"""

import copy
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_llava_ft.checkpoints.checked.folder import UNREADABLE, reason_of
from hf_llava_ft.errors import UserError
from hf_llava_ft.estimate.bytes_alive import BytesAlive
from hf_llava_ft.estimate.operations import FlopCounter
from hf_llava_ft.estimate.pictures import TYPICAL_SIZE, Picture, picture_of
from hf_llava_ft.evaluation.token_losses import LossOverTokens
from hf_llava_ft.modeling.chunked_loss_llava import can_chunk, chunked_loss, rows_of_chunk
from hf_llava_ft.modeling.configuration_llava import LlavaConfig
from hf_llava_ft.modeling.modeling_llava import LlavaForCausalLM
from hf_llava_ft.modeling.part_names_llava import LANGUAGE_MODEL, part_of
from hf_llava_ft.settings.arguments import TuningArguments
from hf_llava_ft.training.tuning import with_tuning

_FEW_LAYERS = (2, 3)


@dataclass(frozen=True)
class Batch:
    """
    The rows of a micro-batch, all alike.

    Args:
        size (`int`): rows.
        images (`int`): pictures in a row.
        text_tokens (`int`): other tokens in a row.
        supervised (`int`): tokens of a row that the loss counts.
        picture_size (`tuple[int, int]`): height and width of a picture; matters in LLaVA-1.6 only.
    """

    size: int
    images: int
    text_tokens: int
    supervised: int
    picture_size: tuple[int, int] = TYPICAL_SIZE


@dataclass(frozen=True)
class Precision:
    """
    Args:
        weights (`torch.dtype`): that the model is loaded in.
        autocast (`bool`): compute in 16 bits whatever the weights are in, as the Trainer does with bf16 or fp16.
        whole_model (`torch.dtype`, *optional*): that the engine turns all weights into, as DeepSpeed does.
    """

    weights: torch.dtype
    autocast: bool = False
    whole_model: torch.dtype | None = None


@dataclass(frozen=True)
class MicroBatch:
    """
    Of one micro-batch on one device; without weights, gradients and optimiser states.

    Args:
        held (`float`): bytes alive between forward and backward, logits and loss among them.
        logits (`float`): of these, those of head and loss.
        peak (`float`): largest number of bytes alive at a time, `held` and temporary ones.
        operations (`float`): floating point operations carried out; a multiply-add is two.
    """

    held: float
    logits: float
    peak: float
    operations: float


def build_model(config: LlavaConfig, tuning: TuningArguments, precision: Precision, attention: str = "sdpa") -> Any:
    """
    The model that `tuning` trains, on the device `meta`, where tensors have no content.

    A language model of few bits has its weights whole here: `quantized_bytes` in `memory.py` knows their size.
    """
    config = copy.deepcopy(config)
    with torch.device("meta"):
        try:
            model: Any = LlavaForCausalLM._from_config(config, dtype=precision.weights, attn_implementation=attention)
        except UNREADABLE as error:
            raise UserError(f"no model can be made by this config.json: {reason_of(error)}") from error
        if tuning.bits < 16:
            model.is_loaded_in_4bit, model.is_loaded_in_8bit = tuning.bits == 4, tuning.bits == 8
        tuned = with_tuning(model, tuning, base="")
    if precision.whole_model is not None:
        for tensor in (*tuned.parameters(), *tuned.buffers()):
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(precision.whole_model)
    if tuning.bits < 16:
        # What preparing a quantised model leaves alone, and turns to float32 here, because it is not packed.
        for _, parameter in quantized_weights(tuned):
            parameter.data = parameter.data.to(torch.bfloat16 if precision.autocast else precision.weights)
    return tuned.train()


def quantized_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights of the linear layers of the language model: what is loaded in few bits where that is asked for."""
    for name, module in model.named_modules():
        is_base = part_of(name) == LANGUAGE_MODEL and "lora_" not in name and "modules_to_save" not in name
        if isinstance(module, nn.Linear) and is_base:
            yield f"{name}.weight", module.weight


def trace_micro_batch(
    config: LlavaConfig,
    tuning: TuningArguments,
    precision: Precision,
    batch: Batch,
    *,
    gradient_checkpointing: bool,
    attention: str = "sdpa",
    whole_logits: bool = False,
) -> MicroBatch:
    """
    Bytes and operations of one micro-batch with all layers of the language model.

    Args:
        whole_logits (`bool`): the logits of a step exist at once, however many they are: the head is shared out.
    """
    num_layers = config.text_config.num_hidden_layers
    few = [
        _trace(_with_layers(config, count), tuning, precision, batch, gradient_checkpointing, attention, whole_logits)
        for count in _FEW_LAYERS
    ]
    (fewer_vision, fewer), (_, more) = few
    steps = num_layers - _FEW_LAYERS[0]

    def extrapolated(name: str) -> float:
        first, second = getattr(fewer, name), getattr(more, name)
        return first + (second - first) * steps

    values = {name: extrapolated(name) for name in ("held", "logits", "operations")}
    # What is temporary is that of one layer at a time, so that more layers add what they hold and no more.
    values["peak"] = max(fewer_vision, more.peak + values["held"] - more.held)
    return MicroBatch(**values)


def _with_layers(config: LlavaConfig, count: int) -> LlavaConfig:
    config = copy.deepcopy(config)
    config.text_config.num_hidden_layers = count
    if getattr(config.text_config, "layer_types", None):
        config.text_config.layer_types = config.text_config.layer_types[:count]
    return config


def _trace(
    config: LlavaConfig,
    tuning: TuningArguments,
    precision: Precision,
    batch: Batch,
    gradient_checkpointing: bool,
    attention: str,
    whole_logits: bool,
) -> tuple[float, MicroBatch]:
    """The peak of the vision part's forward pass, and the costs of the whole with the peak of all that follows."""
    model = build_model(config, tuning, precision, attention)
    # Not fake ones: crops and tokens follow from the numbers in them.
    picture = picture_of(config, batch.picture_size)
    image_sizes = torch.tensor([picture.size] * (batch.size * batch.images))
    with FakeTensorMode():
        _put_on_fake_device(model)
        if gradient_checkpointing:
            model.gradient_checkpointing_enable()  # as the Trainer does
        bytes_alive = BytesAlive(model)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_forget_gradient)
        counter = FlopCounter()
        dtype = torch.bfloat16 if precision.autocast else torch.float32
        with counter, bytes_alive:
            with torch.autocast("cpu", dtype, enabled=precision.autocast):
                embeds = _embedded(model, config, batch, picture, image_sizes)
                vision_peak = bytes_alive.start_peak_anew()
                loss, logits = _loss(model, config, batch, embeds, bytes_alive, whole_logits)
                del embeds
            held = bytes_alive.now  # without what autocast kept for the forward pass alone
            bytes_alive.collects = True
            gc.freeze()
            try:
                loss.backward()
            finally:
                gc.unfreeze()
        total = counter.get_total_flops()
    return vision_peak, MicroBatch(held, logits, bytes_alive.peak, total)


def _put_on_fake_device(model: nn.Module) -> None:
    """Replaces the tensors of `model` by fake ones of a CPU; on `meta`, attention would be that of no device."""
    fakes: dict[int, torch.Tensor] = {}
    for module in model.modules():
        of_module: list[dict[str, Any]] = [module._parameters, module._buffers]
        for tensors in of_module:
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in fakes:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                    if isinstance(tensor, nn.Parameter):
                        fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                    fakes[id(tensor)] = fake
                tensors[name] = fakes[id(tensor)]


def _embedded(
    model: Any, config: LlavaConfig, batch: Batch, picture: Picture, image_sizes: torch.Tensor
) -> torch.Tensor:
    """`float[B, T, D]`: the rows with the features of their pictures in front of the text."""
    llava = _unwrapped(model).model
    ids = torch.zeros(batch.size, picture.tokens * batch.images + batch.text_tokens, dtype=torch.int64)
    embeds = model.get_input_embeddings()(ids)
    if not batch.images:
        return embeds
    edge = config.vision_config.image_size
    pixels = torch.zeros(batch.size * batch.images * picture.crops, 3, edge, edge)
    pixels = pixels.to(llava.vision_tower.dtype)
    sizes = image_sizes if config.image_aspect_ratio == "anyres" else None
    features = llava.get_image_features(pixel_values=pixels, image_sizes=sizes, return_dict=True).pooler_output
    images = torch.cat(tuple(features))
    rows = torch.arange(ids.shape[1] * batch.size)[: len(images)]
    flat = embeds.reshape(-1, embeds.shape[-1])
    return flat.index_copy(0, rows, images.to(flat.dtype)).view_as(embeds)


def _loss(
    model: Any,
    config: LlavaConfig,
    batch: Batch,
    embeds: torch.Tensor,
    bytes_alive: "BytesAlive",
    whole_logits: bool,
) -> tuple[torch.Tensor, float]:
    """The loss over the supervised positions, as `LlavaForCausalLM` and `LlavaTrainer` have it, and the bytes that
    head and loss hold."""
    llava = _unwrapped(model)
    hidden = llava.model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    before = bytes_alive.now - hidden.untyped_storage().nbytes()  # which only the head reads
    positions = torch.arange(batch.size * batch.supervised)
    chosen = hidden.reshape(-1, hidden.shape[-1])[positions]
    vocab_size = config.text_config.vocab_size
    loss_function = LossOverTokens(num_tokens=vocab_size, image_token_id=config.image_token_id)
    targets = torch.zeros(len(positions), dtype=torch.int64)

    def loss_of(logits: torch.Tensor, targets: torch.Tensor, divisor: int | None = None) -> torch.Tensor:
        return loss_function(
            logits=logits, labels=None, vocab_size=vocab_size, shift_labels=targets, num_items_in_batch=divisor
        )

    rows = None if whole_logits else rows_of_chunk(len(targets), vocab_size)
    if rows is None or not can_chunk(llava.lm_head, chosen):
        loss = loss_of(llava.lm_head(chosen), targets)
    else:
        loss = chunked_loss(llava.lm_head, chosen, targets, loss_of, None, rows)
    del chosen, hidden, targets, positions  # as the Trainer drops all of the model's output but the loss
    return loss, bytes_alive.now - before


def _unwrapped(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _forget_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None  # counted with the states
