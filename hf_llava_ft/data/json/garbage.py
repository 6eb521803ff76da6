"""Python's cyclic garbage collector, out of the way where it can find nothing.

It runs whenever some hundred more containers were made than freed, and then looks at all there are. Rows of JSON are
nothing but containers, and none of them points back: looking at them over and over takes as long as checking them.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def garbage_collection_paused() -> Iterator[None]:
    """For a block that makes many dicts and lists without cycles; what is no longer referenced is freed as ever."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
