"""`llava-ft check`: reads the data as the model to be trained would, and reports what it finds."""

import os
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
from rich.console import Console

from hf_llava_ft.checking.check import check_data
from hf_llava_ft.checking.kept_checks import KeptCheck
from hf_llava_ft.checking.preview import first_rows, print_preview
from hf_llava_ft.checking.report import write_check_report
from hf_llava_ft.checking.result import CheckResult
from hf_llava_ft.checking.rows import Sample
from hf_llava_ft.checking.summary import print_summary
from hf_llava_ft.checkpoints.inspection import inspect_checkpoint
from hf_llava_ft.checkpoints.opening import load_config
from hf_llava_ft.checkpoints.starting.training_processor import processor_for_training
from hf_llava_ft.data.formats import Source, open_source
from hf_llava_ft.data.formats.column_choice import SaidOfColumns
from hf_llava_ft.data.pictures import decode_failure
from hf_llava_ft.errors import UserError
from hf_llava_ft.processing.picture_opening_llava import PictureOpening


def run_check(
    data_path: str,
    image_folder: str | None = ".",
    model: str | None = None,
    *,
    revision: str | None = None,
    version: str | None = None,
    picture_opening: PictureOpening | None = None,
    model_max_length: int | None = None,
    batch_size: int | None = None,
    samples_per_second: float | None = None,
    preview: int = 0,
    report: Path | None = None,
    allow_outside: bool = False,
    allow_urls: bool = False,
    columns: SaidOfColumns = None,
    num_proc: int | None = None,
    recheck: bool = False,
    console: Console | None = None,
) -> CheckResult:
    """
    Check a dataset, print what was found, and write the report.

    Args:
        data_path, image_folder, allow_outside, allow_urls, columns: see `open_source`.
        model (`str`, *optional*): folder or Hub id; without it nothing is said of tokens.
        version (`str`, *optional*): chat template, instead of the model's.
        picture_opening (`str`, *optional*): `upright` or `original`, instead of the model's.
        model_max_length (`int`, *optional*): tokens that a row may have; by default what the language model takes.
        batch_size (`int`, *optional*): rows in a forward pass; by default as in training.
        samples_per_second (`float`, *optional*): measured in a run before, for the time of an epoch.
        preview (`int`): rows to print with what is learned marked; the same number are in the report.
        report (`Path`, *optional*): HTML file to write.
        recheck (`bool`): check all of it again, though nothing has changed since the last time.
        console (`rich.console.Console`, *optional*): where the result is printed; stdout by default.

    Raises:
        UserError: if data or model can't be opened. What is wrong with a row is in the result.
    """
    console = console or Console()
    sources = open_source(data_path, image_folder, allow_outside=allow_outside, allow_urls=allow_urls, columns=columns)
    if preview and model is None:
        raise UserError("--preview shows what a model learns; give it with --model.")
    if picture_opening is not None and model is None:
        raise UserError("--picture_opening is how pictures are opened for a model; give it with --model.")
    processor = None
    if model is not None:
        processor = processor_for_training(model, revision, version, picture_opening=picture_opening)
        if model_max_length is None:
            checkpoint = inspect_checkpoint(model, revision)
            model_max_length = load_config(checkpoint.base, checkpoint.revision).text_config.max_position_embeddings
    settings: dict[str, Any] = {"longest": model_max_length, "batch_size": batch_size}
    kept = KeptCheck(Path(os.path.expanduser(datasets.config.HF_DATASETS_CACHE)), sources, processor, **settings)
    result = None if recheck else kept.load()
    if result is None:
        result = check_data(sources, processor, **settings, num_proc=num_proc, kept=kept)
    else:
        told = "Nothing has changed since the last check, whose result this is; --recheck checks all of it again."
        console.print(told, highlight=False, markup=False, soft_wrap=True)
    if processor is not None and preview:
        print_preview(console, processor, first_rows(sources, preview))
    print_summary(result, console, samples_per_second)
    if report is not None:
        samples = {**_first_samples(sources, preview), **result.samples}
        write_check_report(report, result, processor, samples, samples_per_second)
    return result


def _first_samples(sources: list[Source], number: int) -> dict[str, Sample]:
    """The first rows that nothing is wrong with, among the first `number`."""
    samples: dict[str, Sample] = {}
    for source in sources:
        for row_number, raw in islice(source.iter_raw(), max(0, number - len(samples))):
            try:
                row = source.parse(raw, row_number)
                images = [source.locate(image, "") for image in row["images"]]
            except UserError:
                continue
            if all(decode_failure(image["bytes"] or str(image["path"])) is None for image in images):
                samples[f"number {len(samples) + 1}"] = Sample(row_number, row, images)
    return samples
