"""What a refusal of the Hub means, in one sentence for the user."""

from typing import cast

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hf_llava_ft.checkpoints.files import first_line
from hf_llava_ft.errors import UserError
from hf_llava_ft.hub.private_text import without_token
from hf_llava_ft.library_differences import HTTPError

_BAD_REQUEST, _UNAUTHORIZED, _FORBIDDEN, _TOO_MANY_REQUESTS, _SERVER_ERROR = 400, 401, 403, 429, 500
_CHANGED_MEANWHILE = (409, 412)


def push_refusal(error: BaseException, repo_id: str, revision: str | None = None) -> UserError | None:
    """`None` if `error` is about something else than the Hub. The causes of `error` are looked at too."""
    cause: BaseException | None = error
    while cause is not None:
        sentence = _sentence(cause, repo_id, revision)
        if sentence is not None:
            return UserError(without_token(sentence))
        cause = cause.__cause__ or cause.__context__
    return None


def status_of(error: BaseException) -> int | None:
    """Of HTTP; `None` if there was no answer, or it is another kind of error."""
    response = getattr(error, "response", None)
    return cast(int, response.status_code) if isinstance(error, HfHubHTTPError) and response is not None else None


def _sentence(error: BaseException, repo_id: str, revision: str | None) -> str | None:
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, and pushing needs the Hub: unset it."
    if isinstance(error, LocalTokenNotFoundError):
        return "there is no token for the Hub: log in with hf auth login, or set HF_TOKEN."
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} has no revision {revision}: name a branch, or a pull request that is open."
    if isinstance(error, RepositoryNotFoundError) and status_of(error) != _UNAUTHORIZED:
        return f"{repo_id} is not there for the user of this token: check the name, or give a token of its owner."
    if isinstance(error, GatedRepoError):
        return f"{repo_id} is gated, and this token has no access to it."
    if isinstance(error, HfHubHTTPError):
        return _status_sentence(error, repo_id)
    if isinstance(error, HTTPError):
        return (
            f"the connection to the Hub broke ({first_line(error)}): push {repo_id} again when the network is better; "
            f"what was uploaded is not sent a second time."
        )
    if isinstance(error, ValueError) and "Invalid metadata in README.md" in str(error):
        return f"the Hub refuses the card of {repo_id}: {_told(str(error).partition('README.md.')[2])}."
    return None


def _status_sentence(error: HfHubHTTPError, repo_id: str) -> str:
    status, told = status_of(error), _told(error.server_message or first_line(error))
    if status == _UNAUTHORIZED:
        return "the Hub does not take the token: it is wrong or has expired; log in anew with hf auth login."
    if status == _FORBIDDEN:
        return (
            f"the token may not write to {repo_id} ({told}): give one that may (hf auth login, or HF_TOKEN), choose a "
            f"name of your own, or offer it with --create_pr."
        )
    if status in _CHANGED_MEANWHILE:
        return f"{repo_id} is changed by somebody else all the time ({told}): push again later."
    if status == _TOO_MANY_REQUESTS:
        return f"the Hub has had too many requests from here, and {repo_id} is as it was: push again in some minutes."
    if status is not None and status >= _SERVER_ERROR:
        return f"the Hub fails with {status}, and {repo_id} is as it was: push again later."
    return f"the Hub refuses {repo_id} with status {status} ({told})."


def _told(text: str) -> str:
    return " ".join(text.split())[:300].rstrip(".")
