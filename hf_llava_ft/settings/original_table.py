"""The flags of the original LLaVA and of LLaVA-NeXT that are not flags of ours: what each is here.

Sources: haotian-liu/LLaVA c121f04 and LLaVA-VL/LLaVA-NeXT df17966, `llava/train/train.py`, and the TrainingArguments
of the transformers 4.37 that the first runs on. `original_flags.py` translates by this table.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Renamed:
    """A flag under a new name.

    Args:
        name (`str`): ours.
        kind (`type`): of the value.
    """

    name: str
    kind: type = str


@dataclass(frozen=True)
class NoMeaning:
    """A flag that does nothing here.

    Args:
        kind (`type`): of the value.
        why (`str`): why not, for the note.
        harmless (`tuple`, *optional*): the values whose effect is what happens anyway; default: all.
        instead (`str`): for the error that any other value is.
    """

    kind: type
    why: str
    harmless: tuple[Any, ...] | None = None
    instead: str = ""


_OLD_GPU_ONLY = "transformers 5 has no such switch"


_OF_LLAVA: dict[str, Renamed | NoMeaning] = {
    # transformers renamed them.
    "evaluation_strategy": Renamed("eval_strategy"),
    "warmup_ratio": Renamed("warmup_steps", float),
    "no_cuda": Renamed("use_cpu", bool),
    "per_gpu_train_batch_size": Renamed("per_device_train_batch_size", int),
    "per_gpu_eval_batch_size": Renamed("per_device_eval_batch_size", int),
    "push_to_hub_token": Renamed("hub_token"),
    "push_to_hub_model_id": Renamed("hub_model_id"),
    # The original's own.
    "lazy_preprocess": NoMeaning(bool, "pictures are always opened when their row is due"),
    "is_multimodal": NoMeaning(bool, "it follows from the data"),
    "mm_use_im_patch_token": NoMeaning(bool, "no text ever holds the token <im_patch>, so none is added"),
    "mpt_attn_impl": NoMeaning(str, "it speaks of MPT models alone, which are not trained here"),
    "lora_weight_path": NoMeaning(
        str,
        "the original never reads it",
        ("",),
        "to go on from an adapter, merge it (llava-ft merge) and train from the result",
    ),
    "cache_dir": NoMeaning(
        str, "the cache is the Hub library's", ("", "None"), "set the environment variable HF_HUB_CACHE"
    ),
    # Those of transformers that are gone.
    "save_safetensors": NoMeaning(
        bool,
        "weights are always saved as safetensors",
        (True,),
        "leave it out: no tool needs pickled weights any more",
    ),
    "group_by_length": NoMeaning(
        bool,
        "rows are grouped by --group_by_modality_length",
        (False,),
        "use --group_by_modality_length True, which batches rows of similar length, with pictures and without apart",
    ),
    "adafactor": NoMeaning(bool, "the optimizer is --optim", (False,), "use --optim adafactor"),
    "half_precision_backend": NoMeaning(
        str, "it is PyTorch's own", ("auto", "cuda_amp", "cpu_amp"), "leave it out: apex is no longer there"
    ),
    "fp16_backend": NoMeaning(
        str, "it is PyTorch's own", ("auto", "cuda_amp", "cpu_amp"), "leave it out: apex is no longer there"
    ),
    "fp16_opt_level": NoMeaning(str, "it speaks of apex, which is no longer there"),
    "split_batches": NoMeaning(
        bool, "batch sizes are per device", (False,), """use --accelerator_config '{"split_batches": true}'"""
    ),
    "dispatch_batches": NoMeaning(
        bool, "each process reads its own rows", (False,), """use --accelerator_config '{"dispatch_batches": true}'"""
    ),
    "fsdp_min_num_params": NoMeaning(int, "it is part of --fsdp_config", (0,), "use --fsdp_config"),
    "fsdp_transformer_layer_cls_to_wrap": NoMeaning(str, "it is part of --fsdp_config", (), "use --fsdp_config"),
    "include_tokens_per_second": NoMeaning(
        bool, "see --include_num_input_tokens_seen", (False,), "use --include_num_input_tokens_seen"
    ),
    "include_inputs_for_metrics": NoMeaning(
        bool, "see --include_for_metrics", (False,), "use --include_for_metrics inputs"
    ),
    "logging_dir": NoMeaning(
        str, "TensorBoard's folder is set elsewhere", (), "set the environment variable TENSORBOARD_LOGGING_DIR"
    ),
    "push_to_hub_organization": NoMeaning(str, "the name says it", ("",), "use --hub_model_id ORGANIZATION/NAME"),
    "torchdynamo": NoMeaning(str, "see --torch_compile", ("",), "use --torch_compile_backend"),
    "use_mps_device": NoMeaning(bool, "an Apple GPU is used where there is one"),
    "use_ipex": NoMeaning(bool, _OLD_GPU_ONLY, (False,), "leave it out"),
    "jit_mode_eval": NoMeaning(bool, _OLD_GPU_ONLY, (False,), "leave it out, or use --torch_compile True"),
    "use_legacy_prediction_loop": NoMeaning(bool, _OLD_GPU_ONLY, (False,), "leave it out"),
    "past_index": NoMeaning(int, _OLD_GPU_ONLY, (-1,), "leave it out"),
    "tpu_num_cores": NoMeaning(int, _OLD_GPU_ONLY, (), "leave it out"),
    "tpu_metrics_debug": NoMeaning(bool, _OLD_GPU_ONLY, (False,), "leave it out"),
    "ray_scope": NoMeaning(str, "it speaks of searches with Ray, which are not done here"),
    "mp_parameters": NoMeaning(str, _OLD_GPU_ONLY, ("",), "leave it out"),
}


_VIDEO = "it speaks of videos, which are not trained on here"
_NO_RESAMPLER = "there is no resampler between tower and projector"
_LEAVE_OUT = "leave it out"
_SET_IN_CONFIG = "set rope_scaling in the config.json of the language model"

# LLaVA-NeXT's, which it has besides those above.
_OF_LLAVA_NEXT: dict[str, Renamed | NoMeaning] = {
    "model_class_name": NoMeaning(str, "what a model is follows from its config.json"),
    "vision_tower_pretrained": NoMeaning(
        str, "the tower is --vision_tower", ("", "None"), "name the tower's folder or id in --vision_tower"
    ),
    "unfreeze_language_model": NoMeaning(bool, "LLaVA-NeXT never reads it"),
    "tune_mm_vision_resampler": NoMeaning(bool, _NO_RESAMPLER, (False,), _LEAVE_OUT),
    "freeze_mm_vision_resampler": NoMeaning(bool, _NO_RESAMPLER),
    "mm_resampler_type": NoMeaning(
        str, _NO_RESAMPLER, ("", "None", "identity"), "leave it out; the model is then one without a resampler"
    ),
    **{
        name: NoMeaning(kind, _NO_RESAMPLER)
        for name, kind in {
            "mm_mask_drop_mode": str,
            "mm_mask_drop_skip_percentage": float,
            "mm_mask_drop_ratio": float,
            "mm_mask_drop_ratio_upper": float,
            "mm_mask_drop_ratio_lower": float,
            "mm_perceiver_depth": int,
            "mm_perceiver_latents": int,
            "mm_perceiver_ff_mult": float,
            "mm_perceiver_pretrained": str,
            "mm_qformer_depth": int,
            "mm_qformer_latents": int,
            "mm_qformer_pretrained": str,
            "mm_spatial_pool_out_channels": int,
        }.items()
    },
    **{
        name: NoMeaning(kind, _VIDEO)
        for name, kind in {
            "mm_newline_position": str,  # of frames; rows of a picture's crops end in a newline as the model says
            "mm_spatial_pool_stride": int,
            "mm_spatial_pool_mode": str,
            "faster_token_stride": int,
            "video_folder": str,
            "video_fps": int,
            "frames_upbound": int,
            "add_time_instruction": bool,
            "force_sample": bool,
        }.items()
    },
    "add_faster_video": NoMeaning(bool, _VIDEO, (False,), _LEAVE_OUT),
    "rope_scaling_factor": NoMeaning(float, "positions are those of the model", (1.0,), _SET_IN_CONFIG),
    "rope_scaling_type": NoMeaning(
        str,
        "positions are those of the model",
        ("", "None"),
        _SET_IN_CONFIG,
    ),
    "use_pos_skipping": NoMeaning(bool, "positions are never skipped here", (False,), _LEAVE_OUT),
    "pos_skipping_range": NoMeaning(int, "it speaks of --use_pos_skipping"),
    "s2": NoMeaning(bool, "a picture is seen at one scale, or in crops as the model says", (False,), _LEAVE_OUT),
    "s2_scales": NoMeaning(str, "it speaks of --s2"),
    "delay_load": NoMeaning(bool, "the tower is loaded with the model"),
    "early_mix_text": NoMeaning(
        bool, "rows without pictures stand among the others as they are", (False,), "mix them into --data_path"
    ),
    "image_crop_resolution": NoMeaning(int, "it speaks of --image_aspect_ratio crop_split and highres alone"),
    "image_split_resolution": NoMeaning(int, "it speaks of --image_aspect_ratio crop_split and highres alone"),
    "group_by_varlen": NoMeaning(
        bool, "rows are grouped by --group_by_modality_length", (False,), "use --group_by_modality_length True"
    ),
    "group_by_modality_length_auto": NoMeaning(
        bool, "rows are grouped by --group_by_modality_length", (False,), "use --group_by_modality_length True"
    ),
    "verbose_logging": NoMeaning(bool, "--log_level says how much is told"),
    "enable_ring_attention": NoMeaning(
        bool, "a row is not divided among devices", (False,), "leave it out, or shorten rows with --model_max_length"
    ),
    "trainer_mode": NoMeaning(str, "training is by gradients", ("regular",), "leave it out"),
    "zo_eps": NoMeaning(float, "it speaks of --trainer_mode zo"),
    "zo_num_directions": NoMeaning(int, "it speaks of --trainer_mode zo"),
}
FLAGS = _OF_LLAVA | _OF_LLAVA_NEXT

# Say together what trains.
SWITCHES = ("lora_enable", "tune_mm_mlp_adapter")
# LLaVA-NeXT's words for the same, which go before those (`tunable_parts.py`).
SWITCHES_OF_NEXT = {"mm_tunable_parts": str, "unfreeze_mm_vision_tower": bool}

# A command line with one of these is in the original's words. Those that only say how LoRA is done are not among them.
MARKERS = frozenset(
    (*SWITCHES, "freeze_backbone", "freeze_mm_mlp_adapter", "vision_tower", "pretrain_mm_mlp_adapter")
    + ("mm_projector_type", "mm_vision_select_layer", "mm_vision_select_feature", "mm_use_im_start_end")
    + ("mm_use_im_patch_token", "mm_patch_merge_type", "image_grid_pinpoints", "lazy_preprocess", "is_multimodal")
    + ("mpt_attn_impl", "lora_weight_path", "cache_dir")
    + (*SWITCHES_OF_NEXT, *_OF_LLAVA_NEXT)
)
# And with one of these in LLaVA-NeXT's, which has other defaults.
NEXT_MARKERS = frozenset((*SWITCHES_OF_NEXT, *_OF_LLAVA_NEXT))
