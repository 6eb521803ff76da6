"""`llava-ft evaluate --tasks`: the field's benchmarks through the field's tool.

lmms-eval brings questions, prompts and scores; the answers come from our batches, so that folders of either kind and
adapters are asked as they are.

What may surprise: of a task's `generation_kwargs`, `until` is not heeded, nor is it in lmms-eval's own classes for
LLaVA: an answer ends where the model ends it.
"""

from collections import defaultdict
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console

from hf_llava_ft.answering.batches import Question, answer_all
from hf_llava_ft.answering.files import progress_bar
from hf_llava_ft.answering.loading import load_for_answering
from hf_llava_ft.answering.prompts import question_content
from hf_llava_ft.answering.ranks import ALONE, Ranks, own_gpu
from hf_llava_ft.checkpoints.evaluation_results import EvaluationResult
from hf_llava_ft.errors import UserError
from hf_llava_ft.evaluation.results import keep_results

_BATCHES_AT_ONCE = 8  # whose pictures are held at once
_MOST_TOKENS = 1024  # where a task says nothing, as in lmms-eval's own classes
_95_PERCENT = 1.96  # standard errors


class BatchedAnswers:
    """
    A model as lmms-eval asks it: to be inherited from in front of its `lmms`, which it says the rest of.

    Args:
        model, processor: as `load_for_answering` gives them.
        batch_size (`int`): questions at a time.
    """

    def __init__(self, model: Any, processor: Any, batch_size: int, console: Console):
        super().__init__()
        self.task_dict: dict[str, Any]  # lmms-eval's: the rows of each task by split
        self.model = model
        self.device = torch.device("cpu")  # where lmms-eval puts what the processes tell each other, over gloo
        self._processor, self._batch_size, self._console = processor, batch_size, console
        self.failed: set[tuple[str, Any]] = set()  # task and row; of several processes one may ask a row twice

    def generate_until(self, requests: list[Any]) -> list[str]:
        """The answers, in the order of the requests."""
        by_options: dict[Any, list[int]] = defaultdict(list)
        for place, request in enumerate(requests):
            by_options[_sampling(request)].append(place)
        answers = [""] * len(requests)
        bar = progress_bar(self._console, "answers", 0, len(requests))
        with bar as advance, torch.inference_mode():
            for (temperature, top_p), places in by_options.items():
                for start in range(0, len(places), self._batch_size * _BATCHES_AT_ONCE):
                    window = places[start : start + self._batch_size * _BATCHES_AT_ONCE]
                    found = answer_all(
                        self.model,
                        self._processor,
                        [self._question(requests[place]) for place in window],
                        batch_size=self._batch_size,
                        temperature=temperature,
                        top_p=top_p,
                    )
                    for place, answer in found:
                        answers[window[place]] = answer.text
                        if answer.error:
                            self.failed.add((requests[window[place]].task_name, requests[window[place]].doc_id))
                        advance()
        return answers

    def _question(self, request: Any) -> Question:
        text, settings, pictures_of, row, task, split = request.args
        pictures = pictures_of(self.task_dict[task][split][row]) or []
        if not all(isinstance(picture, Image.Image) for picture in pictures):
            raise UserError(f"--tasks {task} asks about more than pictures, which LLaVA does not take.")
        messages = [{"role": "user", "content": question_content(text, len(pictures))}]
        return Question(messages, pictures, settings.get("max_new_tokens") or _MOST_TOKENS)

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        raise UserError(
            f"--tasks {requests[0].task_name} compares likelihoods of given answers: take a task that reads answers, "
            f"or your own rows with --metric choice_likelihood."
        )

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        raise UserError(f"--tasks {requests[0].task_name} asks in several rounds: take a task that asks once.")


def _sampling(request: Any) -> tuple[float, float | None]:
    settings = request.args[1]
    if settings.get("num_beams") not in (None, 1):
        raise UserError(
            f"--tasks {request.task_name} searches with {settings['num_beams']} beams: take a task with one."
        )
    temperature = float(settings.get("temperature") or 0)
    return temperature, settings.get("top_p") if temperature else None


def evaluate_tasks(
    model: str,
    tasks: list[str],
    *,
    base: str | None = None,
    task_folder: Path | None = None,
    limit: int | None = None,
    output_dir: Path | None = None,
    batch_size: int = 16,
    loading: dict[str, Any] | None = None,
    ranks: Ranks = ALONE,
    console: Console | None = None,
) -> dict[str, Any] | None:
    """
    Asks a model lmms-eval's tasks, and writes what lmms-eval writes into `output_dir`.

    Args:
        model, base (`str`): a folder or Hub id, and the base of an adapter where it is not the one that it names.
        tasks (`list[str]`): names of lmms-eval's tasks and groups.
        task_folder (`Path`, *optional*): with more tasks, a YAML file each.
        limit (`int`, *optional*): rows of each task, for a trial.
        output_dir (`Path`, *optional*): by default `evaluation-NAME` here, after the model's folder.
        loading (`dict`): for [`load_for_answering`], but `base`.
        ranks (`Ranks`): processes that share the rows; the first writes and returns the result.

    Returns:
        `model`, `tasks` with the figures of each, `rows` with how many it has, and `without_answer`.

    Raises:
        UserError: if a task is unknown, or asks for what a LLaVA can't do.
    """
    console = console or Console(stderr=True)
    from lmms_eval.api.model import lmms
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager
    from lmms_eval.utils import make_table

    manager = TaskManager("WARNING", include_path=None if task_folder is None else str(task_folder))
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown:
        raise UserError(
            f"lmms-eval has no task {' and no '.join(unknown)}: `lmms-eval --tasks list` names all, and --task_folder "
            f"takes your own."
        )
    loading = loading or {}
    device = loading.get("device") or own_gpu()
    parts = load_for_answering(model, base=base, **{**loading, "device": device})
    asked: Any = type("AskedByLmmsEval", (BatchedAnswers, lmms), {})(*parts, batch_size, console)
    # "torchrun" is the group that is there already; "accelerate" finds no group of processes where there is no GPU.
    backend = "accelerate" if ranks.count == 1 else "torchrun"
    results = simple_evaluate(
        asked,
        tasks=list(tasks),
        task_manager=manager,
        limit=limit,
        batch_size=batch_size,
        distributed_executor_backend=backend,
    )
    num_failed = len(set().union(*ranks.from_all(asked.failed)))
    if results is None:  # not the first process of a launcher
        return None
    console.print(make_table(results), highlight=False, markup=False)
    into = Path(output_dir) if output_dir else Path(f"evaluation-{Path(model).resolve().name}")
    _write(results, model, into)
    rows = {task: number["effective"] for task, number in results["n-samples"].items()}
    if limit is None:
        keep_results(model, _results(results["results"], rows), lambda said: console.print(said, markup=False))
    if num_failed:
        console.print(f"{num_failed:,} questions have no answer, which counts as an empty one.")
    console.print(f"All of it is in {into}.", highlight=False, markup=False, soft_wrap=True)
    found = {"model": model, "tasks": results["results"], "rows": rows, "without_answer": num_failed}
    return found | {"output_dir": str(into)}


def _write(results: dict[str, Any], model: str, into: Path) -> None:
    """What `lmms-eval --output_path --log_samples` writes."""
    from lmms_eval.loggers import EvaluationTracker

    samples = results.pop("samples")
    tracker = EvaluationTracker(output_path=str(into))
    # Here and not in `simple_evaluate`, which would have it copy the model.
    tracker.general_config_tracker.log_experiment_args("hf_llava_ft", f"pretrained={model}", "", "", False)
    tracker.save_results_aggregated(results, samples, datetime.now().strftime("%Y%m%d_%H%M%S"))
    for task, its_samples in samples.items():
        tracker.save_results_samples(task, its_samples)


def _results(tasks: dict[str, dict[str, Any]], rows: dict[str, int]) -> list[EvaluationResult]:
    """Its figures, `accuracy,none` and the standard error `accuracy_stderr,none` say, as a card tells them."""
    found = []
    for task, figures in tasks.items():
        for key, value in figures.items():
            name, _, of_filter = key.partition(",")
            if not isinstance(value, float) or "_stderr" in name or task not in rows:
                continue
            error = figures.get(f"{name}_stderr,{of_filter}")
            around = _95_PERCENT * error if isinstance(error, float) else 0.0
            found.append(EvaluationResult(task, rows[task], name, name, value, value - around, value + around))
    return found
