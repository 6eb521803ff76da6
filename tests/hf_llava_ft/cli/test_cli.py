"""The commands as a user types them: what goes well, and the one sentence and exit code 2 for everything that does
not."""

import json
import os
import re
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import hf_llava_ft
from hf_llava_ft.train import parse_arguments
from tests import warm_python


def train_flags(model, data, folder, output_dir, **more) -> list[str]:
    flags = {
        "model_name_or_path": model,
        "data_path": data,
        "image_folder": folder,
        "output_dir": output_dir,
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "lora_r": 4,
        "save_strategy": "no",
        "use_cpu": True,
    }
    return [text for name, value in (flags | more).items() for text in (f"--{name}", str(value))]


def sentence(err: str) -> str:
    """The one line a user gets; fails if there is a traceback or more than one."""
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, err
    return lines[0]


# ---------------------------------------------------------------------- the whole way


def test_train_merge_generate_and_chat(llava_ft, tiny_checkpoint, llava_json, tmp_path, monkeypatch):
    data, folder = llava_json(4)
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    code, _, err = llava_ft("train", *train_flags(tiny_checkpoint, data, folder, adapter))
    assert code == 0 and "What trains" in err and "loss" in err
    assert not [name for name in os.listdir(adapter) if "partial" in name]

    code, _, err = llava_ft("merge", "--adapter", adapter, "--output_dir", merged, "--json", tmp_path / "merge.json")
    assert code == 0 and "Merged and verified" in err
    assert json.loads((tmp_path / "merge.json").read_text())["verified"] is True
    assert json.loads((merged / "config.json").read_text())["model_type"] == "llava"

    answers = []
    for model in (adapter, merged):
        flags = ["--image", folder / "0.png", "--prompt", "What is it?", "--max_new_tokens", 6]
        code, out, _ = llava_ft("generate", "--model", model, *flags, "--json", tmp_path / "answer.json")
        assert code == 0
        answers.append(json.loads((tmp_path / "answer.json").read_text())["answer"])
        assert out.strip() == answers[-1]
    assert answers[0] == answers[1]

    said = iter([f"/image {folder / '0.png'}", "What is it?", "/image nowhere.png", "/new", "Hello", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(said))
    code, out, err = llava_ft("chat", "--model", merged, "--max_new_tokens", 6)
    assert code == 0 and f"model: {answers[0]}"[:9] in out and "nowhere.png does not exist" in err
    assert next(said, None) is None


def test_help_of_every_command(llava_ft):
    for command in ([], ["quickstart"], ["compose"], ["train"], ["merge"], ["generate"], ["chat"]):
        code, out, _ = llava_ft(*command, "--help")
        assert code == 0 and "--help" in out
    assert "--mm_projector_lr" in llava_ft("train", "--help")[1]


# ---------------------------------------------------------------------- wrong data


def conversation(*turns: tuple[str, str], image: str | None = "0.png") -> dict:
    row = {"id": "x", "conversations": [{"from": role, "value": value} for role, value in turns]}
    return row | ({"image": image} if image else {})


WRONG_DATA = {
    "missing image": ([conversation(("human", "<image>\nq"), ("gpt", "a"), image="no.png")], "row 1 (id 'x').*no.png"),
    "corrupt image": (
        [conversation(("human", "<image>\nq"), ("gpt", "a"), image="bad.png")],
        "row 1 (id 'x').*bad.png",
    ),
    "unknown role": ([conversation(("human", "<image>\nq"), ("robot", "a"))], "row 1 (id 'x').*robot"),
    "image count": (
        [conversation(("human", "<image><image>\nq"), ("gpt", "a"))],
        "2 <image> placeholders and 1 image",
    ),
    "no answer": ([conversation(("human", "<image>\nq"))], "row 1 (id 'x').*answer"),
    "empty set": ([], "no rows"),
    "leaves the folder": (
        [conversation(("human", "<image>\nq"), ("gpt", "a"), image="../secret.png")],
        "row 1 (id 'x').*secret.png",
    ),
}


@pytest.mark.parametrize("case", WRONG_DATA)
def test_wrong_data_is_one_sentence(llava_ft, tiny_checkpoint, tmp_path, case):
    rows, expected = WRONG_DATA[case]
    Image.new("RGB", (20, 20)).save(tmp_path / "0.png")
    Image.new("RGB", (200, 200), "red").save(tmp_path / "bad.png")
    (tmp_path / "bad.png").write_bytes((tmp_path / "bad.png").read_bytes()[:60])
    data = tmp_path / "data.json"
    data.write_text(json.dumps(rows))
    output = tmp_path / "out"
    code, _, err = llava_ft("train", *train_flags(tiny_checkpoint, data, tmp_path, output))
    assert code == 2
    pattern = ".*".join(re.escape(part) for part in expected.split(".*"))
    assert re.search(pattern, sentence(err)), err
    assert not output.exists()


def test_broken_json_names_the_line(llava_ft, tiny_checkpoint, tmp_path):
    data = tmp_path / "data.json"
    data.write_text('[\n {"id": "a",\n  "conversations": oops}\n]')
    code, _, err = llava_ft("train", *train_flags(tiny_checkpoint, data, tmp_path, tmp_path / "out"))
    assert code == 2 and "line 3" in sentence(err)


def test_a_row_that_is_too_long_is_named(llava_ft, tiny_checkpoint, llava_json, tmp_path):
    flags = train_flags(tiny_checkpoint, *llava_json(2), tmp_path / "out", model_max_length=60)
    code, _, err = llava_ft("train", *flags)
    assert code == 2 and "row 1 (id 'row0') has" in sentence(err) and "limit is 60" in err


# ---------------------------------------------------------------------- wrong models, flags and folders


def test_a_folder_that_is_no_model(llava_ft, llava_json, tmp_path):
    (tmp_path / "empty").mkdir()
    for model, expected in (
        (tmp_path / "empty", "neither config.json nor"),
        ("no/such-model", "neither a folder nor"),
        (tmp_path / "gone", "gone is not a folder on this computer"),
    ):
        code, _, err = llava_ft("train", *train_flags(model, *llava_json(2), tmp_path / "out"))
        assert code == 2 and expected in sentence(err)
        code, _, err = llava_ft("generate", "--model", model, "--prompt", "q")
        assert code == 2 and expected in sentence(err)


def test_the_version(llava_ft):
    assert llava_ft("--version")[:2] == (0, f"{hf_llava_ft.__version__}\n")


def test_an_adapter_without_its_weights(llava_ft, tiny_checkpoint, tmp_path):
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(tiny_checkpoint)}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    code, _, err = llava_ft("merge", "--adapter", tmp_path, "--output_dir", tmp_path / "merged")
    assert code == 2 and "no adapter_model.safetensors" in sentence(err) and not (tmp_path / "merged").exists()


def test_an_adapter_whose_base_has_moved(llava_ft, tmp_path):
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "gone")}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    for command in (
        ("merge", "--adapter", tmp_path, "--output_dir", tmp_path / "out"),
        ("verify", "--model", tmp_path),
    ):
        code, _, err = llava_ft(*command)
        assert code == 2 and f"{tmp_path / 'gone'} is not a folder" in sentence(err) and "--base" in sentence(err)


def test_a_model_that_is_no_llava(llava_ft, llava_json, tmp_path, tiny_processor):
    (tmp_path / "bert").mkdir()
    tiny_processor.save_pretrained(tmp_path / "bert")
    (tmp_path / "bert/config.json").write_text('{"model_type": "bert"}')
    code, _, err = llava_ft("train", *train_flags(tmp_path / "bert", *llava_json(2), tmp_path / "out"))
    assert code == 2 and "is a model of type 'bert'" in sentence(err)


def test_an_output_folder_that_cannot_be_written(llava_ft, tiny_checkpoint, llava_json, tmp_path):
    (tmp_path / "file").touch()
    for output in (tmp_path / "file", tmp_path / "file" / "below", "/proc/nowhere/out"):
        code, _, err = llava_ft("train", *train_flags(tiny_checkpoint, *llava_json(2), output))
        assert code == 2 and "cannot be written" in sentence(err)


def test_merge_refuses_a_full_model_and_a_full_folder(llava_ft, tiny_checkpoint, llava_json, tmp_path):
    code, _, err = llava_ft("merge", "--adapter", tiny_checkpoint, "--output_dir", tmp_path / "merged")
    assert code == 2 and "not an adapter" in sentence(err) and not (tmp_path / "merged").exists()
    llava_ft("train", *train_flags(tiny_checkpoint, *llava_json(2), tmp_path / "adapter"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    code, _, err = llava_ft("merge", "--adapter", tmp_path / "adapter", "--output_dir", tmp_path / "full")
    assert code == 2 and "is not empty" in sentence(err)
    assert os.listdir(tmp_path / "full") == ["mine.txt"]


def test_a_merge_that_answers_otherwise_fails_and_leaves_nothing(
    llava_ft, tiny_checkpoint, llava_json, tmp_path, monkeypatch
):
    llava_ft("train", *train_flags(tiny_checkpoint, *llava_json(2), tmp_path / "adapter"))
    save = hf_llava_ft.LlavaForCausalLM.save_pretrained

    def save_damaged(self, *args, **kwargs):
        self.model.multi_modal_projector.linear_2.weight.data *= 1.5
        save(self, *args, **kwargs)

    monkeypatch.setattr(hf_llava_ft.LlavaForCausalLM, "save_pretrained", save_damaged)
    code, _, err = llava_ft("merge", "--adapter", tmp_path / "adapter", "--output_dir", tmp_path / "merged")
    assert code == 2 and "not the same as base and adapter: the logits differ by" in sentence(err)
    assert not [name for name in os.listdir(tmp_path) if "merged" in name]


def test_flash_attention_that_is_not_installed_says_what_to_do(llava_ft, tiny_checkpoint, llava_json, tmp_path):
    flags = train_flags(tiny_checkpoint, *llava_json(2), tmp_path / "out", attn_implementation="flash_attention_2")
    code, _, err = llava_ft("train", *flags)
    assert code == 2 and "pip install 'hf-llava-ft[flash-attn]'" in sentence(err) and "sdpa" in err


def test_unknown_flags_and_values(llava_ft, tiny_checkpoint, llava_json, tmp_path):
    flags = train_flags(tiny_checkpoint, *llava_json(2), tmp_path / "out")
    code, _, err = llava_ft("train", *flags, "--learning_rat", "1")
    assert code == 2 and "unknown argument --learning_rat" in sentence(err)
    code, _, err = llava_ft("train", *flags, "--version", "v9")
    assert code == 2 and "unknown chat template 'v9'; known: v1" in sentence(err)


@pytest.mark.parametrize("name", ["nowhere.png", "text.png"])
def test_an_image_to_ask_about_that_is_none(llava_ft, tiny_checkpoint, tmp_path, name):
    (tmp_path / "text.png").write_text("no picture")
    code, _, err = llava_ft("generate", "--model", tiny_checkpoint, "--prompt", "q", "--image", tmp_path / name)
    assert code == 2 and name in sentence(err)


# ---------------------------------------------------------------------- going on, and launchers


def test_a_run_goes_on_from_its_last_checkpoint(llava_ft, tiny_checkpoint, llava_json, tmp_path):
    data = llava_json(6)
    settings = {"save_strategy": "steps", "save_steps": 2, "seed": 3}
    whole = train_flags(tiny_checkpoint, *data, tmp_path / "whole", **settings | {"max_steps": 4})
    assert llava_ft("train", *whole)[0] == 0
    # The same run, cut off after its first checkpoint.
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/checkpoint-4")
    (tmp_path / "cut/adapter_model.safetensors").unlink()
    again = train_flags(tiny_checkpoint, *data, tmp_path / "cut", **settings | {"max_steps": 4})
    assert llava_ft("train", *again, "--resume_from_checkpoint", "True")[0] == 0
    expected = load_file(tmp_path / "whole/adapter_model.safetensors")
    found = load_file(tmp_path / "cut/adapter_model.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)

    code, _, err = llava_ft("train", *whole, "--resume_from_checkpoint", tmp_path / "nowhere")
    assert code == 2 and "is not a checkpoint to resume from" in sentence(err)


@pytest.mark.parametrize("launcher", [["-m", "hf_llava_ft.train"], ["-m", "accelerate.commands.launch", "--cpu"]])
def test_other_ways_to_start(tiny_checkpoint, llava_json, tmp_path, checkout, launcher):
    if "accelerate" in launcher[1]:
        launcher = [*launcher, "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no"]
        launcher += ["--dynamo_backend", "no", "-m", "hf_llava_ft.train"]
    flags = train_flags(tiny_checkpoint, *llava_json(2), tmp_path / "out", max_steps=1)
    done = warm_python.run([*launcher, *flags], cwd=checkout)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/adapter_config.json").is_file()
    if "accelerate" in launcher[1]:
        # Reports a failed child in its own way, as exit code 1. The child is a new Python, and told before it has
        # imported torch.
        flags, named, code = [*flags, "--learning_rat", "1"], "--learning_rat", 1
    else:
        flags[flags.index("--data_path") + 1] = named = "nowhere.json"
        code = 2
    done = warm_python.run([*launcher, *flags], cwd=checkout)
    assert "error: " in done.stderr and named in done.stderr and done.returncode == code


def test_scripts_are_the_commands(tiny_checkpoint, checkout, tmp_path):
    for script in ("compose", "merge_lora"):
        done = warm_python.run([f"hub_scripts/{script}.py", "--help"], cwd=checkout)
        assert done.returncode == 0 and "--output_dir" in done.stdout


def test_a_template_that_never_stops_is_refused_before_training(llava_ft, tiny_checkpoint, llava_json, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, folder)
    # As the llava-hf checkpoints have it: the answer is marked, its end is not.
    (folder / "chat_template.jinja").write_text(
        "{% for message in messages %}{% if message['role'] == 'assistant' %}ASSISTANT: {% generation %}"
        "{{ message['content'][0]['text'] }} {% endgeneration %}{% else %}USER: <image>\nq {% endif %}{% endfor %}"
    )
    flags = train_flags(folder, *llava_json(2), tmp_path / "out")
    code, _, err = llava_ft("train", *flags)
    assert code == 2 and "would never learn to stop" in sentence(err)
    assert llava_ft("train", *flags, "--version", "v1")[0] == 0


def test_a_preset_is_a_recipe_that_flags_may_change(llava_ft, tiny_checkpoint, llava_json, tmp_path):
    flags = ["--model_name_or_path", "m", "--data_path", "d", "--output_dir", str(tmp_path / "o"), "--use_cpu", "True"]
    flags += ["--bf16", "False"]
    parsed = parse_arguments(["--preset", "llava-v1.5-lora", *flags, "--lora_r", "8"])
    model_args, data_args, tuning_args, training_args = parsed
    assert model_args.version == "v1" and model_args.image_aspect_ratio == "pad" and data_args.model_max_length == 2048
    assert (tuning_args.lora_r, tuning_args.lora_alpha) == (8, 256)
    assert (training_args.learning_rate, training_args.mm_projector_lr) == (2e-4, 2e-5)
    code, _, err = llava_ft("train", "--preset", "llava-v9", *flags)
    assert code == 2 and "llava-v9" in sentence(err) and "llava-v1.5-lora" in err
