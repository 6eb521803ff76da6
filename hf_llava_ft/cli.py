"""`llava-ft`: the commands. Each imports what it needs when it runs, so that `--help` answers at once."""

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from hf_llava_ft.errors import UserError, exit_on_user_error

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
_FORMAT_HELP = (
    "llava: that of haotian-liu/LLaVA. llava-hf: transformers' own; a model that it cannot express is written with "
    "its code, and others load it with trust_remote_code=True."
)
JsonOption = Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")]


@app.command()
def quickstart(
    output_dir: Annotated[Path, typer.Option("--output_dir", help="Where everything is written.")] = Path(
        "runs/quickstart"
    ),
    seed: Annotated[int, typer.Option("--seed", help="Governs every initialisation and the order of the data.")] = 42,
) -> None:
    """Compose a small LLaVA, ask it, fine-tune it on real photographs, merge, verify, ask again."""
    with exit_on_user_error():
        from hf_llava_ft.quickstart import run_quickstart

        if not run_quickstart(output_dir, seed=seed).passed:
            raise typer.Exit(1)


@app.command()
def compose(
    vision: Annotated[str, typer.Option("--vision", help="CLIP or SigLIP model: folder or Hub id.")],
    language: Annotated[str, typer.Option("--language", help="Decoder language model: folder or Hub id.")],
    output_dir: Annotated[Path, typer.Option("--output_dir", help="Where the new LLaVA is written.")],
    version: Annotated[str | None, typer.Option("--version", help="Chat template; default: the tokenizer's.")] = None,
    projector_type: Annotated[
        str, typer.Option("--mm_projector_type", help="linear, mlp{N}x_gelu, identity.")
    ] = "mlp2x_gelu",
    vision_feature_layer: Annotated[
        int, typer.Option("--mm_vision_select_layer", help="Hidden state that is read.")
    ] = -2,
    image_aspect_ratio: Annotated[str, typer.Option("--image_aspect_ratio", help="square or pad.")] = "pad",
    seed: Annotated[int, typer.Option("--seed", help="Governs the fresh projector.")] = 42,
) -> None:
    """Make a new LLaVA from a vision tower and a language model."""
    with exit_on_user_error():
        from hf_llava_ft.compose import compose_llava

        folder = compose_llava(
            vision,
            language,
            output_dir,
            version=version,
            projector_type=projector_type,
            vision_feature_layer=vision_feature_layer,
            image_aspect_ratio=image_aspect_ratio,
            seed=seed,
        )
        typer.echo(f"The new LLaVA is at {folder}.", err=True)
        _print_note_on_code(folder)


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def train(context: typer.Context) -> None:
    """Fine-tune a LLaVA: [RECIPE.yaml] and flags, those of the original's train.py and transformers' Trainer too."""
    from hf_llava_ft.train import main as train_main

    train_main(context.args)


@app.command()
def check(
    data: Annotated[str, typer.Argument(metavar="DATA", help="Data of any format; as --data_path in training.")],
    image_folder: Annotated[str, typer.Option("--image_folder", help="Folder the image paths are relative to.")] = ".",
    model: Annotated[
        str | None, typer.Option("--model", help="Folder or Hub id that is to be trained; without it, no tokens.")
    ] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Revision of the model on the Hub.")] = None,
    version: Annotated[str | None, typer.Option("--version", help="Chat template; default: the model's.")] = None,
    model_max_length: Annotated[
        int | None,
        typer.Option("--model_max_length", min=1, help="Longest row in tokens; default: what the model takes."),
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch_size", min=1, help="Rows in a forward pass, for padding and steps.")
    ] = 16,
    samples_per_second: Annotated[
        float | None, typer.Option("--samples_per_second", min=1e-9, help="Of a run before; for the time of an epoch.")
    ] = None,
    allow_images_outside: Annotated[
        bool, typer.Option("--allow_images_outside", help="Take image paths that leave the folder.")
    ] = False,
    allow_image_urls: Annotated[bool, typer.Option("--allow_image_urls", help="Fetch images from the web.")] = False,
    num_proc: Annotated[
        int | None, typer.Option("--num_proc", min=1, help="Processes; default: one for each core.")
    ] = None,
    preview: Annotated[
        int, typer.Option("--preview", min=0, help="Print so many rows with what is learned marked.")
    ] = 0,
    report: Annotated[Path | None, typer.Option("--report", help="Also write the result as an HTML page.")] = None,
    json_file: JsonOption = None,
) -> None:
    """Look at a whole data set before training: rows, images, tokens, and everything that training would refuse.

    Ends with 0 if every row can be trained on, 1 if some can't, 2 if data or model can't be opened.
    """
    with exit_on_user_error():
        from hf_llava_ft.checking import run_check

        result = run_check(
            data,
            image_folder,
            model,
            revision=revision,
            version=version,
            model_max_length=model_max_length,
            batch_size=batch_size,
            samples_per_second=samples_per_second,
            allow_outside=allow_images_outside,
            allow_urls=allow_image_urls,
            num_proc=num_proc,
            preview=preview,
            report=report,
        )
        if json_file is not None:
            _write_json(json_file, result.to_json())
        if not result.trainable:
            raise typer.Exit(1)


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def estimate(context: typer.Context) -> None:
    """Memory and time of a training run, from the model's configuration alone: the flags of train, and --fit GB."""
    from hf_llava_ft.estimate import main as estimate_main

    estimate_main(context.args)


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
        _print_note_on_code(output_dir)
        if json_file is not None:
            result = {"output_dir": str(output_dir), "verified": True, "loader": merged.verification.loader}
            _write_json(json_file, result | {"logit_difference": difference})


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
        _print_note_on_code(output_dir)
        if json_file is not None:
            result = {"output_dir": str(output_dir), "kind": done.kind, "verified": True}
            _write_json(json_file, result | {"loader": done.verification.loader, "logit_difference": difference})


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
            _write_json(json_file, {"prompt": prompt, "images": image or [], "answer": answer})


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


def _print_note_on_code(folder: Path) -> None:
    from hf_llava_ft.remote_code import carries_our_code, note_on_code

    if carries_our_code(folder):
        typer.echo(note_on_code(folder), err=True)


def _print_stream(conversation, question: str, images: list, **generation) -> str:
    answer = ""
    for piece in conversation.stream(question, images, **generation):
        answer += piece
        typer.echo(piece, nl=False)
    typer.echo("")
    return answer.strip()


def _write_json(path: Path, content: dict) -> None:
    import json

    try:
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from error


def main() -> None:
    """Entry point of the console script. Click's own usage errors exit with code 2 too."""
    app()


if __name__ == "__main__":
    main()
