"""What is told of a training: what others may know, and nothing that has another type than it should."""

import json
import os

import pytest
from huggingface_hub import constants

from hf_llava_ft.checkpoints import training_facts as module
from hf_llava_ft.checkpoints.training_facts import (
    SUMMARY_FILE,
    TRAINING_FILE,
    TrainingFacts,
    base_facts,
    hub_commit,
    training_facts,
)
from hf_llava_ft.errors import UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SUMMARY = {
    "steps": 4,
    "epochs": 2.0,
    "rows_per_step": 8,
    "supervised_tokens": 30,
    "tokens": 100,
    "seconds": 3.5,
    "seconds_without_evaluation": 2.5,
    "peak_memory": {"bytes": 2**30, "of": "GPU memory of the first process"},
    "device": "NVIDIA H200",
    "base": [{"name": "org/base", "commit": COMMIT}],
    "trained": [{"part": "lm_head", "num_trainable": 0, "num_total": 5, "dtype": "bfloat16", "learning_rate": "-"}],
    "data": {
        "rows": 16,
        "fingerprint": "ab12",
        "sources": [
            {"where": "/home/me/secret place/rows.json", "format": "LLaVA JSON", "weight": 2.0, "fingerprint": "cd"},
            {"where": "C:\\Users\\me\\rows.csv", "format": "image-caption CSV", "weight": 1},
            {"where": "org/rows:train", "format": "messages Hub data set", "weight": 1},
        ],
    },
    "settings": {
        "learning_rate": 2e-5,
        "lora_r": 16,
        "bf16": True,
        "train_type": "lora",
        "output_dir": "~/runs/out",
        "model_name_or_path": "/home/me/base",
        "hub_token": "hf_abcdefgh",
        "deepspeed": "/home/me/zero3.json",
        "version": "/home/me/template",
    },
    "versions": {"torch": "2.13.0+cpu", "../x": "1"},
}
LOG = [
    {"step": 1, "loss": 2.0, "learning_rate": 1e-5},
    {"step": 2, "eval_loss": 1.5},
    {"step": 3, "loss": float("nan"), "learning_rate": 1e-5},
    {"step": 4, "loss": 1.0},
    {"step": 4, "train_loss": 1.5},
]


def test_of_a_run_that_is_kept_which_others_may_know(tmp_path):
    facts = TrainingFacts.of_run(SUMMARY, LOG)
    assert facts.settings == {"learning_rate": 2e-5, "lora_r": 16, "bf16": True, "train_type": "lora"}
    assert facts.numbers["seconds"] == 2.5 and facts.numbers["peak_memory_bytes"] == 2**30
    assert facts.losses == [[1, 2.0, 1e-5], [4, 1.0, 0]] and facts.evaluated == [[2, 1.5]]
    assert [(source["name"], source["on_hub"]) for source in facts.sources] == [
        *(("rows.json", False), ("rows.csv", False), ("org/rows:train", True)),
    ]
    assert facts.base == SUMMARY["base"] and facts.trained == SUMMARY["trained"]
    assert facts.versions == {"torch": "2.13.0+cpu"}
    facts.save(tmp_path)
    written = (tmp_path / TRAINING_FILE).read_text()
    for secret in ("home", "Users", "runs", "hf_abc", "zero3", "secret place"):
        assert secret in json.dumps(SUMMARY) and secret not in written
    assert training_facts(tmp_path) == facts


def test_a_run_is_read_with_its_log(tmp_path):
    (tmp_path / SUMMARY_FILE).write_text(json.dumps(SUMMARY))
    assert training_facts(tmp_path).losses == []
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": LOG}))
    assert training_facts(tmp_path) == TrainingFacts.of_run(SUMMARY, LOG)


def test_where_nothing_is_known_nothing_is_told(tmp_path):
    assert training_facts(tmp_path) is None
    (tmp_path / TRAINING_FILE).write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        training_facts(tmp_path)


@pytest.mark.parametrize(
    "value", [None, 3, 10**400, "x", "a\n\n# b", [], [1], [None, {}], {}, {"rows": []}, [[1, 2, 3, "x"]], True, -1]
)
def test_what_has_another_type_is_left_out(value):
    """The file comes with a model that somebody else has pushed."""
    whole = json.loads(json.dumps(module.asdict(TrainingFacts.of_run(SUMMARY, LOG))))
    for name in whole:
        facts = TrainingFacts.of_json(whole | {name: value})
        assert not getattr(facts, name) or name == "device" and facts.device == value
        for inner in whole[name] if isinstance(whole[name], dict) else ():
            TrainingFacts.of_json(whole | {name: {**whole[name], inner: value}})
    assert TrainingFacts.of_json(value) == TrainingFacts()


def test_a_name_that_is_no_repository_is_not_on_the_hub():
    [source] = TrainingFacts.of_json({"sources": [{"name": "../../x](http://e)", "on_hub": True}]}).sources
    assert not source["on_hub"]


def test_a_long_log_is_thinned_to_its_ends():
    log = [{"step": step, "loss": 1.0 / step, "learning_rate": 0.1} for step in range(1, 5008)]
    losses = TrainingFacts.of_run({}, log).losses
    assert len(losses) <= module.MAX_LOGGED + 1
    assert losses[0][0] == 1 and losses[-1][0] == 5007


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The cache of the Hub with org/base, whose main is at COMMIT."""
    folder = tmp_path / "models--org--base"
    (folder / "snapshots" / COMMIT).mkdir(parents=True)
    (folder / "snapshots" / COMMIT / "config.json").write_text("{}")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))


def test_the_commit_of_a_base_is_that_in_the_cache(cache, tmp_path, monkeypatch):
    assert hub_commit("org/base") == hub_commit("org/base", "main") == hub_commit("org/base", COMMIT) == COMMIT
    assert hub_commit("org/base", "other") is None and hub_commit("org/unknown") is None
    assert base_facts(["org/base", "/a/folder", "org/unknown"]) == [{"name": "org/base", "commit": COMMIT}]
    monkeypatch.chdir(tmp_path)
    os.makedirs("org/base")  # a folder of that name is what would be loaded
    assert hub_commit("org/base") is None


def test_what_a_folder_was_made_of_is_what_is_made_of_it(cache, tmp_path):
    parts = base_facts(["org/base"])
    TrainingFacts(base=parts).save(tmp_path)
    assert base_facts([str(tmp_path)]) == parts
    (tmp_path / TRAINING_FILE).write_text("{")  # a note that is damaged does not cost a run its summary
    assert base_facts([str(tmp_path)]) == []


def test_of_a_checkpoint_what_was_so_when_it_was_written(tmp_path):
    (tmp_path / SUMMARY_FILE).write_text(json.dumps(SUMMARY))
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    state = {"global_step": 2, "epoch": 1.0, "log_history": LOG[:2]}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    facts = training_facts(folder)
    assert facts.losses == [[1, 2.0, 1e-5]] and facts.evaluated == [[2, 1.5]] and facts.settings["lora_r"] == 16
    assert facts.numbers == {"steps": 2, "epochs": 1.0, "rows_per_step": 8, "peak_memory_bytes": 2**30}
    merged = folder.rename(tmp_path / "merged")  # what else lies in a run's folder is not of that run
    assert training_facts(merged) is None
