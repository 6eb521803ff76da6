"""The page of an evaluation: figures, and rows with their pictures, in one file that needs no other and no script."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from hf_llava_ft.answering.rows import AskedRow
from hf_llava_ft.data.pictures import open_picture
from hf_llava_ft.evaluation.metrics.given import Given
from hf_llava_ft.evaluation.scores import Figure, Scores
from hf_llava_ft.evaluation.table import name_of, shown, shown_change, shown_interval
from hf_llava_ft.reports.page import THUMBNAIL_PIXELS, Picture, write_page

if TYPE_CHECKING:
    from hf_llava_ft.evaluation.evaluate import Evaluation

MAX_ROWS = 300  # with pictures of 10 kB each, a page of 3 MB
_RIGHT = 1 - 1e-9


def write_evaluation_report(
    path: Path,
    evaluation: "Evaluation",
    rows: Callable[[], Iterable[AskedRow]],
    tuned: list[Given],
    base: list[Given] | None,
) -> None:
    """
    Args:
        path (`Path`): the HTML file; replaced whole.
        rows: gives the rows again, for their pictures.
        tuned, base (`list[Given]`): the answers, row by row.
    """
    shown_places = _places_shown(evaluation.scores, len(tuned))
    pictures = _pictures(rows(), set(shown_places))
    cards = [_card(place, evaluation, tuned, base, pictures) for place in shown_places]
    kinds = [kind for kind in ("better", "worse", "same", "right", "partly", "wrong") if _num(cards, kind)]
    scores = evaluation.scores
    write_page(
        path,
        "evaluation.html",
        title=f"Evaluation of {Path(evaluation.model).name or evaluation.model}",
        verdict=_verdict(evaluation),
        kind=_kind(scores.figures),
        num_better=None if base is None else len(scores.better),
        num_worse=None if base is None else len(scores.worse),
        figures=[_line(figure) for figure in scores.figures],
        has_base=base is not None,
        filters=[(kind, _num(cards, kind)) for kind in kinds],
        cards=cards,
        num_rows=len(tuned),
        facts=[
            ("Model", evaluation.model),
            *([("Compared with", evaluation.base)] if evaluation.base else []),
            ("Data", evaluation.data),
            ("Rows", f"{len(tuned):,}"),
            *([("Why this metric", evaluation.reason)] if evaluation.reason else []),
        ],
    )


def _places_shown(scores: Scores, number: int) -> list[int]:
    """Rows in the order of the data; of many, those that changed before the others."""
    if number <= MAX_ROWS:
        return list(range(number))
    changed = [place for pair in zip(scores.worse, scores.better, strict=False) for place in pair]
    longer = max(scores.worse, scores.better, key=len)
    changed += longer[len(changed) // 2 :]
    others = range(0, number, max(1, number // MAX_ROWS))
    return sorted(list(dict.fromkeys([*changed[: MAX_ROWS // 2], *others]))[:MAX_ROWS])


def _pictures(rows: Iterable[AskedRow], places: set[int]) -> dict[int, list[Picture]]:
    found: dict[int, list[Picture]] = {}
    for place, row in enumerate(rows):
        if place in places:
            found[place] = [small for image in row.question.images if (small := _small(image)) is not None]
    return found


def _small(image: Any) -> Picture | None:
    """None of a picture that can't be read, of which its line speaks."""
    try:
        picture = open_picture(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    picture.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    clean = Image.new("RGB", picture.size)  # leaves metadata behind
    clean.paste(picture)
    return Picture.of(clean, quality=75)


def _card(
    place: int,
    evaluation: "Evaluation",
    tuned: list[Given],
    base: list[Given] | None,
    pictures: dict[int, list[Picture]],
) -> dict[str, Any]:
    facts, scores = evaluation.facts[place], evaluation.scores
    kinds = [] if not scores.figures[0].metric.asks else [_how_right(float(scores.tuned[place]), scores)]
    if scores.gains is not None:
        gain = float(scores.gains[place])
        kinds.append("better" if gain > 1e-9 else "worse" if gain < -1e-9 else "same")
    return {
        "number": facts.key[1],
        "question": facts.line["prompt"].replace("<image>", "").strip(),
        "choices": facts.choices,
        "references": list(dict.fromkeys(facts.references)),
        "pictures": pictures.get(place, []),
        "after": tuned[place].answer,
        "before": None if base is None else base[place].answer,
        "asks": any(figure.metric.asks for figure in scores.figures),
        "score": shown(scores.figures[0], float(scores.tuned[place])),
        "score_before": None if scores.base is None else shown(scores.figures[0], float(scores.base[place])),
        "kinds": kinds,
    }


def _how_right(score: float, scores: Scores) -> str:
    if not scores.higher_is_better:
        score = 1 - score
    return "right" if score >= _RIGHT else "wrong" if score <= 1 - _RIGHT else "partly"


def _num(cards: list[dict[str, Any]], kind: str) -> int:
    return sum(kind in card["kinds"] for card in cards)


def _line(figure: Figure) -> dict[str, Any]:
    has_base = figure.base is not None
    return {
        "name": name_of(figure),
        "tuned": shown_interval(figure, figure.tuned),
        "base": shown_interval(figure, figure.base) if figure.base is not None else None,
        "change": shown_change(figure) if has_base else None,
        "kind": "" if not figure.is_beyond_noise else "bad" if figure.is_worse else "good",
    }


def _kind(figures: list[Figure]) -> str:
    """`bad` if anything fell beyond noise, `good` if the main figure rose so, else neither."""
    if any(figure.is_worse for figure in figures):
        return "bad"
    return "good" if figures[0].is_beyond_noise else ""


def _verdict(evaluation: "Evaluation") -> str:
    main = evaluation.scores.figures[0]
    text = f"{main.metric.title}: {shown(main, main.tuned.value)}"
    return text if main.base is None else f"{text}, before {shown(main, main.base.value)}"
