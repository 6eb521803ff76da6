"""What a model card can tell, as the values of `templates/model_card.md`. What is not known is None there."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hf_llava_ft.checkpoints.evaluation_results import EvaluationResult
from hf_llava_ft.checkpoints.inspection import Kind
from hf_llava_ft.checkpoints.original_folders import PROJECTOR_FILE
from hf_llava_ft.checkpoints.reload import Loader
from hf_llava_ft.checkpoints.training_facts import TrainingFacts
from hf_llava_ft.checkpoints.verify import Verification
from hf_llava_ft.reports.markdown import Markdown, code_span, escaped

_MANY_ROWS = 1000
_METHODS = ("lora", "qlora", "projector", "freeze_vision", "full")
_LOSSES = ("tokens", "micro_batch")
_NUMBERS = ("steps", "epochs", "rows_per_step", "seconds", "tokens_per_second", "peak_memory_bytes", "seed")
_SETTINGS = (
    *("bits", "lora_r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora", "freeze_mm_mlp_adapter"),
    *("learning_rate", "mm_projector_lr", "mm_vision_tower_lr", "warmup_steps", "weight_decay"),
    *("neftune_noise_alpha", "model_max_length", "bf16", "fp16"),
)
_ROWS = ("rows", "rows_with_images", "images", "rows_evaluated", "rows_left_out", "rows_cut")
# The models on the Hub that something was made of: name, and commit, tag or branch.
Bases = Sequence[tuple[str, str | None]]


@dataclass(frozen=True)
class Sample:
    """
    Args:
        pictures (`list[str]`): their paths inside the repository, which are ours.
        question (`str`): that was asked.
        before (`str`, *optional*): the answer before the first step.
        after (`str`): the answer at the end.
    """

    pictures: list[str]
    question: str
    before: str | None
    after: str


def model_card_values(
    kind: Kind,
    repo_id: str,
    loader: Loader,
    bases: Bases,
    *,
    vision_tower: str | None,
    facts: TrainingFacts | None,
    evaluated: tuple[int, float] | None,
    results: Sequence[EvaluationResult],
    samples: list[Sample],
    verification: Verification | None,
    license: str | None,
    is_license_of_base: bool,
    languages: list[str],
    plot: str | None,
) -> dict[str, Any]:
    """
    Args:
        repo_id, bases, vision_tower: names of the Hub, and revisions, that were checked: they stand in code.
        loader (`Loader`): what it takes to load the whole model.
        evaluated (`tuple[int, float]`, *optional*): step and loss that are those of the weights.
        results (`list[EvaluationResult]`): of `llava-ft evaluate`.
        license (`str`, *optional*): by its name, where it is stated.
        is_license_of_base (`bool`): it was not stated of this model.
        plot (`str`, *optional*): path of the loss curve inside the repository.
    """
    known = facts or TrainingFacts()
    rows = known.data.get("rows")
    return {
        "kind": Markdown(kind),
        "title": repo_id.rpartition("/")[2],
        "repo_id": Markdown(repo_id),
        "bases": [hub_link(name, revision) for name, revision in bases],
        "is_merged": kind == "model" and known.settings.get("train_type") in ("lora", "qlora"),
        "is_recorded": facts is not None,
        "is_of_parts_alone": not known.numbers,
        "num_conversations": rows or known.numbers.get("samples"),
        "hub_data": [_data_link(source["name"]) for source in known.sources if source["on_hub"]],
        "way": _way(kind, loader, bases, vision_tower),
        "samples": [_sample(sample) for sample in samples],
        "has_answers_before": any(sample.before is not None for sample in samples),
        "training": _training(known),
        "plot": Markdown(plot) if plot else None,
        "evaluation": _evaluation(known, *evaluated) if evaluated else None,
        "measured": [vars(each) for each in results],
        "data": _data(known),
        "verification": _verification(verification) if verification else None,
        "num_few_rows": rows if rows and rows < _MANY_ROWS else None,
        "stated_license": license,
        "is_license_of_base": is_license_of_base,
        "languages": languages,
        "versions": [f"{name} {version}" for name, version in known.versions.items()],
    }


def hub_link(name: str, revision: str | None = None) -> Markdown:
    """A link to a model on the Hub, whose name was checked, with the first figures of its commit."""
    at = f" at {code_span(revision[:12])}" if revision else ""
    tree = f"/tree/{revision}" if revision else ""
    return Markdown(f"[{escaped(name)}](https://huggingface.co/{name}{tree}){at}")


def _data_link(name: str) -> Markdown:
    """A link to a data set whose name was checked; a split may follow a colon."""
    repo_id, _, split = name.partition(":")
    of_split = f" ({escaped(split)})" if split else ""
    return Markdown(f"[{escaped(repo_id)}](https://huggingface.co/datasets/{repo_id}){of_split}")


def _way(kind: Kind, loader: Loader, bases: Bases, vision_tower: str | None) -> dict[str, Any]:
    """How it is loaded."""
    base, revision = bases[0] if len(bases) == 1 else (None, None)
    is_ours = loader == "hf_llava_ft" or kind == "original_lora" or (kind == "adapter" and base is None)
    return {
        "is_for_projector": kind == "projector",
        "is_this_package": is_ours and kind != "projector",
        "trusts": loader == "trust_remote_code",
        "base": Markdown(base) if base else None,
        "base_revision": Markdown(revision) if revision else None,
        "vision_tower": Markdown(vision_tower) if vision_tower else None,
        "projector_file": Markdown(PROJECTOR_FILE),
    }


def _sample(sample: Sample) -> dict[str, Any]:
    pictures = [Markdown(path) for path in sample.pictures]
    return {"pictures": pictures, "question": sample.question, "before": sample.before, "after": sample.after}


def _training(facts: TrainingFacts) -> dict[str, Any] | None:
    """Settings, what trained, the loss, and what it took."""
    if not (facts.settings or facts.trained or facts.losses):
        return None
    said, numbers = facts.settings, facts.numbers
    return {
        **{name: said.get(name) for name in _SETTINGS},
        **{name: numbers.get(name) for name in _NUMBERS},
        **{name: _code(said.get(name)) for name in ("lr_scheduler_type", "optim", "version")},
        "method": _one_of(_METHODS, said.get("train_type")),
        "loss_normalization": _one_of(_LOSSES, said.get("loss_normalization")),
        "device": facts.device,
        "num_processes": int(numbers.get("num_processes") or 1),
        "trained": [
            {
                "part": code_span(part["part"]),
                "num_trainable": part.get("num_trainable", 0),
                "num_total": part.get("num_total", 0),
                "dtype": part.get("dtype", ""),
                # A part that did not train has a dash.
                "learning_rate": None if part.get("learning_rate") == "-" else part.get("learning_rate", ""),
            }
            for part in facts.trained
        ],
        "losses": [facts.losses[0][1], facts.losses[-1][1]] if facts.losses else None,
    }


def _evaluation(facts: TrainingFacts, step: int, loss: float) -> dict[str, Any]:
    return {
        "rows": facts.data.get("rows_evaluated"),
        "share": facts.settings.get("eval_split"),
        "step": step,
        "loss": loss,
        "points": _few(facts.evaluated, step),
    }


def _few(evaluated: list[list[float]], step: int) -> list[list[float]]:
    """At most eleven, with the first, the last and that of `step` among them."""
    stride = max(1, len(evaluated) // 8)
    last = len(evaluated) - 1
    return [each for index, each in enumerate(evaluated) if index % stride == 0 or index == last or each[0] == step]


def _data(facts: TrainingFacts) -> dict[str, Any] | None:
    """Numbers and fingerprints of the data; nothing of what is in it."""
    if not (facts.data or facts.sources):
        return None
    return {
        **{name: facts.data.get(name) for name in _ROWS},
        "tokens": facts.numbers.get("tokens"),
        "supervised_tokens": facts.numbers.get("supervised_tokens"),
        "fingerprint": _code(facts.data.get("fingerprint")),
        "sources": [
            {
                "name": _data_link(source["name"]) if source["on_hub"] else source["name"],
                "format": source.get("format", ""),
                "weight": source.get("weight", 1),
                "fingerprint": _code(source.get("fingerprint")) or "",
            }
            for source in facts.sources
        ],
    }


def _verification(verification: Verification) -> dict[str, Any]:
    return {
        "differences": verification.differences,
        "loader": Markdown(verification.loader),
        "logit_difference": verification.logit_difference,
    }


def _code(text: str | None) -> Markdown | None:
    return code_span(text) if text else None


def _one_of(words: tuple[str, ...], word: Any) -> Markdown | None:
    """The template compares it, so it must be as it is."""
    return Markdown(word) if word in words else None
