"""What a Trainer pushes while it trains and at its end, to the Hub of `loopback_hub.py`, by the training command."""

import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from transformers import TrainingArguments

import hf_llava_ft
from hf_llava_ft.checkpoints.opening import fit_to_processor, load_model
from hf_llava_ft.hub.staging import goes
from hf_llava_ft.training.resuming.resume import what_is_missing
from hf_llava_ft.training.trainer_push import PushingTrainer
from tests import warm_python
from tests.loopback.cards import problems
from tests.loopback_hub import LoopbackHub, Status

ROOT = Path(__file__).resolve().parents[3]

# In one process, which pays for its imports once. A run ends with the code that the command would exit with.
RUNS = """
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from hf_llava_ft import LlavaTrainer, LlavaTrainingArguments, load_data, load_model, load_processor
from hf_llava_ft.train import main

folder, base = Path(sys.argv[1]), sys.argv[2]

def train(name, *flags, model="org/base", push=True, **environment):
    os.environ.update(environment)
    try:
        main([
            *("--model_name_or_path", model, "--data_path", str(folder / "data.json"), "--image_folder", str(folder)),
            *("--output_dir", str(folder / "runs" / name), "--use_cpu", "--max_steps", "4", "--save_steps", "2"),
            *("--learning_rate", "1e-2", "--per_device_train_batch_size", "2", "--logging_steps", "1"),
            *(("--push_to_hub", "--hub_model_id", f"user/{name}", "--hub_always_push") if push else ()),
            *flags,
        ])
    except SystemExit as stop:
        return stop.code
    finally:
        os.environ["HF_TOKEN"] = "hf_loopback"
    return 0

best = ("--eval_strategy", "steps", "--eval_steps", "2", "--eval_split", "0.3", "--load_best_model_at_end")
codes = [
    train("checkpoint", "--hub_strategy", "checkpoint", *best),
    train("all", "--hub_strategy", "all_checkpoints", "--save_total_limit", "1"),
    train("nested", "--hub_strategy", "every_save", "--train_type", "full", model="org/nested"),
    train("end", "--hub_strategy", "end", "--train_type", "freeze_vision", "--hub_revision", "trained"),
]
api = HfApi()
arguments = LlavaTrainingArguments(
    output_dir=str(folder / "runs" / "notebook"), use_cpu=True, report_to="none", hub_model_id="user/notebook"
)
trainer = LlavaTrainer(
    load_model(base), arguments, train_dataset=load_data(str(folder / "data.json"), str(folder)),
    processing_class=load_processor(base),
)
commit = trainer.push_to_hub(tags="mine", dataset_tags="org/data", license="mit", language="en")
assert commit.oid == api.model_info("user/notebook").sha and commit.repo_url.repo_id == "user/notebook", commit
assert trainer.push_to_hub("Again", blocking=False, tags="yours").result().commit_message == "Again"
# The commit at step 2 of 4, on another computer.
commit = [each.commit_id for each in api.list_repo_commits("user/checkpoint") if "step 2" in each.title][0]
there = snapshot_download("user/checkpoint", revision=commit, allow_patterns="last-checkpoint/*")
codes += [
    train("resumed", *best, "--resume_from_checkpoint", f"{there}/last-checkpoint", push=False),
    train("broken", "--hub_strategy", "every_save"),
    # What is refused.
    train("local", model=base),
    train("expired", HF_TOKEN="hf_expired"),
    train("reading", HF_TOKEN="hf_reading"),
]
print("codes:", codes)
"""


@pytest.fixture(scope="module")
def trained(tiny, tiny_checkpoint, tiny_processor, tmp_path_factory):
    """The Hub, the folder with the runs, the base, and what the program said."""
    root = tmp_path_factory.mktemp("trainer-push")
    folder = root / "private"
    folder.mkdir()
    rows = []
    for index in range(8):
        Image.new("RGB", (40 + index, 50), (20 * index, 80, 90)).save(folder / f"{index}.png")
        question, answer = f"<image>\nWhat is number {index}?", f"It is {index * 7}."
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        rows.append({"id": str(index), "image": f"{index}.png", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(rows))
    nested = tiny.model(projector_type="linear")
    fit_to_processor(nested, tiny_processor)
    nested.save_pretrained(root / "nested")
    tiny_processor.save_pretrained(root / "nested")
    with LoopbackHub() as hub:
        hub.upload("models/org/base", tiny_checkpoint)
        hub.upload("models/org/nested", root / "nested")
        # A push that fails now and then still arrives.
        hub.fail(Status(503), "/commit/", nth=2)
        # And one that never does.
        hub.fail(Status(403), "/user/broken/commit/", times=1000)
        environment = {**os.environ, **hub.environment(root / "home")}
        done = warm_python.run(["-c", RUNS, str(folder), str(tiny_checkpoint)], cwd=ROOT, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        assert hub.unknown == []
        yield hub, folder, tiny_checkpoint, done


def written(commit, folder: Path, inside: str = "") -> Path:
    """The files of a commit, those in the folder `inside` of it."""
    for path, file in commit.files.items():
        if path.startswith(inside):
            target = folder / path.removeprefix(inside)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.content)
    return folder


def pushes(hub, name: str, branch: str = "main") -> list:
    """All commits but the first, which is empty; oldest first."""
    return hub.repositories[f"models/user/{name}"].at(branch).history()[-2::-1]


@pytest.mark.slow
def test_runs_end_as_they_should(trained):
    hub, folder, base, done = trained
    assert "codes: [0, 0, 0, 0, 0, 2, 2, 2, 2]" in done.stdout
    assert "Pushed: " in done.stderr
    sentences = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(sentences) == 4 and "Traceback" not in done.stderr
    refused = sentences.pop(0)
    assert "may not write to user/broken" in refused and f"is whole at {folder / 'runs' / 'broken'}" in refused
    assert (folder / "runs" / "broken" / "checkpoint-4").is_dir()  # the pushes at 2 and 4 failed, and it went on
    assert done.stderr.count("A push to the Hub failed: ") == 3
    assert f"the adapter's base is {base}, a folder that nobody else has" in sentences[0]
    assert "is wrong or has expired" in sentences[1] and "hf_expired" not in done.stderr
    assert "may not write to user/reading" in sentences[2]
    assert {f"models/user/{name}" for name in ("local", "expired", "reading")}.isdisjoint(hub.repositories)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "steps", "kind"),
    [("checkpoint", [2, 4], "adapter"), ("all", [2, 4], "adapter"), ("nested", [2, 4], "model")],
)
def test_every_commit_is_a_whole_model(trained, tmp_path, name, steps, kind):
    hub, folder, base, _ = trained
    commits = pushes(hub, name)
    assert [commit.title for commit in commits] == [f"Training in progress, step {step}" for step in steps] + [
        "End of training"
    ]
    weights = []
    for index, commit in enumerate(commits):
        names = {path for path in commit.files if "/" not in path} - {".gitattributes"}
        assert all(goes(path, kind) or path == "README.md" for path in names), names
        readme = commit.files["README.md"].content.decode()
        assert problems(readme, "model") == ([], []) and "pipeline_tag: image-text-to-text" in readme
        place = written(commit, tmp_path / str(index))
        model = load_model(str(place), base=str(base) if kind == "adapter" else None)
        assert isinstance(model, torch.nn.Module)
        file = place / ("adapter_model.safetensors" if kind == "adapter" else "model.safetensors")
        weights.append(load_file(file))
    assert any(not torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    run = folder / "runs" / name
    final = load_file(run / ("adapter_model.safetensors" if kind == "adapter" else "model.safetensors"))
    assert all(torch.equal(weights[-1][key], final[key]) for key in final)


@pytest.mark.slow
def test_checkpoints_go_where_the_strategy_says(trained, tmp_path):
    hub, _, base, _ = trained
    for name, folders in {
        "checkpoint": [{"last-checkpoint"}] * 3,
        "all": [{"checkpoint-2"}, {"checkpoint-2", "checkpoint-4"}, {"checkpoint-2", "checkpoint-4"}],
        "nested": [set()] * 3,
    }.items():
        for index, (commit, expected) in enumerate(zip(pushes(hub, name), folders, strict=True)):
            assert {path.split("/")[0] for path in commit.files if "optimizer.pt" in path} == expected
            for inside in expected:
                place = written(commit, tmp_path / name / str(index) / inside, f"{inside}/")
                assert what_is_missing(place) is None
                load_model(str(place), base=str(base))


@pytest.mark.slow
def test_a_run_goes_on_from_what_was_pushed(trained):
    _, folder, _, _ = trained
    one, other = (
        load_file(folder / "runs" / name / "adapter_model.safetensors") for name in ("checkpoint", "resumed")
    )
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.slow
def test_end_pushes_once_and_to_its_branch(trained, tmp_path):
    hub, _, _, _ = trained
    assert pushes(hub, "end") == []
    [commit] = pushes(hub, "end", "trained")
    assert commit.title == "End of training"
    place = written(commit, tmp_path)
    assert json.loads((place / "config.json").read_text())["architectures"] == ["LlavaForConditionalGeneration"]
    assert type(load_model(str(place))) is hf_llava_ft.LlavaForCausalLM


@pytest.mark.slow
def test_a_trainer_pushes_when_it_is_told_to(trained, tmp_path):
    hub, _, _, _ = trained
    first, second = pushes(hub, "notebook")
    assert (first.title, second.title) == ("End of training", "Again")
    card = yaml.safe_load(first.files["README.md"].content.decode().split("---")[1])
    assert "mine" in card["tags"] and card["datasets"] == ["org/data"]
    assert (card["license"], card["language"]) == ("mit", "en")
    load_model(str(written(second, tmp_path)))


@pytest.mark.slow
def test_nothing_of_this_computer_goes(trained):
    hub, folder, _, _ = trained
    for name in ("checkpoint", "all", "nested", "end", "notebook"):
        for branch in hub.repositories[f"models/user/{name}"].branches:
            for commit in pushes(hub, name, branch):
                for path, file in commit.files.items():
                    for secret in (str(folder), str(folder.parent), "hf_loopback", str(Path.home())):
                        assert secret.encode() not in file.content, (name, path, secret)
                assert not any(path.endswith(("data.json", "training_args.bin", ".html")) for path in commit.files)
    left = [path for run in (folder / "runs").iterdir() for path in run.iterdir() if path.name.startswith(".")]
    assert left == []


@pytest.mark.slow
def test_an_adapter_names_the_commit_of_its_base(trained):
    hub, _, _, _ = trained
    for commit in pushes(hub, "checkpoint"):
        settings = json.loads(commit.files["adapter_config.json"].content)
        assert settings["base_model_name_or_path"] == "org/base"
        assert settings["revision"] == hub.repositories["models/org/base"].at("main").sha


class _Learner(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, x):
        return {"loss": (self.weight * x).sum()}


def test_training_ends_when_what_it_pushed_has_arrived(tmp_path):
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True
    )
    trainer = PushingTrainer(model=_Learner(), args=args, train_dataset=[{"x": torch.ones(1)}])
    may_arrive = threading.Event()
    with ThreadPoolExecutor(max_workers=1) as pushes:
        trainer._running_pushes = [pushes.submit(may_arrive.wait, 60)]
        threading.Timer(1, may_arrive.set).start()
        trainer.train()
        assert all(push.done() for push in trainer._running_pushes)
