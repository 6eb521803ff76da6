"""Who may reach the page, and what is said before a model is loaded."""

import socket

import pytest

from hf_llava_ft.errors import UserError
from hf_llava_ft.web import server
from hf_llava_ft.web.access import PASSWORD_VARIABLE, check_free, checker, is_loopback, password_for

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
    monkeypatch.setattr(server, "find_spec", lambda name: name)  # as if the extra were installed
    monkeypatch.setattr("sys.stdin", open("/dev/null"))
    monkeypatch.delenv(PASSWORD_VARIABLE, raising=False)
    code, _, err = llava_ft("chat", "--model", "nowhere", *flags)
    assert code == 2 and told in err and err.count("error: ") == 1 and "nowhere" not in err


def test_a_page_without_its_extra_says_what_to_install(llava_ft, monkeypatch):
    monkeypatch.setattr(server, "find_spec", lambda name: None)
    code, _, err = llava_ft("chat", "--model", "nowhere", "--web")
    assert code == 2 and err == "error: --web needs Gradio: pip install 'hf-llava-ft[web]'.\n"
