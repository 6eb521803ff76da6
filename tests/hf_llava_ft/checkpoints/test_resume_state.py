"""A checkpoint whose state is damaged, or holds code, is refused in one sentence before the run goes on."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from hf_llava_ft.checkpoints.checked.resume_state import check_resume_state
from hf_llava_ft.errors import UserError
from hf_llava_ft.training.resuming.resume import seal

STATES = ("optimizer.pt", "scheduler.pt", "rng_state.pth")


class Code:
    def __reduce__(self):
        return print, ("code of the checkpoint was run",)


@pytest.fixture(scope="module")
def run(tiny_checkpoint, tmp_path_factory):
    """Flags of a run of four steps, and the checkpoint behind its second."""
    from hf_llava_ft.train import main

    folder = tmp_path_factory.mktemp("state")
    Image.new("RGB", (60, 40), (200, 90, 20)).save(folder / "red.png")
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "It is red."}]
    rows = [{"id": str(n), "image": "red.png", "conversations": turns} for n in range(4)]
    (folder / "data.json").write_text(json.dumps(rows))
    flags = [
        *("--model_name_or_path", tiny_checkpoint, "--data_path", folder / "data.json", "--image_folder", folder),
        *("--use_cpu", "True", "--save_strategy", "steps", "--save_steps", "2", "--lora_r", "4", "--max_steps", "4"),
        *("--per_device_train_batch_size", "1", "--report_to", "none", "--learning_rate", "1e-3"),
    ]
    main(list(map(str, [*flags, "--output_dir", folder / "out"])))
    return flags, folder / "out/checkpoint-2"


@pytest.fixture
def checkpoint(run, tmp_path):
    shutil.copytree(run[1], tmp_path / "checkpoint-2")
    return tmp_path / "checkpoint-2"


def test_a_whole_one_is_taken(checkpoint):
    check_resume_state(checkpoint)


def damages():
    for name in STATES:
        yield name, "garbage", lambda file: file.write_bytes(b"\x80garbage" * 9)
        yield name, "empty", lambda file: file.write_bytes(b"")
        yield name, "cut off", lambda file: file.write_bytes(file.read_bytes()[:-40])
        yield name, "a web page", lambda file: file.write_bytes(b"<html>proxy</html>")
        yield name, "code", lambda file: torch.save({"state": Code()}, file)
        yield name, "old code", lambda file: torch.save(Code(), file, _use_new_zipfile_serialization=False)
        yield name, "a list", lambda file: torch.save([1], file)
    yield "optimizer.pt", "nothing", lambda file: torch.save({}, file)
    yield "scaler.pt", "code", lambda file: torch.save({"scale": Code()}, file)
    yield "adapter_model.bin", "code", lambda file: torch.save({"scale": Code()}, file)
    for kind, text in (
        ("nested deeply", '{"a":' * 99999 + "1" + "}" * 99999),
        ("a list", "[]"),
        ("cut off", '{"global_step": 2'),
        ("no step", "{}"),
        ("a step that is a text", '{"global_step": "2"}'),
        ("a log that is a text", '{"global_step": 2, "log_history": "none"}'),
        ("an epoch that is a text", '{"global_step": 2, "epoch": "half"}'),
    ):
        yield "trainer_state.json", kind, lambda file, text=text: file.write_text(text)


@pytest.mark.parametrize("name, kind, damage", [pytest.param(*each, id=" ".join(each[:2])) for each in damages()])
def test_a_damaged_one_is_a_sentence_that_names_the_file(checkpoint, name, kind, damage, capfd):
    damage(checkpoint / name)
    with pytest.raises(UserError) as refused:
        check_resume_state(checkpoint)
    sentence = refused.value.sentence
    assert name in sentence
    assert "\n" not in sentence
    assert "weights_only" not in sentence
    assert ("code" in sentence) == ("code" in kind)
    assert "was run" not in capfd.readouterr().out


def resumed(llava_ft, run, checkpoint):
    seal(checkpoint)
    output_dir = checkpoint.parent
    return llava_ft("train", *run[0], "--output_dir", output_dir, "--resume_from_checkpoint", checkpoint)


def test_the_command_says_it(llava_ft, run, checkpoint):
    torch.save(Code(), checkpoint / "scheduler.pt")
    code, out, err = resumed(llava_ft, run, checkpoint)
    assert code == 2
    assert "scheduler.pt holds code" in err
    assert "was run" not in out


@pytest.mark.parametrize("kind", ["missing", "nan", "shape"])
def test_an_adapter_that_is_not_whole_is_not_resumed(llava_ft, run, checkpoint, kind):
    file = checkpoint / "adapter_model.safetensors"
    weights = load_file(file)
    name = min(name for name in weights if "lora_B" in name)
    if kind == "missing":
        del weights[name]
    else:
        weights[name] = torch.full((3, 3) if kind == "shape" else weights[name].shape, float("nan"))
    save_file(weights, file, metadata={"format": "pt"})
    code, _, err = resumed(llava_ft, run, checkpoint)
    assert code == 2
    assert name.removeprefix("base_model.model.") in err
