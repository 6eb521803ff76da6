"""Single files of a model, in a folder or on the Hub, and what a refusal of the Hub means in one sentence.

A missing file is information: the kind of a model follows from its files. A Hub that does not answer says nothing, and
counting that as a missing file would take the model for another kind, so it is an error.
"""

import json
from pathlib import Path
from typing import Any, cast

from huggingface_hub import (
    HfApi,
    file_exists,
    hf_hub_download,
    is_offline_mode,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hf_llava_ft.errors import UserError
from hf_llava_ft.library_differences import HTTPError

_MOST_LEVELS = 100  # of lists and objects within each other, in a file of settings
_UNAUTHORIZED, _FORBIDDEN, _TOO_MANY_REQUESTS, _SERVER_ERROR = 401, 403, 429, 500


def find_file(path: str, name: str, revision: str | None = None) -> str | None:
    """
    Where the file `name` of `path`, a folder or a Hub id, is on this machine, after downloading it; `None` if `path`
    has none. With `HF_HUB_OFFLINE` what is not in the cache counts as not there.

    Raises:
        UserError: if `path` is neither a folder nor a repository, or the Hub gives no answer.
    """
    try:
        if Path(path).exists():
            file = Path(path, name)
            return str(file) if file.is_file() else None
    except PermissionError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    try:
        return hf_hub_download(path, name, revision=revision)
    except RemoteEntryNotFoundError:
        return None
    except (HTTPError, OSError, ValueError) as error:
        if isinstance(error, LocalEntryNotFoundError) and (is_offline_mode() or _known_missing(path, name, revision)):
            return None
        raise UserError(hub_refusal(error, path, revision) or f"{path}: {name} cannot be had: {error}.") from error


def has_file(path: str, name: str, revision: str | None = None) -> bool:
    """As [`find_file`], without downloading."""
    if Path(path).exists():
        return Path(path, name).is_file()
    known = try_to_load_from_cache(path, name, revision=revision)
    if known is not None or is_offline_mode():
        return isinstance(known, str)
    try:
        return file_exists(path, name, revision=revision)
    except (HTTPError, OSError, ValueError) as error:
        raise UserError(hub_refusal(error, path, revision) or f"{path}: {name} cannot be had: {error}.") from error


def name_for_anywhere(path: str) -> str:
    """What others on this machine find `path` by, whatever their current folder: a folder's absolute path, a Hub id as
    it is."""
    return str(Path(path).absolute()) if Path(path).is_dir() else path


def read_json(path: str, name: str, revision: str | None = None) -> dict[str, Any] | None:
    """
    The content of a JSON file of `path`; `None` if it has none.

    Raises:
        UserError: as [`find_file`], or if the file holds no JSON object.
    """
    file = find_file(path, name, revision)
    if file is None:
        return None
    refuse_what_is_no_file(Path(file))
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except RecursionError as error:
        raise UserError(f"{path}: {name} is nested too deeply.") from error
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: {name} cannot be read: {first_line(error)}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: {name} is not a JSON object.")
    if _is_deeper(content, _MOST_LEVELS):
        raise UserError(f"{path}: {name} is nested too deeply.")
    return content


def _is_deeper(content: Any, levels: int) -> bool:
    layer = [content]
    for _ in range(levels):
        inner = [each.values() if isinstance(each, dict) else each for each in layer]
        layer = [one for each in inner for one in each if isinstance(one, (dict, list))]
        if not layer:
            return False
    return True


def refuse_what_is_no_file(file: Path) -> None:
    """
    Raises:
        UserError: if there is a web page in the place of the file, or a pointer of Git LFS to it.
    """
    try:
        with file.open("rb") as stream:
            start = stream.read(200).lstrip().lower()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from error
    if start.startswith((b"<!doctype", b"<html", b"<head")):
        raise UserError(
            f"{file} holds a web page, which a proxy or a login page may have sent in its place: download it again."
        )
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{file} is a pointer of Git LFS and not the file itself: run git lfs pull there.")


def local_file(path: str, name: str, revision: str | None = None) -> Path | None:
    """Where the file `name` of `path` is, in a folder or in the cache; nothing is downloaded."""
    if Path(path).is_dir():
        file = Path(path, name)
        return file if file.is_file() else None
    try:
        known = try_to_load_from_cache(path, name, revision=revision)
    except HFValidationError:
        return None
    return Path(known) if isinstance(known, str) else None


def _known_missing(path: str, name: str, revision: str | None) -> bool:
    """Whether the Hub has said before that there is no such file."""
    known = try_to_load_from_cache(path, name, revision=revision)
    return known is not None and not isinstance(known, str)


def settings_folder(path: str, revision: str | None = None) -> tuple[Path, str]:
    """
    A folder with all settings and all code of the repository `path`, without weights, and the commit they are of.

    Raises:
        UserError: as [`find_file`].
    """
    try:
        folder = Path(snapshot_download(path, revision=revision, allow_patterns=["*.json", "*.py"]))
    except (HTTPError, OSError, ValueError) as error:
        raise UserError(hub_refusal(error, path, revision) or f"{path} cannot be had: {error}.") from error
    return folder, folder.name


def not_here(path: str, revision: str | None = None) -> str:
    """The sentence about a `path` that was looked for in vain."""
    if Path(path).is_absolute():  # no name on the Hub; an adapter names the folder of its base so
        return (
            f"{path} is not a folder on this computer: check the path, or, if it is the base that an adapter names, "
            f"say with --base where that is now."
        )
    if is_offline_mode():
        named = path if revision is None else f"revision {revision} of {path}"
        return (
            f"{named} is neither a folder nor in the cache of the Hub's models, and HF_HUB_OFFLINE forbids to ask the "
            f"Hub: unset it, or download the model first."
        )
    return (
        f"{path} is neither a folder nor a model on the Hub that can be reached from here: check the name; a private "
        f"one asks for a token that may read it (hf auth login, or HF_TOKEN)."
    )


def hub_refusal(error: BaseException, path: str, revision: str | None = None) -> str | None:
    """
    What the Hub, or the way to it, has against loading `path`, in one sentence; `None` if `error` is about something
    else. transformers raises errors of its own over those of huggingface_hub, so the causes are looked at too.
    """
    cause: BaseException | None = error
    sentences = []
    while cause is not None:
        # A checkpoint may name other repositories, such as that of its tower.
        about_path = cause is error or f"/{path}/" in _url(cause)
        sentences.append(_sentence(cause, path, revision) if about_path else None)
        cause = cause.__cause__ or cause.__context__
    return next((sentence for sentence in reversed(sentences) if sentence), None)  # the first error knows most


def _url(error: BaseException) -> str:
    response: Any = getattr(error, "response", None)
    try:
        return str(response.url if response is not None else cast(Any, error).request.url)
    except (AttributeError, RuntimeError):  # it is about no request, or does not say which
        return ""


def _sentence(error: BaseException, path: str, revision: str | None) -> str | None:
    if isinstance(error, GatedRepoError):
        return (
            f"{path} is gated: ask for access at {HfApi().endpoint}/{path}, and give a token of that account (hf "
            f"auth login, or HF_TOKEN)."
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{path} has no revision {revision}: name a branch, a tag or a commit that is there."
    if isinstance(error, RepositoryNotFoundError | HFValidationError):
        return not_here(path, revision)
    if isinstance(error, RemoteEntryNotFoundError):
        return None
    if isinstance(error, HfHubHTTPError):
        return _status_sentence(error.response.status_code, path)
    if isinstance(error, HTTPError) and not hasattr(error, "response"):  # else it is what the one above it tells of
        return (
            f"the Hub cannot be reached for {path} ({first_line(error)}): check the connection; what was downloaded "
            f"before loads with HF_HUB_OFFLINE=1."
        )
    if isinstance(error, LocalEntryNotFoundError):
        return not_here(path, revision)
    return None


def _status_sentence(status: int, path: str) -> str:
    if status == _UNAUTHORIZED:
        return (
            f"the Hub does not take the token for {path}: it is wrong or has expired; hf auth login makes a new one."
        )
    if status == _FORBIDDEN:
        return f"the token has no right to read {path}: give one that has (hf auth login, or HF_TOKEN)."
    if status == _TOO_MANY_REQUESTS:
        return f"the Hub has had too many requests from here to answer for {path}: wait some minutes, or give a token."
    if status >= _SERVER_ERROR:
        return f"the Hub answers for {path} with its own failure {status}: try again later."
    return f"the Hub refuses {path} with status {status}."


def first_line(error: BaseException) -> str:
    """The first line of what an error says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
