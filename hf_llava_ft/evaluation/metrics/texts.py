"""Longer answers, by libraries of the extra `evaluation`: BLEU, ROUGE-L, and word errors of what was read."""

import importlib
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

from hf_llava_ft.errors import UserError
from hf_llava_ft.evaluation.metrics.given import Given, Metric, ratio


def is_installed(metric: Metric) -> bool:
    """Whether what a metric needs is there."""
    return all(find_spec(module) is not None for module in metric.needs)


def _library(module: str, metric: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"--metric {metric} needs {module}: pip install 'hf-llava-ft[evaluation]'.") from error


def _bleu_counts(rows: Sequence[Given]) -> np.ndarray:
    """Right and all groups of one to four words, and the lengths of answers and references: `float64[N, 10]`."""
    bleu = _library("sacrebleu", "bleu").BLEU(effective_order=True)
    found = []
    for row in rows:
        score = bleu.sentence_score(row.answer, list(row.references))
        found.append([*score.counts, *score.totals, score.sys_len, score.ref_len])
    return np.array(found, dtype=np.float64).reshape(-1, 10)


def _bleu(sums: np.ndarray, *, of_one_row: bool = False) -> float:
    counts = [round(float(value)) for value in sums]
    score = _library("sacrebleu", "bleu").BLEU.compute_bleu(
        counts[:4], counts[4:8], counts[8], counts[9], smooth_method="exp", effective_order=of_one_row
    )
    return float(score.score) / 100


def _rouge_l(rows: Sequence[Given]) -> np.ndarray:
    scorer = _library("rouge_score.rouge_scorer", "rouge_l").RougeScorer(["rougeL"], use_stemmer=True)
    scores = [scorer.score_multi(list(row.references), row.answer)["rougeL"].fmeasure for row in rows]
    return np.stack((np.array(scores), np.ones(len(rows))), axis=1)


def _word_errors(rows: Sequence[Given]) -> np.ndarray:
    """Wrong words and words of the nearest reference: `float64[N, 2]`."""
    jiwer = _library("jiwer", "wer")
    found = []
    for row in rows:
        each = []
        for reference in filter(str.strip, row.references):
            words = jiwer.process_words(reference, row.answer)
            errors = words.substitutions + words.deletions + words.insertions
            each.append((errors, words.hits + words.substitutions + words.deletions))
        found.append(min(each, key=lambda pair: pair[0] / pair[1], default=(0, 0)))
    return np.array(found, dtype=np.float64).reshape(-1, 2)


BLEU = Metric(
    "bleu", "BLEU", _bleu_counts, {"bleu": _bleu}, lambda row: _bleu(row, of_one_row=True), needs=("sacrebleu",)
)
ROUGE_L = Metric("rouge_l", "ROUGE-L", _rouge_l, {"rouge_l": ratio}, ratio, needs=("rouge_score",))
WER = Metric("wer", "Word error rate", _word_errors, {"wer": ratio}, ratio, higher_is_better=False, needs=("jiwer",))
