"""A folder uploaded to the Hub in one commit, even over a bad connection.

What may surprise:
* The client repeats single requests, but neither a commit nor the creation of a repository: a commit whose answer is
  lost may have succeeded. So the whole step is repeated, and begins by checking what is there.
* Large files are uploaded before the commit, and the Hub keeps them: another push sends only the others.
* The commit names its parent, so that nothing is overwritten that came in between.
"""

import hashlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    RepoFile,
    get_session,
    get_token,
    is_offline_mode,
)
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id

from hf_llava_ft.errors import UserError
from hf_llava_ft.hub.refusals import push_refusal, status_of
from hf_llava_ft.library_differences import HTTPError

_LOG = logging.getLogger(__name__)
T = TypeVar("T")

# Seconds before the second, third, ... attempt. The client's own repetitions come on top.
WAITS = (1, 2, 4, 8)
# Seconds that the Hub may ask to wait: its limits are over after five minutes.
LONGEST_WAIT = 310
# Seconds to connect, and between two pieces of what comes and goes. The client itself would wait for ever.
TIMEOUTS = (30.0, 300.0, 300.0, None)
_CONFLICTS = (409, 412)
_TRANSIENT = (408, 425, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class Uploaded:
    """
    Args:
        repo_id (`str`): where it is.
        repo_type (`str`): "model" or "dataset".
        commit (`str`): the revision that holds the folder.
        url (`str`): to look at.
        pull_request (`str`, *optional*): `refs/pr/N`, if it was asked for.
        changed (`bool`): false if the folder was there already, and nothing was done.
        deleted (`list[str]`): files of an older version that the commit took away.
    """

    repo_id: str
    repo_type: str
    commit: str
    url: str
    pull_request: str | None = None
    changed: bool = True
    deleted: list[str] = field(default_factory=list)


def check_login(repo_id: str) -> str:
    """
    The name of the user that the token is of.

    Raises:
        UserError: if `repo_id` is none, there is no token, the Hub doesn't take it, or it may only read.
    """
    try:
        validate_repo_id(repo_id)
        valid = repo_id.count("/") == 1
    except ValueError:
        valid = False
    if not valid:
        raise UserError(f"--repo_id {repo_id} is not a repository name: write user/name, with letters, digits, - _ .")
    if is_offline_mode():
        raise UserError("HF_HUB_OFFLINE is set, and pushing needs the Hub: unset it.")
    if get_token() is None:
        raise UserError("there is no token for the Hub: log in with hf auth login, or set HF_TOKEN.")
    try:
        me = patiently(HfApi().whoami)
    except (HTTPError, OSError, ValueError) as error:
        refusal = push_refusal(error, repo_id)
        if refusal is None:
            raise
        raise refusal from error
    role = ((me.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        raise UserError(f"the token is read-only: give one that may write to {repo_id} (hf auth login, or HF_TOKEN).")
    return str(me["name"])


@dataclass
class Upload:
    """
    A folder on its way to a repository.

    Args:
        folder (`Path`): everything in it goes.
        repo_id (`str`): user/name.
        repo_type (`str`): "model" or "dataset".
        message (`str`): of the commit.
        private (`bool`): of a repository that is made for it.
        revision (`str`, *optional*): branch; it is made from main if it is not there.
        create_pr (`bool`): a pull request instead of a commit on main.
        replaces: which files of the repository are of the kind that is uploaded, and go when the folder lacks them.
        check: is given the files of the repository, and raises if the folder must not go there.
        token (`str`, *optional*): instead of the one that is logged in.
    """

    folder: Path
    repo_id: str
    repo_type: str
    message: str
    private: bool = False
    revision: str | None = None
    create_pr: bool = False
    replaces: Callable[[str], bool] = lambda name: False
    check: Callable[[set[str]], None] = lambda names: None
    token: str | None = field(default=None, repr=False)

    def __post_init__(self):
        self._api = HfApi(token=self.token)
        self._files = {
            path.relative_to(self.folder).as_posix(): path for path in self.folder.rglob("*") if path.is_file()
        }
        self._hashed: dict[str, CommitOperationAdd] = {}
        self._sent = False
        self._pull_requests: set[str] = set()

    def run(self) -> Uploaded:
        """
        Raises:
            UserError: if the Hub refuses, or could not be reached. Then nothing has changed there, but that an empty
                repository or branch may be new.
        """
        try:
            return patiently(self._attempt, also=_CONFLICTS)
        except (HTTPError, OSError, ValueError, RuntimeError) as error:
            refusal = None if isinstance(error, UserError) else push_refusal(error, self.repo_id, self.revision)
            if refusal is None:
                raise
            raise refusal from error

    def _attempt(self) -> Uploaded:
        head = self._head()
        there = self._tree(head)
        self.check(set(there))
        changed = [name for name in self._files if not self._is_there(name, there.get(name))]
        stale = sorted(name for name in there if name not in self._files and self.replaces(name))
        if not changed and not stale:
            return self._uploaded(head, changed=self._sent)
        if self.create_pr and (found := self._lost_pull_request()):
            return found
        additions = [self._addition(name) for name in changed]
        deletions = [CommitOperationDelete(name, is_folder=False) for name in stale]
        self._sent = True
        commit = self._api.create_commit(
            self.repo_id,
            [*additions, *deletions],
            commit_message=self.message,
            repo_type=self.repo_type,
            revision=self.revision,
            create_pr=self.create_pr,
            parent_commit=head,
        )
        return self._uploaded(commit.oid, pull_request=commit.pr_revision, deleted=stale)

    def _head(self) -> str:
        """The commit to build on, in a repository and on a branch that are made if they are not there."""
        try:
            about = self._api.repo_info(self.repo_id, repo_type=self.repo_type)
        except RepositoryNotFoundError:
            self._api.create_repo(self.repo_id, repo_type=self.repo_type, private=self.private, exist_ok=True)
            about = self._api.repo_info(self.repo_id, repo_type=self.repo_type)
        if self.private and not about.private:
            raise UserError(
                f"{self.repo_id} exists and is public, and --private would not change that: make it private in its "
                f"settings first, or choose another name."
            )
        if self.revision is None:
            return str(about.sha)
        try:
            return str(self._api.repo_info(self.repo_id, repo_type=self.repo_type, revision=self.revision).sha)
        except RevisionNotFoundError:
            if self.revision.startswith("refs/"):
                raise
            self._api.create_branch(self.repo_id, branch=self.revision, repo_type=self.repo_type, exist_ok=True)
            return str(self._api.repo_info(self.repo_id, repo_type=self.repo_type, revision=self.revision).sha)

    def _tree(self, commit: str) -> dict[str, RepoFile]:
        entries = self._api.list_repo_tree(self.repo_id, repo_type=self.repo_type, revision=commit, recursive=True)
        return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

    def _is_there(self, name: str, entry: RepoFile | None) -> bool:
        path = self._files[name]
        if entry is None or entry.size != path.stat().st_size:
            return False
        if entry.lfs is not None:
            return entry.lfs.sha256 == self._sha256(name)
        return entry.blob_id == _git_hash(path.read_bytes())

    def _sha256(self, name: str) -> str:
        return self._addition(name).upload_info.sha256.hex()

    def _addition(self, name: str) -> CommitOperationAdd:
        """A new one each time, because it remembers what was on the Hub; but hashing a large file takes minutes."""
        addition = CommitOperationAdd(name, str(self._files[name]))
        if name in self._hashed:
            addition.upload_info = self._hashed[name].upload_info
        self._hashed[name] = addition
        return addition

    def _lost_pull_request(self) -> Uploaded | None:
        """The pull request of an attempt before, whose answer did not arrive."""
        refs = self._api.list_repo_refs(self.repo_id, repo_type=self.repo_type, include_pull_requests=True)
        found = {ref.ref: ref.target_commit for ref in refs.pull_requests or []}
        if not self._sent:
            self._pull_requests = set(found)
            return None
        for ref in sorted(set(found) - self._pull_requests):
            there = self._tree(found[ref])
            if all(self._is_there(name, there.get(name)) for name in self._files):
                return self._uploaded(found[ref], pull_request=ref)
        return None

    def _uploaded(self, commit: str, pull_request: str | None = None, changed: bool = True, deleted=()) -> Uploaded:
        url = f"{self._api.endpoint}/{'' if self.repo_type == 'model' else f'{self.repo_type}s/'}{self.repo_id}"
        if pull_request is not None:
            url = f"{url}/discussions/{pull_request.rpartition('/')[2]}"
        elif self.revision is not None:
            url = f"{url}/tree/{self.revision}"
        return Uploaded(self.repo_id, self.repo_type, commit, url, pull_request, changed, list(deleted))


def patiently(call: Callable[[], T], also: tuple[int, ...] = ()) -> T:
    """
    What `call` returns, which is repeated while the way to the Hub is disturbed.

    Args:
        also (`tuple[int, ...]`): further status codes after which another attempt may do better.
    """
    for wait in (*WAITS, None):
        get_session().timeout = TIMEOUTS
        try:
            return call()
        except (HTTPError, OSError, RuntimeError) as error:
            pause = None if wait is None else _pause(error, wait, also)
            if pause is None:
                raise
            _LOG.warning("The Hub did not answer as it should; another attempt in %d s.", pause)
        time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def _git_hash(content: bytes) -> str:
    """The id that git, and so the Hub, gives to a file that is not in LFS."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _pause(error: BaseException, wait: int, also: tuple[int, ...]) -> int | None:
    """Seconds until another attempt; `None` if it would end as this one."""
    cause: BaseException | None = error
    while cause is not None:
        status = status_of(cause)
        if isinstance(cause, HfHubHTTPError) and status is not None:
            if status not in (*_TRANSIENT, *also):
                return None
            asked = cause.response.headers.get("Retry-After", "")
            asked_for = int(asked) if asked.isdigit() else 0
            return max(wait, asked_for) if asked_for <= LONGEST_WAIT else None
        if isinstance(cause, HTTPError):
            return wait
        cause = cause.__cause__ or cause.__context__
    return None
