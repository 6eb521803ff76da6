"""All metrics, and which of them fits data that nobody said one for."""

from collections.abc import Sequence
from statistics import median

from hf_llava_ft.errors import UserError
from hf_llava_ft.evaluation.metrics.choices import CHOICE, CHOICE_LIKELIHOOD, chosen
from hf_llava_ft.evaluation.metrics.cider import CIDER
from hf_llava_ft.evaluation.metrics.given import Given, Metric
from hf_llava_ft.evaluation.metrics.losses import LOSS
from hf_llava_ft.evaluation.metrics.short_answers import ANLS, EXACT_MATCH, RELAXED_ACCURACY
from hf_llava_ft.evaluation.metrics.texts import BLEU, ROUGE_L, WER, is_installed
from hf_llava_ft.evaluation.metrics.vqa import VQA_ACCURACY
from hf_llava_ft.evaluation.metrics.yes_no import YES_NO, yes_or_no

METRICS = {
    metric.name: metric
    for metric in (
        *(EXACT_MATCH, RELAXED_ACCURACY, VQA_ACCURACY, ANLS, YES_NO, CHOICE, CHOICE_LIKELIHOOD),
        *(CIDER, BLEU, ROUGE_L, WER, LOSS),
    )
}
_MANY_WORDS = 5


def metrics_called(names: Sequence[str]) -> list[Metric]:
    """
    Those of `--metric`, in its order.

    Raises:
        UserError: if there is none of a name, or what it needs is not installed.
    """
    wanted = [name.strip() for each in names for name in each.split(",")]
    unknown = next((name for name in wanted if name not in METRICS), None)
    if unknown is not None:
        raise UserError(f"--metric {unknown} is none that there is: use {', '.join(METRICS)}.")
    found = [METRICS[name] for name in dict.fromkeys(wanted)]
    for metric in found:
        if not is_installed(metric):
            raise UserError(f"--metric {metric.name} needs {metric.needs[0]}: pip install 'hf-llava-ft[evaluation]'.")
    return found


def fitting_metric(rows: Sequence[Given]) -> tuple[Metric, str]:
    """The metric for data by its answers, and the reason in words."""
    references = [reference for row in rows for reference in row.references]
    words = median(len(reference.split()) for reference in references)
    if all(yes_or_no(reference) is not None for reference in references) and words <= _MANY_WORDS:
        return YES_NO, "all answers are yes or no"
    if all(row.choices and chosen(row.references[0], row.choices) is not None for row in rows):
        return CHOICE, "every question has choices, and its answer is one of them"
    has_several = any(len(row.references) > 1 for row in rows)
    if has_several and words > _MANY_WORDS:
        return CIDER, f"there are several captions to a row, with {words:g} words"
    if has_several:
        return VQA_ACCURACY, "there are several short answers to a row"
    if words > _MANY_WORDS and is_installed(ROUGE_L):
        return ROUGE_L, f"answers have {words:g} words"
    if words > _MANY_WORDS:
        return EXACT_MATCH, "answers are long, and rouge_l needs pip install 'hf-llava-ft[evaluation]'"
    if sum(_is_number(reference) for reference in references) * 2 >= len(references):
        return RELAXED_ACCURACY, "at least half of the answers are numbers"
    return EXACT_MATCH, f"answers are short, with {words:g} words"


def _is_number(text: str) -> bool:
    try:
        float(text.strip().rstrip("%"))
    except ValueError:
        return False
    return True
