"""The first look at a command line: help, mistyped flags and what is missing, before torch and transformers are
imported. What it lets pass, the parser looks at again."""

import difflib
import sys
from collections.abc import Sequence
from itertools import zip_longest

from hf_llava_ft.errors import UserError, exit_on_user_error
from hf_llava_ft.settings.flags.help import wants_help
from hf_llava_ft.settings.flags.known import all_names, is_known, own_flags
from hf_llava_ft.settings.flags.wrong_names import sentence_on
from hf_llava_ft.settings.recipes import read_recipe, split_recipe

NEEDED = {
    "model_name_or_path": "the LLaVA to train, a folder or an id on the Hub",
    "data_path": "the data, a file, a folder or an id on the Hub (docs/data.md)",
}


def first_look(argv: Sequence[str]) -> str | None:
    """
    Args:
        argv: as `resolve` takes it.

    Returns:
        A page of help, if one is asked for.

    Raises:
        UserError: for a flag, a setting of the recipe or a choice that there is none of, or if model or data are not
            named.
    """
    recipe, words = split_recipe(argv)
    if (page := wants_help(words)) is not None:
        return page
    names = [word[2:].partition("=")[0] for word in words if word.startswith("--") and len(word) > 2]
    for name in names:
        if not is_known(name):
            raise UserError(sentence_on(f"--{name}", all_names()))
    _check_choices(words)
    given = {name.replace("-", "_") for name in names}
    if recipe is not None:
        given |= set(read_recipe(recipe, all_names()))
    for name, what in NEEDED.items():
        if name not in given:
            raise UserError(f"--{name} is missing: {what}. llava-ft train --help lists all flags.")
    return None


def end_at_first_look(argv: Sequence[str]) -> None:
    """Ends the process where there is nothing to import for: after a page of help, or after the sentence on what is
    wrong with `argv`, with exit code 2."""
    with exit_on_user_error():
        if (page := first_look(argv)) is not None:
            print(page, end="")
            sys.exit(0)


def models_and_words(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The models that a command line names, the recipe's included, and all its words with those of the recipe."""
    recipe, words = split_recipe(argv)
    settings = {} if recipe is None else read_recipe(recipe, all_names())
    models = settings.get("model_name_or_path", [])
    for word, next_word in zip_longest(words, words[1:], fillvalue=""):
        name, is_said, value = word.partition("=")
        if name.replace("-", "_") == "__model_name_or_path":
            models = [*models, value if is_said else next_word]
    of_recipe = [word for name, values in settings.items() for word in (name, *values)]
    return models, [*words, *of_recipe]


def _check_choices(words: Sequence[str]) -> None:
    for word, next_word in zip_longest(words, words[1:], fillvalue="--"):
        name, is_said, value = word.removeprefix("--").partition("=")
        name, value = name.replace("-", "_"), value if is_said else next_word
        flag = own_flags().get(name) if word.startswith("--") else None
        # LLaVA-NeXT has more words for the last one.
        if flag is None or not flag.choices or value.startswith("--") or name == "image_aspect_ratio":
            continue
        if value not in flag.choices:
            close = difflib.get_close_matches(value, flag.choices, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]}? " if close else ""
            raise UserError(f"--{name} {value}: {hint}It is one of {', '.join(flag.choices)}.")
