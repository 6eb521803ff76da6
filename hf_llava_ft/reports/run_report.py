"""`report.html` and `loss.png` of a training run, from its summary and its log."""

from pathlib import Path
from typing import Any

from PIL import Image

from hf_llava_ft.reports.page import Picture, write_page
from hf_llava_ft.reports.plots import curve_key, loss_plot_svg, save_loss_plot
from hf_llava_ft.whole_files import write_atomically

REPORT_FILE, PLOT_FILE = "report.html", "loss.png"
SUPERVISED = "supervised_tokens"
MAX_BETWEEN = 20  # evaluations that are shown between the first and the last


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
    told = None
    if losses:
        told = summary["loss"] | {
            "curve": loss_plot_svg(losses, steps=steps, evaluated=evaluated),
            "key": curve_key(losses, evaluated),
            "rate_curve": loss_plot_svg(rates, steps=steps, label="learning rate", smooth=False),
        }
    settings = summary["settings"]
    write_page(
        output_dir / REPORT_FILE,
        "run.html",
        model=_model_name(str(settings.get("model_name_or_path"))),
        data_names=[source["name"] for source in summary["data"]["sources"]],
        train_type=settings.get("train_type"),
        num_steps=summary["steps"],
        num_epochs=summary["epochs"] or 0,
        loss=told,
        evaluated=_evaluated(summary, evaluated) if evaluated else None,
        prompts=_prompts(answers or [], pictures or []),
        trained=trained,
        facts=_facts(summary),
        data=_data(summary["data"]),
        settings_of_run=[(name, _shown(value)) for name, value in settings.items() if value is not None],
        versions=list(summary["versions"].items()),
    )


def _model_name(model: str) -> str:
    return Path(model).name if model.startswith(("/", "~", ".")) else model


def _evaluated(summary: dict[str, Any], evaluated: list[tuple[int, float]]) -> dict[str, float]:
    best = summary["eval_loss"]["best"]
    return {"first": evaluated[0][1], "last": evaluated[-1][1], "best": best["loss"], "best_step": best["step"]}


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


def _data(data: dict[str, Any]) -> list[tuple[str, str]]:
    facts = {name.replace("_", " "): _shown(data[name]) for name in data if name != "sources"}
    for source in data["sources"]:
        facts[source["name"]] = f"{source['format']}, {source['bytes']:,} bytes, weight {source['weight']:g}"
    return list(facts.items())


def _shown(value: Any) -> str:
    if value is None:
        return "not known before reading"
    return " ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def _prompts(answers: list[dict[str, Any]], pictures: list[list[Image.Image]]) -> list[dict[str, Any]]:
    """Of each prompt `question`, `pictures`, `expected`, and of its answers, each with a title, `shown`, the first and
    the last, and `between`; `num_between` is how many there are of these."""
    by_prompt: dict[int, dict[int, dict[str, Any]]] = {}
    for answer in answers:
        by_prompt.setdefault(answer["index"], {})[answer["step"]] = answer
    prompts = []
    for index, at in sorted(by_prompt.items()):
        steps = sorted(at)
        between = steps[1:-1]
        said = {step: (step_title(step), at[step]["answer"]) for step in steps}
        prompts.append(
            {
                "question": at[steps[-1]]["prompt"],
                "pictures": list(map(Picture.of, pictures[index] if index < len(pictures) else [])),
                "expected": at[steps[-1]].get("expected"),
                "shown": [said[step] for step in dict.fromkeys((steps[0], steps[-1]))],
                "between": [said[step] for step in _evenly(between)],
                "num_between": len(between),
            }
        )
    return prompts


def step_title(step: int) -> str:
    """Of an answer."""
    return "before training" if step == 0 else f"step {step}"


def _evenly(steps: list[int]) -> list[int]:
    """At most `MAX_BETWEEN` of the steps, evenly spaced, with the first and the last."""
    if len(steps) <= MAX_BETWEEN:
        return steps
    return [steps[round(index * (len(steps) - 1) / (MAX_BETWEEN - 1))] for index in range(MAX_BETWEEN)]
