"""`llava-ft evaluate`: a model on rows with known answers, and beside it the one that it was tuned from."""

import gc
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from hf_llava_ft.answering.files import state_of_data, state_of_model
from hf_llava_ft.answering.loading import answering_device, load_for_answering
from hf_llava_ft.answering.ranks import ALONE, Ranks, own_gpu
from hf_llava_ft.answering.rows import open_questions
from hf_llava_ft.checkpoints.files import read_json
from hf_llava_ft.checkpoints.inspection import ADAPTER_CONFIG
from hf_llava_ft.checkpoints.opening import load_config, load_processor
from hf_llava_ft.checkpoints.run_files import SUMMARY_FILE
from hf_llava_ft.data.formats import Source
from hf_llava_ft.data.formats.column_choice import SaidOfColumns
from hf_llava_ft.errors import UserError
from hf_llava_ft.evaluation.held_out import HeldOut, held_out_of
from hf_llava_ft.evaluation.judged import answers_in, given_of, losses_in
from hf_llava_ft.evaluation.metrics.by_name import fitting_metric, metrics_called
from hf_llava_ft.evaluation.metrics.given import Given, Metric
from hf_llava_ft.evaluation.metrics.losses import LOSS
from hf_llava_ft.evaluation.metrics.yes_no import is_yes_of
from hf_llava_ft.evaluation.report import write_evaluation_report
from hf_llava_ft.evaluation.results import keep_results, results_of
from hf_llava_ft.evaluation.rows import RowFacts, facts_of_row, rows_of
from hf_llava_ft.evaluation.scores import Scores, scored
from hf_llava_ft.evaluation.table import table_of
from hf_llava_ft.whole_files import write_atomically

REPORT_FILE, RESULT_FILE = "report.html", "result.json"


@dataclass(frozen=True)
class Data:
    """
    Args:
        data_path (`str`, *optional*): rows in any format that training reads; or
        run (`str`, *optional*): folder of a run, whose held-out rows are found again.
        image_folder, columns, access: see `open_questions`.
        system (`str`, *optional*): system message instead of the rows' own.
        name (`str`, *optional*): of the data, where it is not that of its file.
    """

    data_path: str | None = None
    run: str | None = None
    image_folder: str | None = None
    columns: SaidOfColumns = None
    access: dict[str, bool] = field(default_factory=dict)
    system: str | None = None
    name: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """
    Args:
        model, base (`str`): what was evaluated, and compared with.
        data (`str`): its name.
        facts (`list[RowFacts]`): the rows.
        scores (`Scores`): figures and rows' scores.
        reason (`str`, *optional*): why its metric was chosen, where nobody said one.
        output_dir (`Path`): where all of it is.
        num_failed (`int`): rows that the model gave no answer to.
    """

    model: str
    base: str | None
    data: str
    facts: list[RowFacts]
    scores: Scores
    reason: str | None
    output_dir: Path
    num_failed: int

    def as_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {"model": self.model, "base": self.base, "data": self.data, "rows": len(self.facts)}
        found |= {"reason": self.reason, "without_answer": self.num_failed}
        found["figures"] = [figure.as_json() for figure in self.scores.figures]
        if self.base is not None:
            for name in ("better", "worse"):
                places = getattr(self.scores, name)
                found[name] = [{"row": self.facts[place].key[1], "file": self.facts[place].key[0]} for place in places]
        return found | {"output_dir": str(self.output_dir), "report": str(self.output_dir / REPORT_FILE)}


def evaluate(
    model: str,
    data: Data,
    *,
    base: str | None = None,
    alone: bool = False,
    needs_base: bool = False,
    metrics: Sequence[str] = (),
    output_dir: str | Path | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 128,
    loading: dict[str, Any] | None = None,
    draws: int = 1000,
    seed: int = 0,
    facts_of: Callable[[list[Source]], dict[str, Any]] | None = None,
    ranks: Ranks = ALONE,
    console: Console | None = None,
) -> Evaluation | None:
    """
    Asks the rows' first questions, and writes answers, figures and a page into `output_dir`. An evaluation that was
    interrupted goes on where it was, and one that is finished is only computed again, with other metrics say.

    Args:
        model (`str`): folder or Hub id of a model or an adapter.
        base (`str`, *optional*): compared with it; by default the base that an adapter names or a run started from.
        alone (`bool`): nothing is compared.
        needs_base (`bool`): it is refused where nothing is known to compare with.
        metrics (`list[str]`): names of `METRICS`; by default the one that fits the answers of the data, and the loss.
        output_dir (`Path`, *optional*): by default `evaluation-NAME` here, after the model's folder.
        loading (`dict`): for [`load_for_answering`], but `base`.
        draws, seed (`int`): of the bootstrap.
        facts_of (*optional*): see `held_out_of`.
        ranks (`Ranks`): processes that share the rows, with one file system; the first writes and returns the result.

    Raises:
        UserError: if a row is wrong or has no answer to compare with, before anything is asked.
    """
    console, loading = console or Console(stderr=True, quiet=not ranks.is_first), loading or {}
    tell = _teller(console)
    wanted = metrics_called(metrics)
    answering_device(loading.get("device"))
    adapter = read_json(model, ADAPTER_CONFIG, loading.get("revision"))
    under = {} if adapter is None else {"base": base}
    compared = None if alone else base or base_of(model, adapter)
    of_base = None if base or adapter is None else adapter.get("revision")  # the commit that it was tuned on
    if needs_base and compared is None:
        raise UserError(f"{model} does not say what it was tuned from: give it as --base.")
    processor = load_processor(model, loading.get("revision"), base=under.get("base"))
    found = _found_data(data, processor, facts_of)

    def rows() -> Any:
        return rows_of(found.sources, found.keys, data.system)

    facts = [facts_of_row(row) for row in rows()]
    if not facts:
        raise UserError(f"{found.name} holds no row to evaluate.")
    chosen, reason = _chosen(wanted, facts)
    if reason is not None:
        tell(f"Metric: {chosen[0].name}, because {reason}; --metric says another.")
    into = Path(output_dir) if output_dir else Path(f"evaluation-{Path(model).resolve().name}")
    into.mkdir(parents=True, exist_ok=True)
    state: dict[str, Any] = {
        "data": state_of_data(found.sources),
        "rows": None if found.keys is None else sorted(found.keys),
    }
    state |= {"image_folder": data.image_folder, "columns": data.columns, "system": data.system}
    asking = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
    judged = {}
    for name, path, more in (("base", compared, {}), ("tuned", model, under)):
        if path is not None:
            its_loading = {**(loading if name == "tuned" else {**loading, "revision": of_base}), **more}
            judged[name] = _judge(
                into, name, path, its_loading, state, found.sources, rows, facts, chosen, asking, ranks, console
            )
    if not ranks.is_first:
        return None
    tuned, num_failed = judged["tuned"]
    scores = scored(chosen, tuned, judged["base"][0] if "base" in judged else None, draws=draws, seed=seed)
    evaluation = Evaluation(model, compared, found.name, facts, scores, reason, into, num_failed)
    write_evaluation_report(
        into / REPORT_FILE, evaluation, rows, tuned, judged["base"][0] if "base" in judged else None
    )
    content = json.dumps(evaluation.as_json(), indent=2, ensure_ascii=False) + "\n"
    write_atomically(into / RESULT_FILE, lambda path: path.write_text(content, encoding="utf-8"))
    keep_results(model, results_of(found.name, len(facts), scores), tell)
    _tell(evaluation, console, tell)
    return evaluation


def base_of(model: str, adapter: dict[str, Any] | None) -> str | None:
    """What an adapter names as its base, or the run in a folder was started from; None where neither is known."""
    if adapter is not None:
        return adapter.get("base_model_name_or_path")
    summary = read_json(model, SUMMARY_FILE) if Path(model).is_dir() else None
    named = (summary or {}).get("settings", {}).get("model_name_or_path")
    if not isinstance(named, str):
        return None
    try:
        load_config(os.path.expanduser(named))
    except UserError:  # gone, or the language model that a new LLaVA was made of
        return None
    return os.path.expanduser(named)


def _found_data(data: Data, processor: Any, facts_of: Callable[[list[Source]], dict[str, Any]] | None) -> HeldOut:
    if (data.data_path is None) == (data.run is None):
        raise UserError("evaluate needs rows: give --data_path, or the folder of a run as --eval_split.")
    if data.run is not None:
        assert facts_of is not None  # whoever gives a run
        return held_out_of(data.run, processor, facts_of)
    assert data.data_path is not None
    sources = open_questions(data.data_path, data.image_folder, columns=data.columns, **data.access)
    names = [source.where if not Path(source.where).exists() else Path(source.where).name for source in sources]
    return HeldOut(sources, None, data.name or ", ".join(names))


def _chosen(wanted: list[Metric], facts: list[RowFacts]) -> tuple[list[Metric], str | None]:
    if wanted:
        for metric in wanted:
            lacks = next((each for each in facts if not each.choices), None)
            if metric.name.startswith("choice") and lacks is not None:
                raise UserError(
                    f"--metric {metric.name}: {lacks.key[0]}: row {lacks.key[1]} has no choices: give it "
                    f'"choices": [...], or a line "A. ..." for each in its question.'
                )
            if metric.name == "yes_no":
                for each in facts:
                    is_yes_of(each.references)
        return wanted, None
    metric, reason = fitting_metric([Given("", each.references, each.choices) for each in facts])
    return [metric, LOSS], reason


def _judge(
    into: Path,
    name: str,
    path: str,
    loading: dict[str, Any],
    state: dict[str, Any],
    sources: list[Source],
    rows: Callable[[], Any],
    facts: list[RowFacts],
    metrics: list[Metric],
    asking: dict[str, Any],
    ranks: Ranks,
    console: Console,
) -> tuple[list[Given], int]:
    """What one model answers, and how many rows it did not; it is loaded once, if at all."""
    loaded: list[tuple[Any, Any]] = []

    def load() -> tuple[Any, Any]:
        if not loaded:
            loaded.append(load_for_answering(path, **{**loading, "device": loading.get("device") or own_gpu()}))
        return loaded[0]

    settings = {"model": state_of_model(path), **state, **loading}
    files, total = [source.where for source in sources], len(facts)
    answers: dict[Any, Any] = {}
    losses: dict[Any, Any] = {}
    if any(metric.asks for metric in metrics):
        of_answers = settings | {"max_new_tokens": asking["max_new_tokens"]}
        answers = answers_in(
            into / f"answers-{name}.jsonl",
            *(of_answers, files, rows, total, load),
            console=console,
            what=f"{name}: answers",
            ranks=ranks,
            **asking,
        )
    if not all(metric.asks for metric in metrics):
        of_choices = any(metric.needs_choices for metric in metrics)
        losses = losses_in(
            into / f"{'likelihoods' if of_choices else 'losses'}-{name}.jsonl",
            *(settings, files, rows, total, load),
            of_choices=of_choices,
            batch_size=asking["batch_size"],
            console=console,
            what=f"{name}: losses",
            ranks=ranks,
        )
    if loaded:
        loaded.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return given_of(facts, answers, losses), sum("error" in line for line in answers.values())


def _tell(evaluation: Evaluation, console: Console, tell: Callable[[str], None]) -> None:
    scores = evaluation.scores
    console.print(table_of(scores, f"{evaluation.data}, {len(evaluation.facts):,} rows"))
    if evaluation.base is not None:
        tell(f"Rows that got better: {len(scores.better):,}; worse: {len(scores.worse):,}.")
    if evaluation.num_failed:
        tell(f"{evaluation.num_failed:,} rows have no answer, which counts as an empty one; their lines say why.")
    tell(f"All of it is in {evaluation.output_dir / REPORT_FILE}.")


def _teller(console: Console) -> Callable[[str], None]:
    def tell(sentence: str) -> None:
        console.print(sentence, highlight=False, markup=False, soft_wrap=True)

    return tell
