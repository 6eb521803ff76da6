"""`llava-ft push`: what goes to the Hub."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from hf_llava_ft.cli.application import ColumnsOption, JsonOption, app, write_json
from hf_llava_ft.errors import UserError, exit_on_user_error
from hf_llava_ft.start_up import importing

if TYPE_CHECKING:
    from hf_llava_ft.hub.upload import Uploaded

_BASE_HELP = "Hub id of the base of an adapter or projector that was trained on a local folder."


@app.command()
def push(
    path: Annotated[
        str,
        typer.Argument(metavar="PATH", help="Folder of an adapter, a model or a projector; or data in any format."),
    ],
    repo_id: Annotated[str, typer.Option("--repo_id", help="user/name; created if it does not exist.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Branch; created from main if it does not exist.")
    ] = None,
    create_pr: Annotated[bool, typer.Option("--create_pr", help="Open a pull request.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry_run", help="List what would be uploaded, print the card, and upload nothing.")
    ] = False,
    no_verify: Annotated[
        bool, typer.Option("--no_verify", help="Skip verification, before the upload and after.")
    ] = False,
    keep_card: Annotated[
        bool, typer.Option("--keep_card", help="Leave README.md on the Hub as it is, instead of writing it anew.")
    ] = False,
    commit_message: Annotated[str | None, typer.Option("--commit_message", help="Message of the commit.")] = None,
    license: Annotated[
        str | None,
        typer.Option("--license", help="License, as the Hub names it; a model has by default that of its base."),
    ] = None,
    language: Annotated[
        list[str] | None, typer.Option("--language", help="Language, en, de, ...; may be repeated.")
    ] = None,
    run: Annotated[Path | None, typer.Option("--run", help="Folder of the training run, for the card.")] = None,
    base: Annotated[str | None, typer.Option("--base", help=_BASE_HELP)] = None,
    samples: Annotated[
        int,
        typer.Option("--samples", min=0, help="Show this many of the --eval_prompts with their pictures on the card."),
    ] = 0,
    image_folder: Annotated[
        str | None, typer.Option("--image_folder", help="For data: the folder that its image paths are relative to.")
    ] = None,
    columns: ColumnsOption = None,
    kinds: Annotated[list[str] | None, typer.Option("--kind", hidden=True, help="Nothing else is pushed.")] = None,
    json_file: JsonOption = None,
) -> None:
    """Upload an adapter, a model, a projector or data in one commit, and check that it works for the next person."""
    with exit_on_user_error():
        common: dict[str, Any] = {
            "private": private,
            "revision": revision,
            "create_pr": create_pr,
            "dry_run": dry_run,
            "verify": not no_verify,
            "commit_message": commit_message,
            "tell": lambda text: typer.echo(text, err=True),
        }
        if not _holds_model(path):
            given = {"--run": run, "--base": base, "--samples": samples, "--keep_card": keep_card}
            wrong = [name for name, value in given.items() if value]
            if kinds:
                raise UserError(f"{path} holds no {kinds[0]}: it has neither config.json nor adapter_config.json.")
            if wrong:
                raise UserError(f"{wrong[0]} is for models, and {path} holds none: it has no config.json.")
            with importing():
                from hf_llava_ft.hub.push_dataset import push_data

            of_card: dict[str, Any] = {"license": license, "language": language}
            data = push_data(path, repo_id, image_folder=image_folder, columns=columns, **of_card, **common)
            content: dict[str, Any] = {"kind": "dataset", "files": data.files}
            left_out, card, uploaded, checked = [], data.card, data.uploaded, "downloaded again and compared"
        else:
            for name, value in {"--image_folder": image_folder, "--columns": columns}.items():
                if value is not None:
                    raise UserError(f"{name} is for data, and {path} holds a model.")
            with importing():
                from hf_llava_ft.hub import push as pushing

            pushed = pushing.push(
                path,
                repo_id,
                keep_card=keep_card,
                license=license,
                language=language,
                run=run,
                base=base,
                samples=samples,
                kinds=cast(Any, tuple(kinds)) if kinds else None,
                **common,
            )
            content = {"kind": pushed.kind, "files": pushed.files}
            left_out, card, uploaded = pushed.left_out, pushed.card, pushed.uploaded
            checked = "downloaded again and loaded in a fresh process"
            if pushed.verification is not None:
                found = pushed.verification
                content |= {"loader": found.loader, "logit_difference": found.logit_difference}
                checked += f" (largest logit difference {found.logit_difference:.1e})"
        if uploaded is None:
            _print_dry_run(repo_id, content["files"], left_out, card)
        else:
            _print_uploaded(uploaded, "" if no_verify else checked)
        write_json(json_file, content | {"uploaded": None if uploaded is None else vars(uploaded)})


def _holds_model(path: str) -> bool:
    """Anything else may be data."""
    if any(Path(path, name).is_file() for name in ("config.json", "adapter_config.json", "mm_projector.bin")):
        return True
    checkpoints = sorted(Path(path).glob("checkpoint-*"), key=lambda folder: folder.stat().st_mtime)
    if checkpoints:
        raise UserError(
            f"{path} is a training run without a model, because it has not finished: push "
            f"{checkpoints[-1]}, or continue training."
        )
    return False


def _print_dry_run(repo_id: str, files: dict[str, int], left_out: list[str], card: str) -> None:
    typer.echo(f"{repo_id} would get {len(files)} files in one commit:")
    for name, size in files.items():
        typer.echo(f"  {size:>14,}  {name}")
    if left_out:
        typer.echo(f"Not uploaded: {', '.join(left_out)}")
    typer.echo(f"\n{card}")


def _print_uploaded(uploaded: "Uploaded", checked: str) -> None:
    if uploaded.changed:
        typer.echo(f"Uploaded: {uploaded.url} (commit {uploaded.commit}).", err=True)
    else:
        typer.echo(f"Nothing has changed: {uploaded.url} holds all of it (commit {uploaded.commit}).", err=True)
    if uploaded.deleted:
        typer.echo(f"Files of the previous version are deleted: {', '.join(uploaded.deleted)}.", err=True)
    if checked:
        typer.echo(f"Verified: {checked}.", err=True)
    else:
        typer.echo("Not verified: whether it loads for others and gives the same answers was not tried.", err=True)
