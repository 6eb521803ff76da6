"""Metrics by values computed by hand, and by those of the scorers that everybody compares with."""

import math

import numpy as np
import pytest

from hf_llava_ft.errors import UserError
from hf_llava_ft.evaluation.bootstrap import difference, interval
from hf_llava_ft.evaluation.metrics.by_name import METRICS, fitting_metric, metrics_called
from hf_llava_ft.evaluation.metrics.choices import choices_in, chosen
from hf_llava_ft.evaluation.metrics.cider import cider_scores, words_of
from hf_llava_ft.evaluation.metrics.given import Given, ratio
from hf_llava_ft.evaluation.metrics.short_answers import anls, edit_distance, is_exact, is_relaxed_match
from hf_llava_ft.evaluation.metrics.vqa import normalized, vqa_accuracy
from hf_llava_ft.evaluation.metrics.yes_no import says_yes
from hf_llava_ft.evaluation.scores import scored

CAPTIONS = [
    ("a cat sits on the mat", ["a cat is on the mat", "the cat sits on a mat"]),
    ("two dogs run in the park", ["dogs run in a park", "two dogs play in the park with a ball"]),
    ("a man rides a horse on a beach at dusk", ["a man on a horse", "a person rides a brown horse on the beach"]),
    ("a red bus", ["a red double decker bus on a street", "a bus"]),
]


def value(name, rows, figure=None):
    metric = METRICS[name]
    return metric.figures[figure or next(iter(metric.figures))](metric.statistics(rows).sum(0))


@pytest.mark.parametrize(
    "answer, reference, is_equal",
    [("Red.", "red", True), (" a  red car", "A red car", True), ("red", "dark red", False), ("", "red", False)],
)
def test_exact_match_passes_over_capitals_blanks_and_a_full_stop(answer, reference, is_equal):
    assert is_exact(answer, reference) is is_equal


@pytest.mark.parametrize(
    "answer, reference, is_right",
    [
        ("105", "100", True),
        ("95", "100", True),
        ("106", "100", False),
        ("-100", "100", False),
        ("25%", "0.25", True),
        ("25", "0.25", False),
        ("0", "0", True),
        ("0.01", "0", False),  # of zero no share can be taken
        ("Germany", "germany", True),
        ("12 apples", "12", False),
    ],
)
def test_relaxed_accuracy_is_that_of_chartqa(answer, reference, is_right):
    assert is_relaxed_match(answer, reference) is is_right


def test_edit_distance_counts_what_is_put_in_left_out_and_exchanged():
    assert edit_distance("kitten", "sitting") == 3 and edit_distance("", "abc") == 3 and edit_distance("abc", "") == 3


@pytest.mark.parametrize(
    "answer, references, score",
    [
        ("hello", ["hello"], 1.0),
        ("Hello  World", ["hello world"], 1.0),
        ("hallo", ["hello"], 0.8),
        ("ab", ["ac"], 0.5),  # the threshold itself counts
        ("abcd", ["axyz"], 0.0),
        ("hallo", ["something else", "hello"], 0.8),
        ("", ["hello"], 0.0),
    ],
)
def test_anls_takes_the_nearest_reference_and_nothing_below_a_half(answer, references, score):
    assert anls(answer, references) == pytest.approx(score)


@pytest.mark.parametrize(
    "answer, found",
    [
        ("The Two dogs.", "2 dogs"),
        ("none", "0"),
        ("dont know", "don't know"),
        ("red/blue", "red blue"),
        ("red / blue", "red blue"),
        ("1,000", "1000"),
        ("2.5", "2.5"),
        ("T-shirt", "t shirt"),
        ("what ?", "what"),
    ],
)
def test_answers_are_normalised_as_in_the_official_evaluation(answer, found):
    assert normalized(answer) == found


@pytest.mark.parametrize("num_equal, score", [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_of_ten_answers(num_equal, score):
    # Of three who said it, each of the seven others finds three and each of themselves two: (7 * 1 + 3 * 2/3) / 10.
    references = ["red"] * num_equal + ["blue"] * (10 - num_equal)
    assert vqa_accuracy("the Red", references) == pytest.approx(score)


def test_vqa_accuracy_of_fewer_answers():
    assert vqa_accuracy("Red.", ["red"]) == 1 and vqa_accuracy("blue", ["red"]) == 0
    assert vqa_accuracy("red", ["red", "red"]) == 1 and vqa_accuracy("red", ["red", "blue"]) == 0.5


def test_yes_and_no_are_read_as_llava_reads_pope():
    assert says_yes("Yes, there is.") and says_yes("There is a dog. No cat.")
    assert not says_yes("No, there is none.") and not says_yes("It is not there") and not says_yes("no")


def test_figures_of_yes_and_no():
    asked = [("yes", "yes")] * 3 + [("yes", "no")] * 1 + [("no", "no")] * 4 + [("no", "yes")] * 2
    rows = [Given(answer, (reference,)) for answer, reference in asked]  # 3 true, 1 false yes; 4 true, 2 false no
    found = {name: value("yes_no", rows, name) for name in METRICS["yes_no"].figures}
    assert found == pytest.approx(
        {"accuracy": 0.7, "precision": 0.75, "recall": 0.6, "f1": 2 * 0.75 * 0.6 / 1.35, "yes_share": 0.4}
    )
    assert value("yes_no", [Given("", ("yes",)), Given("", ("no",))]) == 0  # no answer is a wrong one
    assert value("yes_no", [Given("no", ("no",))], "f1") == 0
    with pytest.raises(UserError, match="neither yes nor no"):
        value("yes_no", [Given("yes", ("red",))])


@pytest.mark.parametrize(
    "answer, place",
    [
        ("B", 1),
        ("(B)", 1),
        ("B.", 1),
        ("B. a dog", 1),
        ("B) a dog", 1),
        ("The answer is B.", 1),
        ("the answer is: (B)", 1),
        ("a dog", 1),
        ("A dog.", 1),  # the words, not the letter in front of them
        ("D", None),
        ("perhaps", None),
        ("", None),
    ],
)
def test_the_choice_that_an_answer_names(answer, place):
    assert chosen(answer, ["a cat", "a dog", "a cow"]) == place


def test_choices_stand_in_a_question_or_not():
    assert choices_in("Which?\nA. a cat\n(B) a dog\nAnswer with the letter.") == ("a cat", "a dog")
    assert choices_in("Which?\nB. a cat\nC. a dog") == () and choices_in("A. Smith is who?") == ()


def test_multiple_choice_by_letter_and_by_likelihood():
    row = Given("A", ("B",), ("a cat", "a dog"), choice_losses=(2.0, 1.5))
    assert value("choice", [row]) == 0 and value("choice_likelihood", [row]) == 1
    assert value("choice_likelihood", [Given("", ("a cat",), ("a cat", "a dog"), choice_losses=(2.0, 1.5))]) == 0


def test_cider_has_the_values_of_pycocoevalcap():
    answers = [words_of(answer) for answer, _ in CAPTIONS]
    references = [[words_of(each) for each in references] for _, references in CAPTIONS]
    # pycocoevalcap 1.2, Cider().compute_score
    expected = [3.984827684059434, 3.4851469276445584, 1.8779041485151842, 1.6820358848857615]
    assert cider_scores(answers, references) == pytest.approx(expected, abs=1e-12)
    assert words_of("A cat's mid-air jump, twice!") == ["a", "cat's", "mid-air", "jump", "twice"]


def test_bleu_is_that_of_the_corpus_as_sacrebleu_has_it():
    import sacrebleu

    rows = [Given(answer, tuple(references)) for answer, references in CAPTIONS]
    answers, references = [row.answer for row in rows], list(zip(*(row.references for row in rows), strict=True))
    assert value("bleu", rows) * 100 == pytest.approx(sacrebleu.corpus_bleu(answers, references).score)
    assert value("bleu", [Given("the cat is on the mat", ("the cat is on the mat",))]) == pytest.approx(1)
    assert value("bleu", [Given("", ("the cat",))]) == 0


def test_rouge_l_is_the_longest_common_part_with_the_nearest_reference():
    # "the cat on the mat" is common: 5 of 5 words of the answer, 5 of 6 of the reference.
    row = Given("the cat on the mat", ("a dog", "the cat sat on the mat"))
    assert value("rouge_l", [row]) == pytest.approx(2 * (5 / 5) * (5 / 6) / (5 / 5 + 5 / 6))


def test_word_error_rate_is_of_all_words_together():
    rows = [Given("the cat sat", ("the cat sat down",)), Given("x y z w", ("a b",)), Given("", ("a b",))]
    assert value("wer", rows) == pytest.approx((1 + 4 + 2) / (4 + 2 + 2))
    assert value("wer", [Given("a b", ("c d e", "a b"))]) == 0


def test_loss_is_the_mean_over_tokens_and_perplexity_its_exponential():
    rows = [Given("", ("a",), loss=(6.0, 2)), Given("", ("b",), loss=(1.0, 8))]
    assert value("loss", rows) == pytest.approx(0.7) and value("loss", rows, "perplexity") == pytest.approx(
        math.exp(0.7)
    )


def test_an_interval_is_that_of_a_binomial():
    statistics = np.array([[1.0, 1.0]] * 60 + [[0.0, 1.0]] * 40)
    found = interval(statistics, ratio, draws=4000, seed=1)
    assert found.value == 0.6 and found == interval(statistics, ratio, draws=4000, seed=1)
    half = 1.96 * math.sqrt(0.6 * 0.4 / 100)
    assert (found.low, found.high) == pytest.approx((0.6 - half, 0.6 + half), abs=0.012)


def test_a_change_is_drawn_in_pairs():
    before = np.array([[float(index % 2), 1.0] for index in range(100)])
    after = before.copy()
    after[::10, 0] = 1.0  # ten rows get better, none worse
    paired = difference(before, after, ratio)
    assert paired.value == pytest.approx(0.1) and paired.low > 0.03
    assert difference(before, before, ratio).high == 0


def test_better_and_worse_rows_and_whether_it_is_noise():
    base = [Given("x", ("a",)), Given("a", ("a",)), Given("a", ("a",))] * 20
    tuned = [Given("a", ("a",)), Given("x", ("a",)), Given("a", ("a",))] * 20
    scores = scored([METRICS["exact_match"]], tuned, base)
    assert scores.better == list(range(0, 60, 3)) and scores.worse == list(range(1, 60, 3))
    assert not scores.figures[0].is_beyond_noise
    worse = scored([METRICS["exact_match"]], [Given("x", ("a",))] * 60, base).figures[0]
    assert worse.is_beyond_noise and worse.is_worse
    losses = [[Given("", ("a",), loss=(number, 1)) for _ in range(5)] for number in (1.0, 2.0)]
    assert scored([METRICS["loss"]], losses[1], losses[0]).figures[0].is_worse  # a loss that rose
    assert not scored([METRICS["loss"]], losses[0], losses[1]).figures[0].is_worse


@pytest.mark.parametrize(
    "rows, name",
    [
        ([("yes",), ("No, there is not.",)], "yes_no"),
        ([("red",), ("dark blue",)], "exact_match"),
        ([("12",), ("3.5%",), ("red",)], "relaxed_accuracy"),
        ([("red", "red", "blue"), ("two", "2")], "vqa_accuracy"),
        ([("a cat sits on the mat", "a cat on a mat in the room")], "cider"),
        ([("a cat sits on the mat by the door",)], "rouge_l"),
    ],
)
def test_the_metric_that_fits_the_answers(rows, name):
    metric, reason = fitting_metric([Given("", references) for references in rows])
    assert metric.name == name and reason


def test_the_metric_of_questions_with_choices():
    assert fitting_metric([Given("", ("B",), ("a", "b"))])[0].name == "choice"
    assert fitting_metric([Given("", ("other",), ("a", "b"))])[0].name == "exact_match"


def test_metrics_by_name_and_what_is_missing(monkeypatch):
    assert [metric.name for metric in metrics_called(["loss,anls", "anls"])] == ["loss", "anls"]
    with pytest.raises(UserError, match="--metric f1 is none"):
        metrics_called(["f1"])
    monkeypatch.setattr("hf_llava_ft.evaluation.metrics.texts.find_spec", lambda module: None)
    with pytest.raises(UserError, match=r"needs sacrebleu: pip install 'hf-llava-ft\[evaluation\]'"):
        metrics_called(["bleu"])
