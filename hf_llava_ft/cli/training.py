"""`llava-ft quickstart | compose | train | check | init | estimate`: everything up to a trained model."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from hf_llava_ft.cli.application import (
    ColumnsOption,
    JsonOption,
    OutputDirOption,
    app,
    print_note_on_code,
    writable_file,
    write_json,
)
from hf_llava_ft.errors import exit_on_user_error
from hf_llava_ft.settings.composition import Composition
from hf_llava_ft.start_up import importing, leave_out_bitsandbytes


@app.command()
def quickstart(
    output_dir: Annotated[Path, typer.Option("--output_dir", help="Where all results are written.")] = Path(
        "runs/quickstart"
    ),
    seed: Annotated[
        int, typer.Option("--seed", help="Seed of all initialisations and of the order of the data.")
    ] = 42,
) -> None:
    """Compose a small LLaVA, fine-tune it on five photographs, merge it, and compare its answers before and after."""
    with exit_on_user_error():
        with importing():
            from hf_llava_ft.quickstart.command import run_quickstart

        if not run_quickstart(output_dir, seed=seed).passed:
            raise typer.Exit(1)


@app.command()
def shapes(
    output_dir: OutputDirOption,
    num_pictures: Annotated[int, typer.Option("--num_pictures", min=1, help="Pictures that are trained on.")] = 12000,
    num_held_out: Annotated[
        int, typer.Option("--num_held_out", min=1, help="Held-out pictures, of each of the two kinds.")
    ] = 300,
    seed: Annotated[
        int, typer.Option("--seed", help="Of the pictures, of what is held out, and of all weights.")
    ] = 42,
    learn: Annotated[
        bool, typer.Option("--learn", help="Also train a small LLaVA with random weights on it, and examine it.")
    ] = False,
) -> None:
    """Draw pictures of coloured shapes, with questions and with held-out combinations: to learn, not to remember.

    Exit code: with --learn 0 if it answers as many questions as docs/learning.md promises, else 1.
    """
    with exit_on_user_error():
        from hf_llava_ft.quickstart.shapes import write_shapes

        folder = write_shapes(output_dir, num_pictures, num_held_out, seed)
        typer.echo(f"The pictures and their questions are at {folder}.", err=True)
        if learn:
            from hf_llava_ft.quickstart.learning import learn_shapes

            if not learn_shapes(folder / "run", folder, seed).passed:
                raise typer.Exit(1)


@app.command()
def compose(
    context: typer.Context,
    vision: Annotated[str, typer.Option("--vision", help="CLIP or SigLIP model: folder or Hub id.")],
    language: Annotated[str, typer.Option("--language", help="Decoder language model: folder or Hub id.")],
    output_dir: OutputDirOption,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Revision of the language model on the Hub.")
    ] = None,
    version: Annotated[
        str | None, typer.Option("--version", help="Chat template; default: the tokenizer's.")
    ] = Composition.version,
    projector_type: Annotated[
        str, typer.Option("--mm_projector_type", help="linear, mlp{N}x_gelu or identity.")
    ] = Composition.projector_type,
    vision_feature_layer: Annotated[
        int, typer.Option("--mm_vision_select_layer", help="The tower's hidden state that the projector reads.")
    ] = Composition.vision_feature_layer,
    image_aspect_ratio: Annotated[
        str, typer.Option("--image_aspect_ratio", help="How a picture is made square: square or pad.")
    ] = Composition.image_aspect_ratio,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the new projector.")] = Composition.seed,
) -> None:
    """Make a new LLaVA from a vision tower and a language model."""
    with exit_on_user_error():
        with importing():
            from hf_llava_ft.checkpoints.compose import compose_llava

        folder = compose_llava(**context.params)  # these options are its arguments, name by name
        typer.echo(f"The new LLaVA is at {folder}.", err=True)
        print_note_on_code(folder)


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def train(context: typer.Context) -> None:
    """Fine-tune a LLaVA, with a recipe (YAML), flags, and those of the original LLaVA and of transformers' Trainer."""
    with exit_on_user_error():
        from hf_llava_ft.settings.flags.first_look import end_at_first_look, models_and_words

        end_at_first_look(context.args)
        leave_out_bitsandbytes(*models_and_words(context.args))
        with importing():
            from hf_llava_ft.train import main as train_main

        train_main(context.args)


@app.command()
def check(
    data: Annotated[str, typer.Argument(metavar="DATA", help="Data in any format, as --data_path in training.")],
    image_folder: Annotated[str, typer.Option("--image_folder", help="Folder the image paths are relative to.")] = ".",
    model: Annotated[
        str | None,
        typer.Option("--model", help="Model to be trained, folder or Hub id; without it, tokens are not counted."),
    ] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Revision of the model on the Hub.")] = None,
    version: Annotated[str | None, typer.Option("--version", help="Chat template; default: the model's.")] = None,
    picture_opening: Annotated[
        Literal["upright", "original"] | None,
        typer.Option("--picture_opening", help="How training will open pictures; default: as the model was trained."),
    ] = None,
    model_max_length: Annotated[
        int | None,
        typer.Option("--model_max_length", min=1, help="Most tokens of a row; default: the model's own limit."),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch_size", "--per_device_train_batch_size", min=1, help="Rows on a device at once; default: as train."
        ),
    ] = None,
    samples_per_second: Annotated[
        float | None,
        typer.Option("--samples_per_second", min=1e-9, help="Speed of an earlier run, for the time of an epoch."),
    ] = None,
    allow_images_outside: Annotated[
        bool, typer.Option("--allow_images_outside", help="Allow image paths that leave the image folder.")
    ] = False,
    allow_image_urls: Annotated[bool, typer.Option("--allow_image_urls", help="Fetch images from the web.")] = False,
    columns: ColumnsOption = None,
    num_proc: Annotated[
        int | None, typer.Option("--num_proc", min=1, help="Processes; default: one for each core.")
    ] = None,
    recheck: Annotated[
        bool, typer.Option("--recheck", help="Check all of it again, though nothing has changed since the last time.")
    ] = False,
    preview: Annotated[
        int, typer.Option("--preview", min=0, help="Print this many rows, with what is learned marked.")
    ] = 0,
    report: Annotated[
        Path | None, typer.Option("--report", callback=writable_file, help="Also write the result as an HTML page.")
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Check a whole dataset before training: rows, images, tokens, and everything that training would refuse.

    Exit code: 0 if every row can be trained on, 1 if some can't, 2 if data or model can't be loaded.
    """
    with exit_on_user_error():
        leave_out_bitsandbytes([model])
        with importing():
            from hf_llava_ft.checking.command import run_check

        result = run_check(
            data,
            image_folder,
            model,
            revision=revision,
            version=version,
            picture_opening=picture_opening,
            model_max_length=model_max_length,
            batch_size=batch_size,
            samples_per_second=samples_per_second,
            allow_outside=allow_images_outside,
            allow_urls=allow_image_urls,
            columns=columns,
            num_proc=num_proc,
            recheck=recheck,
            preview=preview,
            report=report,
        )
        write_json(json_file, result.to_json())
        if not result.trainable:
            raise typer.Exit(1)


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Pictures, with captions beside them.")],
    output: Annotated[
        Path | None, typer.Option("--output", help="The file to write, which must be new; default: FOLDER/data.json.")
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", help="What is asked where there are only captions; default: Describe the picture."),
    ] = None,
    captions: Annotated[
        str | None,
        typer.Option("--captions", help="Where the captions are: a table, or txt; default: whichever is there."),
    ] = None,
    columns: ColumnsOption = None,
) -> None:
    """Make a data file of a folder of pictures with captions beside them, and check it.

    A caption is a text file of the picture's name, or a row of a table (CSV, TSV, JSON Lines, Parquet).

    Exit code: 0 if every row can be trained on, 1 if some can't, 2 if no file was written.
    """
    with exit_on_user_error():
        with importing():
            from hf_llava_ft.checking.init_folder import run_init

        if not run_init(folder, output, prompt=prompt, captions=captions, columns=columns).trainable:
            raise typer.Exit(1)


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def estimate(context: typer.Context) -> None:
    """Estimate memory and time of a run from the model's configuration; takes the flags of train, and --fit GB."""
    with exit_on_user_error():
        with importing():
            from hf_llava_ft.estimate.command import main as estimate_main

        estimate_main(context.args)
