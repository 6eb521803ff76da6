"""The repositories of the loopback Hub: commits that follow one another, and the names that point at them."""

import hashlib
from dataclasses import dataclass, field

# What git-lfs keeps in place of a file, roughly; the Hub tells its size.
POINTER_SIZE = 134
# What the Hub's own .gitattributes sends to large storage, as far as our files go.
_LFS_ENDINGS = (".safetensors", ".parquet", ".bin", ".pt", ".pth", ".gguf", ".npz", ".model", ".zip", ".arrow")
# Larger or binary files go there too.
_LARGEST_REGULAR = 10 * 2**20


class Refused(Exception):
    """An answer of the Hub that is no success.

    Args:
        status (`int`): of HTTP.
        code (`str`): of the header X-Error-Code; may be empty.
        message (`str`): for a person.
    """

    def __init__(self, status: int, code: str, message: str):
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


@dataclass(frozen=True)
class StoredFile:
    """
    Args:
        content (`bytes`): what a download gives.
        lfs (`bool`): whether it is in large storage.
    """

    content: bytes
    lfs: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self) -> str:
        """git's name for it; for a file in large storage, that of its pointer."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        kept = pointer.encode() if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(kept) + kept).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid

    def entry(self, path: str) -> dict:
        """As `tree` and `paths-info` tell of it."""
        about = {"type": "file", "path": path, "size": len(self.content), "oid": self.oid}
        large = {"oid": self.sha256, "size": len(self.content), "pointerSize": POINTER_SIZE}
        return about | ({"lfs": large} if self.lfs else {})


@dataclass(frozen=True)
class Commit:
    """
    Args:
        sha (`str`): 40 digits.
        parent (`Commit`, *optional*): none for the first.
        title (`str`): of the commit.
        files (`dict[str, StoredFile]`): all of them, after it.
        brought (`list[str]`): paths that it adds, changes or deletes.
    """

    sha: str
    parent: "Commit | None"
    title: str
    files: dict[str, StoredFile]
    brought: list[str]

    def history(self) -> "list[Commit]":
        """Itself and those before it, newest first."""
        return [self, *(self.parent.history() if self.parent else [])]


@dataclass
class Repository:
    """
    Args:
        kind (`str`): "models" or "datasets".
        name (`str`): "user/name".
        private (`bool`, defaults to `False`): only for members of its namespace.
        gated (`bool`, defaults to `False`): only for members, though everybody sees that it is there.
        tags (`dict[str, str]`): commits by tag.
        pull_requests (`dict[int, str]`): titles by number.
    """

    kind: str
    name: str
    private: bool = False
    gated: bool = False
    tags: dict[str, str] = field(default_factory=dict)
    pull_requests: dict[int, str] = field(default_factory=dict)

    def __post_init__(self):
        attributes = "".join(f"*{ending} filter=lfs diff=lfs merge=lfs -text\n" for ending in _LFS_ENDINGS)
        first = StoredFile(attributes.encode())
        self._commits: dict[str, Commit] = {}
        self.heads: dict[str, str] = {}
        self._add("refs/heads/main", None, "initial commit", {".gitattributes": first}, [".gitattributes"])

    @property
    def branches(self) -> dict[str, str]:
        start = "refs/heads/"
        return {ref.removeprefix(start): sha for ref, sha in self.heads.items() if ref.startswith(start)}

    def at(self, revision: str | None) -> Commit:
        """The commit that a branch, a tag, `refs/...` or a commit's (shortened) name stands for."""
        revision = revision or "main"
        known = self.heads | {f"refs/tags/{tag}": sha for tag, sha in self.tags.items()}
        for name in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if name in known:
                return self._commits[known[name]]
        found = [commit for sha, commit in self._commits.items() if len(revision) >= 7 and sha.startswith(revision)]
        if len(found) != 1:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found[0]

    def upload_mode(self, path: str, size: int, sample: bytes) -> str:
        large = path.endswith(_LFS_ENDINGS) or size > _LARGEST_REGULAR or b"\0" in sample
        return "lfs" if large else "regular"

    def commit(
        self, revision: str, title: str, changes: dict[str, StoredFile | None], parent: str | None, create_pr: bool
    ) -> tuple[Commit, int | None]:
        """
        Args:
            changes: new content by path; None deletes.
            parent (`str`, *optional*): what the author took for the head.

        Returns:
            The commit, and the number of the pull request it is on, if it opens one.
        """
        ref = revision if revision in self.heads else f"refs/heads/{revision}"
        if ref not in self.heads:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {ref}")
        head = self._commits[self.heads[ref]]
        if parent is not None and parent != head.sha:
            raise Refused(412, "", "A commit has happened since. Please refresh and try again.")
        missing = [path for path, file in changes.items() if file is None and path not in head.files]
        if missing:
            raise Refused(404, "EntryNotFound", f"A file with this name doesn't exist: {missing[0]}")
        number = None
        if create_pr:
            number = len(self.pull_requests) + 1
            self.pull_requests[number] = title
            ref = f"refs/pr/{number}"
        files = {path: file for path, file in (head.files | changes).items() if file is not None}
        return self._add(ref, head, title, files, list(changes)), number

    def _add(self, ref, parent, title, files, brought) -> Commit:
        told = repr((self.kind, self.name, ref, len(self._commits), title, sorted(files))).encode()
        commit = Commit(hashlib.sha1(told).hexdigest(), parent, title, files, brought)
        self._commits[commit.sha] = commit
        self.heads[ref] = commit.sha
        return commit

    def merge(self, number: int) -> None:
        """What the button of a pull request does; the branch must not have moved on."""
        pull = self.at(f"refs/pr/{number}")
        self._add("refs/heads/main", self.at("main"), self.pull_requests[number], pull.files, pull.brought)

    def create_branch(self, name: str, start: str | None) -> None:
        if f"refs/heads/{name}" in self.heads:
            raise Refused(409, "", f"Reference already exists: {name}")
        self.heads[f"refs/heads/{name}"] = self.at(start).sha

    def create_tag(self, name: str, revision: str) -> None:
        if name in self.tags:
            raise Refused(409, "", f"Tag reference exists already: {name}")
        self.tags[name] = self.at(revision).sha
