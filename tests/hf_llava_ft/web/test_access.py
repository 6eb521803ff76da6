"""Who may reach the page, and what is said before a model is loaded."""

import socket
from importlib.metadata import PackageNotFoundError

import pytest

from hf_llava_ft.errors import UserError
from hf_llava_ft.web import server
from hf_llava_ft.web.access import (
    PASSWORD_VARIABLE,
    check_free,
    checker,
    is_asked_by_another_site,
    is_loopback,
    password_for,
)

LONG_ENOUGH = "correct horse battery"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_this_machine_alone_needs_no_password(host, monkeypatch):
    monkeypatch.delenv(PASSWORD_VARIABLE, raising=False)
    assert is_loopback(host) and password_for(host) is None
    monkeypatch.setenv(PASSWORD_VARIABLE, LONG_ENOUGH)
    assert password_for(host) == LONG_ENOUGH


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "localhost.example.com", "my-machine", ""])
def test_other_machines_need_one_and_never_on_the_command_line(host, monkeypatch):
    monkeypatch.setattr("sys.stdin", open("/dev/null"))  # nobody to ask
    for password, told in (("", "needs a password then"), ("short", "has 5 characters, and needs 12 or more")):
        monkeypatch.setenv(PASSWORD_VARIABLE, password)
        with pytest.raises(UserError, match=told) as refused:
            password_for(host)
        assert not password or password not in str(refused.value)
    monkeypatch.setenv(PASSWORD_VARIABLE, LONG_ENOUGH)
    assert password_for(host) == LONG_ENOUGH


def test_a_password_is_compared_whole():
    is_right = checker("pässword of päge")
    assert is_right("anybody", "pässword of päge")
    assert not is_right("anybody", "pässword of") and not is_right("anybody", "")


def test_a_port_that_is_taken_is_one_sentence():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot be at --host 127.0.0.1 --port {port}: .*; choose another"):
            check_free("127.0.0.1", port)
    check_free("127.0.0.1", port)
    with pytest.raises(UserError, match="cannot be at --host no.such.machine.invalid"):
        check_free("no.such.machine.invalid", 7860)


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--web", "--host", "0.0.0.0"], "needs a password then"),
        (["--web", "--image", "cat.jpg"], "--image is for the terminal"),
        (["--web", "--history", "talks.txt"], "does not end in .json"),
        (["--adapter", "a"], "--adapter is for the page: add --web"),
        (["--port", "8000"], "--port is for the page: add --web"),
    ],
)
def test_wrong_flags_are_one_sentence_before_anything_is_loaded(llava_ft, monkeypatch, flags, told):
    monkeypatch.setattr(server, "version", lambda name: server.OLDEST)  # as if the extra were installed
    monkeypatch.setattr("sys.stdin", open("/dev/null"))
    monkeypatch.delenv(PASSWORD_VARIABLE, raising=False)
    code, _, err = llava_ft("chat", "--model", "nowhere", *flags)
    assert code == 2 and told in err and err.count("error: ") == 1 and "nowhere" not in err


@pytest.mark.parametrize("installed", [None, "4.44.1", "6.4"])
def test_a_page_without_its_extra_says_what_to_install(llava_ft, monkeypatch, installed):
    def version(name):
        if installed is None:
            raise PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(server, "version", version)
    code, _, err = llava_ft("chat", "--model", "nowhere", "--web")
    what = f"--web needs Gradio 6.31 or newer, and {installed or 'none'} is installed"
    assert code == 2 and err == f"error: {what}: pip install 'hf-llava-ft[web]'.\n"


def test_the_extra_is_what_the_page_asks_for(checkout):
    assert f'web = ["gradio>={server.OLDEST},<7"' in (checkout / "pyproject.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "method, headers, is_another",
    [
        ("POST", {}, False),  # no browser
        ("POST", {"origin": "http://box:7860", "host": "box:7860"}, False),
        ("POST", {"origin": "http://evil.example", "host": "box:7860"}, True),
        ("GET", {"origin": "http://evil.example", "host": "box:7860"}, True),
        ("POST", {"origin": "null", "host": "box:7860"}, True),
        ("POST", {"origin": "http://127.0.0.1:8888", "host": "127.0.0.1:7860"}, True),
        # A browser's own word counts: behind a proxy with TLS, the host is another.
        ("POST", {"sec-fetch-site": "same-origin", "origin": "https://chat.example", "host": "127.0.0.1:7860"}, False),
        ("POST", {"sec-fetch-site": "cross-site", "origin": "http://box:7860", "host": "box:7860"}, True),
        ("GET", {"sec-fetch-site": "same-site", "sec-fetch-mode": "no-cors"}, True),
        ("GET", {"sec-fetch-site": "none", "sec-fetch-mode": "navigate"}, False),
        ("GET", {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, False),  # a link
        ("POST", {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, True),  # a form
    ],
)
def test_another_site_is_told_from_the_page_itself(method, headers, is_another):
    assert is_asked_by_another_site(method, headers) is is_another
