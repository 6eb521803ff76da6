"""The loss curve, as a PNG for a folder and as an inline SVG for a page.

The two look alike but are drawn apart: the PNG by matplotlib, imported only when asked for; the SVG by hand, because
in a page it has to follow the reader's theme (`currentColor`) and keep its lettering readable on a telephone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup, escape

from hf_llava_ft.reports.axis import Axis, step_ticks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Up to this many steps the raw curve is readable by itself.
MAX_STEPS_WITHOUT_SMOOTHING = 50
# A page that draws a point for each of 100,000 steps would weigh megabytes and look the same.
MAX_SVG_POINTS = 1000
LINE_COLOR = "#2563eb"
LEARNING_RATE_COLOR = "#b45309"
EVAL_COLOR = "#15803d"


def save_loss_plot(
    losses: list[float],
    path: str | Path,
    title: str = "Training loss",
    learning_rates: list[float] | None = None,
    steps: list[int] | None = None,
    evaluated: list[tuple[int, float]] | None = None,
) -> None:
    """Write the loss per step as a PNG of 900 x 450 pixels.

    Args:
        losses (`list[float]`): One value per step, the first being step 1. A value that is not finite leaves a gap.
        path (`str` or `Path`): The PNG to write.
        title (`str`): What stands above the curve.
        learning_rates (`list[float]`, *optional*): One value per step, drawn dashed against an axis on the right.
        steps (`list[int]`, *optional*): The step of each loss, ascending, where not each step has one.
        evaluated (`list[tuple[int, float]]`, *optional*): Step and loss of each evaluation.
    """
    figure = loss_figure(losses, title=title, learning_rates=learning_rates, steps=steps, evaluated=evaluated)
    # matplotlib would otherwise write its version and address into the file, which then changes with every upgrade.
    figure.savefig(path, format="png", metadata={"Software": None})


def loss_figure(
    losses: list[float],
    *,
    title: str = "",
    learning_rates: list[float] | None = None,
    steps: list[int] | None = None,
    evaluated: list[tuple[int, float]] | None = None,
    width: int = 900,
    height: int = 450,
    font_size: float = 12,
) -> Figure:
    """The loss curve as a matplotlib figure of `width` x `height` pixels, outside pyplot and its global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if learning_rates is not None and len(learning_rates) != len(losses):
        raise ValueError(f"{len(losses)} losses but {len(learning_rates)} learning rates; give one of each per step.")

    figure = Figure(figsize=(width / 100, height / 100), dpi=100, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps, evaluated = steps or list(range(1, len(losses) + 1)), evaluated or []
    axis = Axis.of([*losses, *(loss for _, loss in evaluated)])
    last = max([*steps[-1:], *(step for step, _ in evaluated)], default=0)
    if len(losses) > MAX_STEPS_WITHOUT_SMOOTHING:
        axes.plot(steps, losses, color=LINE_COLOR, alpha=0.3, linewidth=1.2, label="each step")
        axes.plot(steps, smoothed(losses), color=LINE_COLOR, linewidth=2.4, label="smoothed")
    else:
        # A single step has no line to show, only a point.
        marker = "o" if len(losses) == 1 else None
        axes.plot(steps, losses, color=LINE_COLOR, linewidth=2.2, marker=marker, label="loss")
    if evaluated:
        axes.plot(*zip(*evaluated, strict=True), color=EVAL_COLOR, linewidth=1.8, marker="o", label="evaluation")

    axes.set_xlabel("step", fontsize=font_size)
    axes.set_ylabel(f"loss{axis.note}", fontsize=font_size)
    if axis.is_logarithmic:
        axes.set_yscale("log")
        axes.minorticks_off()
    axes.set_ylim(axis.bottom, axis.with_room_above)
    ticks = axis.ticks(5)
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xlim((1, last) if last > 1 else (0, 2))
    axes.set_xticks(step_ticks(last))
    axes.tick_params(labelsize=font_size, length=0, pad=8)
    axes.grid(color="#e5e7eb", linewidth=1)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#9ca3af")
    if title:
        axes.set_title(title, fontsize=font_size + 2, loc="left", pad=12)

    lines = axes.get_lines()
    if learning_rates is not None:
        right = axes.twinx()
        lines += right.plot(
            steps, learning_rates, color=LEARNING_RATE_COLOR, linestyle="--", linewidth=1.5, label="learning rate"
        )
        right.set_ylabel("learning rate", fontsize=font_size)
        rates = Axis.from_zero(learning_rates)
        right.set_ylim(0, rates.with_room_above)
        right.set_yticks(rates.ticks(5))
        right.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
        right.tick_params(labelsize=font_size, length=0, pad=8)
        right.yaxis.get_offset_text().set_fontsize(font_size)
        right.spines[:].set_visible(False)
    if len(lines) > 1:
        # Beside the curves, wherever they run, and beside the numbers of the axis on the right.
        figure.legend(handles=lines, fontsize=font_size, frameon=False, loc="outside right upper", borderpad=1)
    return figure


def loss_plot_svg(
    losses: list[float],
    *,
    steps: list[int] | None = None,
    evaluated: list[tuple[int, float]] | None = None,
    label: str = "loss",
    smooth: bool = True,
) -> Markup:
    """The loss curve as an `<svg>` element to put inside an HTML page.

    It fills the width it is given while its lettering stays the same size: only the inner `<svg>`, which holds the
    curve, is stretched. Colours follow the page (`currentColor`, and `--accent` where the page sets it). There are no
    ids, so any number of curves may share a page. What is drawn may also be something else, a `label` says what.

    Args:
        losses, steps, evaluated: see [`save_loss_plot`].
        label (`str`): What is drawn.
        smooth (`bool`): Draw a smoothed curve over one of many steps.
    """
    height = 220
    steps, evaluated = steps or list(range(1, len(losses) + 1)), evaluated or []
    axis = Axis.of([*losses, *(loss for _, loss in evaluated)])
    last = max([*steps[-1:], *(step for step, _ in evaluated)], default=0)

    def x_percent(step: int) -> float:
        return 50.0 if last == 1 else 100 * (step - 1) / (last - 1)

    def y_pixels(loss: float) -> float:
        return height * (1 - axis.height_of(loss))

    parts = []
    for value in axis.ticks(5):
        y = f"{y_pixels(value):.1f}"
        parts.append(
            f'<line x1="0" x2="100%" y1="{y}" y2="{y}" stroke="currentColor" stroke-opacity=".15"/>'
            f'<text x="-8" y="{y}" dy=".35em" text-anchor="end">{value:g}</text>'
        )
    for step in step_ticks(last):
        parts.append(f'<text x="{x_percent(step):.2f}%" y="{height + 20}" text-anchor="middle">{step}</text>')
    parts.append(f'<text x="50%" y="{height + 40}" text-anchor="middle">step</text>')
    parts.append(f'<text x="-36" y="-14">{escape(label + axis.note)}</text>')

    curves = [(losses, 2.2, 1.0)]
    if smooth and len(losses) > MAX_STEPS_WITHOUT_SMOOTHING:
        curves = [(losses, 1.2, 0.35), (smoothed(losses), 2.4, 1.0)]
    accent = f"var(--accent,{LINE_COLOR})"
    # A curve of one point is a dot, and dots go outside the stretched part, where they would become ellipses.
    green = f"var(--good,{EVAL_COLOR})"
    dots = [(step, loss, accent) for step, loss in zip(steps, losses, strict=True) if len(losses) == 1]
    dots += [(step, loss, green) for step, loss in evaluated]
    for step, loss, color in dots:
        if math.isfinite(loss):
            place = f'cx="{x_percent(step):.2f}%" cy="{y_pixels(loss):.1f}"'
            parts.append(f'<circle {place} r="4" style="fill:{color}"/>')
    lines = [(list(zip(steps, values, strict=True)), width, opacity, accent) for values, width, opacity in curves]
    if evaluated:
        lines.append((evaluated, 1.8, 1.0, green))
    paths = "".join(
        f'<path d="{_path(points, lambda step: 10 * x_percent(step), y_pixels)}" fill="none" stroke-width="{width}" '
        f'stroke-opacity="{opacity}" stroke-linejoin="round" vector-effect="non-scaling-stroke" '
        f'style="stroke:{color}"/>'
        for points, width, opacity, color in lines
    )
    # The labels hang over the edges of the element; its margins are the room for them.
    style = "overflow:visible;display:block;margin:36px 12px 52px 44px;width:calc(100% - 56px)"
    description = escape(_description(label, losses, steps))
    return Markup(  # of numbers, and what is escaped above
        f'<svg role="img" aria-label="{description}" width="100%" height="{height}" font-size="13" '
        f'fill="currentColor" style="{style}">'
        f"{''.join(parts)}"
        f'<svg width="100%" height="{height}" viewBox="0 0 1000 {height}" preserveAspectRatio="none" '
        f'style="overflow:visible">{paths}</svg></svg>'
    )


def curve_key(losses: list[float], evaluated: list[tuple[int, float]] | None = None) -> list[tuple[str, str]]:
    """What the lines of [`loss_plot_svg`] are, as a legend beside it says: a name for its style, and words."""
    if len(losses) > MAX_STEPS_WITHOUT_SMOOTHING:
        key = [("thin", "loss of each step"), ("line", "smoothed")]
    else:
        key = [("line", "loss")]
    return [*key, *([("evaluation", "evaluation")] if evaluated else [])]


def smoothed(losses: list[float]) -> list[float]:
    """The mean over each step and its neighbours on both sides, a twentieth of the run in all.

    A run that is over can look ahead, so the curve does not lag behind as a decaying mean does. Steps that are not
    finite do not count.
    """
    sums, counts = [0.0], [0]
    for loss in losses:
        is_finite = math.isfinite(loss)
        sums.append(sums[-1] + (loss if is_finite else 0.0))
        counts.append(counts[-1] + is_finite)
    reach = max(2, len(losses) // 40)
    means = []
    for i in range(len(losses)):
        start, stop = max(0, i - reach), min(len(losses), i + reach + 1)
        count = counts[stop] - counts[start]
        means.append((sums[stop] - sums[start]) / count if count else math.nan)
    return means


def _description(label: str, values: list[float], steps: list[int]) -> str:
    name = "Training loss" if label == "loss" else label.capitalize()
    if not values:
        return f"{name}: no steps"
    return f"{name}: {values[0]:.4g} at step {steps[0]}, {values[-1]:.4g} at step {steps[-1]}"


def _path(points: list[tuple[int, float]], x_of: Callable[[int], float], y_of: Callable[[float], float]) -> str:
    """SVG path data; the pen is lifted over values that are not finite."""
    if len(points) > MAX_SVG_POINTS:
        # The lowest and the highest of each stretch, so that no spike is lost.
        stride = math.ceil(2 * len(points) / MAX_SVG_POINTS)
        stretches = [points[i : i + stride] for i in range(0, len(points), stride)]
        finite = [[point for point in stretch if math.isfinite(point[1])] or stretch[:1] for stretch in stretches]
        points = [
            point
            for stretch in finite
            for point in sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
        ]
    commands, pen = [], "M"
    for step, loss in points:
        if math.isfinite(loss):
            commands.append(f"{pen}{x_of(step):.1f} {y_of(loss):.1f}")
        pen = "L" if math.isfinite(loss) else "M"
    return "".join(commands)
