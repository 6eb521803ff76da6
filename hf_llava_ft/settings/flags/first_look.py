"""The first look at a command line: help, mistyped flags and what is missing, before torch and transformers are
imported. What it lets pass, the parser looks at again."""

from collections.abc import Sequence

from hf_llava_ft.errors import UserError
from hf_llava_ft.settings.flags.help import wants_help
from hf_llava_ft.settings.flags.known import all_names, is_known
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
        UserError: for a flag or a setting of the recipe that there is none of, or if model or data are not named.
    """
    recipe, words = split_recipe(argv)
    if (page := wants_help(words)) is not None:
        return page
    names = [word[2:].partition("=")[0] for word in words if word.startswith("--") and len(word) > 2]
    for name in names:
        if not is_known(name):
            raise UserError(sentence_on(f"--{name}", all_names()))
    given = {name.replace("-", "_") for name in names}
    if recipe is not None:
        given |= set(read_recipe(recipe, all_names()))
    for name, what in NEEDED.items():
        if name not in given:
            raise UserError(f"--{name} is missing: {what}. llava-ft train --help lists all flags.")
    return None
