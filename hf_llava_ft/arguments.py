"""What a run is told: model, data, tuning, and the Trainer's own arguments with LLaVA's additions.

Each setting lives in one class. Defaults are those of LLaVA-1.5's LoRA recipe (haotian-liu/LLaVA,
`scripts/v1_5/finetune_lora.sh`), so that a run with nothing set is the paper's.
"""

from dataclasses import dataclass, field
from typing import Literal

from transformers import TrainingArguments


@dataclass
class ModelArguments:
    """Which model is trained, and how it reads."""

    model_name_or_path: str = field(metadata={"help": "LLaVA folder or Hub id, original or llava-hf."})
    revision: str | None = field(default=None, metadata={"help": "Revision of the model on the Hub."})
    version: str | None = field(
        default=None,
        metadata={"help": "Chat template: v1, plain, qwen, ... (docs/parity.md); default: the model's."},
    )
    image_aspect_ratio: Literal["square", "pad", "anyres"] | None = field(
        default=None,
        metadata={"help": "How a picture is made square; default: as the model has it. anyres: only of LLaVA-1.6."},
    )
    attn_implementation: str = field(default="sdpa", metadata={"help": "sdpa, eager, flash_attention_2, ..."})
    dtype: str = field(default="auto", metadata={"help": "dtype of the weights: auto (as saved), float32, bfloat16."})


@dataclass
class DataArguments:
    """What it is trained on."""

    data_path: str = field(metadata={"help": "LLaVA JSON or JSONL file."})
    image_folder: str = field(default=".", metadata={"help": "Folder the image paths in the data are relative to."})
    model_max_length: int | None = field(
        default=None,
        metadata={"help": "Longest row in tokens, image included; default: what the language model takes."},
    )


@dataclass
class TuningArguments:
    """Which weights are trained."""

    train_type: Literal["lora", "projector", "freeze_vision", "full"] = field(
        default="lora",
        metadata={
            "help": "lora: LoRA on the language model, and the projector. projector: the projector alone (stage 1). "
            "freeze_vision: language model and projector (stage 2). full: these and the vision tower."
        },
    )
    lora_r: int = field(default=128, metadata={"help": "LoRA rank."})
    lora_alpha: int = field(default=256, metadata={"help": "LoRA scaling numerator."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout in front of the LoRA layers."})


@dataclass
class LlavaTrainingArguments(TrainingArguments):
    """
    transformers' `TrainingArguments`, and:

    Args:
        mm_projector_lr (`float`, *optional*):
            Learning rate of the projector; by default `learning_rate`.
        group_by_modality_length (`bool`):
            Batches of rows with images or without, each of similar length (LLaVA-1.5).
        sampler_order (`"default"` or `"original"`):
            `original` takes the rows in the original LLaVA's order for this seed, grouped or not; grouping then sorts
            within one step, which saves no padding. Micro-batches that do not fill an optimiser step are left out, as
            there.
        loss_normalization (`"tokens"` or `"micro_batch"`):
            `tokens` is the mean over all supervised tokens of an optimiser step. `micro_batch` is the original's mean
            per micro-batch, then the mean of those over accumulation steps and ranks.
        learning_rate, lr_scheduler_type, warmup_steps, logging_steps, per_device_train_batch_size:
            the same arguments with LLaVA's defaults.
    """

    # transformers parses strings of these fields as JSON or numbers; a subclass has to repeat the list.
    learning_rate: float = field(default=2e-4, metadata={"help": "Peak learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    warmup_steps: float = field(default=0.03, metadata={"help": "Steps of warmup, or below 1 the share of all steps."})
    logging_steps: float = field(default=1, metadata={"help": "Steps between two logs."})
    mm_projector_lr: float | None = field(default=None, metadata={"help": "Learning rate of the projector."})
    group_by_modality_length: bool = field(
        default=False, metadata={"help": "Batches of one modality and similar length."}
    )
    sampler_order: Literal["default", "original"] = field(
        default="default", metadata={"help": "original: the rows in the original LLaVA's order."}
    )
    loss_normalization: Literal["tokens", "micro_batch"] = field(
        default="tokens",
        metadata={"help": "Mean over an optimiser step's supervised tokens, or the original's mean of means."},
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay False: the collator reads all columns."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # nothing to pin for, and PyTorch warns about it
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must stay False: the collator needs the messages and the images.")
