"""The command lines of the original's scripts mean here what they mean there."""

import json
import shlex

import pytest

from hf_llava_ft.errors import UserError
from hf_llava_ft.settings.original_flags import translate
from hf_llava_ft.settings.original_table import FLAGS, MARKERS, NEXT_MARKERS, NoMeaning
from hf_llava_ft.settings.parsing import resolve
from hf_llava_ft.settings.training_arguments import LlavaTrainingArguments
from hf_llava_ft.train import main as train_main

# As haotian-liu/LLaVA c121f04 has them in scripts/, without the program's name and with its variables filled in.
PRETRAIN = """
    --deepspeed ./scripts/zero2.json --model_name_or_path lmsys/vicuna-13b-v1.5 --version plain
    --data_path ./playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json
    --image_folder ./playground/data/LLaVA-Pretrain/images --vision_tower openai/clip-vit-large-patch14-336
    --mm_projector_type mlp2x_gelu --tune_mm_mlp_adapter True --mm_vision_select_layer -2 --mm_use_im_start_end False
    --mm_use_im_patch_token False --bf16 True --output_dir ./checkpoints/llava-v1.5-13b-pretrain --num_train_epochs 1
    --per_device_train_batch_size 32 --per_device_eval_batch_size 4 --gradient_accumulation_steps 1
    --evaluation_strategy "no" --save_strategy "steps" --save_steps 24000 --save_total_limit 1 --learning_rate 1e-3
    --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type "cosine" --logging_steps 1 --tf32 True
    --model_max_length 2048 --gradient_checkpointing True --dataloader_num_workers 4 --lazy_preprocess True
    --report_to wandb
"""
FINETUNE = """
    --deepspeed ./scripts/zero3.json --model_name_or_path lmsys/vicuna-13b-v1.5 --version v1
    --data_path ./playground/data/llava_v1_5_mix665k.json --image_folder ./playground/data
    --vision_tower openai/clip-vit-large-patch14-336
    --pretrain_mm_mlp_adapter ./checkpoints/llava-v1.5-13b-pretrain/mm_projector.bin --mm_projector_type mlp2x_gelu
    --mm_vision_select_layer -2 --mm_use_im_start_end False --mm_use_im_patch_token False --image_aspect_ratio pad
    --group_by_modality_length True --bf16 True --output_dir ./checkpoints/llava-v1.5-13b --num_train_epochs 1
    --per_device_train_batch_size 16 --per_device_eval_batch_size 4 --gradient_accumulation_steps 1
    --evaluation_strategy "no" --save_strategy "steps" --save_steps 50000 --save_total_limit 1 --learning_rate 2e-5
    --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type "cosine" --logging_steps 1 --tf32 True
    --model_max_length 2048 --gradient_checkpointing True --dataloader_num_workers 4 --lazy_preprocess True
    --report_to wandb
"""
PRETRAIN, FINETUNE = " ".join(PRETRAIN.split()), " ".join(FINETUNE.split())
PROJECTOR_FLAG = "--pretrain_mm_mlp_adapter ./checkpoints/llava-v1.5-13b-pretrain/mm_projector.bin "
FINETUNE_LORA = "--lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5 " + FINETUNE.replace(
    "--learning_rate 2e-5", "--learning_rate 2e-4"
).replace("checkpoints/llava-v1.5-13b ", "checkpoints/llava-v1.5-13b-lora ")
FINETUNE_TASK = (
    FINETUNE.replace("lmsys/vicuna-13b-v1.5", "liuhaotian/llava-v1.5-13b")
    .replace(PROJECTOR_FLAG, "")
    .replace("checkpoints/llava-v1.5-13b ", "checkpoints/llava-v1.5-13b-task ")
)
FINETUNE_TASK_LORA = (
    FINETUNE_LORA.replace("lmsys/vicuna-13b-v1.5", "liuhaotian/llava-v1.5-13b")
    .replace(PROJECTOR_FLAG, "")
    .replace("llava-v1.5-13b-lora ", "llava-v1.5-13b-task-lora ")
)
# Not LLaVA-1.5: the projector is one layer, because nothing is said.
FINETUNE_QLORA = """
    --deepspeed ./scripts/zero2.json --lora_enable True --bits 4
    --model_name_or_path ./checkpoints/vicuna-v1-3-7b --version v1
    --data_path ./playground/data/llava_instruct_80k.json --image_folder /path/to/coco/train2017
    --vision_tower openai/clip-vit-large-patch14
    --pretrain_mm_mlp_adapter ./checkpoints/llava-vicuna-v1-3-7b-pretrain/mm_projector.bin --mm_vision_select_layer -2
    --mm_use_im_start_end False --mm_use_im_patch_token False --bf16 True
    --output_dir ./checkpoints/llava-vicuna-v1-3-7b-finetune_lora --num_train_epochs 1
    --per_device_train_batch_size 16 --per_device_eval_batch_size 4 --gradient_accumulation_steps 1
    --evaluation_strategy "no" --save_strategy "steps" --save_steps 50000 --save_total_limit 1 --learning_rate 2e-5
    --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type "cosine" --logging_steps 1 --tf32 True
    --model_max_length 2048 --gradient_checkpointing True --lazy_preprocess True --dataloader_num_workers 4
    --report_to wandb
"""
# scripts/pretrain.sh, before LLaVA-1.5.
PRETRAIN_V1 = (
    PRETRAIN.replace("lmsys/vicuna-13b-v1.5", "./checkpoints/vicuna-v1-3-7b")
    .replace("--version plain", "--version v0_plain")
    .replace("patch14-336", "patch14")
    .replace("--mm_projector_type mlp2x_gelu", "")
    .replace("size 32", "size 16")
    .replace("1e-3", "2e-3")
)
# The tutorial's: LoRA on one picture, ten times over.
TUTORIAL = FINETUNE_TASK_LORA.replace("zero3", "zero2").replace("13b", "7b").replace("epochs 1 ", "epochs 10 ")

COMMON = {
    "bf16": True,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "eval_strategy": "no",
    "save_strategy": "steps",
    "save_total_limit": 1,
    "save_steps": 50000,
    "weight_decay": 0.0,
    "warmup_steps": 0.03,
    "lr_scheduler_type": "cosine",
    "logging_steps": 1,
    "tf32": True,
    "model_max_length": 2048,
    "gradient_checkpointing": True,
    "dataloader_num_workers": 4,
    "report_to": "wandb",
    "mm_use_im_start_end": False,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "vision_tower": "openai/clip-vit-large-patch14-336",
    "dtype": "bfloat16",
    "bits": 16,
    "mm_projector_lr": None,
    "pretrain_mm_mlp_adapter": None,
    # What the original does and no script says.
    "optim": "adamw_torch",
    "mm_vision_select_feature": "patch",
    "loss_normalization": "micro_batch",
    "sampler_order": "original",
    "freeze_backbone": False,
    "freeze_mm_mlp_adapter": False,
    "use_dora": False,
    "use_rslora": False,
    "lora_bias": "none",
    "lora_vision_tower": False,
    "lora_target_modules": None,
    "resume_from_checkpoint": "auto",
    "picture_opening": "original",
}
STAGE_2 = {
    "train_type": "freeze_vision",
    "version": "v1",
    "image_aspect_ratio": "pad",
    "group_by_modality_length": True,
    "learning_rate": 2e-5,
    "deepspeed": "./scripts/zero3.json",
    "data_path": "./playground/data/llava_v1_5_mix665k.json",
    "image_folder": "./playground/data",
}
ADAPTER = {"pretrain_mm_mlp_adapter": "./checkpoints/llava-v1.5-13b-pretrain/mm_projector.bin"}
LORA = {
    "train_type": "lora",
    "lora_r": 128,
    "lora_alpha": 256,
    "lora_dropout": 0.05,
    "learning_rate": 2e-4,
    "mm_projector_lr": 2e-5,
}
STAGE_1 = {
    "train_type": "projector",
    "version": "plain",
    "image_aspect_ratio": "square",
    "group_by_modality_length": False,
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 32,
    "save_steps": 24000,
    "deepspeed": "./scripts/zero2.json",
    "output_dir": "./checkpoints/llava-v1.5-13b-pretrain",
}
VICUNA, LLAVA = {"model_name_or_path": "lmsys/vicuna-13b-v1.5"}, {"model_name_or_path": "liuhaotian/llava-v1.5-13b"}
SCRIPTS = {
    "v1_5/pretrain.sh": (PRETRAIN, STAGE_1 | VICUNA),
    "v1_5/finetune.sh": (FINETUNE, STAGE_2 | ADAPTER | VICUNA | {"output_dir": "./checkpoints/llava-v1.5-13b"}),
    "v1_5/finetune_lora.sh": (
        FINETUNE_LORA,
        STAGE_2 | LORA | ADAPTER | VICUNA | {"output_dir": "./checkpoints/llava-v1.5-13b-lora"},
    ),
    "v1_5/finetune_task.sh": (FINETUNE_TASK, STAGE_2 | LLAVA | {"output_dir": "./checkpoints/llava-v1.5-13b-task"}),
    "v1_5/finetune_task_lora.sh": (
        FINETUNE_TASK_LORA,
        STAGE_2 | LORA | LLAVA | {"output_dir": "./checkpoints/llava-v1.5-13b-task-lora"},
    ),
    "finetune_qlora.sh": (
        FINETUNE_QLORA,
        {
            "train_type": "qlora",
            "bits": 4,
            "double_quant": True,
            "quant_type": "nf4",
            "lora_r": 64,
            "lora_alpha": 16,
            "lora_dropout": 0.05,
            "learning_rate": 2e-5,
            "deepspeed": "./scripts/zero2.json",
            "version": "v1",
            "image_aspect_ratio": "square",
            "group_by_modality_length": False,
            "mm_projector_type": "linear",
            "vision_tower": "openai/clip-vit-large-patch14",
            "pretrain_mm_mlp_adapter": "./checkpoints/llava-vicuna-v1-3-7b-pretrain/mm_projector.bin",
        },
    ),
    "pretrain.sh": (
        PRETRAIN_V1,
        STAGE_1
        | {
            "version": "v0_plain",
            "mm_projector_type": "linear",
            "vision_tower": "openai/clip-vit-large-patch14",
            "learning_rate": 2e-3,
            "per_device_train_batch_size": 16,
        },
    ),
    "the tutorial": (
        TUTORIAL,
        STAGE_2
        | LORA
        | {
            "model_name_or_path": "liuhaotian/llava-v1.5-7b",
            "deepspeed": "./scripts/zero2.json",
            "num_train_epochs": 10,
            "output_dir": "./checkpoints/llava-v1.5-7b-task-lora",
        },
    ),
}
MINIMAL = ["--model_name_or_path", "m", "--data_path", "d.json", "--output_dir", "o"]


def dry_run(capsys, argv) -> dict:
    train_main([*argv, "--dry_run"])
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_means_the_same_here(capsys, name):
    # Neither model nor data are anywhere near: nothing of them is opened.
    text, expected = SCRIPTS[name]
    shown = dry_run(capsys, shlex.split(text))
    settings = {name: setting["value"] for name, setting in shown["settings"].items()}
    expected = COMMON | expected
    assert {name: settings[name] for name in expected} == expected
    # Whatever else there is has its default; the numbers of LoRA also where there is none.
    others = {name for name, setting in shown["settings"].items() if setting["from"] != "default"} - set(expected)
    paths = {"data_path", "image_folder", "output_dir", "model_name_or_path"}
    assert others <= paths | {"activation_checkpointing", "lora_r", "lora_alpha", "lora_dropout"}
    assert shown["settings"]["eval_strategy"]["from"] == "translated from --evaluation_strategy"
    assert any(note.startswith("--warmup_ratio 0.03: now --warmup_steps 0.03") for note in shown["translated"])


def test_every_setting_is_shown_with_where_it_comes_from(capsys):
    shown = dry_run(capsys, shlex.split(FINETUNE_QLORA))["settings"]
    assert set(LlavaTrainingArguments.__dataclass_fields__) <= set(shown)
    origins = {name: setting["from"] for name, setting in shown.items()}
    assert origins["learning_rate"] == "flag" and origins["seed"] == "default"
    assert origins["lora_r"] == "default of the original"
    assert origins["train_type"] == "translated from --lora_enable"


def test_what_is_not_said_is_as_in_the_original_and_without_its_words_as_here():
    ours = resolve(MINIMAL).by_name
    theirs = resolve([*MINIMAL, "--lazy_preprocess", "True"]).by_name
    found = {name: (ours[name].value, theirs[name].value) for name in ours if ours[name].value != theirs[name].value}
    assert found == {
        "train_type": ("lora", "freeze_vision"),
        "version": (None, "v1"),
        "image_aspect_ratio": (None, "square"),
        "picture_opening": (None, "original"),
        "mm_projector_type": (None, "linear"),
        "mm_vision_select_layer": (None, -1),
        "mm_vision_select_feature": (None, "patch"),
        "model_max_length": (None, 512),
        "lora_r": (None, 64),
        "lora_alpha": (None, 16),
        "learning_rate": (2e-4, 5e-5),
        "mm_projector_lr": (2e-5, None),
        "num_train_epochs": (None, 3.0),
        "per_device_train_batch_size": (None, 8),
        "gradient_accumulation_steps": (None, 1),
        "lr_scheduler_type": ("cosine", "linear"),
        "warmup_steps": (None, 0.0),
        "logging_steps": (1, 500.0),
        "optim": ("adamw_torch_fused", "adamw_torch"),
        "loss_normalization": ("tokens", "micro_batch"),
        "sampler_order": ("default", "original"),
        "group_by_modality_length": (True, False),
        "dtype": ("auto", "float32"),
        "resume_from_checkpoint": (None, "auto"),
    }


@pytest.mark.parametrize("more", [["--train_type", "lora"], ["--preset", "llava-v1.5-lora"]])
def test_our_own_words_beside_the_originals_keep_our_defaults(more):
    settings = resolve([*MINIMAL, "--lazy_preprocess", "True", *more]).by_name
    assert settings["lora_r"].value in (None, 128) and settings["learning_rate"].value == 2e-4
    assert settings["loss_normalization"].value == "tokens"


@pytest.mark.parametrize(
    ("flags", "train_type"),
    [
        ("--lora_enable", "lora"),  # a bare switch is true
        ("--lora_enable true", "lora"),
        ("--lora_enable False", "freeze_vision"),
        ("--tune_mm_mlp_adapter True", "projector"),
        ("--tune_mm_mlp_adapter False --lora_enable True", "lora"),
        ("--lora_enable True --bits 8", "qlora"),
        ("--lora_enable True --bits 16", "lora"),
        ("--lora_enable True --freeze_backbone True", "lora"),
        ("--lora_enable True --train_type qlora", "qlora"),
        ("--vision_tower openai/clip-vit-large-patch14", "freeze_vision"),
    ],
)
def test_the_switches_say_what_trains(flags, train_type):
    settings = resolve([*MINIMAL, *flags.split()])
    assert json.loads(settings.to_json())["settings"]["train_type"]["value"] == train_type


@pytest.mark.parametrize(
    ("flags", "bf16_dtype", "plain_dtype"),
    [
        ("--lora_enable True", "bfloat16", "float32"),
        ("--tune_mm_mlp_adapter True", "bfloat16", "float32"),
        ("--deepspeed zero3.json --lora_enable False", "bfloat16", "float32"),
        # Steps of 2e-5 would vanish: nothing keeps a float32 copy of the weights.
        ("--lora_enable False", "float32", "float32"),
    ],
)
def test_the_dtype_of_the_weights(flags, bf16_dtype, plain_dtype):
    for more, expected in ((["--bf16", "True"], bf16_dtype), ([], plain_dtype)):
        assert resolve([*MINIMAL, *flags.split(), *more]).by_name["dtype"].value == expected
    half = resolve([*MINIMAL, *flags.split(), "--fp16", "True"]).by_name["dtype"].value
    assert half == ("float16" if flags == "--lora_enable True" else "float32")


def test_the_second_reference(capsys):
    flags = "--train_type use_lora --bf16 true --fp16 false --evaluation_strategy no --save_strategy epoch"
    shown = dry_run(capsys, [*MINIMAL, *flags.split(), "--learning_rate", "4e-4", "--logging_steps", "10"])["settings"]
    values = {name: setting["value"] for name, setting in shown.items()}
    assert (values["train_type"], values["lora_r"], values["lora_alpha"], values["lora_dropout"]) == (
        "lora",
        32,
        8,
        0.05,
    )
    assert values["lora_target_modules"] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert (values["learning_rate"], values["logging_steps"], values["lr_scheduler_type"]) == (4e-4, 10, "linear")
    assert values["loss_normalization"] == "tokens" and values["save_strategy"] == "epoch"
    for name in ("full", "freeze_vision"):
        assert resolve([*MINIMAL, "--train_type", name]).by_name["train_type"].value == name


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--lora_enable True --tune_mm_mlp_adapter True", "two kinds of training: choose one"),
        ("--lora_enable True --train_type full", "--train_type full and --lora_enable True contradict"),
        ("--lora_enable False --train_type lora", "--train_type lora and --lora_enable False contradict"),
        ("--bits 4 --tune_mm_mlp_adapter True", "bits 4 needs LoRA"),
        ("--bits 4 --lazy_preprocess True", "bits 4 needs LoRA"),
        ("--bits 5", "--bits: invalid choice"),
        ("--lora_weight_path adapter", "merge it .llava-ft merge. and train from the result"),
        ("--cache_dir here", "set the environment variable HF_HUB_CACHE"),
        ("--save_safetensors False", "always saved as safetensors"),
        ("--group_by_length True", "use --group_by_modality_length True"),
        ("--logging_dir logs", "TENSORBOARD_LOGGING_DIR"),
        ("--warmup_ratio 1.5", "is not a share of the steps"),
        ("--evaluation_strategy no --eval_strategy steps", "is called --eval_strategy now, which says something else"),
        ("--tune_mm_mlp_adapter True --freeze_mm_mlp_adapter True", "nothing to train"),
        ("--version v99", "unknown chat template 'v99'"),
        ("--lr_scheduler_type coseno", "coseno"),
        ("--lora_enabled True", "did you mean --lora_enable"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_a_sentence(flags, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        resolve([*MINIMAL, *flags.split()]).to_json()
    assert "\n" not in str(caught.value)


def test_every_flag_of_the_original_is_known():
    # The three classes of its train.py that transformers' own do not have.
    own = """
        model_name_or_path version freeze_backbone tune_mm_mlp_adapter vision_tower mm_vision_select_layer
        pretrain_mm_mlp_adapter mm_projector_type mm_use_im_start_end mm_use_im_patch_token mm_patch_merge_type
        mm_vision_select_feature data_path lazy_preprocess is_multimodal image_folder image_aspect_ratio cache_dir
        optim freeze_mm_mlp_adapter mpt_attn_impl model_max_length double_quant quant_type bits lora_enable lora_r
        lora_alpha lora_dropout lora_weight_path lora_bias mm_projector_lr group_by_modality_length
    """
    values = (
        dict.fromkeys(own.split(), "True")
        | {
            "mm_vision_select_layer": "-2",
            "mm_patch_merge_type": "flat",
            "mm_vision_select_feature": "patch",
            "model_max_length": "9",
            "bits": "16",
            "lora_bias": "none",
            "quant_type": "nf4",
            "mm_projector_lr": "1",
            "image_aspect_ratio": "pad",
            "optim": "adamw_torch",
            "cache_dir": "",
            "lora_weight_path": "",
            "tune_mm_mlp_adapter": "False",
            "freeze_backbone": "False",
        }
        | {f"lora_{name}": "8" for name in ("r", "alpha", "dropout")}
    )
    settings = resolve([word for name, value in values.items() for word in (f"--{name}", value)])
    assert set(own.split()) - set(settings.by_name) <= set(FLAGS) | {"lora_enable", "tune_mm_mlp_adapter"}
    assert set(values) >= MARKERS - NEXT_MARKERS - {"image_grid_pinpoints"}


def test_a_flag_without_effect_is_told_and_one_with_another_effect_refused():
    for name, flag in FLAGS.items():
        if not isinstance(flag, NoMeaning) or name in LlavaTrainingArguments.__dataclass_fields__:
            continue
        for value in flag.harmless if flag.harmless is not None else ("anything",):
            assert [note.split(":")[0] for note in translate({name: value}).notes] == [f"--{name} {value}"]
        if flag.harmless is not None:
            with pytest.raises(UserError, match=f"--{name} something else has no meaning here"):
                translate({name: "something else"})


def test_a_stream_has_no_order_of_the_original():
    flags = [*MINIMAL, "--lora_enable", "True", "--streaming", "True"]
    assert resolve(flags).by_name["sampler_order"].value == "default"
