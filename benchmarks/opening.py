"""What it costs to know the size that a picture will have, from its header: with its orientation and without.

python benchmarks/opening.py PICTURE [PICTURE ...]
"""

import sys
import time
from collections.abc import Callable
from functools import partial

from PIL import Image

from hf_llava_ft.processing.picture_opening_llava import rgb_picture, size_when_opened

HEADERS, PICTURES = 200, 3  # how often each is looked at


def microseconds(paths: list[str], look: Callable[[Image.Image], object], rounds: int = HEADERS) -> float:
    """For each picture, the shortest of several times over all of them."""
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        for _ in range(rounds):
            for path in paths:
                with Image.open(path) as image:
                    look(image)
        best = min(best, time.perf_counter() - started)
    return best / rounds / len(paths) * 1e6


def main(paths: list[str]) -> None:
    """Prints microseconds for each picture."""
    print(f"header alone:            {microseconds(paths, lambda image: image.size):8.0f} us a picture")
    print(f"size when opened:        {microseconds(paths, size_when_opened):8.0f} us a picture")
    for opening in ("original", "upright"):
        took = microseconds(paths, partial(rgb_picture, opening=opening), PICTURES)
        print(f"decoded, {opening + ':':15} {took:8.0f} us a picture")


if __name__ == "__main__":
    main(sys.argv[1:])
