"""`report.html` and `loss.png` of a training run, from its summary and its log."""

from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from hf_llava_ft.reports.page import data_address, facts_list, said, trained_table, write_atomically, write_page
from hf_llava_ft.reports.plots import loss_plot_svg, save_loss_plot

REPORT_FILE, PLOT_FILE = "report.html", "loss.png"
SUPERVISED = "supervised_tokens"
MAX_STEPS = 8  # columns of answers
STYLE = """
.said{overflow-x:auto}.said table{min-width:520px}.said img{width:96px;height:auto;border-radius:6px;margin:0 4px 0 0}
.said th,.said td{text-align:left;vertical-align:top;min-width:130px}
.said td{white-space:pre-wrap;overflow-wrap:anywhere;padding:8px 14px 8px 0}
.legend{color:var(--muted)}.legend b{color:var(--good)}.settings{columns:2;column-gap:36px;font-size:.9rem}
.settings dl{display:block}.settings dl>div{break-inside:avoid;display:flex;justify-content:space-between;gap:16px}
.settings dl>div{padding:4px 0;border-bottom:1px solid var(--rule)}.settings dt{font-weight:400}
.settings dd{text-align:right;font-variant-numeric:tabular-nums}
@media(max-width:720px){.settings{columns:1}.said table{min-width:0}.said td{display:block;padding:4px 0}
.said td+td::before{content:attr(data-name);display:block;font-size:.85rem;font-weight:600}}
"""


def write_run_report(
    output_dir: Path,
    summary: dict[str, Any],
    log: list[dict[str, Any]],
    trained: list[tuple[str, int, int, str]],
    answers: list[dict[str, Any]] | None = None,
    pictures: list[list[Image.Image]] | None = None,
) -> None:
    """
    Write both files.

    Args:
        output_dir (`Path`): the folder of the run.
        summary (`dict`): of `train_summary`.
        log (`list[dict]`): the Trainer's `log_history`.
        trained: part, trainable parameters, all parameters, learning rate.
        answers (`list[dict]`, *optional*): lines of `eval_answers.jsonl`.
        pictures (`list[list[Image.Image]]`, *optional*): thumbnails of each prompt, in the order of the prompts.
    """
    logged = [entry for entry in log if "loss" in entry]
    steps, losses = [entry["step"] for entry in logged], [float(entry["loss"]) for entry in logged]
    rates = [float(entry.get("learning_rate") or 0.0) for entry in logged]
    evaluated = [(entry["step"], float(entry["eval_loss"])) for entry in log if "eval_loss" in entry]
    if losses:
        write_atomically(
            output_dir / PLOT_FILE,
            lambda path: save_loss_plot(losses, path, learning_rates=rates, steps=steps, evaluated=evaluated),
        )
    rate_curve = loss_plot_svg(rates, steps=steps, label="learning rate", smooth=False) if losses else ""
    sections = [
        f"<header><h1>Training run</h1><p>{escape(_headline(summary))}</p></header>",
        f"<section><h2>Loss</h2>{_legend(summary, evaluated)}"
        f"{loss_plot_svg(losses, steps=steps, evaluated=evaluated)}</section>"
        if losses
        else "",
        f"<section><h2>Answers</h2>{_answers(answers, pictures or [])}</section>" if answers else "",
        f"<section><h2>What trained</h2>{trained_table(trained)}</section>",
        f"<section><h2>How it went</h2>{facts_list(_facts(summary))}</section>",
        f"<section><h2>Learning rate</h2>{rate_curve}</section>" if losses else "",
        _named("Data", _data(summary["data"])),
        _named("Settings", {name: _shown(value) for name, value in summary["settings"].items() if value is not None}),
        _named("Versions", summary["versions"]),
    ]
    write_page(output_dir / REPORT_FILE, "Training run", sections, STYLE)


def _headline(summary: dict[str, Any]) -> str:
    settings = summary["settings"]
    model, data = str(settings.get("model_name_or_path")), [each["name"] for each in summary["data"]["sources"]]
    name = Path(model).name if model.startswith(("/", "~", ".")) else model
    return (
        f"{name} on {', '.join(data)}, {settings.get('train_type')}: {summary['steps']:,} steps, "
        f"{summary['epochs'] or 0:.3g} epochs."
    )


def _legend(summary: dict[str, Any], evaluated: list[tuple[int, float]]) -> str:
    loss = summary["loss"]
    sentence = f"From {loss['first']:.3g} to {loss['last']:.3g} in training."
    if evaluated:
        best = summary["eval_loss"]["best"]
        sentence += (
            f" <b>&#9679; Evaluation</b>: from {evaluated[0][1]:.3g} to {evaluated[-1][1]:.3g}, "
            f"the least {best['loss']:.3g} at step {best['step']}."
        )
    return f'<p class="legend">{sentence}</p>'


def _facts(summary: dict[str, Any]) -> list[tuple[str, str]]:
    facts = [("device", f"{summary['device']}, processes: {summary['num_processes']}")]
    facts.append(("seconds of training", f"{summary['seconds_without_evaluation']:,.1f}"))
    if summary["seconds"] - summary["seconds_without_evaluation"] > 0:
        facts.append(("seconds in all", f"{summary['seconds']:,.1f}"))
    for name in ("samples", "tokens", SUPERVISED):
        per_second = summary[f"{name}_per_second"]
        speed = "" if per_second is None else f", {per_second:,.1f} a second"
        share = f" ({100 * (summary['supervised_share'] or 0):.3g}%)" if name == SUPERVISED else ""
        facts.append((name.replace("_", " "), f"{summary[name]:,}{share}{speed}"))
    peak = summary["peak_memory"]
    if peak["bytes"] is not None:
        facts.append(("peak memory", f"{peak['bytes'] / 2**30:.2f} GiB ({peak['of']})"))
    return facts


def _data(data: dict[str, Any]) -> dict[str, str]:
    facts = {name.replace("_", " "): _shown(data[name]) for name in data if name != "sources"}
    for source in data["sources"]:
        facts[source["name"]] = f"{source['format']}, {source['bytes']:,} bytes, weight {source['weight']:g}"
    return facts


def _shown(value: Any) -> str:
    if value is None:
        return "not known before reading"
    return " ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def _named(title: str, values: dict[str, str]) -> str:
    return f'<section><h2>{title}</h2><div class="settings">{facts_list(list(values.items()))}</div></section>'


def _answers(answers: list[dict[str, Any]], pictures: list[list[Image.Image]]) -> str:
    """A row for each prompt, a column for each step."""
    steps, note = _shown_steps(sorted({answer["step"] for answer in answers}))
    names = {step: f"step {step}" for step in steps} | {0: "before training"}
    by_prompt: dict[int, dict[int, str]] = {}
    questions = {}
    for answer in answers:
        by_prompt.setdefault(answer["index"], {})[answer["step"]] = answer["answer"]
        questions[answer["index"]] = answer["prompt"]
    rows = ["<th>prompt</th>" + "".join(f"<th>{names[step]}</th>" for step in steps)]
    for index, said_at in sorted(by_prompt.items()):
        images = "".join(
            f'<img src="{data_address(picture)}" alt="" width="{picture.width}" height="{picture.height}">'
            for picture in (pictures[index] if index < len(pictures) else [])
        )
        cells = "".join(
            f'<td dir="auto" data-name="{names[step]}">{said(said_at.get(step, ""))}</td>' for step in steps
        )
        rows.append(f"<td>{images}<div>{escape(questions[index])}</div></td>{cells}")
    return f'{note}<div class="said"><table>{"".join(f"<tr>{row}</tr>" for row in rows)}</table></div>'


def _shown_steps(steps: list[int]) -> tuple[list[int], str]:
    """At most `MAX_STEPS` of the steps, evenly spaced with the first and the last, and a paragraph that says so."""
    if len(steps) <= MAX_STEPS:
        return steps, ""
    kept = [steps[round(index * (len(steps) - 1) / (MAX_STEPS - 1))] for index in range(MAX_STEPS)]
    return kept, f'<p class="legend">{MAX_STEPS} of {len(steps)} times; all are in eval_answers.jsonl.</p>'
