"""Rendering chat templates, which are programs that come with a model.

transformers keeps them from everything but time and memory. Here these get a bound, where Python can set one.
"""

import ctypes
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

MAX_SECONDS = 10.0
MAX_CHARACTERS = 50_000_000


class TemplateWithoutEnd(ValueError):
    """A template did not end in time."""


def render_within_bounds(**kwargs: Any) -> Any:
    """
    `render_jinja_template`, which ends.

    Raises:
        ValueError: if it takes longer than `MAX_SECONDS`, or gives more text than `MAX_CHARACTERS`.
    """
    with _limited_time():
        rendered, spans = render_jinja_template(**kwargs)  # type: ignore[str-unpack]
    if sum(map(len, rendered)) > MAX_CHARACTERS:
        raise ValueError(f"the chat template gives more than {MAX_CHARACTERS:,} characters")
    return rendered, spans


@contextmanager
def _limited_time() -> Iterator[None]:
    # A timer is of the main thread, and of whoever has set one before; Windows has none.
    is_free = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    if not is_free or signal.getsignal(signal.SIGALRM) != signal.SIG_DFL:
        with _limited_by_a_thread():
            yield
        return
    signal.signal(signal.SIGALRM, _stop)
    signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)


def _stop(*_: Any) -> None:
    raise TemplateWithoutEnd(_message())


@contextmanager
def _limited_by_a_thread() -> Iterator[None]:
    """A second thread raises in this one; it costs some 0.1 ms, which is why the main thread has a timer."""
    thread, lock, is_over = threading.get_ident(), threading.Lock(), False

    def stop() -> None:
        with lock:
            if not is_over:
                raised = ctypes.py_object(TemplateWithoutEnd)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), raised)

    timer = threading.Timer(MAX_SECONDS, stop)
    timer.start()
    try:
        try:
            yield
        finally:
            with lock:
                is_over = True
            timer.cancel()
    except TemplateWithoutEnd:  # raised by its class alone
        raise TemplateWithoutEnd(_message()) from None


def _message() -> str:
    return f"the chat template does not end within {MAX_SECONDS:g} s"


__all__ = ["TemplateWithoutEnd", "render_within_bounds"]
