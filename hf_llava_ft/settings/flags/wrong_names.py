"""What is meant by a flag that there is none of: the words of other programs, and typing errors."""

import difflib
from collections.abc import Collection

# What they are called here. Words behind a name are its value.
_MEANT = {
    "model_name_or_path": "model model_name model_path model_id base_model pretrained_model_name_or_path",
    "data_path": "data dataset dataset_name dataset_path data_file data_files train_data train_file train_data_path "
    "dataset_train_split",
    "image_folder": "images image_dir images_dir image_root image_path images_folder img_dir media_dir",
    "output_dir": "output out out_dir output_path output_folder save_dir save_path",
    "version": "template chat_template conv_mode conv_template conv_version prompt_version prompt_template "
    "chat_template_path",
    "model_max_length": "max_length max_len max_seq_length max_seq_len cutoff_len seq_len context_length",
    "dtype": "torch_dtype model_dtype",
    "attn_implementation": "attention attn_impl",
    "attn_implementation flash_attention_2": "flash_attn use_flash_attn use_flash_attention_2",
    "learning_rate": "lr peak_lr base_lr",
    "mm_projector_lr": "projector_lr projector_learning_rate lr_projector merger_lr",
    "mm_vision_tower_lr": "vision_lr vision_tower_lr tower_lr vision_learning_rate",
    "num_train_epochs": "epochs epoch num_epochs n_epochs max_epochs train_epochs",
    "max_steps": "steps num_steps train_steps max_train_steps",
    "per_device_train_batch_size": "batch_size train_batch_size per_device_batch_size micro_batch_size batch bs",
    "per_device_eval_batch_size": "eval_batch_size",
    "gradient_accumulation_steps": "accumulation grad_accum gradient_accumulation accumulation_steps grad_acc_steps",
    "gradient_checkpointing": "checkpointing use_gradient_checkpointing grad_checkpoint grad_checkpointing",
    "warmup_steps": "warmup warmup_proportion num_warmup_steps",
    "lr_scheduler_type": "scheduler lr_scheduler schedule",
    "optim": "optimizer optimiser",
    "max_grad_norm": "grad_clip clip_grad gradient_clipping",
    "train_type": "finetuning_type tuning_type tune mode stage",
    "train_type lora": "lora use_peft use_lora peft",
    "train_type qlora": "qlora use_qlora",
    "train_type freeze_vision": "freeze_vision freeze_vision_tower freeze_tower tune_llm",
    "train_type full": "full_finetune full_finetuning full",
    "freeze_mm_mlp_adapter": "freeze_multi_modal_projector freeze_projector",
    "train_type projector": "projector_only tune_projector freeze_language_model",
    "bits 4": "load_in_4bit quantize_4bit 4bit",
    "bits 8": "load_in_8bit quantize_8bit 8bit",
    "bits": "quantization quantization_bit quant bit",
    "lora_r": "r rank lora_rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lora_target_modules": "target_modules lora_target lora_targets",
    "bf16 True": "bfloat16 mixed_precision precision amp pure_bf16",
    "fp16 True": "float16 half",
    "eval_split": "val_size val_split validation_split test_size eval_ratio val_ratio",
    "eval_data_path": "eval_data val_data eval_file validation_file val_file eval_dataset val_path dataset_test_split",
    "eval_prompts": "prompts eval_questions",
    "resume_from_checkpoint": "resume continue resume_training",
    "overwrite_output_dir": "overwrite force",
    "deepspeed": "deepspeed_config ds_config zero",
    "dataloader_num_workers": "num_workers workers preprocessing_num_workers num_proc",
    "logging_steps": "log_steps log_every log_interval",
    "save_steps": "save_every checkpoint_steps",
    "report_to wandb": "wandb use_wandb",
    "report_to": "logger tracker report",
    "push_to_hub": "push upload",
    "hub_model_id": "repo_id hub_repo hub_id",
    "group_by_modality_length": "group_by_len length_grouping group_length",
    "streaming": "stream dataset_streaming",
    "shuffle_buffer_size": "buffer_size",
    "quant_type": "quantization_type bnb_4bit_quant_type",
    "double_quant": "use_bnb_nested_quant",
    "revision": "model_revision",
    "early_stopping_patience": "early_stopping_steps patience",
    "on_bad_row skip": "skip_bad_rows ignore_errors skip_errors",
    "use_cpu": "cpu no_gpu",
}
_BY_GUESS = {guess: meant for meant, guesses in _MEANT.items() for guess in guesses.split()}


def meant_by(name: str, known: Collection[str]) -> str | None:
    """
    The setting that is most likely meant by a name that is none, with its value where the name said it.

    Args:
        known (`Collection[str]`): the names that there are.
    """
    name = name.lstrip("-").replace("-", "_").lower()
    if (meant := _BY_GUESS.get(name)) is not None:
        return meant
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.75)), None)


def sentence_on(word: str, known: Collection[str]) -> str:
    """What is said of a word on the command line that is no flag."""
    meant = meant_by(word, known)
    hint = f"did you mean --{meant}? " if meant else ""
    return f"unknown argument {word}; {hint}llava-ft train --help lists the flags."
