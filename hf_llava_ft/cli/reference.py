"""`docs/reference.md`, of what the commands declare: `python -m hf_llava_ft.cli.reference > docs/reference.md`."""

from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

import typer

from hf_llava_ft.cli import app
from hf_llava_ft.settings.flags.help import GROUPS, USAGE
from hf_llava_ft.settings.flags.known import OF_THE_PARSER, Flag, own_flags
from hf_llava_ft.settings.original_table import FLAGS, SWITCHES, SWITCHES_OF_NEXT, NoMeaning, Renamed

# They read a command line of their own: the flags of a run.
OF_A_RUN = ("train", "estimate")
_HEAD = """# All flags

Written by `make reference` from what the commands declare; do not edit it by hand. In words: [training](training.md),
[settings](settings.md), [data](data.md), [checking](checking.md), [answering](answering.md), [the Hub](hub.md),
[serving](serving.md)."""
_EACH = "training.md#what-each-setting-of-transformers-does-here"
_OF_TRANSFORMERS = f"of transformers' `TrainingArguments`: [what it does]({_EACH})"


def reference() -> str:
    """The whole page, ending in a newline."""
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    parts = [_HEAD, _run_flags(), _original_flags()]
    parts += [_command(name, command) for name, command in commands.items() if name not in OF_A_RUN]
    return "\n\n".join(parts) + "\n"


def _table(heading: str, rows: Sequence[tuple[str, ...]]) -> str:
    lines = [heading, "| --- " * (heading.count("|") - 1) + "|"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def _run_flags() -> str:
    parts = [
        f"## llava-ft train\n\n`{USAGE}`; `llava-ft estimate` takes "
        "the same, and [its own](estimate.md).\nAll of transformers' flags work as well: "
        "`llava-ft train --help-all` lists them."
    ]
    own = own_flags()
    begin = [(f"`--{name}`", "", text) for name, text in OF_THE_PARSER.items()]
    parts.append("### To begin with\n\n" + _table("| flag | default | |", begin))
    for title, names in GROUPS.items():
        rows = []
        for name in names:
            flag = own.get(name)
            text = _choices(flag) + flag.help if flag is not None else _OF_TRANSFORMERS
            rows.append((f"`--{name}`", _default(flag.default) if flag is not None else "", text))
        parts.append(f"### {title[0].upper()}{title[1:]}\n\n" + _table("| flag | default | |", rows))
    return "\n\n".join(parts)


def _choices(flag: Flag) -> str:
    return f"{', '.join(f'`{choice}`' for choice in flag.choices)}. " if flag.choices else ""


def _original_flags() -> str:
    rows = [(f"`--{name}`", "`--train_type`") for name in (*SWITCHES, *SWITCHES_OF_NEXT)]
    for name, meaning in FLAGS.items():
        if isinstance(meaning, Renamed):
            rows.append((f"`--{name}`", f"`--{meaning.name}`"))
        else:
            rows.append((f"`--{name}`", _without_meaning(meaning)))
    return (
        "### Flags of the original LLaVA and of LLaVA-NeXT\n\nThose that have the same name here are above.\n\n"
        + _table("| flag | here |", sorted(rows))
    )


def _without_meaning(meaning: NoMeaning) -> str:
    told = f"without effect: {meaning.why}"
    return told if meaning.harmless is None else f"{told}; where it asks for anything else: {meaning.instead}"


def _command(name: str, command: Any) -> str:
    text = " ".join((command.help or "").split())
    arguments = " ".join(_metavar(each) for each in command.params if each.param_type_name == "argument")
    rows = []
    for each in command.params:
        if each.name == "help":
            continue
        names = [_metavar(each)] if each.param_type_name == "argument" else [*each.opts, *each.secondary_opts]
        default = "required" if each.required else _default(each.default)
        rows.append((", ".join(f"`{word}`" for word in names), default, each.help or ""))
    usage = f"`llava-ft {name}{' ' if arguments else ''}{arguments} [--FLAG VALUE ...]`"
    return f"## llava-ft {name}\n\n{usage}\n\n{text}\n\n" + _table("| flag | default | |", rows)


def _metavar(argument: Any) -> str:
    return argument.metavar or argument.name.upper()


def _default(value: Any) -> str:
    if isinstance(value, bool):
        return str(value) if value else ""
    if isinstance(value, (str, int, float)) and value != "":
        return f"`{value}`"
    return f"`{value.as_posix()}`" if isinstance(value, PurePath) else ""


if __name__ == "__main__":
    print(reference(), end="")
