"""The card of a model, an adapter or a projector on the Hub: README.md with its pictures, and `training.json`.

Metadata is made here; the text is `templates/model_card.md`, with the values of `model_card_values.py`. Whatever comes
from a user or a model is escaped, and what is not known is left out.
"""

import re
import shutil
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_llava_ft.checkpoints.evaluation_results import EvaluationResult, read_results
from hf_llava_ft.checkpoints.files import find_file, read_json
from hf_llava_ft.checkpoints.inspection import ADAPTER_CONFIG, Kind
from hf_llava_ft.checkpoints.reload import Loader
from hf_llava_ft.checkpoints.training_facts import TrainingFacts, hub_id, training_facts
from hf_llava_ft.checkpoints.verify import Verification, loader_for
from hf_llava_ft.errors import UserError
from hf_llava_ft.hub.card_template import card_of
from hf_llava_ft.hub.measured_results import measured
from hf_llava_ft.hub.model_card_samples import write_samples
from hf_llava_ft.hub.model_card_values import Bases, model_card_values
from hf_llava_ft.reports.plots import save_loss_plot

CARD_FILE, ASSETS_FOLDER = "README.md", "assets"
_PLOT = "loss.png"
_REVISION = re.compile(r"(?!.*\.\.)[\w.-]+(/[\w.-]+)*")
_LICENSE_FIELDS = ("license", "license_name", "license_link")


def write_card(
    staged: Path,
    *,
    kind: Kind,
    repo_id: str,
    run: Path | None = None,
    base: str | None = None,
    base_revision: str | None = None,
    verification: Verification | None = None,
    license: str | None = None,
    language: str | list[str] | None = None,
    samples: int = 0,
) -> ModelCard:
    """
    Writes `README.md`, `training.json` (what is known of the training) and `assets/` into the folder that goes to the
    Hub, in place of those that are there.

    Args:
        staged (`Path`): the folder, with everything else that goes to the Hub in it.
        kind (`Kind`): what it holds; see `checkpoints.py`.
        repo_id (`str`): `user/name`, what others load it by.
        run (`Path`, *optional*): folder of the training run, with `train_summary.json`, or of a model that `merge` or
            `convert` made, with `training.json`; by default `staged` is looked into.
        base (`str`, *optional*): Hub id of the base; by default that which adapter or training name.
        base_revision (`str`, *optional*): its commit, tag or branch.
        verification (`Verification`, *optional*): of the staged folder; without it the card says that there was none.
        license (`str`, *optional*): by default that of the base's card, where that can be read.
        language (`str` or `list[str]`, *optional*): codes such as `en`.
        samples (`int`): so many of the run's `--eval_prompts` are shown with their pictures and answers. They are the
            user's data: none unless asked for.

    Returns:
        The card; `card.validate()` asks the Hub about it.

    Raises:
        UserError: if samples are asked for and not there, or a name is none that the Hub takes.
    """
    staged = Path(staged)
    facts = (training_facts(run) if run else None) or training_facts(staged)
    bases = _bases(staged, kind, base, base_revision, facts)
    for name, revision in [(repo_id, None), *bases]:
        _check_name(name, revision)
    stated = {"license": license} if license else _license_of(bases)
    loader = verification.loader if verification else _loader(staged, kind, bases)
    evaluated, results = _evaluated(facts), read_results(run or staged)

    shutil.rmtree(staged / ASSETS_FOLDER, ignore_errors=True)
    shown = write_samples(run or staged, samples, staged / ASSETS_FOLDER, ASSETS_FOLDER) if samples > 0 else []
    if facts is not None:
        facts.save(staged)
    values = model_card_values(
        kind,
        repo_id,
        loader,
        bases,
        vision_tower=_vision_tower(staged) if kind == "projector" else None,
        facts=facts,
        evaluated=evaluated,
        results=results,
        samples=shown,
        verification=verification,
        license=stated.get("license_name", stated.get("license")),
        is_license_of_base=not license,
        languages=[language] if isinstance(language, str) else language or [],
        plot=_write_plot(staged, facts),
    )
    data = _metadata(kind, repo_id, loader, bases, facts, evaluated, results, {**stated, "language": language})
    card = card_of(ModelCard, data, "model_card.md", values, loading="model_card_loading.md")
    card.save(staged / CARD_FILE)
    return card


@dataclass(frozen=True)
class BaseOnCard:
    """
    What a card says of the base of an adapter, which may have to be asked of the Hub; once is enough for a run.

    Args:
        loader (`Loader`): what it takes to load both.
        license (`dict[str, str]`): that of the base.
    """

    loader: Loader
    license: dict[str, str]

    @classmethod
    def of(cls, folder: Path, facts: TrainingFacts | None) -> "BaseOnCard":
        bases = _bases(folder, "adapter", None, None, facts)
        return cls(_loader(folder, "adapter", bases), _license_of(bases))


def write_local_card(
    folder: Path, name: str, facts: TrainingFacts | None, base: BaseOnCard, plot: str | None = None
) -> None:
    """
    Writes `README.md` of an adapter that stays here, in place of PEFT's. Nothing is checked, and nothing of this
    machine is in it.

    Args:
        name (`str`): of the adapter; one that the Hub would not take is not shown.
        plot (`str`, *optional*): file of the loss curve in the folder.
    """
    try:
        validate_repo_id(name)
    except HFValidationError:
        name = "adapter"
    bases, evaluated = _bases(folder, "adapter", None, None, facts), _evaluated(facts)
    results = read_results(folder)
    values = model_card_values(
        "adapter",
        name,
        base.loader,
        bases,
        vision_tower=None,
        facts=facts,
        evaluated=evaluated,
        results=results,
        samples=[],
        verification=None,
        license=base.license.get("license_name", base.license.get("license")),
        is_license_of_base=True,
        languages=[],
        plot=plot,
    )
    data = _metadata("adapter", name, base.loader, bases, facts, evaluated, results, dict(base.license))
    card_of(ModelCard, data, "model_card.md", values, loading="model_card_loading.md").save(folder / CARD_FILE)


def _check_name(name: str, revision: str | None) -> None:
    """They stand in links and in programs that people copy."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"{name!r} is no name that the Hub takes: use one like user/name.") from error
    if revision is not None and not _REVISION.fullmatch(revision):
        raise UserError(f"{revision!r} is no revision of {name}: name a branch, a tag or a commit.")


def _bases(staged: Path, kind: Kind, base: str | None, revision: str | None, facts: TrainingFacts | None) -> Bases:
    """What is said; else what the adapter names; else what training began with."""
    trained_from = [(each["name"], each.get("commit")) for each in (facts.base if facts else [])]
    if base is None and kind in ("adapter", "original_lora"):
        adapter = read_json(str(staged), ADAPTER_CONFIG) or {}
        named = adapter.get("base_model_name_or_path")
        if isinstance(named, str) and hub_id(named) and not Path(named).exists():
            base, revision = named, revision or adapter.get("revision")
    if base is None:
        return trained_from
    return [(base, revision or dict(trained_from).get(base))]


def _license_of(bases: Bases) -> dict[str, str]:
    """That of the models it was made of, if they have one and the same."""
    found = [_license_on_card(name, revision) for name, revision in bases]
    return found[0] if found and all(each == found[0] for each in found) else {}


def _license_on_card(name: str, revision: str | None) -> dict[str, str]:
    try:
        file = find_file(name, CARD_FILE, revision)
        data: Any = ModelCard.load(file, ignore_metadata_errors=True).data if file else {}
    except (UserError, OSError, ValueError):  # a model that is gone, or a card that is no YAML
        return {}
    return {field: str(value) for field in _LICENSE_FIELDS if _is_written(value := data.get(field))}


def _is_written(value: Any) -> bool:
    """A version or a year was text before YAML took it for a number or a date."""
    return isinstance(value, (str, int, float, date)) and not isinstance(value, bool)


def _loader(staged: Path, kind: Kind, bases: Bases) -> Loader:
    if kind == "model":
        return loader_for(staged)
    if kind != "adapter" or not bases:
        return "hf_llava_ft"
    try:
        return loader_for(staged, bases[0][0])
    except UserError:  # a base that cannot be reached from here; this package can tell whatever it is
        return "hf_llava_ft"


def _vision_tower(staged: Path) -> str | None:
    """Hub id of the tower that a projector belongs to."""
    tower = (read_json(str(staged), "config.json") or {}).get("mm_vision_tower")
    return tower if isinstance(tower, str) and hub_id(tower) is not None and not Path(tower).exists() else None


def _write_plot(staged: Path, facts: TrainingFacts | None) -> str | None:
    """The path of the loss curve inside the repository."""
    if facts is None or not facts.losses:
        return None
    (staged / ASSETS_FOLDER).mkdir(exist_ok=True)
    save_loss_plot(
        [loss for _, loss, _ in facts.losses],
        staged / ASSETS_FOLDER / _PLOT,
        learning_rates=[rate for _, _, rate in facts.losses],
        steps=[int(step) for step, _, _ in facts.losses],
        evaluated=[(int(step), loss) for step, loss in facts.evaluated],
    )
    return f"{ASSETS_FOLDER}/{_PLOT}"


def _evaluated(facts: TrainingFacts | None) -> tuple[int, float] | None:
    """Step and loss of the evaluation that is of the weights: the last, or the best if that is what was kept."""
    if facts is None or not facts.evaluated:
        return None
    step, loss = facts.evaluated[-1]
    if facts.settings.get("load_best_model_at_end"):
        step, loss = min(facts.evaluated, key=lambda each: each[1])
    return int(step), loss


def _metadata(
    kind: Kind,
    repo_id: str,
    loader: Loader,
    bases: Bases,
    facts: TrainingFacts | None,
    evaluated: tuple[int, float] | None,
    results: list[EvaluationResult],
    stated: dict[str, Any],
) -> ModelCardData:
    hub_data = [source["name"].partition(":")[0] for source in (facts.sources if facts else []) if source["on_hub"]]
    names = [name for name, _ in bases]
    relation = "adapter" if kind != "model" else "finetune" if len(names) == 1 else "merge"
    settings = facts.settings if facts else {}
    how = ("dora" if settings.get("use_dora") else "lora") if kind in ("adapter", "original_lora") else None
    library = "peft" if kind == "adapter" else "hf_llava_ft" if loader == "hf_llava_ft" else "transformers"
    fields = {
        **stated,
        "library_name": "hf_llava_ft" if kind == "projector" else library,
        # A projector answers nothing by itself.
        "pipeline_tag": None if kind == "projector" else "image-text-to-text",
        "base_model": (names[0] if len(names) == 1 else names) or None,
        "base_model_relation": relation if names else None,
        "datasets": list(dict.fromkeys(hub_data)) or None,
        "tags": ["llava", *([how] if how else []), "hf_llava_ft"],
    }
    found = [measured(each) for each in results]
    if evaluated is not None:
        found.insert(0, _eval_result(hub_data, "eval_split" in settings, evaluated[1]))
    if found:
        fields |= {"model_name": repo_id.rpartition("/")[2], "eval_results": found}
    return ModelCardData(**{name: value for name, value in fields.items() if value is not None})


def _eval_result(hub_data: list[str], is_held_back: bool, loss: float) -> EvalResult:
    return EvalResult(
        task_type="image-text-to-text",
        dataset_type=hub_data[0] if is_held_back and len(hub_data) == 1 else "custom",
        dataset_name="Rows held back from training" if is_held_back else "Rows given for evaluation",
        metric_type="loss",
        metric_name="Evaluation loss",
        metric_value=round(loss, 6),
    )
