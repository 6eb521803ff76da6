"""Who may reach the page: this machine alone, or who knows a password."""

import getpass
import hmac
import ipaddress
import os
import socket
import sys
from collections.abc import Callable

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
