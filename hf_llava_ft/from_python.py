"""A run from Python: `fine_tune` takes the settings of the command line by name, or as the four objects of them.

The name is not `train`, because `hf_llava_ft.train` is the module that launchers run.
"""

import sys
from collections.abc import Sequence
from os import PathLike
from typing import Any

import torch
from rich.console import Console

from hf_llava_ft.errors import UserError
from hf_llava_ft.settings.machine import has_bf16_gpu, is_first_process
from hf_llava_ft.settings.parsing import resolve
from hf_llava_ft.settings.ranges import check_ranges
from hf_llava_ft.settings.recipes import as_words
from hf_llava_ft.settings.resolved import ARGUMENT_CLASSES
from hf_llava_ft.train import TrainingResult, tell_last_lines, train


def fine_tune(*arguments: Any, console: Console | None = None, **settings: Any) -> TrainingResult:
    """
    Fine-tunes a LLaVA: the run of `llava-ft train`, with the same defaults, checks, notes and result.

        result = fine_tune(model_name_or_path="my-llava", data_path="data.json", output_dir="my-adapter", lora_r=16)
        result = fine_tune("recipe.yaml", data_path="data.json", output_dir="my-adapter")
        result = fine_tune(ModelArguments(...), DataArguments(...), TuningArguments(...), LlavaTrainingArguments(...))

    Args:
        arguments: a recipe (YAML), or an object of each of the four classes of settings, which are taken as they are.
        console (`rich.console.Console`, *optional*): where the run is shown; by default standard error.
        settings: by the names of the flags; what is `None` is left to its default.

    Returns:
        [`TrainingResult`]: where the adapter or the whole model is, the losses, and what trained.

    Raises:
        UserError: for whatever is wrong with settings, model or data, in a sentence.
    """
    objects = [each for each in arguments if isinstance(each, ARGUMENT_CLASSES)]
    if objects:
        built: Sequence[Any] = _in_order(objects, arguments, settings)
    else:
        resolved = resolve(words_of(arguments, settings)).with_chosen_precision(has_bf16_gpu())
        built = resolved.build()
        if is_first_process():
            for note in resolved.notes:
                print(note, file=sys.stderr)
    model_args, data_args, tuning_args, training_args = built
    result = train(model_args, data_args, tuning_args, training_args, console)
    tell_last_lines(result, console)
    return result


def _in_order(objects: list[Any], arguments: Sequence[Any], settings: dict[str, Any]) -> list[Any]:
    found = [[each for each in objects if isinstance(each, kind)] for kind in ARGUMENT_CLASSES]
    if len(arguments) != len(ARGUMENT_CLASSES) or not all(found):
        names = " and ".join(kind.__name__ for kind in ARGUMENT_CLASSES)
        raise UserError(f"fine_tune takes either settings by name or one object each of {names}.")
    if settings:
        name = next(iter(settings))
        raise UserError(f"fine_tune got objects and {name} besides: put {name} into the object that it belongs to.")
    for [each] in found:
        check_ranges(vars(each))
    return [each for [each] in found]


def words_of(recipes: Sequence[Any], settings: dict[str, Any]) -> list[str]:
    """The command line that says the same.

    Raises:
        UserError: if there is more than one recipe, or what is no file's name, or a setting that only shows something.
    """
    for recipe in recipes:
        if not isinstance(recipe, (str, PathLike)):
            raise UserError(
                f"fine_tune got a {type(recipe).__name__}: give settings by name, such as data_path='data.json', or "
                f"the objects of their four classes."
            )
    if len(recipes) > 1:
        raise UserError(f"fine_tune got {len(recipes)} recipes: give one, and what differs by name.")
    words = [str(recipe) for recipe in recipes]
    if settings.get("dry_run"):
        raise UserError("dry_run only shows settings: use llava-ft train --dry_run.")
    for name, value in settings.items():
        if isinstance(value, torch.dtype):
            value = str(value).removeprefix("torch.")
        if value is not None:
            said = as_words(name, value)
            # With "=", so that a value may begin with a dash.
            words += [f"--{name}={said[0]}"] if len(said) == 1 else [f"--{name}", *said]
    return words
