"""Data of any format to a Parquet dataset, here or on the Hub; entry point of `hub_scripts/push_dataset.py` too."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hf_llava_ft.errors import UserError, exit_on_user_error

if TYPE_CHECKING:
    from hf_llava_ft.data.export import ExportedDataset
    from hf_llava_ft.data.formats.column_choice import SaidOfColumns
    from hf_llava_ft.hub.upload import Uploaded

ColumnsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--columns",
        help="Of a table: image=img,prompt=question,response=answer; DATA:... for one of several; repeatable.",
    ),
]

app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)


@dataclass(frozen=True)
class PushedData:
    """
    Args:
        exported (`ExportedDataset`): what was written and read back.
        files (`dict[str, int]`): bytes of each file, by its path in the repository.
        card (`str`): the text of README.md.
        uploaded (`Uploaded`, *optional*): none if it was not to be uploaded.
    """

    exported: "ExportedDataset"
    files: dict[str, int]
    card: str
    uploaded: "Uploaded | None"


def push_data(
    data_path: str,
    repo_id: str | None,
    *,
    image_folder: str | None = None,
    output_dir: Path | None = None,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    dry_run: bool = False,
    verify: bool = True,
    commit_message: str | None = None,
    max_shard_size: str = "500MB",
    allow_outside: bool = False,
    allow_urls: bool = False,
    columns: "SaidOfColumns" = None,
    license: str | None = None,
    language: list[str] | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> PushedData:
    """
    Writes data of any format as a Parquet dataset with a card, reads it back, and uploads it in one commit.

    Args:
        repo_id (`str`, *optional*): `user/name`; without it nothing is uploaded.
        output_dir (`Path`, *optional*): where the dataset stays; by default it is written to a temporary folder.
        license, language (*optional*): for the card; as the Hub names them.
        verify (`bool`): whether the commit is downloaded into an empty cache and compared, byte by byte.
        tell: is given a line on each step.

    Raises:
        UserError: at the first row that is wrong, or if the Hub refuses.
    """
    from hf_llava_ft.data.export import export_dataset
    from hf_llava_ft.data.formats import open_source
    from hf_llava_ft.data.formats.source import refuse_preferences
    from hf_llava_ft.hub.dataset_card import dataset_card
    from hf_llava_ft.hub.download import check_same_files, download, files_of
    from hf_llava_ft.hub.staging import replaced_by
    from hf_llava_ft.hub.upload import Upload, check_login

    if create_pr and revision not in (None, "main"):
        raise UserError("a pull request is made on main: leave out --revision or --create_pr.")
    if repo_id is not None and not dry_run:
        check_login(repo_id)
    sources = open_source(data_path, image_folder, allow_outside=allow_outside, allow_urls=allow_urls, columns=columns)
    refuse_preferences(sources)  # the rejected answers would not be among what is uploaded
    with tempfile.TemporaryDirectory() as temporary:
        folder = output_dir or Path(temporary, "dataset")
        exported = export_dataset(
            sources,
            folder,
            max_shard_size,
            card=partial(dataset_card, name=repo_id or folder.name, license=license, language=language),
        )
        for source in sources:
            tell(source.describe(exported.num_rows if len(sources) == 1 else None))
        files = {name: (folder / name).stat().st_size for name in files_of(folder)}
        tell(
            f"Written and read back: {exported.num_rows:,} rows and {exported.num_images:,} images in "
            f"{'1 file' if exported.num_shards == 1 else f'{exported.num_shards} files'} of "
            f"{exported.download_bytes / 2**20:,.1f} MiB in all."
        )
        if not license:
            tell("The card says that no license is stated; --license states it.")
        card, uploaded = (folder / "README.md").read_text(encoding="utf-8"), None
        if repo_id is not None and not dry_run:
            uploaded = Upload(
                folder,
                repo_id,
                "dataset",
                commit_message or "Upload a dataset for LLaVA",
                private=private,
                revision=revision,
                create_pr=create_pr,
                replaces=lambda name: replaced_by(None, name),
            ).run()
            if verify:
                tell(f"Downloading commit {uploaded.commit[:12]} into an empty cache, to compare it.")
                with tempfile.TemporaryDirectory() as cache:
                    received = download(uploaded, Path(cache), list(files))
                    check_same_files(folder, received, f"commit {uploaded.commit} of {repo_id}")
        return PushedData(exported, files, card, uploaded)


@app.command()
def push_dataset(
    data_path: Annotated[str, typer.Option("--data_path", help="File, folder or Hub id; several with commas.")],
    image_folder: Annotated[str | None, typer.Option("--image_folder", help="Folder of the image paths.")] = None,
    output_dir: Annotated[Path | None, typer.Option("--output_dir", help="Write the dataset here.")] = None,
    repo_id: Annotated[str | None, typer.Option("--repo_id", help="Upload it as user/name, in one commit.")] = None,
    private: Annotated[bool, typer.Option("--private", help="A new repository is private.")] = False,
    columns: ColumnsOption = None,
    license: Annotated[str | None, typer.Option("--license", help="License, as the Hub names it: cc-by-4.0.")] = None,
    language: Annotated[
        list[str] | None, typer.Option("--language", help="Language, en, de, ...; may be repeated.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option("--max_shard_size", help="Of a Parquet file.")] = "500MB",
    allow_image_urls: Annotated[bool, typer.Option("--allow_image_urls", help="Fetch images from the web.")] = False,
    allow_images_outside: Annotated[
        bool, typer.Option("--allow_images_outside", help="Take image paths that leave the image folder.")
    ] = False,
) -> None:
    """Write images and conversations as a Parquet dataset with a card, read it back, and upload it if told where."""
    with exit_on_user_error():
        if output_dir is None and repo_id is None:
            raise UserError("nowhere to write to: give --output_dir, --repo_id, or both.")
        pushed = push_data(
            data_path,
            repo_id,
            image_folder=image_folder,
            output_dir=output_dir,
            private=private,
            max_shard_size=max_shard_size,
            allow_outside=allow_images_outside,
            columns=columns,
            license=license,
            language=language,
            allow_urls=allow_image_urls,
            tell=lambda text: typer.echo(text, err=True),
        )
        if output_dir is not None:
            typer.echo(f"The dataset is at {output_dir}.", err=True)
        if pushed.uploaded is not None:
            done = "Uploaded" if pushed.uploaded.changed else "Nothing has changed at"
            typer.echo(f"{done}: {pushed.uploaded.url}", err=True)


def main() -> None:
    """Runs the command on `sys.argv`; exits with 2 on bad input."""
    app()


if __name__ == "__main__":
    main()
