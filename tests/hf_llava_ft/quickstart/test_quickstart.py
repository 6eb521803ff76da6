"""The whole job on real photographs: with a tiny model of random weights, which learns them in seconds, and with the
real small language model, which needs minutes."""

import json

import pytest
import torch
from PIL import Image

from hf_llava_ft.errors import UserError
from hf_llava_ft.quickstart import command
from hf_llava_ft.quickstart.command import DATA, MARK, QUESTION, QuickstartResult, _fresh, run_quickstart
from tests import warm_python

PLAIN = """
import json, sys
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
model_dir, *images = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(model_dir)
processor = AutoProcessor.from_pretrained(model_dir)
assert "hf_llava_ft" not in sys.modules
answers = []
for image in images:
    content = [{"type": "image", "image": Image.open(image)}, {"type": "text", "text": "What is in the picture?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    ids = model.generate(**inputs, max_new_tokens=48, do_sample=False)
    answers.append(processor.decode(ids[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True).strip())
print(json.dumps(answers))
"""


@pytest.fixture(scope="module", params=["tiny", pytest.param("SmolLM2-135M", marks=pytest.mark.slow)])
def result(request, tiny, tiny_processor, tmp_path_factory):
    """Of the answers before there is only the beginning."""
    output_dir = tmp_path_factory.mktemp("quickstart") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "MAX_NEW_TOKENS", 8)
        if request.param == "tiny":
            original = command._training_flags
            more = ["--max_steps", "60", "--learning_rate", "5e-3", "--mm_projector_lr", "5e-3"]  # the last ones count
            patch.setattr(command, "_training_flags", lambda *args: [*original(*args), *more])
            patch.setattr(command, "compose_small_llava", lambda seed: (decided(tiny.model()), tiny_processor))
        return run_quickstart(output_dir), output_dir


def decided(model):
    """With weights so large before the last softmax, which LoRA leaves as they are, that one word can be likely."""
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = [2], 0
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
    return model


@pytest.mark.timeout(1500)
def test_the_quickstart_learns_the_photographs_and_looks_at_them(result):
    outcome, output_dir = result
    saved = json.loads((output_dir / "result.json").read_text())
    assert saved["after"] == saved["expected"] != saved["before"]
    assert len(saved["after"]) >= 4 and len(set(saved["after"])) == len(saved["after"])
    assert saved["verified"] is True and saved["swapped_ok"] is True and outcome.passed
    assert saved["losses"][-1] < 0.1 * saved["losses"][0]
    for name in ("report.html", "loss.png", "answers.png"):
        assert (output_dir / name).stat().st_size > 10_000 or name == "report.html"
    Image.open(output_dir / "answers.png").verify()
    assert saved["after"][0] in (output_dir / "report.html").read_text()


@pytest.mark.timeout(600)
def test_plain_transformers_gives_the_same_answers(result, tmp_path):
    outcome, output_dir = result
    photos = [DATA / row["image"] for row in json.loads((DATA / "conversations.json").read_text())]
    done = warm_python.run(["-c", PLAIN, str(output_dir / "merged"), *map(str, photos)], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == outcome.expected
    assert QUESTION in PLAIN


def test_nothing_written_names_a_folder_of_this_machine(result):
    _, output_dir = result
    for path in (output_dir / "merged").iterdir():
        if path.suffix in (".json", ".jinja"):
            assert str(output_dir.parent) not in path.read_text(), path.name
    assert str(DATA) not in (output_dir / "report.html").read_text()


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds thesis.txt, which no quickstart wrote"):
        run_quickstart(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_photos_of_others_are_not_taken_for_its_own(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/wedding.jpg").touch()
    (tmp_path / "result.json").write_text('{"score": 1}')
    with pytest.raises(UserError, match="holds photos, which no quickstart wrote"):
        run_quickstart(tmp_path)
    assert (tmp_path / "photos/wedding.jpg").exists()


def test_a_quickstart_begins_anew_where_one_was(tmp_path):
    _fresh(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / ".merged.partial-17").mkdir()  # it was killed
    (tmp_path / ".merged.lock").touch()
    _fresh(tmp_path)
    assert not (tmp_path / "photos").exists()
    (tmp_path / MARK).unlink()  # of version 0.1
    (tmp_path / "merged").mkdir()
    (tmp_path / "result.json").write_text(json.dumps(dict.fromkeys(QuickstartResult.__dataclass_fields__)))
    _fresh(tmp_path)
    assert not (tmp_path / "merged").exists()
