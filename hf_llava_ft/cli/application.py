"""What the commands share: the application, options, and how a result is told."""

from pathlib import Path
from typing import Annotated

import typer

from hf_llava_ft.errors import UserError

app = typer.Typer(
    name="llava-ft",
    help="Fine-tune LLaVA on your images and conversations, and know that it worked.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

ModelOption = Annotated[
    str, typer.Option("--model", help="Folder or Hub id: an adapter, a merged or an original model.")
]
BaseOption = Annotated[str | None, typer.Option("--base", help="Base of an adapter, instead of the one it names.")]
AttentionOption = Annotated[str, typer.Option("--attn_implementation", help="sdpa, eager, flash_attention_2, ...")]
MaxNewTokensOption = Annotated[int, typer.Option("--max_new_tokens", min=1, help="Longest answer in tokens.")]
TemperatureOption = Annotated[float, typer.Option("--temperature", min=0.0, help="0 is greedy.")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")]


def print_note_on_code(folder: Path) -> None:
    from hf_llava_ft.remote_code import carries_our_code, note_on_code

    if carries_our_code(folder):
        typer.echo(note_on_code(folder), err=True)


def write_json(path: Path, content: dict) -> None:
    import json

    try:
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from error
