"""What `llava-ft evaluate` found, as the metadata of a card has it: its `model-index`."""

from pathlib import Path

from huggingface_hub import EvalResult, ModelCard

from hf_llava_ft.checkpoints.evaluation_results import EvaluationResult, read_results
from hf_llava_ft.checkpoints.training_facts import hub_id

_CARD_FILE = "README.md"


def measured(result: EvaluationResult) -> EvalResult:
    """What `llava-ft evaluate` found."""
    is_main = result.figure == result.metric
    return EvalResult(
        task_type="image-text-to-text",
        dataset_type=result.data if "/" in result.data and hub_id(result.data) else "custom",
        dataset_name=result.data,
        dataset_config=result.data,  # huggingface_hub, up to 2.4, puts results together whose names alone differ
        metric_type=result.metric if is_main else result.figure,
        metric_name=result.metric if is_main else f"{result.metric}: {result.figure}",
        metric_value=round(result.value, 6),
    )


def renew_measured(folder: Path) -> bool:
    """Writes what was found since into the metadata of a card that is here; gives whether there is one."""
    path = Path(folder, _CARD_FILE)
    if not path.is_file():
        return False
    card = ModelCard.load(path, ignore_metadata_errors=True)
    new = [measured(each) for each in read_results(folder)]
    names = {(each.dataset_name, each.metric_name) for each in new}
    kept = [each for each in card.data.eval_results or [] if (each.dataset_name, each.metric_name) not in names]
    card.data.eval_results = [*kept, *new]
    card.data.model_name = card.data.model_name or Path(folder).resolve().name
    card.save(path)
    return True
