"""`llava-ft evaluate`: is it good, and did it forget?"""

import importlib.util
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_llava_ft.cli.application import (
    AllowNanOption,
    AttentionOption,
    BitsOption,
    ColumnsOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    RevisionOption,
    SystemOption,
    app,
    write_json,
)
from hf_llava_ft.errors import UserError, exit_on_user_error

# What --tasks takes besides; the rest is up to the task.
_WITH_TASKS = {"model", "base", "tasks", "task_folder", "limit", "output_dir", "batch_size", "json_file"}
_WITH_TASKS |= {"revision", "dtype", "bits", "device", "attn_implementation", "allow_nan"}


@app.command()
def evaluate(
    context: typer.Context,
    model: ModelOption,
    base: Annotated[
        str | None,
        typer.Option("--base", help="Compare with this model; default: what an adapter or a run says it came from."),
    ] = None,
    data_path: Annotated[
        str | None, typer.Option("--data_path", help="Rows with their answers, in any format that training reads.")
    ] = None,
    eval_split: Annotated[
        str | None,
        typer.Option("--eval_split", help="Folder of a run: the rows that its --eval_split held out, instead."),
    ] = None,
    retention: Annotated[
        bool, typer.Option("--retention", help="Or forty questions of our own: whether it forgot what its base knows.")
    ] = False,
    tasks: Annotated[
        str | None,
        typer.Option("--tasks", help="Or benchmarks of lmms-eval, which has to be installed: pope,textvqa_val."),
    ] = None,
    task_folder: Annotated[
        Path | None, typer.Option("--task_folder", help="With --tasks: a folder of more tasks, in lmms-eval's YAML.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="With --tasks: only so many rows of each, for a trial.")
    ] = None,
    image_folder: Annotated[str, typer.Option("--image_folder", help="Folder that their image paths start from.")] = (
        "."
    ),
    columns: ColumnsOption = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            help="exact_match, relaxed_accuracy, vqa_accuracy, anls, yes_no, choice, choice_likelihood, cider, bleu, "
            "rouge_l, wer, loss; several with commas. Default: the one that fits the answers, and loss.",
        ),
    ] = None,
    alone: Annotated[bool, typer.Option("--alone", help="Compare an adapter with nothing.")] = False,
    output_dir: Annotated[
        Path | None,
        typer.Option("--output_dir", help="Where answers, figures and report.html go; goes on if begun there."),
    ] = None,
    allow_images_outside: Annotated[
        bool, typer.Option("--allow_images_outside", help="Allow image paths that leave the image folder.")
    ] = False,
    allow_image_urls: Annotated[bool, typer.Option("--allow_image_urls", help="Fetch images from the web.")] = False,
    batch_size: Annotated[int, typer.Option("--batch_size", min=1, help="Rows at a time.")] = 16,
    max_new_tokens: Annotated[int, typer.Option("--max_new_tokens", min=1, help="Most tokens of an answer.")] = 128,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the draws behind the intervals.")] = 0,
    revision: RevisionOption = None,
    system: SystemOption = None,
    dtype: DtypeOption = "auto",
    bits: BitsOption = None,
    device: DeviceOption = None,
    attn_implementation: AttentionOption = "sdpa",
    allow_nan: AllowNanOption = False,
    json_file: JsonOption = None,
) -> None:
    """Measure a model on rows with known answers, beside its base: figures, intervals, a page with pictures."""
    loading: dict[str, Any] = {"revision": revision, "dtype": dtype, "bits": bits, "device": device}
    loading |= {"attn_implementation": attn_implementation, "allow_nan": allow_nan}
    with exit_on_user_error():
        if sum((data_path is not None, eval_split is not None, retention, tasks is not None)) != 1:
            raise UserError(
                "evaluate takes one of --data_path, --eval_split (the folder of a run), --retention and --tasks."
            )
        if tasks is not None:
            _refuse_beside_tasks(context)
            settings = {"task_folder": task_folder, "limit": limit, "output_dir": output_dir, "batch_size": batch_size}
            _evaluate_tasks(model, tasks, json_file, base=base, loading=loading, **settings)
            return
        if task_folder is not None or limit is not None:
            raise UserError("--task_folder and --limit are for --tasks: leave them out.")
        if retention and (metric or alone):
            raise UserError(
                "--retention compares with the base by metrics of its own: leave --metric and --alone out."
            )
        from hf_llava_ft.answering.ranks import joined_ranks
        from hf_llava_ft.evaluation.evaluate import Data, evaluate
        from hf_llava_ft.evaluation.retention import METRICS, NAME, PHOTOGRAPHS, QUESTIONS, told_of_retention
        from hf_llava_ft.hub.measured_results import renew_measured
        from hf_llava_ft.training.summary import data_facts

        access = {"allow_outside": allow_images_outside, "allow_urls": allow_image_urls}
        data = Data(data_path, eval_split, image_folder, columns, access, system)
        if retention:
            data = Data(str(QUESTIONS), image_folder=str(PHOTOGRAPHS), system=system, name=NAME)
            metric = [each.name for each in METRICS]
        with joined_ranks() as ranks:
            found = evaluate(
                model,
                data,
                base=base,
                alone=alone,
                needs_base=retention,
                metrics=metric or (),
                output_dir=output_dir,
                batch_size=batch_size,
                max_new_tokens=max_new_tokens,
                loading=loading,
                seed=seed,
                facts_of=data_facts,
                ranks=ranks,
            )
        if found is None:  # not the first process of a launcher
            return
        if retention:
            typer.echo(told_of_retention(found.scores), err=True)
        renew_measured(Path(model))
        write_json(json_file, found.as_json())


def _refuse_beside_tasks(context: typer.Context) -> None:
    for option in context.command.params:
        source = context.get_parameter_source(option.name or "")
        # By its name: typer brings a click of its own, or takes the one that is installed.
        if option.name not in _WITH_TASKS and source is not None and source.name != "DEFAULT":
            raise UserError(f"{option.opts[0]} is not for --tasks, which say it themselves: leave it out.")


def _evaluate_tasks(model: str, tasks: str, json_file: Path | None, **settings: Any) -> None:
    if importlib.util.find_spec("lmms_eval") is None:
        raise UserError("--tasks needs lmms-eval: pip install 'hf-llava-ft[lmms-eval]'.")
    from hf_llava_ft.answering.ranks import joined_ranks
    from hf_llava_ft.evaluation.benchmarks import evaluate_tasks
    from hf_llava_ft.hub.measured_results import renew_measured

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    with joined_ranks() as ranks:
        found = evaluate_tasks(model, names, ranks=ranks, **settings)
    if found is not None:
        renew_measured(Path(model))
        write_json(json_file, found)
