"""The entry point of `hub_scripts/push_dataset.py`: data of any format to a Parquet data set, here or on the Hub."""

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from hf_llava_ft.errors import UserError, exit_on_user_error

app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)


@app.command()
def push_dataset(
    data_path: Annotated[str, typer.Option("--data_path", help="File, folder or Hub id; several with commas.")],
    image_folder: Annotated[str | None, typer.Option("--image_folder", help="Folder of the image paths.")] = None,
    output_dir: Annotated[Path | None, typer.Option("--output_dir", help="Write the data set here.")] = None,
    repo_id: Annotated[str | None, typer.Option("--repo_id", help="Upload it as user/name, in one commit.")] = None,
    private: Annotated[bool, typer.Option("--private", help="A new repository is private.")] = False,
    max_shard_size: Annotated[str, typer.Option("--max_shard_size", help="Of a Parquet file.")] = "500MB",
    allow_image_urls: Annotated[bool, typer.Option("--allow_image_urls", help="Fetch images from the web.")] = False,
    allow_images_outside: Annotated[
        bool, typer.Option("--allow_images_outside", help="Take image paths that leave the image folder.")
    ] = False,
) -> None:
    """Write images and conversations as a Parquet data set with a card, read it back, and upload it if told where."""
    with exit_on_user_error():
        if output_dir is None and repo_id is None:
            raise UserError("nowhere to write to: give --output_dir, --repo_id, or both.")
        if repo_id is not None:
            _check_upload(repo_id)
        from hf_llava_ft.data.export import export_dataset
        from hf_llava_ft.data.formats import open_source

        sources = open_source(data_path, image_folder, allow_outside=allow_images_outside, allow_urls=allow_image_urls)
        with tempfile.TemporaryDirectory() as temporary:
            folder = output_dir or Path(temporary) / "dataset"
            exported = export_dataset(sources, folder, max_shard_size, name=repo_id)
            for source in sources:
                typer.echo(source.describe(exported.num_rows if len(sources) == 1 else None), err=True)
            files = "1 file" if exported.num_shards == 1 else f"{exported.num_shards} files"
            typer.echo(
                f"Written and read back: {exported.num_rows:,} rows and {exported.num_images:,} images in {files} of "
                f"{exported.download_bytes / 2**20:,.1f} MiB in all.",
                err=True,
            )
            if output_dir is not None:
                typer.echo(f"The data set is at {output_dir}.", err=True)
            if repo_id is not None:
                typer.echo(f"Uploaded: {_upload(folder, repo_id, private)}", err=True)


def _check_upload(repo_id: str) -> None:
    """Refuses a name or a login that the Hub will not take, before anything is read."""
    import huggingface_hub

    try:
        huggingface_hub.utils.validate_repo_id(repo_id)
        huggingface_hub.whoami()
    # Of the Hub's answers, the network, a token that is not there, and names that are none.
    except (huggingface_hub.errors.HfHubHTTPError, OSError, ValueError) as error:
        raise _refused(repo_id, error) from error


def _upload(folder: Path, repo_id: str, private: bool) -> str:
    """One commit, so that nobody ever loads half of it; the address of the data set."""
    import huggingface_hub

    try:
        api = huggingface_hub.HfApi()
        url = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id, repo_type="dataset", folder_path=folder, commit_message="Upload a data set for LLaVA"
        )
    except (huggingface_hub.errors.HfHubHTTPError, OSError, ValueError) as error:
        raise _refused(repo_id, error) from error
    return str(url)


def _refused(repo_id: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:300].rstrip(".")
    return UserError(
        f"{repo_id} can't be uploaded to ({reason}); log in with `hf auth login`, or check name and network."
    )


def main() -> None:
    """Runs the command on `sys.argv`; exits with 2 on bad input."""
    app()


if __name__ == "__main__":
    main()
