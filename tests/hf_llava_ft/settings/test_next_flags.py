"""The command lines of LLaVA-NeXT's scripts mean here what they mean there, or are refused with what to do."""

import shlex

import pytest

from hf_llava_ft.errors import UserError
from hf_llava_ft.settings.parsing import resolve

# As LLaVA-VL/LLaVA-NeXT df17966 has them in scripts/train/, without the program's name, with variables filled in.
PRETRAIN = """
    --deepspeed scripts/zero3.json --model_name_or_path Qwen/Qwen2-7B-Instruct --version plain
    --data_path /blip_558k/blip_558k_plain.json --image_folder /blip_558k/images
    --vision_tower openai/clip-vit-large-patch14-336 --mm_tunable_parts="mm_mlp_adapter" --mm_vision_select_layer -2
    --mm_projector_type mlp2x_gelu --mm_use_im_start_end False --mm_use_im_patch_token False --bf16 True
    --output_dir /checkpoints/projectors/run --num_train_epochs 1 --per_device_train_batch_size 16
    --per_device_eval_batch_size 4 --gradient_accumulation_steps 1 --evaluation_strategy "no" --save_strategy "no"
    --save_steps 50000 --learning_rate 1e-3 --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type "cosine"
    --logging_steps 1 --tf32 True --model_max_length 8192 --gradient_checkpointing True --dataloader_num_workers 16
    --lazy_preprocess True --report_to wandb --run_name run --attn_implementation sdpa
"""
ONE_VISION = """
    --deepspeed scripts/zero3.json --model_name_or_path lmms-lab/some --version qwen_1_5 --data_path ov.yaml
    --image_folder data --video_folder videos --mm_tunable_parts="mm_vision_tower,mm_mlp_adapter,mm_language_model"
    --mm_vision_tower_lr=2e-6 --vision_tower google/siglip-so400m-patch14-384 --mm_projector_type mlp2x_gelu
    --mm_vision_select_layer -2 --mm_use_im_start_end False --mm_use_im_patch_token False
    --group_by_modality_length True --image_aspect_ratio anyres_max_9 --image_grid_pinpoints "(1x1),...,(6x6)"
    --mm_patch_merge_type spatial_unpad --bf16 True --run_name run --output_dir out --num_train_epochs 1
    --per_device_train_batch_size 1 --per_device_eval_batch_size 4 --gradient_accumulation_steps 2
    --evaluation_strategy "no" --save_strategy "steps" --save_steps 1000 --save_total_limit 1 --learning_rate 1e-5
    --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type "cosine" --logging_steps 1 --tf32 True
    --model_max_length 32768 --gradient_checkpointing True --dataloader_num_workers 4 --lazy_preprocess True
    --report_to wandb --torch_compile True --torch_compile_backend "inductor" --dataloader_drop_last True
    --frames_upbound 32 --mm_newline_position grid --add_time_instruction True --force_sample True
    --mm_spatial_pool_stride 2
"""
BARE = "--model_name_or_path m --data_path d --output_dir o"
ALL = "mm_vision_tower,mm_mlp_adapter,mm_language_model"


def values(line: str) -> dict:
    return {name: setting.value for name, setting in resolve(shlex.split(line)).by_name.items()}


def test_the_pretraining_script_is_stage_1():
    found = values(PRETRAIN)
    assert found["train_type"] == "projector" and found["learning_rate"] == 1e-3 and found["version"] == "plain"
    assert found["mm_projector_lr"] is None and found["loss_normalization"] == "micro_batch"


def test_the_single_image_script_trains_everything_as_it_says():
    settings = resolve(shlex.split(ONE_VISION))
    found = {name: setting.value for name, setting in settings.by_name.items()}
    assert found["train_type"] == "full" and not found["freeze_mm_mlp_adapter"]
    assert found["learning_rate"] == 1e-5 and found["mm_vision_tower_lr"] == 2e-6 and found["mm_projector_lr"] is None
    assert found["version"] == "qwen"
    assert found["image_aspect_ratio"] == "anyres" and found["anyres_max"] == 9
    assert settings.by_name["train_type"].origin == "translated from --mm_tunable_parts"
    notes = "\n".join(settings.notes)
    for flag in ("frames_upbound", "video_folder", "mm_newline_position", "force_sample", "mm_spatial_pool_stride"):
        assert f"--{flag} " in notes and "videos" in notes


@pytest.mark.parametrize(
    ("parts", "train_type", "keeps_projector"),
    [
        ("mm_mlp_adapter", "projector", False),
        ("mm_mlp_adapter,mm_language_model", "freeze_vision", False),
        ("mm_language_model, mm_mlp_adapter", "freeze_vision", False),
        ("mm_language_model", "freeze_vision", True),
        (ALL, "full", False),
        ("mm_vision_tower,mm_language_model", "full", True),
        (f"{ALL},mm_vision_resampler", "full", False),
    ],
)
def test_tunable_parts_say_what_trains(parts, train_type, keeps_projector):
    found = values(f"{BARE} --mm_tunable_parts '{parts}'")
    assert (found["train_type"], found["freeze_mm_mlp_adapter"]) == (train_type, keeps_projector)


@pytest.mark.parametrize(
    ("flags", "train_type", "keeps_projector"),
    [
        ("--mm_tunable_parts mm_mlp_adapter,mm_language_model", "lora", False),
        ("--mm_tunable_parts mm_language_model", "lora", True),
        ("--mm_tunable_parts mm_mlp_adapter,mm_language_model --bits 4", "qlora", False),
    ],
)
def test_with_lora_the_language_models_own_weights_stay_frozen(flags, train_type, keeps_projector):
    settings = resolve(shlex.split(f"{BARE} --lora_enable True {flags}"))
    found = {name: setting.value for name, setting in settings.by_name.items()}
    assert (found["train_type"], found["freeze_mm_mlp_adapter"]) == (train_type, keeps_projector)
    assert any("own weights stay frozen" in note for note in settings.notes)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--mm_tunable_parts mm_vision_tower", "no --train_type trains the tower and not the language model"),
        ("--mm_tunable_parts mm_vision_tower,mm_mlp_adapter", "use --train_type full"),
        ("--mm_tunable_parts mm_vision_resampler", "there is no resampler between tower and projector"),
        ("--mm_tunable_parts mm_tower", "mm_tower is none of mm_vision_tower, mm_mlp_adapter"),
        (f"--mm_tunable_parts {ALL} --lora_enable", "give --lora_vision_tower True"),
        ("--mm_tunable_parts mm_mlp_adapter --lora_enable", "add mm_language_model, or leave --lora_enable out"),
        ("--mm_tunable_parts mm_mlp_adapter --train_type full", "--train_type full and --mm_tunable_parts"),
        ("--unfreeze_mm_vision_tower True --tune_mm_mlp_adapter True", "no --train_type trains the tower and not"),
        ("--image_aspect_ratio crop_split", "use square, pad, anyres or anyres_max_N"),
        ("--image_aspect_ratio anyres_max_nine", "use square, pad, anyres or anyres_max_N"),
        ("--mm_resampler_type spatial_pool", "there is no resampler"),
        ("--s2 True", "a picture is seen at one scale"),
        ("--rope_scaling_factor 2.0", "set rope_scaling in the config.json"),
        ("--group_by_varlen True", "use --group_by_modality_length True"),
        ("--enable_ring_attention True", "a row is not divided among devices"),
        ("--add_faster_video True", "it speaks of videos"),
    ],
)
def test_what_cannot_be_done_is_refused_with_what_can(flags, sentence):
    with pytest.raises(UserError) as caught:
        resolve(shlex.split(f"{BARE} {flags}"))
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_the_older_switches_are_passed_over_beside_tunable_parts_and_named():
    settings = resolve(
        shlex.split(f"{BARE} --mm_tunable_parts mm_mlp_adapter,mm_language_model --freeze_backbone True")
    )
    assert settings.by_name["freeze_backbone"].value is False
    assert any(note.startswith("--freeze_backbone True: without effect") for note in settings.notes)


def test_the_older_switch_for_the_tower():
    assert values(f"{BARE} --unfreeze_mm_vision_tower True")["train_type"] == "full"
    assert values(f"{BARE} --unfreeze_mm_vision_tower False")["train_type"] == "freeze_vision"


def test_what_llava_next_does_unless_told_otherwise_differs_from_llava_1_5():
    next_line = values(f"{BARE} --mm_tunable_parts {ALL}")
    assert (next_line["model_max_length"], next_line["learning_rate"]) == (4096, 5e-5)
    checkpointing = ("gradient_checkpointing", "activation_checkpointing")
    assert any(next_line.get(name) for name in checkpointing)
    older = values(f"{BARE} --tune_mm_mlp_adapter True")
    assert older["model_max_length"] == 512 and not any(older.get(name) for name in checkpointing)
    assert values(f"{BARE} --mm_tunable_parts {ALL} --model_max_length 99")["model_max_length"] == 99
