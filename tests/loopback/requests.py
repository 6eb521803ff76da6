"""A request to the loopback Hub: who asks, and what they may see and change."""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tests.loopback.repositories import Refused, Repository

if TYPE_CHECKING:
    from tests.loopback_hub import LoopbackHub, User

Answer = tuple[int, dict[str, str], bytes]


@dataclass
class Request:
    """
    Args:
        hub (`LoopbackHub`): who is asked.
        headers: of the request.
        body (`bytes`): whole.
        query (`dict[str, list[str]]`): of the address.
        path (`str`): of the address, still quoted.
    """

    hub: "LoopbackHub"
    headers: Any
    body: bytes
    query: dict[str, list[str]]
    path: str

    @property
    def json(self) -> dict:
        return json.loads(self.body or b"{}")

    def user(self) -> "User | None":
        """Who asks; nobody in particular without a token."""
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise Refused(401, "", "Invalid credentials in Authorization header")
        return self.hub.tokens[token] if token else None

    def repository(self, kind: str, name: str, write: bool = False, files: bool = False) -> Repository:
        """The repository, if whoever asks may see it, change it (`write`), and read what is in it (`files`)."""
        user, found = self.user(), self.hub.repositories.get(f"{kind}/{name}")
        member = user is not None and name.split("/")[0] in (user.name, *user.orgs)
        if found is None or (found.private and not member):
            if user is None:
                raise Refused(401, "RepoNotFound", "Invalid username or password.")
            raise Refused(404, "RepoNotFound", "Repository not found")
        if files and found.gated and not member:
            said = (
                f"Access to model {name} is restricted. You must have access to it and be authenticated to access it."
            )
            raise Refused(401 if user is None else 403, "GatedRepo", said)
        if write and user is None:
            raise Refused(401, "RepoNotFound", "Invalid username or password.")
        if write:
            check_may_write(member, user)
        return found


def check_may_write(member: bool, user: "User") -> None:
    if not member:
        raise Refused(403, "", "Authorization error.")
    if user.role != "write":
        raise Refused(403, "", "Forbidden: you must use a write token to upload to a repository.")


def answer_json(content, status: int = 200, **headers: str) -> Answer:
    return status, {"Content-Type": "application/json", **headers}, json.dumps(content).encode()


def refusal(error: Refused) -> Answer:
    headers = {"Content-Type": "application/json", "X-Error-Message": error.message}
    if error.code:
        headers["X-Error-Code"] = error.code
    return error.status, headers, json.dumps({"error": error.message}).encode()


def check_no_token(request) -> None:
    # As storage behind signed addresses does. The client must not hand a token to another host.
    if request.headers.get("Authorization"):
        raise Refused(400, "", "Only one auth mechanism allowed")
