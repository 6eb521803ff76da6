"""What it costs to know that no image has changed: python -m benchmarks.unchanged_files [NUMBER]

Per image: keeping its size and time when a run begins, asking when its row is due, and, to compare, decoding it.
"""

import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

from hf_llava_ft.data.unchanged import FilesAsTheyWere


def main(number: int = 20000) -> None:
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder, "0.jpg")
        Image.effect_noise((640, 480), 60).convert("RGB").save(picture)
        content = picture.read_bytes()
        paths = [str(Path(folder, f"{index}.jpg")) for index in range(number)]
        for path in paths:
            Path(path).write_bytes(content)
        start = time.perf_counter()
        files = FilesAsTheyWere(paths)
        kept = time.perf_counter()
        for path in paths:
            files.check(path, "row 1")
        asked = time.perf_counter()
        for path in paths[:200]:
            with Image.open(path) as opened:
                opened.convert("RGB")
        decoded = time.perf_counter()
    print(f"{number:,} images on a local disk, microseconds per image:")
    print(f"  kept when the run begins  {(kept - start) / number * 1e6:8.1f}")
    print(f"  asked when its row is due {(asked - kept) / number * 1e6:8.1f}")
    print(f"  decoded, 640 x 480        {(decoded - asked) / 200 * 1e6:8.1f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
