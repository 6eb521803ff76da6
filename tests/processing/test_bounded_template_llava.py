"""A chat template that does not end is stopped, and leaves the process's timer as it was."""

import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from hf_llava_ft.processing import bounded_template_llava
from hf_llava_ft.processing.bounded_template_llava import render_within_bounds

# By a thread: the other way takes the timer for itself.
pytestmark = pytest.mark.timeout(60, method="thread")
QUESTION = [[{"role": "user", "content": "What?"}]]
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def test_a_template_without_end_is_stopped(monkeypatch):
    monkeypatch.setattr(bounded_template_llava, "MAX_SECONDS", 0.3)
    start = time.monotonic()
    with pytest.raises(ValueError, match="does not end"):
        render_within_bounds(conversations=QUESTION, chat_template=LOOPS)
    assert time.monotonic() - start < 5
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL


def test_a_template_that_talks_is_refused(monkeypatch):
    monkeypatch.setattr(bounded_template_llava, "MAX_CHARACTERS", 100)
    with pytest.raises(ValueError, match="more than 100 characters"):
        render_within_bounds(conversations=QUESTION, chat_template="{{ 'word' * 99 }}")


def test_another_timer_is_left_alone():
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    try:
        signal.setitimer(signal.ITIMER_REAL, 100)
        [text], _ = render_within_bounds(conversations=QUESTION, chat_template="{{ messages[0].content }}")
        assert text == "What?"
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 90
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_outside_of_the_main_thread_too(monkeypatch):
    monkeypatch.setattr(bounded_template_llava, "MAX_SECONDS", 0.3)
    with ThreadPoolExecutor(1) as pool:
        endless = pool.submit(render_within_bounds, conversations=QUESTION, chat_template=LOOPS)
        with pytest.raises(ValueError, match="does not end within 0.3 s"):
            endless.result(timeout=30)
        # And the thread goes on being of use.
        short = pool.submit(render_within_bounds, conversations=QUESTION, chat_template="{{ messages[0].content }}")
        assert short.result(timeout=30)[0] == [QUESTION[0][0]["content"]]
        assert pool.submit(time.sleep, 0.5).result(timeout=30) is None
