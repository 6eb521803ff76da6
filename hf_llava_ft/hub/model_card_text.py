"""What a card says, section by section, in Markdown. A section about which nothing is known is left out."""

from collections.abc import Sequence
from dataclasses import dataclass

from hf_llava_ft.checkpoints.opening import Kind
from hf_llava_ft.checkpoints.training_facts import TrainingFacts
from hf_llava_ft.checkpoints.verify import Verification
from hf_llava_ft.hub.model_card_training import many
from hf_llava_ft.reports.markdown import escaped, table

_MANY_ROWS = 1000


@dataclass(frozen=True)
class Sample:
    """
    Args:
        pictures (`list[str]`): their paths inside the repository.
        question (`str`): that was asked.
        before (`str`, *optional*): the answer before the first step.
        after (`str`): the answer at the end.
    """

    pictures: list[str]
    question: str
    before: str | None
    after: str


def hub_link(name: str, revision: str | None = None) -> str:
    """A link to a model on the Hub, whose name was checked, with the first figures of its commit."""
    at = f" at `{revision[:12]}`" if revision else ""
    tree = f"/tree/{revision}" if revision else ""
    return f"[{escaped(name)}](https://huggingface.co/{name}{tree}){at}"


def summary_paragraph(kind: Kind, base: Sequence[tuple[str, str | None]], facts: TrainingFacts | None) -> str:
    """
    What it is.

    Args:
        base: names and commits of the models on the Hub that it was made of.
    """
    of = " and ".join(hub_link(name, revision) for name, revision in base)
    settings = facts.settings if facts else {}
    is_merged = kind == "model" and settings.get("train_type") in ("lora", "qlora")
    if kind in ("adapter", "original_lora"):
        what = f"A LoRA adapter for {of or 'a LLaVA'}: with it, the model answers questions about pictures."
    elif kind == "projector":
        what = f"The projector of a LLaVA{', for ' + of if of else ''}: it turns what a vision tower sees into tokens."
    else:
        made = "made of" if len(base) > 1 else "fine-tuned from"
        what = f"A LLaVA, {made} {of}, " if of else "A LLaVA, "
        what += "which answers questions about pictures."
    if is_merged:
        what += " The LoRA adapter that was trained is merged into it: no PEFT is needed."
    return " ".join(filter(None, [what, _trained_on(facts)]))


def _trained_on(facts: TrainingFacts | None) -> str:
    if facts is None:
        return "How it was trained is not recorded."
    if not facts.numbers:  # of its parts alone
        return (
            "No training of the whole is recorded: if its projector is still as it was made, it cannot tell what a "
            "picture shows."
        )
    hub = [_of_hub(source["name"]) for source in facts.sources if source["on_hub"]]
    rows = facts.data.get("rows") or facts.numbers.get("samples")
    if not rows:
        return ""
    return f"It was trained on {many(rows, 'conversation')}{' of ' + ', '.join(hub) if hub else ''}."


def samples_section(samples: list[Sample]) -> str:
    """The questions with their pictures and answers."""
    if not samples:
        return ""
    has_before = any(sample.before is not None for sample in samples)
    rows = []
    for sample in samples:
        pictures = " ".join(f'<img src="{path}" width="200" alt="picture">' for path in sample.pictures)
        answers = ([_said(sample.before)] if has_before else []) + [_said(sample.after)]
        rows.append([pictures, escaped(sample.question), *answers])
    header = ["picture", "question", *(["before training"] if has_before else []), "after training"]
    told = "Greedy answers. Whether these questions were also trained on is not recorded."
    return "\n\n".join(["## Answers", told, table(header, rows)])


def _said(answer: str | None) -> str:
    return escaped(answer or "") or "*(nothing)*"


def evaluation_section(facts: TrainingFacts | None, evaluated: tuple[int, float] | None) -> str:
    """
    Args:
        evaluated (`tuple[int, float]`, *optional*): step and loss that are those of the weights.
    """
    if facts is None or evaluated is None:
        return "## Evaluation\n\nNo evaluation is recorded."
    rows = facts.data.get("rows_evaluated")
    share = facts.settings.get("eval_split")
    of = f" of {many(rows, 'row')}" if rows else " of the rows"
    of += " given for it" if share is None else f" held back from training ({100 * share:g}% of all, drawn at random)"
    step, loss = evaluated
    shown = [[f"{at:,.0f}", f"{value:.4g}"] for at, value in _few(facts.evaluated, step)]
    told = (
        f"Evaluation loss, the mean over the answers' tokens{of}: **{loss:.4g}** at step {step:,}. It says how "
        f"likely the model finds the given answers, not how often its own are right."
    )
    return "\n\n".join(["## Evaluation", told, table(["step", "loss"], shown, numeric=frozenset({0, 1}))])


def _few(evaluated: list[list[float]], step: int) -> list[list[float]]:
    """At most eleven, with the first, the last and that of `step` among them."""
    stride = max(1, len(evaluated) // 8)
    last = len(evaluated) - 1
    return [each for index, each in enumerate(evaluated) if index % stride == 0 or index == last or each[0] == step]


def data_section(facts: TrainingFacts | None) -> str:
    """Numbers and fingerprints of the data; nothing of what is in it."""
    if facts is None or not (facts.data or facts.sources):
        return ""
    data, numbers = facts.data, facts.numbers
    items = []
    for name, told in _ROWS.items():
        if data.get(name):
            items.append(f"{told}: {data[name]:,}")
    tokens, supervised = numbers.get("tokens"), numbers.get("supervised_tokens")
    if tokens and supervised is not None:
        items.append(
            f"tokens read: {tokens:,.0f}, those of pictures among them; learned, which are those of the answers: "
            f"{supervised:,.0f} ({supervised / tokens:.1%})"
        )
    if data.get("fingerprint") and len(facts.sources) != 1:
        items.append(f"fingerprint of all: `{data['fingerprint']}`")
    parts = ["## Data", "\n".join(f"- {item}" for item in items)]
    if facts.sources:
        rows = [
            [
                _of_hub(source["name"]) if source["on_hub"] else escaped(source["name"]),
                escaped(source.get("format", "")),
                f"{source.get('weight', 1):g}",
                f"`{source['fingerprint']}`" if source.get("fingerprint") else "",
            ]
            for source in facts.sources
        ]
        header = ["data set", "format", "weight", "fingerprint (BLAKE2b of its files)"]
        parts.append(table(header, rows, numeric=frozenset({2})))
    return "\n\n".join(filter(None, parts))


_ROWS = {
    "rows": "rows",
    "rows_with_images": "of them with pictures",
    "images": "pictures",
    "rows_evaluated": "rows evaluated",
    "rows_left_out": "rows left out, because they could not be trained on",
    "rows_cut": "rows cut, because they were too long",
}


def verification_section(verification: Verification | None) -> str:
    """What was checked before the upload, and what came out."""
    if verification is None:
        told = "It was not loaded again and compared before it was uploaded."
    elif verification.ok:
        by = {
            "transformers": "plain transformers",
            "trust_remote_code": "transformers and the code in this repository",
            "hf_llava_ft": "hf_llava_ft",
        }[verification.loader]
        told = (
            f"Before the upload these files were loaded in a fresh process by {by}, and asked about a picture. Tokens "
            f"and greedy answer were those of the model that they were copied from, and no logit differed by more "
            f"than {verification.logit_difference:.1e} of the largest."
        )
    else:
        told = f"Before the upload these files answered otherwise: {escaped('; '.join(verification.differences))}."
    return f"## Verification\n\n{told}"


def limits_section(facts: TrainingFacts | None, base: Sequence[tuple[str, str | None]], has_license: bool) -> str:
    """What a reader should not expect."""
    items = ["It can state wrong things about a picture, and state them with confidence."]
    rows = facts.data.get("rows") if facts else None
    if rows and rows < _MANY_ROWS:
        items.append(
            f"It was trained on {many(rows, 'row')} alone: expect it to know these, and do not expect much of others."
        )
    if not facts or not facts.evaluated:
        items.append("How well it does on pictures that it was not trained on has not been measured.")
    if base:
        items.append("It takes over the limits and biases of the models that it was made of.")
    if not has_license:
        items.append("No license is stated: ask before you use it, and see that of the models it was made of.")
    return "## Limits\n\n" + "\n".join(f"- {item}" for item in items)


def versions_section(facts: TrainingFacts | None) -> str:
    """Of the packages it was trained with."""
    if facts is None or not facts.versions:
        return ""
    told = ", ".join(f"{escaped(name)} {escaped(version)}" for name, version in facts.versions.items())
    return f"## Versions\n\nTrained with {told}."


def _of_hub(name: str) -> str:
    """A link to a data set whose name was checked; a split may follow a colon."""
    repo_id, _, split = name.partition(":")
    return f"[{escaped(repo_id)}](https://huggingface.co/datasets/{repo_id})" + (
        f" ({escaped(split)})" if split else ""
    )
