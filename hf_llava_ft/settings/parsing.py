"""The command line of training: flags, a recipe, a preset and defaults become the settings of a run.

The command line overrides the recipe, the recipe the preset, and the preset the defaults. Each layer is read by
itself, so that the origin of every setting is known. What is still open then follows from what trains.
"""

import dataclasses
import re
from argparse import SUPPRESS
from collections.abc import Sequence
from typing import Any, NoReturn

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from hf_llava_ft.errors import UserError
from hf_llava_ft.library_differences import checkpointing_flags
from hf_llava_ft.settings.arguments import DataArguments, ModelArguments, TuningArguments
from hf_llava_ft.settings.by_what_trains import put_defaults
from hf_llava_ft.settings.defaults import DEFAULT
from hf_llava_ft.settings.flags.help import USAGE, wants_help
from hf_llava_ft.settings.flags.known import OF_THE_PARSER
from hf_llava_ft.settings.flags.wrong_names import sentence_on
from hf_llava_ft.settings.machine import has_bf16_gpu
from hf_llava_ft.settings.original_flags import (
    OF_A_NEW_LLAVA,
    ORIGINAL_DEFAULTS,
    USE_LORA_DEFAULTS,
    add_original_flags,
    next_defaults,
    original_dtype,
    translate,
)
from hf_llava_ft.settings.original_table import MARKERS, NEXT_MARKERS
from hf_llava_ft.settings.presets import preset_flags
from hf_llava_ft.settings.recipes import read_recipe, split_recipe
from hf_llava_ft.settings.resolved import ARGUMENT_CLASSES, Setting, Settings, default_of
from hf_llava_ft.settings.training_arguments import LlavaTrainingArguments

FLAG, ORIGINAL_DEFAULT = "flag", "default of the original"


def parse_arguments(
    argv: Sequence[str],
) -> tuple[ModelArguments, DataArguments, TuningArguments, LlavaTrainingArguments]:
    """
    As [`resolve`], as the four objects that `train` takes.

    Raises:
        UserError: for an unknown flag, a wrong value, or settings that contradict each other.
    """
    return resolve(argv).with_chosen_precision(has_bf16_gpu()).build()


def resolve(argv: Sequence[str]) -> Settings:
    """
    The settings that a command line `[RECIPE.yaml] [--preset NAME] [--FLAG VALUE ...]` asks for. Loads no weights,
    opens no data and looks at no device.

    Raises:
        UserError: for an unknown flag, a wrong value, or settings that contradict each other.
    """
    recipe_path, words = split_recipe(argv)
    if (page := wants_help(words)) is not None:
        print(page, end="")
        raise SystemExit(0)
    parser = _Parser()
    line = parser.layer(words)
    dry_run = line.pop("dry_run", False)
    recipe: dict[str, Any] = {}
    if recipe_path is not None:
        by_name = read_recipe(recipe_path, parser.names - {"dry_run"})
        recipe = parser.layer([w for name, value in by_name.items() for w in (f"--{name}", *value)], recipe_path)
    preset_name = line.pop("preset", recipe.pop("preset", None))
    preset = {} if preset_name is None else translate(parser.layer(preset_flags(preset_name))).values
    from_recipe, from_line = translate(recipe), translate(line)
    notes = list(dict.fromkeys([*from_recipe.notes, *from_line.notes]))

    settings = {name: Setting(default_of(field), DEFAULT) for name, field in _fields().items()}

    def put(values: dict[str, Any], origin: str, sources: dict[str, str] | None = None) -> None:
        for name, value in values.items():
            flag = (sources or {}).get(name)
            where = f" of {origin}" if flag and origin != FLAG else ""
            settings[name] = Setting(value, f"translated from --{flag}{where}" if flag else origin)

    given = {**preset, **from_recipe.values, **from_line.values}
    chosen = [values for values in (recipe, line) if "train_type" in values]
    in_original_words = preset_name is None and not chosen and bool(MARKERS & {*recipe, *line})
    original = ORIGINAL_DEFAULTS | (next_defaults() if NEXT_MARKERS & {*recipe, *line} else {})
    if in_original_words:
        put(original, ORIGINAL_DEFAULT)
    elif chosen and chosen[-1]["train_type"] == "use_lora":
        put(USE_LORA_DEFAULTS, "default of --train_type use_lora")
        said = _said(USE_LORA_DEFAULTS, given)
        notes.append(f"--train_type use_lora: --train_type lora, and whatever is not set is as there: {said}.")
    put(preset, f"preset {preset_name}")
    put(from_recipe.values, f"recipe {recipe_path}", from_recipe.sources)
    put(from_line.values, FLAG, from_line.sources)
    if in_original_words:
        as_there = _said(_settle(settings, given, original), given)
        notes.append(f"With the original's flags, what is not set is as there: {as_there}.")
    put_defaults(settings)
    assumed = frozenset(
        name for name in (*OF_A_NEW_LLAVA, "picture_opening") if settings[name].origin == ORIGINAL_DEFAULT
    )
    return Settings(settings, notes, assumed, dry_run=dry_run)


def _settle(settings: dict[str, Setting], given: dict[str, Any], original: dict[str, Any]) -> dict[str, Any]:
    """Adds the original's defaults that depend on other settings; returns all of them."""
    values = {name: setting.value for name, setting in settings.items()}
    defaults = original | {"dtype": original_dtype(values)}
    if values.get("streaming"):
        del defaults["sampler_order"]  # which needs all rows at once
        settings["sampler_order"] = Setting(given.get("sampler_order", "default"), settings["sampler_order"].origin)
    for name, value in defaults.items():
        if name not in given:
            settings[name] = Setting(value, ORIGINAL_DEFAULT)
    return defaults


def _said(defaults: dict[str, Any], given: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in defaults.items() if name not in given)


def _true_false_or_auto(word: str) -> bool | str:
    return "auto" if word.lower() == "auto" else string_to_bool(word)


def _fields() -> dict[str, dataclasses.Field]:
    return {field.name: field for each in ARGUMENT_CLASSES for field in dataclasses.fields(each) if field.init}


class _Parser(HfArgumentParser):
    """Reads one layer at a time: what is not given is not in the result."""

    def __init__(self):
        super().__init__(
            ARGUMENT_CLASSES,
            prog="llava-ft train",
            usage=USAGE,
            allow_abbrev=False,
            add_help=False,  # `flags/help.py`
        )
        self.where = ""
        self.add_argument("--preset", help=OF_THE_PARSER["preset"])
        self.add_argument("--dry_run", type=string_to_bool, nargs="?", const=True, help=OF_THE_PARSER["dry_run"])
        add_original_flags(self, {action.dest for action in self._actions})
        for action in self._actions:
            action.required = False
            if action.type is string_to_bool:
                action.nargs, action.const = "?", True  # also those whose default is none
            if action.dest in checkpointing_flags():
                action.type = _true_false_or_auto
            if action.dest == "report_to":
                action.nargs = "+"  # as the original's transformers has it
            if action.dest == "image_aspect_ratio":
                action.choices, action.type = None, str  # LLaVA-NeXT has more of them, which `translate` knows
        self.names = {action.dest for action in self._actions}

    def layer(self, words: list[str], where: str = "") -> dict[str, Any]:
        """
        Args:
            where (`str`): the file that `words` come from, for errors.
        """
        self.where = f"the recipe {where}: " if where else ""
        empty = [word for word in words if word.startswith("--") and word.endswith("=--")]
        if empty:  # argparse up to Python 3.12 makes an empty list of it, whatever the type
            raise UserError(f"{self.where}{empty[0].removesuffix('=--')} needs a value, and -- is none.")
        defaults = [(action, action.default) for action in self._actions]
        for action in self._actions:
            action.default = SUPPRESS
        try:
            namespace, unknown = self.parse_known_args(words)
        finally:
            for action, default in defaults:
                action.default = default
        if unknown:
            raise UserError(sentence_on(unknown[0].partition("=")[0], self.names))
        values = vars(namespace)
        if len(values.get("report_to", "")) == 1:
            values["report_to"] = values["report_to"][0]
        return values

    def error(self, message: str) -> NoReturn:
        sentence = re.sub(r"^argument (--[^/:]+)[^:]*: ", r"\1: ", message)
        raise UserError(f"{self.where}{sentence}.")
