"""What was uploaded, downloaded again as other users would, and compared byte by byte."""

import filecmp
from pathlib import Path

from huggingface_hub import snapshot_download

from hf_llava_ft.checkpoints.files import first_line
from hf_llava_ft.errors import UserError
from hf_llava_ft.hub.private_text import without_token
from hf_llava_ft.hub.upload import Uploaded, patiently
from hf_llava_ft.library_differences import HTTPError


def files_of(folder: Path) -> list[str]:
    """The paths of all files, relative to `folder`."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def download(uploaded: Uploaded, cache: Path, patterns: list[str]) -> Path:
    """
    The folder with the files of a commit that match `patterns`, fetched into the empty cache `cache`.

    Raises:
        UserError: if they can't be had.
    """
    try:
        folder = patiently(
            lambda: snapshot_download(
                uploaded.repo_id,
                repo_type=uploaded.repo_type,
                revision=uploaded.commit,
                cache_dir=cache,
                allow_patterns=patterns,
            )
        )
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{uploaded.repo_id} has the new commit {uploaded.commit}, which can't be downloaded again to be checked "
            f"({without_token(first_line(error))[:300].rstrip('.')}): push again to check it."
        ) from error
    return Path(folder)


def check_same_files(sent: Path, received: Path, place: str) -> None:
    """
    Args:
        place (`str`): how the second folder is called in the message.

    Raises:
        UserError: if a file of the first folder is not in the second, or not the same.
    """
    for name in files_of(sent):
        if not (received / name).is_file():
            raise UserError(f"{place} has no {name}, which was sent: look whether a .gitignore there leaves it out.")
        if not filecmp.cmp(sent / name, received / name, shallow=False):
            raise UserError(f"{place}: {name} is not what was sent: push again.")
