"""`llava-ft merge | convert | export | verify`: what is done with a model or an adapter."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from hf_llava_ft.cli.application import (
    BaseOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    OutputDirOption,
    RevisionOption,
    app,
    print_note_on_code,
    write_json,
)
from hf_llava_ft.errors import UserError, exit_on_user_error
from hf_llava_ft.start_up import importing, leave_out_bitsandbytes

_FORMAT_HELP = (
    "llava: the format of haotian-liu/LLaVA. llava-hf: that of transformers; a model that it cannot express is "
    "written with its code, and loads with trust_remote_code=True."
)


@app.command()
def merge(
    adapter: Annotated[str, typer.Option("--adapter", help="Adapter: folder or Hub id.")],
    output_dir: OutputDirOption,
    base: BaseOption = None,
    revision: RevisionOption = None,
    dtype: DtypeOption = "auto",
    json_file: JsonOption = None,
) -> None:
    """Merge an adapter into its base, and check the result in a fresh process."""
    with exit_on_user_error():
        leave_out_bitsandbytes([adapter, base])
        with importing():
            from hf_llava_ft.checkpoints.merge import merge_adapter

        done = merge_adapter(adapter, output_dir, base=base, revision=revision, dtype=dtype)
        found, rounding = done.verification, done.rounding
        _print_verified("Merged", output_dir, found.logit_difference)
        typer.echo(rounding.sentence, err=True)
        _print_notes(found.notes)
        result = {"output_dir": str(output_dir), "verified": True, "loader": found.loader}
        result |= {"dtype": str(rounding.dtype).removeprefix("torch."), "lost_share": rounding.lost_share}
        write_json(json_file, result | {"logit_difference": found.logit_difference})


@app.command()
def convert(
    model: ModelOption,
    output_dir: OutputDirOption,
    checkpoint_format: Annotated[str, typer.Option("--format", help=_FORMAT_HELP)],
    base: BaseOption = None,
    revision: RevisionOption = None,
    vision_tower: Annotated[
        str | None, typer.Option("--vision_tower", help="Folder or Hub id of the tower that the format llava names.")
    ] = None,
    dtype: DtypeOption = "auto",
    json_file: JsonOption = None,
) -> None:
    """Write a model, adapter or projector in the other format, and check it in a fresh process."""
    with exit_on_user_error():
        if checkpoint_format not in ("llava-hf", "llava"):
            raise UserError(f"--format {checkpoint_format} is unknown: use llava-hf or llava.")
        leave_out_bitsandbytes([model, base])
        with importing():
            from hf_llava_ft.checkpoints.convert import convert as convert_checkpoint

        form = cast(Any, checkpoint_format)
        done = convert_checkpoint(
            model, output_dir, form, base=base, revision=revision, vision_tower=vision_tower, dtype=dtype
        )
        found = done.verification
        _print_verified("Converted", output_dir, found.logit_difference)
        _print_notes(found.notes)
        result = {"output_dir": str(output_dir), "kind": done.kind, "verified": True, "loader": found.loader}
        write_json(json_file, result | {"logit_difference": found.logit_difference})


@app.command()
def export(
    model: ModelOption,
    output_dir: OutputDirOption,
    server: Annotated[str, typer.Option("--for", help="vllm, sglang, llama.cpp, ollama or endpoints.")],
    base: BaseOption = None,
    revision: RevisionOption = None,
    dtype: DtypeOption = "auto",
    keep_adapter: Annotated[
        bool, typer.Option("--keep_adapter", help="For vllm: write the LoRA of the language model beside its base.")
    ] = False,
    json_file: JsonOption = None,
) -> None:
    """Write and check the folder that a server needs, with an adapter merged, and print how to serve it."""
    with exit_on_user_error():
        leave_out_bitsandbytes([model, base])
        with importing():
            from hf_llava_ft.serving import export_for_serving

        name = cast(Any, server)
        done = export_for_serving(
            model, output_dir, name, base=base, revision=revision, dtype=dtype, keep_adapter=keep_adapter
        )
        _print_verified("Exported", output_dir, done.logit_difference)
        _print_notes(done.notes)
        if done.commands:
            typer.echo("\n".join([f"cd {done.output_dir}", *done.commands]))
        result = {"output_dir": str(output_dir), "for": server, "verified": True}
        result |= {"logit_difference": done.logit_difference, "commands": done.commands, "notes": done.notes}
        write_json(json_file, result)


def _print_verified(done: str, output_dir: Path, logit_difference: float) -> None:
    typer.echo(f"{done} and verified: {output_dir} (largest logit difference {logit_difference:.1e}).", err=True)
    print_note_on_code(output_dir)


@app.command()
def verify(
    model: ModelOption,
    base: BaseOption = None,
    revision: RevisionOption = None,
    adapter: Annotated[
        str | None,
        typer.Option(
            "--adapter", help="The adapter that was merged into it: compare with it too, unmerged and in float32."
        ),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Load a model or an adapter as others would, in a fresh process, and compare it with what this package loads.

    Exit code: 0 if both answer the same, 1 if not, 2 if it can't be loaded.
    """
    with exit_on_user_error():
        leave_out_bitsandbytes([model, base, adapter])
        with importing():
            from hf_llava_ft.hub.verify_published import verify_for_others

        found = verify_for_others(model, base=base, revision=revision, adapter=adapter)
        by = {
            "transformers": "transformers",
            "trust_remote_code": "transformers with trust_remote_code=True",
            "hf_llava_ft": "this package",
        }[found.loader]
        if found.ok:
            difference = f"largest logit difference {found.logit_difference:.1e}"
            typer.echo(f"Verified: {model} loads with {by} and answers the same ({difference}).", err=True)
        else:
            typer.echo(f"Not the same: {model}, loaded with {by}: {'; '.join(found.differences)}.", err=True)
        against = found.against_adapter
        if against is not None:
            typer.echo(
                f"Against {adapter}, unmerged and in float32: largest logit difference "
                f"{against.logit_difference:.1e}; of what was learned, {100 * against.lost_share:.3g} % is lost.",
                err=True,
            )
        _print_notes(found.notes)
        typer.echo(f"Asked what is in a test picture, it says: {found.answer!r}")
        result: dict[str, Any] = {"ok": found.ok, "loader": found.loader, "differences": found.differences}
        if against is not None:
            result["against_adapter"] = dataclasses.asdict(against)
        write_json(json_file, result | {"logit_difference": found.logit_difference, "answer": found.answer})
        if not found.ok:
            raise typer.Exit(1)


def _print_notes(notes: list[str]) -> None:
    for note in notes:
        typer.echo(f"Note: {note}", err=True)
