"""A check's result in the terminal: what is there, what is wrong, what to do."""

from rich.console import Console
from rich.table import Table

from hf_llava_ft.checking.preview import visible
from hf_llava_ft.checking.result import CheckResult
from hf_llava_ft.data.problems import Problem

_MAX_SHOWN = 20  # of problems, and of warnings
_PER_KIND = 5  # while there are other kinds


def print_summary(result: CheckResult, console: Console, samples_per_second: float | None = None) -> None:
    """
    Args:
        samples_per_second (`float`, *optional*): measured in a run before; without it, no time is told.
    """
    for source in result.sources:
        console.print(visible(source), highlight=False, markup=False, soft_wrap=True)
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in summary_lines(result, samples_per_second):
        table.add_row(name, value)
    console.print(table, highlight=False, markup=False)
    _print_problems(result.problems, "problem", console)
    _print_problems(result.warnings, "warning", console)
    by = " by TRL's DPOTrainer (docs/preference.md), not by llava-ft train" if result.holds_preferences else ""
    verdict = f"Every row can be trained on{by}." if result.trainable else _refusal(result)
    style = "bold green" if result.trainable else "bold red"
    console.print(verdict, style=style, highlight=False, markup=False, soft_wrap=True)


# What becomes of pictures that not everybody opens alike.
_OPENED = {
    "upright": {
        "images turned by EXIF": "; trained upright, as transformers' load_image and vLLM open them; llama.cpp turns "
        "nothing",
        "transparent images": "; an alpha channel is dropped, as by transformers' load_image; vLLM, and who hands an "
        "open picture to the processor, see white there: flatten such files to be safe",
    },
    "original": {
        "images turned by EXIF": "; trained as they lie, as the original LLaVA does, while transformers and vLLM turn "
        "them for whoever asks the model",
        "transparent images": "; transparency is dropped, as in the original LLaVA, where other readers may see white",
    },
}


def summary_lines(result: CheckResult, samples_per_second: float | None = None) -> list[tuple[str, str]]:
    """(name, value) of everything that is counted."""
    kinds = result.rows_by_kind
    lines = [
        (
            "rows",
            f"{result.rows:,}: {kinds['image']:,} with an image, {kinds['multi_image']:,} with several, "
            f"{kinds['text']:,} of text alone",
        )
    ]
    formats = ", ".join(f"{name} {number:,}" for name, number in result.image_formats.items())
    shown = f"{result.images:,}, named {_counted(result.image_places, 'time')} by the rows"
    lines.append(("images", f"{shown} ({formats})" if formats else shown))
    for name, number in (
        ("missing images", result.missing_images),
        ("unreadable images", result.unreadable_images),
        ("  of these, too large to decode", result.decompression_bombs),
        ("very long or very flat images", result.extreme_images),
        ("images turned by EXIF", result.turned_images),
        ("transparent images", result.transparent_images),
        ("rows that repeat another", result.duplicate_rows),
    ):
        if number:
            lines.append((name, f"{number:,}{_OPENED[result.picture_opening].get(name, '')}"))
    return lines + _token_lines(result, samples_per_second)


def _token_lines(result: CheckResult, samples_per_second: float | None) -> list[tuple[str, str]]:
    tokens = result.tokens
    if tokens is None:
        return [("tokens", "not counted; --model counts them")]
    if "tokens" not in tokens:
        return [("tokens", "none: no row could be encoded")]
    lengths = tokens["token_lengths"]
    percentiles = lengths["percentiles"]
    lines = [
        (
            "tokens",
            f"{tokens['tokens']:,}, of which {tokens['image_tokens']:,} are of images; "
            f"{tokens['supervised_tokens']:,} are learned ({100 * tokens['supervised_share']:.1f}%)",
        ),
        (
            "tokens per row",
            f"{lengths['min']:,} to {lengths['max']:,}, half of them up to {percentiles['50']:,}, 95% up to "
            f"{percentiles['95']:,}, 99% up to {percentiles['99']:,}",
        ),
        ("", _sparkline(lengths["histogram"])),
    ]
    too_long = result.num_rows_with("too_long")
    limit = tokens["model_max_length"]
    longer = f"{too_long:,}" if limit is None else f"{too_long:,} (--model_max_length {limit:,})"
    if too_long:
        cut = tokens["cut"]
        longer += (
            f"; --on_bad_row skip cuts {cut['tokens']:,} tokens off {cut['rows']:,} of them and leaves out "
            f"{cut['rows_left_out']:,}"
        )
    lines.append(("rows that are too long", longer))
    if "steps" in tokens:
        waste, steps = tokens["padding_waste"], tokens["steps"]
        lines.append(
            (
                "padding",
                f"{100 * waste['group_by_modality_length']:.1f}% of the positions in batches of {steps['batch_size']} "
                f"rows; {100 * waste['random']:.1f}% with --group_by_modality_length False",
            )
        )
        time = (
            "time not known: give --samples_per_second, which training shows"
            if samples_per_second is None
            else f"about {_duration(steps['rows_per_epoch'] / samples_per_second)} at {samples_per_second:g} samples/s"
        )
        rows, num_steps = _counted(steps["rows_per_epoch"], "row"), _counted(steps["steps_per_epoch"], "step")
        accumulated = f" x {steps['accumulation']} accumulated" if steps["accumulation"] > 1 else ""
        of = f"of {steps['batch_size']}{accumulated}"
        lines.append(("every row once (epoch)", f"{rows}, {num_steps} {of} on one device; {time}"))
    return lines


def _print_problems(problems: list[Problem], name: str, console: Console) -> None:
    if not problems:
        return
    console.print(f"\n{_counted(len(problems), name)}", style="bold", highlight=False)
    for problem in chosen_problems(problems, _MAX_SHOWN):
        console.print(f"  {visible(problem.sentence)}", highlight=False, markup=False, soft_wrap=True)
    if len(problems) > _MAX_SHOWN:
        console.print(f"  ... and {len(problems) - _MAX_SHOWN:,} more, all in --json FILE.", highlight=False)


def chosen_problems(problems: list[Problem], number: int) -> list[Problem]:
    """Up to `number` of them, in order, with some of every kind."""
    seen: dict[str, int] = {}
    few: list[int] = []
    rest: list[int] = []
    for place, problem in enumerate(problems):
        seen[problem.kind] = seen.get(problem.kind, 0) + 1
        (few if seen[problem.kind] <= _PER_KIND else rest).append(place)
    return [problems[place] for place in sorted((few + rest)[:number])]


def _refusal(result: CheckResult) -> str:
    rows = len({(problem.file, problem.row) for problem in result.problems})
    return (
        f"Training refuses this set: {rows:,} of {result.rows:,} rows {'has' if rows == 1 else 'have'} problems. "
        "Mend them, or train without them: --on_bad_row skip."
    )


def _sparkline(histogram: dict) -> str:
    """The histogram in a line of blocks, and its ends."""
    counts, edges = histogram["counts"], histogram["edges"]
    blocks = " ▁▂▃▄▅▆▇█"
    top = max(counts)
    line = "".join(blocks[-(-count * (len(blocks) - 1) // top)] for count in counts)
    return f"{edges[0]} {line} {edges[-1] - 1}"


def _counted(number: int, name: str) -> str:
    return f"{number:,} {name}{'' if number == 1 else 's'}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
