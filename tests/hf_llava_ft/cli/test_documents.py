"""What the documentation says of commands and flags is true of the program."""

import re

import pytest
import typer

from hf_llava_ft.cli import app
from hf_llava_ft.cli.reference import OF_A_RUN, reference
from hf_llava_ft.settings.flags.known import all_names, is_known
from hf_llava_ft.settings.flags.wrong_names import meant_by
from tests.documented_commands import PAGES, ROOT, Command, commands_in, inline_commands_in

COMMANDS = typer.main.get_command(app).commands
# Flags of `estimate` that `train` has not.
OF_ESTIMATE = (
    *("model", "engine", "devices", "images", "text_tokens", "picture_size", "supervised_tokens"),
    *("tflops", "utilization", "rows", "fit", "global_batch", "json"),
)


def complaints(command: Command) -> list[str]:
    """What the program would not understand of a command."""
    name, *rest = command.words
    if name not in COMMANDS:
        return [f"{command.page}: there is no command {name}"]
    flags = [word.partition("=")[0] for word in rest if re.match(r"--\w", word)]
    if name in OF_A_RUN:
        also = OF_ESTIMATE if name == "estimate" else ()
        unknown = [flag for flag in flags if flag[2:] not in also and not is_known(flag[2:])]
        unknown = [flag for flag in unknown if flag not in ("--help", "--help-all", "--dry_run")]
    else:
        known = {"--help", *(word for each in COMMANDS[name].params for word in (*each.opts, *each.secondary_opts))}
        unknown = [flag for flag in flags if flag not in known]
    return [f"{command.page}: llava-ft {name} has no {flag}" for flag in unknown]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_are_understood(page):
    found = [*commands_in(page), *inline_commands_in(page)]
    assert [complaint for command in found for complaint in complaints(command)] == []


def test_a_command_and_a_flag_that_are_not_there_are_noticed(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "```bash\nllava-ft check a.json \\\n  --modle b\n```\n`llava-ft bake` `llava-ft train --lora_rnk 3`\n"
    )
    found = [*commands_in(page), *inline_commands_in(page)]
    assert [complaints(command) for command in found] == [
        ["page.md: llava-ft check has no --modle"],
        ["page.md: there is no command bake"],
        ["page.md: llava-ft train has no --lora_rnk"],
    ]


def test_a_block_that_is_not_run_says_why(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- not run: needs a GPU -->\n```bash\nllava-ft train a\n```\n\n```bash\nllava-ft train b\n```\n"
    )
    assert [command.not_run for command in commands_in(page)] == ["not run: needs a GPU", ""]


def test_the_reference_is_that_of_the_code():
    written = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    assert written == reference(), "make reference writes it anew"


def test_every_flag_of_ours_is_in_the_reference():
    text = reference()
    assert "| `--data_path` |" in text and "| `--warmup_ratio` | `--warmup_steps` |" in text
    for name, command in COMMANDS.items():
        if name not in OF_A_RUN:
            [section] = re.findall(rf"^## llava-ft {name}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
            for option in command.params:
                assert (
                    option.name == "help" or f"`{option.opts[0]}`" in section or option.param_type_name == "argument"
                )


def tables_of_others() -> list[tuple[str, str]]:
    """(what it is called there, what it is here), of each row of `docs/coming_from.md` behind the original's."""
    text = (ROOT / "docs" / "coming_from.md").read_text(encoding="utf-8").partition("## From LLaMA-Factory")[2]
    rows = re.findall(r"^\| ([^|]+) \| ([^|]*) \| [^|]*\|$", text, re.MULTILINE)
    return [(there.strip(), here.strip()) for there, here in rows if there.startswith("`")]


def test_what_others_call_otherwise_is_a_flag_here():
    rows = tables_of_others()
    flags = [flag for _, here in rows for flag in re.findall(r"--(\w+)", here)]
    assert len(rows) > 40 and [flag for flag in flags if flag != "output_dir" and not is_known(flag)] == []


def test_the_command_line_knows_the_names_of_those_tables_too():
    names, wrong = all_names(), {}
    for there, here in tables_of_others():
        [*flags] = re.findall(r"`--(\w+)", here)
        words = re.findall(r"`(\w+)", there)
        if len(flags) == len(words):
            meant = {word: (meant_by(word, names) or "").split(" ")[0] for word in words if word not in names}
            expected = dict(zip(words, flags, strict=True))
            wrong |= {word: said for word, said in meant.items() if said != expected[word]}
    assert wrong == {}
