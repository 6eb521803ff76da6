"""The settings of a run: which model, which data, and what of it trains. How it trains is in `training_arguments.py`.

Each setting is in one class of these two files. What is None may follow from what trains and from the number of rows
(`defaults.py`).
"""

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class ModelArguments:
    """Which model is trained, and how it reads."""

    model_name_or_path: str = field(
        metadata={"help": "LLaVA, original or llava-hf, folder or Hub id; or a language model, with --vision_tower."}
    )
    revision: str | None = field(default=None, metadata={"help": "Revision of the model on the Hub."})
    version: str | None = field(
        default=None,
        metadata={"help": "Chat template: v1, plain, qwen, ... (docs/parity.md); default: the model's."},
    )
    image_aspect_ratio: Literal["square", "pad", "anyres"] | None = field(
        default=None,
        metadata={"help": "How a picture is made square; default: the model's own way. anyres: only for LLaVA-1.6."},
    )
    picture_opening: Literal["upright", "original"] | None = field(
        default=None,
        metadata={
            "help": "upright: pictures are turned as their EXIF data say, as transformers opens them for whoever asks "
            "the model. original: as they lie, as the original LLaVA does. Default: as the model was trained, or "
            "upright."
        },
    )
    attn_implementation: str = field(default="sdpa", metadata={"help": "sdpa, eager, flash_attention_2, ..."})
    dtype: str = field(
        default="auto",
        metadata={
            "help": "dtype of frozen weights and of the result: auto (as the model is saved), "
            "float32, bfloat16. What trains is held in float32."
        },
    )
    allow_nan: bool = field(default=False, metadata={"help": "Take a model whose weights are NaN or infinite."})
    vision_tower: str | None = field(
        default=None,
        metadata={
            "help": "CLIP or SigLIP model to put in front of a language model. This and the next seven describe a new "
            "LLaVA; for an existing one they may only repeat what it is, except pretrain_mm_mlp_adapter."
        },
    )
    mm_projector_type: str | None = field(
        default=None, metadata={"help": "linear, mlp{N}x_gelu or identity; default: mlp2x_gelu."}
    )
    pretrain_mm_mlp_adapter: str | None = field(
        default=None,
        metadata={"help": "Projector to start from: mm_projector.bin, or the folder that stage 1 wrote."},
    )
    mm_vision_select_layer: int | None = field(
        default=None, metadata={"help": "The tower's hidden state that the projector reads; default: -2."}
    )
    mm_vision_select_feature: Literal["patch", "cls_patch"] | None = field(
        default=None, metadata={"help": "patch: without the tower's class token; cls_patch: with it; default: patch."}
    )
    mm_use_im_start_end: bool | None = field(
        default=None, metadata={"help": "Put <im_start> and <im_end> around each picture; default: False."}
    )
    mm_patch_merge_type: Literal["flat", "spatial", "spatial_unpad"] | None = field(
        default=None, metadata={"help": "LLaVA-1.6: how the features of the crops become one sequence."}
    )
    image_grid_pinpoints: str | None = field(
        default=None,
        metadata={
            "help": "LLaVA-1.6: the sizes that a picture is fitted into, '[(336, 672), ...]'; or LLaVA-NeXT's grids "
            "of tiles, '(1x1),...,(2x2)'."
        },
    )
    anyres_max: int | None = field(
        default=None,
        metadata={
            "help": "The N of LLaVA-NeXT's --image_aspect_ratio anyres_max_N: most tiles of a picture before its "
            "features are shrunk, which is not done here."
        },
    )
    # Names of the settings above that are defaults of the original's: they hold for a new LLaVA, and a LLaVA that is
    # given may differ.
    assumed: frozenset[str] = field(default=frozenset(), init=False, repr=False)


@dataclass
class DataArguments:
    """What it is trained on."""

    data_path: str = field(
        metadata={"help": "Data in any format (docs/data.md): a file, a folder or a Hub id, or several with weights."}
    )
    image_folder: str = field(
        default=".", metadata={"help": "Folder that the image paths in the data are relative to."}
    )
    columns: list[str] | None = field(
        default=None,
        metadata={
            "help": "Of a table: image=img,prompt=question,response=answer; what is not named is found by its usual "
            "name. Of one dataset of several: DATA:image=img,... ."
        },
    )
    model_max_length: int | None = field(
        default=None,
        metadata={"help": "Most tokens of a row, images included; default: the language model's own limit."},
    )
    on_bad_row: Literal["raise", "skip"] = field(
        default="raise",
        metadata={
            "help": "What to do about a row that can't be trained on. raise: end with an error before training. skip: "
            "leave it out, or cut it if it is only too long, and list it in skipped_rows.jsonl."
        },
    )
    preview: int = field(
        default=0, metadata={"help": "Print this many rows before training, with what is learned marked."}
    )
    allow_images_outside: bool = field(
        default=False, metadata={"help": "Allow image paths that leave the image folder: absolute, '..', links."}
    )
    allow_image_urls: bool = field(default=False, metadata={"help": "Fetch images from http and https addresses."})
    streaming: bool = field(
        default=False,
        metadata={"help": "Read the rows from their files during training, without checking the whole dataset first."},
    )
    shuffle_buffer_size: int = field(
        default=1000,
        metadata={
            "help": "With streaming: rows in the buffer that each worker draws from; 0: the order of the files."
        },
    )
    eval_data_path: str | None = field(
        default=None, metadata={"help": "Rows to evaluate on, as data_path; when --eval_strategy says, or at the end."}
    )
    eval_image_folder: str | None = field(default=None, metadata={"help": "Their images; default: image_folder."})
    eval_columns: list[str] | None = field(
        default=None, metadata={"help": "The same of eval_data_path; default: columns, where they fit."}
    )
    eval_split: float | None = field(
        default=None,
        metadata={"help": "Or the share of the rows to hold out for evaluation, 0.05; drawn with the seed."},
    )
    eval_prompts: str | None = field(
        default=None,
        metadata={"help": "JSON or JSONL of questions (prompt, and image or images) to answer at each evaluation."},
    )
    num_eval_answers: int = field(
        default=3,
        metadata={
            "help": "Without eval_prompts: so many of the evaluated rows are answered before training and at each "
            "evaluation, beside the answer that the data has; 0: none."
        },
    )
    eval_max_new_tokens: int = field(default=128, metadata={"help": "Most tokens of such an answer."})

    @property
    def has_eval_rows(self) -> bool:
        """Whether there are rows to evaluate."""
        return self.eval_data_path is not None or self.eval_split is not None

    def __post_init__(self):
        if self.eval_split is None:
            return
        if self.eval_data_path is not None:
            raise ValueError("eval_split and eval_data_path both say which rows are evaluated: leave one out.")
        if not 0 < self.eval_split < 1:
            raise ValueError(f"eval_split {self.eval_split:g} is not a share of the rows: give one like 0.05.")
        if self.streaming:
            raise ValueError("eval_split needs all rows before training, and streaming has none: use eval_data_path.")


@dataclass
class TuningArguments:
    """Which weights are trained."""

    train_type: Literal["lora", "qlora", "projector", "freeze_vision", "full", "use_lora"] = field(
        default="lora",
        metadata={
            "help": "lora: LoRA on the language model, and the projector. qlora: the same over a quantised language "
            "model. projector: the projector alone (stage 1). freeze_vision: language model and projector (stage 2). "
            "full: these and the vision tower. use_lora: lora, as in yjin07/train-llava."
        },
    )
    freeze_backbone: bool = field(
        default=False,
        metadata={
            "help": "With freeze_vision or full: of the language model only the head trains, as in the original."
        },
    )
    freeze_mm_mlp_adapter: bool = field(
        default=False, metadata={"help": "With lora, freeze_vision or full: freeze the projector."}
    )
    lora_r: int | None = field(default=None, metadata={"help": "LoRA rank; default: by the number of rows."})
    lora_alpha: int | None = field(default=None, metadata={"help": "LoRA scaling numerator; default: twice the rank."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before the LoRA layers."})
    lora_bias: Literal["none", "all", "lora_only"] = field(
        default="none",
        metadata={"help": "Which biases of the language model train with LoRA: none, all, or those of LoRA's layers."},
    )
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Linear layers of the language model to put LoRA on, q_proj v_proj ...; default: all."},
    )
    lora_vision_tower: bool = field(
        default=False, metadata={"help": "LoRA on the linear layers of the vision tower too."}
    )
    use_dora: bool = field(
        default=False, metadata={"help": "DoRA: magnitude and direction trained apart (arXiv 2402.09353)."}
    )
    use_rslora: bool = field(
        default=False, metadata={"help": "rsLoRA: scale by alpha / sqrt(r) instead of alpha / r (arXiv 2312.03732)."}
    )
    bits: Literal[4, 8, 16] = field(
        default=16, metadata={"help": "qlora: bits of the language model's weights; default there: 4."}
    )
    double_quant: bool = field(
        default=True, metadata={"help": "With 4 bits: quantise the scales too (arXiv 2305.14314)."}
    )
    quant_type: Literal["nf4", "fp4"] = field(
        default="nf4", metadata={"help": "With 4 bits: the data type of the weights."}
    )
    # Names of the settings above that were asked for, be it with the value of the default: an adapter that is trained
    # further may contradict. None where nobody knows: then those that are not at their default.
    said: frozenset[str] | None = field(default=None, init=False, repr=False)

    @property
    def is_lora(self) -> bool:
        """Whether what trains becomes an adapter."""
        return self.train_type in ("lora", "qlora")

    def __post_init__(self):
        if self.train_type == "use_lora":
            self.train_type = "lora"
        if self.train_type == "lora" and self.bits < 16:
            self.train_type = "qlora"
        if self.train_type == "qlora" and self.bits == 16:
            self.bits = 4
        if self.bits < 16 and not self.is_lora:
            raise ValueError(
                f"bits {self.bits} needs LoRA, because quantised weights cannot be trained themselves: use train_type "
                f"qlora (the original's --lora_enable True), or leave bits out."
            )
        if self.freeze_backbone and (self.is_lora or self.train_type == "projector"):
            raise ValueError(
                f"freeze_backbone has no meaning with train_type {self.train_type}, which does not train the language "
                f"model's own weights: leave it out."
            )
        if self.freeze_mm_mlp_adapter and self.train_type == "projector":
            raise ValueError("freeze_mm_mlp_adapter leaves train_type projector nothing to train: leave one out.")
