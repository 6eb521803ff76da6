"""Who may reach the page: this machine alone, or who knows a password."""

import getpass
import hmac
import ipaddress
import os
import socket
import sys
from collections.abc import Callable, Mapping
from urllib.parse import urlsplit

from hf_llava_ft.errors import UserError

PASSWORD_VARIABLE = "LLAVA_FT_PASSWORD"
_SHORTEST = 12  # characters: whoever reaches the page may try as often as they like


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what is bound to `host`. A name may mean anything, but for `localhost`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def password_for(host: str) -> str | None:
    """
    The password of the page: from the environment, or asked for where one is needed; `None` for a page of this machine
    that has none. No flag gives it, since every user of a machine sees command lines.

    Raises:
        UserError: if one is needed and there is none, or it is too short.
    """
    password = os.environ.get(PASSWORD_VARIABLE)
    if not password and is_loopback(host):
        return None
    if not password and sys.stdin.isatty():
        password = getpass.getpass(f"A password for the page, of {_SHORTEST} characters or more: ")
    if not password:
        raise UserError(
            f"--host {host} lets other machines reach the page, which needs a password then: put one into the "
            f"environment as {PASSWORD_VARIABLE}, or leave --host out and come through ssh -L."
        )
    if len(password) < _SHORTEST:
        raise UserError(f"the password of the page has {len(password)} characters, and needs {_SHORTEST} or more.")
    return password


def checker(password: str) -> Callable[[str, str], bool]:
    """What the page asks about a name and a password: any name will do."""

    def is_right(name: str, said: str) -> bool:
        return hmac.compare_digest(said.encode(), password.encode())

    return is_right


def is_asked_by_another_site(method: str, headers: Mapping[str, str]) -> bool:
    """
    Whether a browser asks because another site had it do so, which would read and write here with the visitor's login.
    Gradio lets any site do so (up to 6.31) where the page has another name than `localhost`. Told as Go's
    `http.CrossOriginProtection` does; a link to the page is not meant.

    Args:
        headers: of the request, with names in lower case.
    """
    site = headers.get("sec-fetch-site")
    if site is None:  # an older browser, or a page without TLS that is not of this machine
        origin = headers.get("origin")
        return origin is not None and urlsplit(origin).netloc != headers.get("host")
    is_link = method in ("GET", "HEAD") and headers.get("sec-fetch-mode") == "navigate"
    return site not in ("same-origin", "none") and not is_link


def check_free(host: str, port: int) -> None:
    """
    Raises:
        UserError: if nothing can be bound to `host` and `port`.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(address)
    except OSError as error:
        raise UserError(
            f"the page cannot be at --host {host} --port {port}: {error.strerror or error}; choose another."
        ) from error
