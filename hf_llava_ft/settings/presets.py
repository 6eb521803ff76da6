"""The recipes of LLaVA-1.5, as flags of `llava-ft train`.

Source: haotian-liu/LLaVA c121f04, `scripts/v1_5/{pretrain,finetune,finetune_lora}.sh`, and for what those leave to its
train.py, the defaults there. A flag of the user's own, behind a preset's, replaces it.

What a preset does not say:
* Model, data and output, which are the user's. The language model's checkpoint brings the hidden state that is read
  (-2) and the projector (`mlp2x_gelu`), as `llava-ft compose` sets them; stage 2 starts from what stage 1 left.
* The machine. Batch sizes are per device and for eight of them: 256 rows to a step in stage 1, 128 in stage 2. With
  fewer devices raise `gradient_accumulation_steps`. DeepSpeed (ZeRO-2 in stage 1, ZeRO-3 in stage 2) is chosen with
  `--deepspeed`.
* `tf32`, which fails on GPUs that do not have it and under bf16 has nothing to speed up; and Weights & Biases.
* Where ours differs from the original on purpose, docs/parity.md: `--loss_normalization micro_batch` and
  `--sampler_order original` bring the original's loss and order of rows back.
"""

from hf_llava_ft.errors import UserError

Flags = dict[str, str | int | float | bool]

# What the three scripts have in common.
_COMMON: Flags = {
    "num_train_epochs": 1,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,  # the scripts' warmup_ratio: below 1 it is the share of all steps
    "weight_decay": 0.0,
    "model_max_length": 2048,
    "bf16": True,
    "gradient_checkpointing": True,
    "dataloader_num_workers": 4,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_total_limit": 1,
}

PRESETS: dict[str, Flags] = {
    # Stage 1, pretrain.sh: the projector alone learns captions. It gives no image_aspect_ratio, and train.py's default
    # is square: stage 1 of LLaVA-1.5 saw cropped pictures.
    "llava-v1.5-pretrain": {
        **_COMMON,
        "train_type": "projector",  # tune_mm_mlp_adapter
        "version": "plain",
        "image_aspect_ratio": "square",
        "group_by_modality_length": False,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 32,
        "gradient_accumulation_steps": 1,
        "save_steps": 24000,
        "dtype": "bfloat16",
    },
    # Stage 2, finetune.sh: language model and projector; the tower stays frozen.
    "llava-v1.5-finetune": {
        **_COMMON,
        "train_type": "freeze_vision",
        "version": "v1",
        "image_aspect_ratio": "pad",
        "group_by_modality_length": True,
        "learning_rate": 2e-5,
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 1,
        "save_steps": 50000,
        # Computed in bf16 all the same. Weights in bfloat16 would round steps this small away; under the original's
        # DeepSpeed there is a float32 copy of them.
        "dtype": "float32",
    },
    # Stage 2 with LoRA, finetune_lora.sh.
    "llava-v1.5-lora": {
        **_COMMON,
        "train_type": "lora",  # lora_enable
        "lora_r": 128,
        "lora_alpha": 256,
        "lora_dropout": 0.05,  # default of its train.py
        "version": "v1",
        "image_aspect_ratio": "pad",
        "group_by_modality_length": True,
        "learning_rate": 2e-4,
        "mm_projector_lr": 2e-5,
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 1,
        "save_steps": 50000,
        "dtype": "bfloat16",
    },
}


def preset_flags(name: str) -> list[str]:
    """
    The preset `name` as command line, `["--version", "v1", ...]`.

    Raises:
        UserError: for an unknown name.
    """
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}.")
    return [word for flag, value in PRESETS[name].items() for word in (f"--{flag}", str(value))]
