"""`llava-ft check`: a whole dataset checked before training.

The rows are read once, in several processes, then every distinct image is decoded once, in parallel too. Of a good row
some forty bytes are kept, of an image file its path. A dataset with images that can't be decoded is read a second
time, to find the rows that name them.

A problem is what training refuses (`--on_bad_row raise`). A row with a warning trains, perhaps not as intended.
"""

from collections import Counter
from itertools import islice
from typing import Any

import numpy as np
from rich.console import Console

from hf_llava_ft.checking.collected import Collected, name_duplicates, name_rows_of_images
from hf_llava_ft.checking.images import image_facts
from hf_llava_ft.checking.kept_checks import KeptCheck
from hf_llava_ft.checking.progress import checking_bar, estimated_rows
from hf_llava_ft.checking.result import CheckResult
from hf_llava_ft.checking.rows import RowChecker, row_kind
from hf_llava_ft.checking.statistics import length_statistics, padding_waste
from hf_llava_ft.data.formats import Source
from hf_llava_ft.data.formats.dialects import PREFERENCE
from hf_llava_ft.data.formats.mixture import draw_rows
from hf_llava_ft.data.worker_pool import results_of_stream
from hf_llava_ft.processing.processing_llava import LlavaProcessor
from hf_llava_ft.settings.defaults import OF_BATCH, batch_of

_IMAGES_AT_ONCE = 32


def check_data(
    sources: list[Source],
    processor: LlavaProcessor | None = None,
    *,
    longest: int | None = None,
    batch_size: int | None = None,
    seed: int = 42,
    num_proc: int | None = None,
    console: Console | None = None,
    kept: KeptCheck | None = None,
) -> CheckResult:
    """
    Check all of some sources.

    Args:
        sources (`list[Source]`): what `open_source` gave.
        processor (`LlavaProcessor`, *optional*): without one nothing is said of tokens.
        longest (`int`, *optional*): tokens that a row may have, images included.
        batch_size (`int`, *optional*): rows in a forward pass, for padding and steps; by default as training has it.
        seed (`int`): of a mixture, as in training.
        num_proc (`int`, *optional*): processes; by default one for each core.
        console (`rich.console.Console`, *optional*): where the bars are drawn, if it is a terminal.
        kept (`KeptCheck`, *optional*): where the result is kept for the next time.

    Raises:
        UserError: if a process is killed for want of memory. What is wrong with the data is in the result.
    """
    console = console or Console(stderr=True)
    collected = Collected(sources)
    result = CheckResult()
    checker = RowChecker(sources, processor, longest)
    with checking_bar(console, "Checking rows", estimated_rows(sources)) as advance:
        chunks = collected.chunks(result.problems)
        for index, findings in results_of_stream(lambda chunk: (chunk[0], checker(chunk)), chunks, num_proc):
            collected.add(index, findings, result)
            advance(len(findings.numbers))
    files = list(collected.paths)
    states = None if kept is None else kept.decoded.keys(files)
    with checking_bar(console, "Checking images", len(files)) as advance:
        paths = iter(files)
        groups = iter(lambda: list(islice(paths, _IMAGES_AT_ONCE)), [])
        for facts in results_of_stream(lambda group: [image_facts(path) for path in group], groups, num_proc):
            collected.add_images(facts)
            advance(len(facts))
    if kept is not None and states is not None:
        sound = [place for place, facts in enumerate(collected.facts) if facts.failure is None]
        kept.decoded.remember([files[place] for place in sound], states[sound])
    result.holds_preferences = any(source.dialect is PREFERENCE for source in sources)
    _summarise(collected, result)
    result.samples = collected.samples()
    name_rows_of_images(collected, result)
    name_duplicates(collected, result)
    if processor is not None:
        result.picture_opening = processor.picture_opening
        result.tokens = _token_summary(sources, collected, result, longest, batch_size, seed)
    order = {source.where: index for index, source in enumerate(sources)}
    for found in (result.problems, result.warnings):
        found.sort(key=lambda problem: (order[problem.file], problem.row or 0))
    if kept is not None:
        kept.store(collected, result)
    return result


def _summarise(collected: Collected, result: CheckResult) -> None:
    num_images = collected.column("num_images")
    result.rows = len(num_images)
    result.sources = [
        source.describe(int((collected.column("source") == index).sum()))
        for index, source in enumerate(collected.sources)
    ]
    kinds = Counter(row_kind(int(number)) for number in num_images[num_images >= 0])
    result.rows_by_kind = {kind: kinds[kind] for kind in ("text", "image", "multi_image")}
    result.image_places = int(num_images[num_images > 0].sum())
    facts = collected.facts + collected.embedded
    result.images = len(facts)
    result.missing_images = len({p.what for p in result.problems if p.kind == "missing_image"})
    result.unreadable_images = sum(one.failure is not None for one in facts)
    result.decompression_bombs = sum(one.is_bomb for one in facts)
    result.extreme_images = sum(one.is_extreme and one.failure is None for one in facts)
    result.turned_images = sum(one.is_turned for one in facts)
    result.transparent_images = sum(one.is_transparent for one in facts)
    result.image_formats = dict(Counter(one.format for one in facts if one.format).most_common())
    uses = collected.image_uses()
    result.reused_images = int((np.bincount(uses[uses[:, 2] >= 0, 2]) > 1).sum()) if len(uses) else 0


def _token_summary(
    sources: list[Source],
    collected: Collected,
    result: CheckResult,
    longest: int | None,
    batch_size: int | None,
    seed: int,
) -> dict[str, Any]:
    lengths, supervised = collected.column("lengths"), collected.column("supervised")
    num_images, source_of = collected.column("num_images"), collected.column("source")
    known = lengths > 0
    summary: dict[str, Any] = {"model_max_length": longest}
    if not known.any():
        return summary
    summary["tokens"] = int(lengths[known].sum())
    summary["image_tokens"] = int(collected.column("image_tokens")[known].sum())
    summary["supervised_tokens"] = int(supervised[known].sum())
    summary["supervised_share"] = round(summary["supervised_tokens"] / summary["tokens"], 4)
    summary["token_lengths"] = length_statistics(lengths[known])

    excess = collected.column("excess")
    summary["cut"] = {
        "rows": int((excess > 0).sum()),
        "tokens": int(excess[excess > 0].sum()),
        "rows_left_out": int((excess < 0).sum()),
    }
    # Steps and padding are those of --on_bad_row skip.
    lengths = np.where(excess > 0, lengths - excess, lengths)
    known &= excess >= 0
    wrong = {(problem.file, problem.row) for problem in result.problems if problem.kind != "too_long"}
    is_wrong = np.array(
        [(sources[s].where, n) in wrong for s, n in zip(source_of, collected.column("numbers"), strict=True)]
        if wrong
        else np.zeros(len(lengths)),
        dtype=bool,
    )
    trained: list[np.ndarray] = []
    for index, source in enumerate(sources):
        rows = np.flatnonzero(known & ~is_wrong & (source_of == index))
        if len(rows):
            trained.append(rows if source.weight == 1 else rows[draw_rows(len(rows), source.weight, seed, index)])
    if trained:
        rows = np.concatenate(trained)
        # As a run on one device has it that was told of no other.
        batch: dict[str, Any] = {OF_BATCH[0]: batch_size}
        size, accumulation = ((batch | batch_of("lora", len(rows), 1, batch))[name] for name in OF_BATCH)
        summary["padding_waste"] = padding_waste(lengths[rows], num_images[rows] > 0, size, accumulation)
        summary["steps"] = {
            "batch_size": size,
            "accumulation": accumulation,
            "rows_per_epoch": len(rows),
            "steps_per_epoch": -(-len(rows) // (size * accumulation)),
        }
    return summary
