"""What an evaluation says in the terminal."""

from rich.table import Table

from hf_llava_ft.evaluation.bootstrap import Interval
from hf_llava_ft.evaluation.scores import Figure, Scores


def table_of(scores: Scores, title: str) -> Table:
    """A figure a line, with the bounds of 95 of 100 draws."""
    table = Table(title=title, title_justify="left")
    table.add_column("figure")
    has_base = any(figure.base is not None for figure in scores.figures)
    for name in ("base", "tuned", "change") if has_base else ("value",):
        table.add_column(name, justify="right")
    for figure in scores.figures:
        cells = [shown_interval(figure, figure.tuned)]
        if figure.base is not None and figure.change is not None:
            cells = [shown_interval(figure, figure.base), *cells, shown_change(figure)]
        table.add_row(name_of(figure), *cells)
    return table


def name_of(figure: Figure) -> str:
    """`exact_match`, `yes_no: f1`."""
    is_main = figure.name == figure.metric.name
    return figure.name if is_main else f"{figure.metric.name}: {figure.name}"


def shown(figure: Figure, value: float, *, sign: bool = False) -> str:
    """A share in percent and its change, with a sign, in points of it; anything else as it is."""
    if figure.metric.is_share:
        return f"{100 * value:+.1f}" if sign else f"{100 * value:.1f}%"
    return f"{value:{'+' if sign else ''}.4g}"


def shown_interval(figure: Figure, found: Interval) -> str:
    return f"{shown(figure, found.value)} ({shown(figure, found.low)} to {shown(figure, found.high)})"


def shown_change(figure: Figure) -> str:
    change = figure.change
    assert change is not None
    bounds = f"({shown(figure, change.low, sign=True)} to {shown(figure, change.high, sign=True)})"
    unit = " points" if figure.metric.is_share else ""
    noise = "" if figure.is_beyond_noise else ", within noise"
    return f"{shown(figure, change.value, sign=True)}{unit} {bounds}{noise}"
