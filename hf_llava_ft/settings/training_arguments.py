"""How a run trains: the Trainer's own arguments, with LLaVA's defaults and additions."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from transformers import TrainingArguments

from hf_llava_ft.library_differences import checkpointing_flags
from hf_llava_ft.settings.defaults import OF_BATCH, UNTIL_KNOWN, groups_by_default
from hf_llava_ft.settings.machine import has_bf16_gpu, settles_precision, workers_by_cores
from hf_llava_ft.settings.refused import check_not_refused


@dataclass
class LlavaTrainingArguments(TrainingArguments):
    """
    transformers' `TrainingArguments`, and:

    Args:
        mm_projector_lr (`float`, *optional*):
            Learning rate of the projector; by default `learning_rate`, where that is given.
        mm_vision_tower_lr (`float`, *optional*):
            Learning rate of what trains in the vision tower; by default `learning_rate`, where that is given.
        group_by_modality_length (`bool`):
            Batches of rows with images or without, each of similar length in tokens; in words with `sampler_order`
            `original`. True by default, but for streams, other orders, and rows whose lengths are not known; False is
            random order.
        sampler_order (`"default"` or `"original"`):
            `original` takes the rows in the original LLaVA's order for this seed, grouped or not; grouping then sorts
            within one step, which saves no padding. Micro-batches that do not fill an optimiser step are left out, as
            there.
        packing (`bool`):
            Each batch of a device is a pack of rows that fill `max_tokens_per_batch` tokens without padding, each of
            which sees itself alone. `per_device_train_batch_size` is 1 then, and `gradient_accumulation_steps` counts
            packs.
        max_tokens_per_batch (`int`, *optional*):
            Most tokens of a pack; by default so many that a step has about the rows that it has without packing, 8192
            at most, or the longest row.
        padding_free (`"auto"`, `"true"` or `"false"`):
            Compute the rows of a batch one behind the other, each at its own length, instead of padded to the longest.
            `auto` is on a CPU, where the language model can.
        gradient_checkpointing (`bool` or `"auto"`):
            Compute activations twice, which takes less memory. `auto`, the default, is on where the heaviest batch
            would not fit without; `llava-ft train` and `fine_tune` know that, a `LlavaTrainer` leaves it off.
        compile (`"auto"`, `"true"` or `"false"`):
            Compile the layers of the language model, each by itself, in training with packing. `auto` is on a GPU.
        loss_normalization (`"tokens"` or `"micro_batch"`):
            `tokens` is the mean over all supervised tokens of an optimiser step. `micro_batch` is the original's mean
            per micro-batch, then the mean of those over accumulation steps and ranks.
        early_stopping_patience (`int`, *optional*):
            End when the loss of so many evaluations in a row was no better than the best before; the best is loaded.
        try_longest_batch (`"auto"`, `"true"` or `"false"`):
            Try the batch of the longest rows before the first step, so that too little memory is known then. `auto` is
            on a GPU. It leaves no trace in the run. Not with streaming, and not under DeepSpeed.
        resume_anyway (`bool`):
            Resume although data or settings are not what the checkpoint's run had.
        overwrite_output_dir (`bool`):
            Move what is in the output folder to one beside it, where a new run would be refused.
        dataloader_num_workers (`int`):
            by default on a GPU half the cores of this process, 8 at most, and 0 on a CPU and for streams, whose order
            depends on it.
        lr_scheduler_type, logging_steps:
            the same arguments with LLaVA's defaults.
        learning_rate, num_train_epochs, per_device_train_batch_size, gradient_accumulation_steps, warmup_steps:
            the same arguments; what is not given follows from what trains and from the number of rows, when the
            [`LlavaTrainer`] knows them (`defaults.py`). Until then they have the values of `UNTIL_KNOWN`.
        bf16 (`bool`, *optional*):
            by default True on a GPU that computes in bfloat16, unless `fp16`, `use_cpu` or the launcher say otherwise.
    """

    # transformers parses strings of these fields as JSON or numbers; a subclass has to repeat the list.
    # None is what nobody said.
    learning_rate: float = field(
        default=None,  # type: ignore[assignment]
        metadata={"help": "Peak learning rate; default: by what trains."},
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    warmup_steps: float = field(
        default=None,  # type: ignore[assignment]
        metadata={"help": "Warmup steps; below 1 their share of all; default: 0.03, and none in a short run."},
    )
    num_train_epochs: float = field(
        default=None,  # type: ignore[assignment]
        metadata={"help": "How often each row is seen; default: by the number of rows."},
    )
    per_device_train_batch_size: int = field(
        default=None,  # type: ignore[assignment]
        metadata={"help": "Rows on a device at once; default: by the number of rows, 8 at most."},
    )
    gradient_accumulation_steps: int = field(
        default=None,  # type: ignore[assignment]
        metadata={"help": "Batches to a step; default: by the number of rows, or 1 beside a batch size."},
    )
    bf16: bool = field(
        default=None,  # type: ignore[assignment]
        metadata={"help": "Compute in bfloat16; default: where the GPU has it."},
    )
    logging_steps: float = field(default=1, metadata={"help": "Steps between two logs."})
    mm_projector_lr: float | None = field(
        default=None, metadata={"help": "Learning rate of the projector; default: by what trains."}
    )
    mm_vision_tower_lr: float | None = field(
        default=None, metadata={"help": "Learning rate of the vision tower; default: by what trains."}
    )
    dataloader_num_workers: int = field(
        default=None,  # type: ignore[assignment]
        metadata={"help": "Processes that open pictures meanwhile; default: by the cores on a GPU, else 0."},
    )
    group_by_modality_length: bool = field(
        default=None,  # type: ignore[assignment]
        metadata={"help": "Batches of one modality and similar length, in which little is padding; default: True."},
    )
    sampler_order: Literal["default", "original"] = field(
        default="default", metadata={"help": "original: the rows in the original LLaVA's order."}
    )
    packing: bool = field(
        default=False, metadata={"help": "Rows come in packs of max_tokens_per_batch instead of padded batches."}
    )
    max_tokens_per_batch: int | None = field(
        default=None, metadata={"help": "With packing: most tokens of a pack; default: by the rows, 8192 at most."}
    )
    padding_free: str = field(
        default="auto",
        metadata={"help": "Compute the rows of a batch without padding: auto (on a CPU), true or false."},
    )
    gradient_checkpointing: bool = field(
        default=None,  # type: ignore[assignment]
        metadata={"help": "Compute activations twice, in less memory: true, false or auto; default: auto."},
    )
    compile: str = field(
        default="auto",
        metadata={"help": "With packing: compile the language model's layers: auto (on a GPU), true or false."},
    )
    loss_normalization: Literal["tokens", "micro_batch"] = field(
        default="tokens",
        metadata={"help": "tokens: mean over a step's supervised tokens; micro_batch: the original's mean of means."},
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "End after this many evaluations in a row without improvement, and keep the best."},
    )
    try_longest_batch: str = field(
        default="auto",
        metadata={"help": "Try the batch of the longest rows before the first step: auto (on a GPU), true or false."},
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Must stay False: a loss that is not finite ends the run."}
    )
    resume_anyway: bool = field(
        default=False, metadata={"help": "Resume although data or settings are not those of the checkpoint's run."}
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Begin a new run in a folder that is not empty: what is there is moved to one beside it."},
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay False: the collator reads all columns."}
    )

    def leave_open(self, names: Iterable[str]) -> None:
        """Says that the values of `names` are nobody's, and may be replaced; not of what DeepSpeed has read."""
        self.unsaid: frozenset[str] = frozenset(names) - self._read_by_deepspeed()

    def _read_by_deepspeed(self) -> set[str]:
        if self.deepspeed_plugin is None:
            return set()
        settings = self.deepspeed_plugin.hf_ds_config
        has_rate = any(settings.get_value(name) is not None for name in ("optimizer", "scheduler"))
        return {*OF_BATCH, *(("learning_rate",) if has_rate else ())}

    def _settle_checkpointing(self) -> None:
        names = checkpointing_flags()
        said = {name: value for name in names if str(value := getattr(self, name)).lower() not in ("none", "auto")}
        for name, value in said.items():
            if str(value).lower() not in ("true", "false"):
                raise ValueError(f"{name} {value} is none of auto, true and false.")
        # Whether it is left to the machine.
        self.checkpointing_is_auto: bool = not said
        for name in names:
            setattr(self, name, str(said[name]).lower() == "true" if name in said else None)
        if not said:
            setattr(self, names[0], False)

    def __post_init__(self):
        unsaid = {name for name in UNTIL_KNOWN if getattr(self, name) is None}
        if self.packing and self.per_device_train_batch_size is None:
            self.per_device_train_batch_size = 1  # a pack
            unsaid.remove("per_device_train_batch_size")
        for name in unsaid:
            setattr(self, name, UNTIL_KNOWN[name])
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not settles_precision(self.use_cpu, self.deepspeed) and has_bf16_gpu()
        self.workers_unsaid = self.dataloader_num_workers is None
        if self.workers_unsaid:
            self.dataloader_num_workers = 0
        self.order_unsaid = self.group_by_modality_length is None
        if self.order_unsaid:
            self.group_by_modality_length = not self.packing and groups_by_default(
                self.sampler_order, self.train_sampling_strategy
            )
        self._settle_checkpointing()
        # No setting: a run that goes on keeps its own (`training/row_order.py`).
        self.grouped_by: str = "words" if self.sampler_order == "original" else "tokens"
        for name in ("try_longest_batch", "compile", "padding_free"):
            setattr(self, name, str(getattr(self, name)).lower())
            if getattr(self, name) not in ("auto", "true", "false"):
                raise ValueError(f"{name} {getattr(self, name)} is none of auto, true and false.")
        if str(self.fsdp).lower() in ("true", "false"):  # of which transformers takes no words, only the bare flag
            self.fsdp = True if str(self.fsdp).lower() == "true" else None  # type: ignore[assignment]
        if self.early_stopping_patience is not None:
            if self.early_stopping_patience < 1:
                raise ValueError(
                    f"early_stopping_patience {self.early_stopping_patience}: give 1 or more evaluations."
                )
            if self.eval_strategy == "no":
                raise ValueError("early_stopping_patience needs evaluations: add eval_strategy steps or epoch.")
            self.load_best_model_at_end = True
            self.metric_for_best_model = self.metric_for_best_model or "eval_loss"
        super().__post_init__()
        if self.deepspeed_plugin is not None and self.device.type == "cpu" and "WORLD_SIZE" in os.environ:
            # accelerate joins the processes later on a CPU, and ZeRO-3 divides the model among them while it is read.
            import deepspeed

            deepspeed.init_distributed(dist_backend="gloo")
        if self.deepspeed_plugin is not None:
            settings = self.deepspeed_plugin.hf_ds_config
            gathers = settings.get_value("zero_optimization.stage3_gather_16bit_weights_on_model_save", False)
            if settings.is_zero3() and not gathers:
                raise ValueError(
                    "DeepSpeed's ZeRO-3 is set up without stage3_gather_16bit_weights_on_model_save, so that no model "
                    "could be saved that anything loads: set it to true under zero_optimization, as in "
                    "examples/deepspeed/zero3.json."
                )
        if self.workers_unsaid and self.device.type == "cuda":
            self.dataloader_num_workers = workers_by_cores()
            self.dataloader_persistent_workers |= self.dataloader_num_workers > 0
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # nothing to pin for, and PyTorch warns about it
        check_not_refused(self)
        if "learning_rate" in unsaid & self._read_by_deepspeed():
            raise ValueError(
                "learning_rate has to be given, since DeepSpeed's settings have an optimizer or a scheduler that take "
                "it over before it is known what trains: 2e-5 for whole parts, 2e-4 for LoRA."
            )
        self.leave_open(unsaid)
        if self.fp16:  # whose scaler skips such steps, and whose log would be NaN from then on
            self.logging_nan_inf_filter = True
