"""`llava-ft merge | convert | generate | chat`: what is done with a model or an adapter."""

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from hf_llava_ft.cli.application import (
    AttentionOption,
    BaseOption,
    JsonOption,
    MaxNewTokensOption,
    ModelOption,
    TemperatureOption,
    app,
    print_note_on_code,
    write_json,
)
from hf_llava_ft.errors import UserError, exit_on_user_error

_FORMAT_HELP = (
    "llava: that of haotian-liu/LLaVA. llava-hf: transformers' own; a model that it cannot express is written with "
    "its code, and others load it with trust_remote_code=True."
)


@app.command()
def merge(
    adapter: Annotated[str, typer.Option("--adapter", help="Adapter folder or Hub id.")],
    output_dir: Annotated[Path, typer.Option("--output_dir", help="Where the merged model is written.")],
    base: BaseOption = None,
    dtype: Annotated[
        str, typer.Option("--dtype", help="dtype of the merged weights: auto (the base's), float32, ...")
    ] = "auto",
    json_file: JsonOption = None,
) -> None:
    """Merge an adapter into its base, and check the result in a fresh process."""
    with exit_on_user_error():
        from hf_llava_ft.merge import merge_adapter

        merged = merge_adapter(adapter, output_dir, base=base, dtype=dtype)
        difference = merged.verification.logit_difference
        typer.echo(f"Merged and verified: {merged.output_dir} (largest logit difference {difference:.1e}).", err=True)
        print_note_on_code(output_dir)
        if json_file is not None:
            result = {"output_dir": str(output_dir), "verified": True, "loader": merged.verification.loader}
            write_json(json_file, result | {"logit_difference": difference})


@app.command()
def convert(
    model: ModelOption,
    output_dir: Annotated[Path, typer.Option("--output_dir", help="Where the new folder is written.")],
    checkpoint_format: Annotated[str, typer.Option("--format", help=_FORMAT_HELP)],
    base: BaseOption = None,
    vision_tower: Annotated[
        str | None, typer.Option("--vision_tower", help="Name of the tower for the format llava.")
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="dtype of the weights: auto (kept), float32, ...")] = "auto",
    json_file: JsonOption = None,
) -> None:
    """Write a model, adapter or projector in the other format, and check it in a fresh process."""
    with exit_on_user_error():
        if checkpoint_format not in ("llava-hf", "llava"):
            raise UserError(f"--format {checkpoint_format} is unknown: use llava-hf or llava.")
        from hf_llava_ft.convert import convert as convert_checkpoint

        done = convert_checkpoint(
            model, output_dir, cast(Any, checkpoint_format), base=base, vision_tower=vision_tower, dtype=dtype
        )
        difference = done.verification.logit_difference
        typer.echo(f"Converted and verified: {done.output_dir} (largest logit difference {difference:.1e}).", err=True)
        print_note_on_code(output_dir)
        if json_file is not None:
            result = {"output_dir": str(output_dir), "kind": done.kind, "verified": True}
            write_json(json_file, result | {"loader": done.verification.loader, "logit_difference": difference})


@app.command()
def generate(
    model: ModelOption,
    prompt: Annotated[str, typer.Option("--prompt", help="The question.")],
    image: Annotated[list[str] | None, typer.Option("--image", help="Path or URL; may be repeated.")] = None,
    base: BaseOption = None,
    max_new_tokens: MaxNewTokensOption = 256,
    temperature: TemperatureOption = 0.0,
    attn_implementation: AttentionOption = "sdpa",
    json_file: JsonOption = None,
) -> None:
    """Answer one question about one or more pictures, streamed."""
    with exit_on_user_error():
        from hf_llava_ft.answering import Conversation, load_for_answering, open_image

        images = [open_image(source) for source in image or []]
        conversation = Conversation(*load_for_answering(model, base=base, attn_implementation=attn_implementation))
        answer = _print_stream(conversation, prompt, images, max_new_tokens=max_new_tokens, temperature=temperature)
        if json_file is not None:
            write_json(json_file, {"prompt": prompt, "images": image or [], "answer": answer})


@app.command()
def chat(
    model: ModelOption,
    image: Annotated[list[str] | None, typer.Option("--image", help="Path or URL to begin with.")] = None,
    base: BaseOption = None,
    max_new_tokens: MaxNewTokensOption = 256,
    temperature: TemperatureOption = 0.0,
    attn_implementation: AttentionOption = "sdpa",
) -> None:
    """Talk with a model about pictures. In the chat: /image PATH_OR_URL, /new, /quit."""
    with exit_on_user_error():
        from hf_llava_ft.answering import Conversation, load_for_answering, open_image

        pending = [open_image(source) for source in image or []]
        parts = load_for_answering(model, base=base, attn_implementation=attn_implementation)
        conversation = Conversation(*parts)
        typer.echo("/image PATH_OR_URL adds a picture, /new begins anew, /quit ends.", err=True)
        while True:
            try:
                line = input("you: ").strip()
            except (EOFError, KeyboardInterrupt):
                typer.echo("")
                return
            if line == "/quit":
                return
            if line == "/new":
                conversation, pending = Conversation(*parts), []
            elif line.startswith("/image"):
                try:
                    pending.append(open_image(line.removeprefix("/image").strip()))
                except UserError as error:
                    typer.echo(f"error: {error.sentence}", err=True)
            elif line:
                typer.echo("model: ", nl=False)
                _print_stream(conversation, line, pending, max_new_tokens=max_new_tokens, temperature=temperature)
                pending = []


def _print_stream(conversation, question: str, images: list, **generation) -> str:
    answer = ""
    for piece in conversation.stream(question, images, **generation):
        answer += piece
        typer.echo(piece, nl=False)
    typer.echo("")
    return answer.strip()
