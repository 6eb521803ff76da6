"""`llava-ft evaluate` on tiny models: the figures are those of its files, and a killed command goes on."""

import io
import json
import math

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from rich.console import Console

from hf_llava_ft.answering.loading import load_for_answering
from hf_llava_ft.checkpoints.evaluation_results import EvaluationResult, read_results
from hf_llava_ft.data.collator import LlavaCollator
from hf_llava_ft.errors import UserError
from hf_llava_ft.evaluation import judged
from hf_llava_ft.evaluation.evaluate import Data, evaluate
from hf_llava_ft.evaluation.retention import METRICS, NAME, PHOTOGRAPHS, QUESTIONS, retention_questions
from hf_llava_ft.evaluation.rows import facts_of_row, rows_of
from hf_llava_ft.hub.measured_results import measured, renew_measured
from hf_llava_ft.hub.model_card import write_card
from tests.tiny_models import build_tiny_processor, tiny_model

LOADING = {"device": "cpu"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models of different weights."""
    folders = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = tiny_model()
        with torch.no_grad():
            for parameter in model.lm_head.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = [2], 0
        folder = tmp_path_factory.mktemp("models") / f"model{seed}"
        model.save_pretrained(folder)
        build_tiny_processor().save_pretrained(folder)
        folders.append(folder)
    return folders


@pytest.fixture
def told():
    return Console(record=True, file=io.StringIO(), width=300)


def evaluated(model, data, folder, into, console=None, **more):
    found = Data(str(data), image_folder=str(folder))
    settings = {"batch_size": 2, "max_new_tokens": 4, "loading": LOADING, "console": console, "draws": 50} | more
    return evaluate(str(model), found, output_dir=into, **settings)


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_two_models_side_by_side(llava_ft, models, llava_json, tmp_path):
    data, folder = llava_json(5, with_text_rows=True)
    into, result = tmp_path / "found", tmp_path / "result.json"
    flags = ["--data_path", data, "--image_folder", folder, "--output_dir", into, "--max_new_tokens", 4]
    flags += ["--batch_size", 2, "--device", "cpu", "--json", result, "--metric", "anls,loss"]
    code, out, err = llava_ft("evaluate", "--model", models[1], "--base", models[0], *flags)
    assert code == 0, err
    found = json.loads(result.read_text())
    assert found["rows"] == 5 and found == json.loads((into / "result.json").read_text())
    assert [figure["figure"] for figure in found["figures"]] == ["anls", "loss", "perplexity"]
    assert "Rows that got better" in err and str(into / "report.html") in err
    for name, model in (("base", models[0]), ("tuned", models[1])):
        said = lines(into / f"answers-{name}.jsonl")
        assert [line["row"] for line in said] == [1, 2, 3, 4, 5] and len({line["answer"] for line in said}) > 0
        # The loss of all answers' tokens, as the model itself computes it in one batch.
        parts = load_for_answering(str(model), device="cpu")
        rows = []
        for index, raw in enumerate(json.loads(data.read_text())):
            turns = [
                {"role": "user", "content": []},
                {"role": "assistant", "content": raw["conversations"][1]["value"]},
            ]
            if "image" in raw:
                turns[0]["content"].append({"type": "image"})
            question = f"What is number {index}?"
            turns[0]["content"].append({"type": "text", "text": f"\n{question}" if "image" in raw else question})
            pictures = [Image.open(folder / raw["image"])] if "image" in raw else []
            rows.append({"messages": turns, "images": pictures, "id": str(index)})
        batch = LlavaCollator(parts[1])(rows)
        with torch.no_grad():
            logits = parts[0](**{name: value for name, value in batch.items() if name != "labels"}).logits
        logits[..., max(parts[1].tokenizer.get_vocab().values()) + 1 :] = -math.inf  # rows of the head without a token
        logits[..., parts[1].image_token_id] = -math.inf
        targets = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100).item()
        assert found["figures"][1][name]["value"] == pytest.approx(loss, rel=1e-4)
        assert found["figures"][2][name]["value"] == pytest.approx(math.exp(loss), rel=1e-3)


def test_a_killed_evaluation_goes_on_and_a_finished_one_is_only_computed_again(
    models, llava_json, tmp_path, monkeypatch, told
):
    data, folder = llava_json(6)
    into, whole = tmp_path / "found", judged.losses_of
    unbroken = evaluated(models[0], data, folder, tmp_path / "unbroken", metrics=["exact_match,loss"])

    windows = []

    def killed(*args, **settings):
        if windows:
            raise KeyboardInterrupt
        windows.append(1)
        return whole(*args, **settings)

    monkeypatch.setattr(judged, "_BATCHES_AT_ONCE", 1)
    monkeypatch.setattr(judged, "losses_of", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluated(models[0], data, folder, into, metrics=["exact_match,loss"])
    assert len(lines(into / "answers-tuned.jsonl")) == 6 and len(lines(into / "losses-tuned.jsonl")) == 2
    monkeypatch.setattr(judged, "losses_of", whole)
    # What was answered is not asked again: nothing could be, with this.
    monkeypatch.setattr("hf_llava_ft.answering.files.answer_all", lambda *args, **settings: 1 / 0)
    again = evaluated(models[0], data, folder, into, told, metrics=["exact_match,loss"])
    assert again.as_json()["figures"] == unbroken.as_json()["figures"]
    assert "6 of 6 rows are there" in told.export_text()
    monkeypatch.setattr("hf_llava_ft.evaluation.evaluate.load_for_answering", lambda *args, **settings: 1 / 0)
    other = evaluated(models[0], data, folder, into, metrics=["anls"])
    assert other.scores.figures[0].name == "anls"
    with pytest.raises(UserError, match="begun with another max_new_tokens.*--output_dir"):
        evaluated(models[0], data, folder, into, metrics=["anls"], max_new_tokens=5)


def test_a_metric_that_does_not_suit_the_data_is_refused_before_anything_is_asked(models, llava_json, tmp_path):
    for metric, said in (("yes_no", "neither yes nor no"), ("choice", "has no choices")):
        with pytest.raises(UserError, match=said):
            evaluated(models[0], *llava_json(2), tmp_path / "found", metrics=[metric])
    assert not (tmp_path / "found").exists()


def test_choices_several_answers_and_a_metric_that_is_chosen(models, tmp_path, told):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    rows = [
        {"image": "red.png", "prompt": "Which?\nA. red\nB. blue", "completion": "A"},
        {"image": "red.png", "prompt": "Which?", "completion": "(B)", "choices": ["green", "red"]},
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    found = evaluated(models[0], data, tmp_path, tmp_path / "found", told)
    assert found.scores.figures[0].name == "choice" and "Metric: choice, because" in told.export_text()
    assert [facts.choices for facts in found.facts] == [("red", "blue"), ("green", "red")]
    likeliest = evaluated(models[0], data, tmp_path, tmp_path / "found", metrics=["choice_likelihood"])
    losses = [line["choice_losses"] for line in lines(tmp_path / "found" / "likelihoods-tuned.jsonl")]
    right = [losses[0][0] < losses[0][1], losses[1][1] < losses[1][0]]
    assert likeliest.scores.figures[0].tuned.value == sum(right) / 2

    rows = [{"question_id": 1, "image": "red.png", "question": "Which?", "answers": ["red", "red", "blue"]}]
    data.write_text(json.dumps(rows[0]))
    found = evaluated(models[0], data, tmp_path, tmp_path / "several")
    assert found.scores.figures[0].name == "vqa_accuracy" and found.facts[0].references == ("red", "red", "blue")
    data.write_text(json.dumps({"question_id": 1, "image": "red.png", "text": "Which?"}))
    with pytest.raises(UserError, match="row 1 has no answer to compare with"):
        evaluated(models[0], data, tmp_path, tmp_path / "none")
    with pytest.raises(UserError, match="row 1 has no choices"):
        data.write_text(json.dumps(rows[0]))
        evaluated(models[0], data, tmp_path, tmp_path / "none", metrics=["choice"])


def test_the_page_shows_rows_and_escapes_what_was_said(models, tmp_path):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    hostile = "<script>alert(1)</script>"
    rows = [{"image": "red.png", "prompt": hostile, "completion": "red"}, {"prompt": "And?", "completion": "blue"}]
    data = tmp_path / "rows.json"
    data.write_text(json.dumps(rows))
    evaluated(models[0], data, tmp_path, tmp_path / "found", base=str(models[1]), metrics=["exact_match"])
    page = (tmp_path / "found" / "report.html").read_text()
    assert hostile not in page and "&lt;script&gt;" in page and "<script" not in page
    assert page.count("<article") == 2 and page.count('src="data:image/jpeg') == 1
    assert 'id="show-same"' in page and 'id="show-wrong"' in page and 'id="show-better"' not in page


def test_results_reach_the_card_and_do_not_pile_up(models, llava_json, tmp_path):
    data, folder = llava_json(3)
    (models[0] / "evaluation.json").unlink(missing_ok=True)
    (models[0] / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n")
    for _ in range(2):
        evaluated(models[0], data, folder, tmp_path / "found", metrics=["anls,loss"])
        assert renew_measured(models[0])
    card = ModelCard.load(models[0] / "README.md")
    assert [(each.dataset_name, each.metric_type) for each in card.data.eval_results] == [
        ("data.json", "anls"),
        ("data.json", "loss"),
        ("data.json", "perplexity"),
    ]
    assert card.data.license == "mit" and "# Mine" in card.text
    assert card.data.eval_results[0].metric_value == pytest.approx(read_results(models[0])[0].value, abs=1e-6)
    assert [each.dataset_type for each in card.data.eval_results] == ["custom"] * 3
    text = write_card(models[0], kind="model", repo_id="me/mine").text
    assert "| data&#46;json (3) | anls | 0 (0 to 0) |" in text and "loss: perplexity" in text
    assert "No evaluation is recorded" not in text and "has not been measured" not in text
    (models[0] / "evaluation.json").write_text(json.dumps({"results": [{"data": 3}, "x", None]}))
    assert read_results(models[0]) == []
    for name in ("README.md", "evaluation.json"):
        (models[0] / name).unlink()


def test_the_retention_probe_has_forty_questions_that_can_be_told_apart():
    rows = list(rows_of(retention_questions(), None))
    assert len(rows) == 40 and sum(bool(row.question.images) for row in rows) == 20
    for row in rows:
        facts = facts_of_row(row)
        assert facts.choices.count(facts.references[0]) == 1 and len(set(facts.choices)) == len(facts.choices) > 1


def test_retention_compares_with_the_base(llava_ft, models, tmp_path):
    flags = ["--retention", "--output_dir", tmp_path / "found", "--max_new_tokens", 2, "--device", "cpu"]
    code, _, err = llava_ft("evaluate", "--model", models[1], "--base", models[0], *flags)
    assert code == 0 and "forg" in err
    found = json.loads((tmp_path / "found" / "result.json").read_text())
    assert [each["figure"] for each in found["figures"]] == [metric.name for metric in METRICS]
    assert found["data"] == NAME and QUESTIONS.is_file() and PHOTOGRAPHS.is_dir()


def test_what_is_asked_for_must_be_one_thing(llava_ft, models):
    code, _, err = llava_ft("evaluate", "--model", models[0])
    assert code == 2 and "one of --data_path, --eval_split" in err


def test_a_data_set_of_the_hub_is_named_by_its_id():
    result = EvaluationResult("user/vqa", 4, "yes_no", "f1", 0.5, 0.4, 0.6)
    assert measured(result).dataset_type == "user/vqa" and measured(result).metric_name == "yes_no: f1"
