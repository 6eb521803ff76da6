"""What the commands share: the application, options, and output of results."""

from pathlib import Path
from typing import Annotated, Any

import typer

from hf_llava_ft import __version__
from hf_llava_ft.errors import UserError

app = typer.Typer(
    name="llava-ft",
    no_args_is_help=True,
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
    """Fine-tune LLaVA on your images and conversations, and verify the result."""


ModelOption = Annotated[str, typer.Option("--model", help="Folder or Hub id: a model or an adapter, of any format.")]
BaseOption = Annotated[str | None, typer.Option("--base", help="Base of an adapter, if not the one it names.")]
OutputDirOption = Annotated[
    Path, typer.Option("--output_dir", help="Where the result is written: a new or empty folder.")
]
DtypeOption = Annotated[
    str, typer.Option("--dtype", help="dtype of the weights: auto (as saved), float32, bfloat16, float16.")
]
RevisionOption = Annotated[
    str | None, typer.Option("--revision", help="Branch, tag or commit on the Hub; default: main.")
]
ImagesOption = Annotated[list[str] | None, typer.Option("--image", help="Path or URL of a picture; may be repeated.")]
AttentionOption = Annotated[str, typer.Option("--attn_implementation", help="sdpa, eager, flash_attention_2, ...")]
AllowNanOption = Annotated[bool, typer.Option("--allow_nan", help="Take a model whose weights are NaN or infinite.")]
ColumnsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--columns",
        help="Of a table: image=img,prompt=question,response=answer; DATA:... for one of several; repeatable.",
    ),
]
MaxNewTokensOption = Annotated[int, typer.Option("--max_new_tokens", min=1, help="Most tokens of an answer.")]
TemperatureOption = Annotated[float, typer.Option("--temperature", min=0.0, help="Sampling temperature; 0: greedy.")]

TopPOption = Annotated[
    float | None,
    typer.Option(
        "--top_p", min=1e-6, max=1.0, help="Sample from the likeliest tokens of this share; with --temperature."
    ),
]
SystemOption = Annotated[
    str | None, typer.Option("--system", help="System message; default: the chat template's own, if it has one.")
]
BitsOption = Annotated[
    int | None, typer.Option("--bits", help="4 or 8: quantise the language model on loading, with bitsandbytes.")
]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:1, mps; default: the best that there is.")
]


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


def write_json(path: Path | None, content: dict[str, Any]) -> None:
    """Writes the file that `--json` asks for, if it does."""
    import json

    if path is None:
        return
    try:
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from error
