"""Preferences: what is read, what is refused, and that TRL learns them with our model, processor and adapter."""

import importlib.util
import json
import os
import re
import shutil

import pytest
from PIL import Image
from safetensors.torch import load_file

from hf_llava_ft import UserError, load_data
from hf_llava_ft.data.formats import open_source
from hf_llava_ft.data.preferences import load_preferences
from hf_llava_ft.processing.picture_opening_llava import rgb_picture
from tests import warm_python


@pytest.fixture
def preferences(tmp_path):
    """A function that writes rows, the first of them with what is given; returns file and image folder."""

    def write(**first):
        images = tmp_path / "images"
        images.mkdir(exist_ok=True)
        rows = []
        for number, colour in enumerate(("red", "green", "blue", "white")):
            Image.new("RGB", (40, 30 + number), colour).save(images / f"{number}.png")
            row = {"id": str(number), "image": f"{number}.png", "prompt": "<image>\nWhich colour?"}
            rows.append(row | {"chosen": colour, "rejected": "black"})
        rows[0] |= first
        data = tmp_path / "preferences.json"
        data.write_text(json.dumps(rows))
        return data, images

    return write


def test_both_answers_and_the_place_of_the_picture_are_read(preferences):
    data, images = preferences()
    rows = load_preferences(data, images)
    assert len(rows) == 4
    assert rows[0]["prompt"] == [
        {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "\nWhich colour?"}]}
    ]
    for key, text in (("chosen", "red"), ("rejected", "black")):
        assert rows[0][key] == [{"role": "assistant", "content": [{"type": "text", "text": text}]}]
    [picture] = rows[1]["images"]
    assert picture.size == (40, 31) and rgb_picture(picture, "upright").getpixel((0, 0)) == (0, 128, 0)


def test_texts_and_messages_say_the_same(preferences):
    plain = load_preferences(*preferences())[0]
    messages = {
        "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nWhich colour?"}]}],
        "chosen": [{"role": "assistant", "content": "red"}],
        "rejected": [{"role": "assistant", "content": "black"}],
    }
    as_messages = load_preferences(*preferences(**messages))[0]
    assert [as_messages[key] for key in messages] == [plain[key] for key in messages]


@pytest.mark.parametrize(
    "first, sentence",
    [
        ({"prompt": None}, 'has no "prompt"'),
        ({"rejected": "red"}, '"chosen" and "rejected" are the same'),
        ({"rejected": ""}, 'with "rejected": turn 2 is an empty answer'),
        ({"rejected": "<image> black"}, 'with "rejected": turn 2, an answer, holds <image>'),
        ({"prompt": "<image><image>\nWhich?"}, 'with "chosen": 2 <image> placeholders and 1 image'),
        ({"chosen": [{"role": "user", "content": "red"}]}, '"chosen" is not one answer'),
    ],
)
def test_what_is_wrong_with_a_row_is_said(preferences, llava_ft, first, sentence):
    data, images = preferences(**first)
    with pytest.raises(UserError, match=re.escape(sentence)) as error:
        load_preferences(data, images)
    assert "row 1 (id '0')" in error.value.sentence
    code, out, _ = llava_ft("check", data, "--image_folder", images, "--num_proc", 1)
    assert code == 1 and sentence in " ".join(out.split()) and "1 problem" in out


def test_check_takes_preferences(preferences, llava_ft):
    data, images = preferences()
    code, out, _ = llava_ft("check", data, "--image_folder", images, "--num_proc", 1)
    assert code == 0 and "detected preference JSON, 4 rows" in out
    assert "Every row can be trained on by TRL's DPOTrainer (docs/preference.md), not by llava-ft train." in out


def test_what_learns_answers_refuses_preferences(preferences, tiny_checkpoint, llava_ft, tmp_path):
    data, images = preferences()
    with pytest.raises(UserError, match="DPOTrainer"):
        load_data(data, images)
    for more in ([], ["--on_bad_row", "skip"], ["--streaming", "True", "--max_steps", "1"]):
        flags = ["--model_name_or_path", tiny_checkpoint, "--data_path", data, "--image_folder", images]
        code, _, err = llava_ft("train", *flags, "--output_dir", tmp_path / "out", *more)
        assert code == 2 and "holds preferences (chosen and rejected)" in err, more
    [source] = open_source([data], images)
    assert source.format == "preference JSON"


def test_other_data_is_no_preferences(llava_json):
    with pytest.raises(UserError, match='preferences have "prompt", "chosen" and "rejected"'):
        load_preferences(*llava_json(2))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed: pip install trl")
def test_trl_learns_them_and_the_adapter_merges(preferences, tiny_checkpoint, llava_ft, tmp_path, checkout):
    data, images = preferences()
    output, script = tmp_path / "my-preferences", checkout / "examples" / "dpo_with_trl.py"
    done = warm_python.run(
        [str(script), str(tiny_checkpoint), str(data), str(images), str(output), "--max_steps", "2"],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(checkout)},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    losses = [float(loss) for loss in re.findall(r"^step \d: loss ([\d.]+)", done.stdout, re.MULTILINE)]
    assert len(losses) == 2 and losses[0] == pytest.approx(0.6931, abs=1e-4)  # nothing is preferred yet: log 2
    adapter = load_file(output / "adapter_model.safetensors")
    assert not [name for name in adapter if ".ref." in name]
    learned = [tensor for name, tensor in adapter.items() if "lora_B" in name]
    assert len(learned) == 14 and all(tensor.abs().max() > 0 for tensor in learned)
    before = load_file(tiny_checkpoint / "model.safetensors")
    name = next(name for name in before if name.endswith("multi_modal_projector.linear_1.weight"))
    [projector] = [tensor for key, tensor in adapter.items() if key.endswith("multi_modal_projector.linear_1.weight")]
    assert not projector.equal(before[name])
    code, _, err = llava_ft("merge", "--adapter", output, "--output_dir", tmp_path / "preferred")
    assert code == 0 and "Merged and verified" in err, err
    shutil.rmtree(tmp_path / "preferred")
