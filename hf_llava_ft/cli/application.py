"""What the commands share: the application, options, and how a result is told."""

from pathlib import Path
from typing import Annotated

import typer

from hf_llava_ft import __version__
from hf_llava_ft.errors import UserError

app = typer.Typer(
    name="llava-ft",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Fine-tune LLaVA on your images and conversations, and know that it worked."""


ModelOption = Annotated[
    str, typer.Option("--model", help="Folder or Hub id: an adapter, a merged or an original model.")
]
BaseOption = Annotated[str | None, typer.Option("--base", help="Base of an adapter, instead of the one it names.")]
RevisionOption = Annotated[
    str | None, typer.Option("--revision", help="Branch, tag or commit of what is on the Hub; default: main.")
]
AttentionOption = Annotated[str, typer.Option("--attn_implementation", help="sdpa, eager, flash_attention_2, ...")]
AllowNanOption = Annotated[bool, typer.Option("--allow_nan", help="Take a model whose weights are NaN or infinite.")]
MaxNewTokensOption = Annotated[int, typer.Option("--max_new_tokens", min=1, help="Longest answer in tokens.")]
TemperatureOption = Annotated[float, typer.Option("--temperature", min=0.0, help="0 is greedy.")]


def writable_file(path: Path | None) -> Path | None:
    """Callback of an option that names a file to write: a wrong one is refused before the work and not behind it."""
    if path is not None:
        from hf_llava_ft.checkpoints.artifact import check_writable_file

        try:
            check_writable_file(path)
        except UserError as error:
            raise typer.BadParameter(error.sentence) from error
    return path


JsonOption = Annotated[
    Path | None, typer.Option("--json", callback=writable_file, help="Also write the result to this file.")
]


def print_note_on_code(folder: Path) -> None:
    from hf_llava_ft.checkpoints.remote_code import carries_our_code, note_on_code

    if carries_our_code(folder):
        typer.echo(note_on_code(folder), err=True)


def write_json(path: Path, content: dict) -> None:
    import json

    try:
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from error
