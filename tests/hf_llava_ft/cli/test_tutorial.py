"""The commands of the tutorial and of troubleshooting, as they stand, with a tiny model in place of the 7B one."""

import json

import pytest
from PIL import Image

from tests.documented_commands import ROOT, Command, commands_in

TUTORIAL, TROUBLESHOOTING = ROOT / "docs" / "tutorial.md", ROOT / "docs" / "troubleshooting.md"
MODEL = "liuhaotian/llava-v1.5-7b"
# Less of everything, for a CPU.
QUICKLY = {
    "train": ["--use_cpu", "True", "--lora_r", "4"],
    "generate": ["--max_new_tokens", "4"],
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder that one works in: pictures with captions, others with a table, and LLaVA JSON."""
    photos, scans, images = (tmp_path / name for name in ("photos", "scans", "images"))
    for each in (photos, scans, images):
        each.mkdir()
    names = ["red", "green", "blue", "yellow", "white"]
    for number, name in enumerate(names):
        picture = Image.new("RGB", (40 + number, 30), name)
        for each in (photos, scans, images):
            picture.save(each / f"{number}.png")
        (photos / f"{number}.txt").write_text(f"All of it is {name}.")
    lines = [f"{number}.png,What is it?,{name}" for number, name in enumerate(names)]
    (scans / "table.csv").write_text("\n".join(["img,ask,reply", *lines]) + "\n")
    rows = [
        {
            "id": str(number),
            "image": f"{number}.png",
            "conversations": [
                {"from": "human", "value": "<image>\nWhich colour?"},
                {"from": "gpt", "value": name},
            ],
        }
        for number, name in enumerate(names)
    ]
    for file in ("data.json", "replay.json"):
        (tmp_path / file).write_text(json.dumps(rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(llava_ft, command: Command, model) -> None:
    words = [str(model) if word in (MODEL, "$MODEL") else word for word in command.words]
    if "--dry_run" not in words:
        words += QUICKLY.get(words[0], [])
    code, out, err = llava_ft(*words)
    assert code == 0, f"llava-ft {' '.join(words)}\n{out[-2000:]}\n{err[-3000:]}"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_tutorial_from_top_to_bottom(llava_ft, folder, tiny_checkpoint):
    done = [command for command in commands_in(TUTORIAL) if not command.not_run]
    for command in done:
        if command.words[0] == "push":
            continue  # a Hub: below
        run(llava_ft, command, tiny_checkpoint)
    assert [command.words[0] for command in done] == [
        *("init", "init", "check", "estimate", "train", "train", "generate", "generate", "merge", "verify", "export"),
        "push",
    ]
    for name in ("check.html", "my-adapter/report.html", "my-model/config.json", "served/SERVING.md"):
        assert (folder / name).is_file(), name
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert [answer["expected"] for answer in answers][:2] == ["All of it is red.", "All of it is green."]
    code, out, err = llava_ft("push", "my-model", "--repo_id", "user/my-model", "--dry_run")
    assert code == 0 and "config.json" in out + err


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_commands_of_troubleshooting(llava_ft, folder, tiny_checkpoint):
    done = [command for command in commands_in(TROUBLESHOOTING) if not command.not_run]
    run(llava_ft, Command("", ["train", *_flags(tiny_checkpoint, "my-adapter"), "--save_steps", "1"]), tiny_checkpoint)
    run(llava_ft, Command("", ["merge", "--adapter", "my-adapter", "--output_dir", "my-model"]), tiny_checkpoint)
    for number, command in enumerate(done):
        words = list(command.words)
        if words[0] == "merge":
            words[words.index("--output_dir") + 1] += str(number)  # a new folder, as it has to be
        run(llava_ft, Command(command.page, words), tiny_checkpoint)
    assert len(done) >= 18


def _flags(model, output_dir: str) -> list[str]:
    return [
        *("--model_name_or_path", str(model), "--data_path", "data.json", "--image_folder", "images"),
        *("--output_dir", output_dir),
    ]


def test_each_pain_has_a_command():
    text = TROUBLESHOOTING.read_text(encoding="utf-8")
    sections = text.split("\n## ")[1:]
    assert [section.partition(".")[0] for section in sections] == [str(number) for number in range(1, 26)]
    assert [section.splitlines()[0] for section in sections if "```bash\n" not in section] == []
