"""The bad rows of a source, kept beside the cache of `datasets` as long as the data file and the images of these rows
do not change."""

import json
import os
from hashlib import blake2b
from pathlib import Path

from filelock import FileLock

from hf_llava_ft.checking.check import check_data
from hf_llava_ft.data.formats.source import Source
from hf_llava_ft.data.problems import Problem
from hf_llava_ft.errors import UserError


def problems_of(source: Source, root: Path, error: UserError, is_remembered: bool = True) -> list[Problem]:
    """
    Args:
        root (`Path`): of the cache.
        error (`UserError`): because of which the source could not be loaded.
        is_remembered (`bool`): take what an earlier check found, where the files have stayed as they were.

    Returns:
        `list[Problem]`: all that is wrong with the rows.

    Raises:
        UserError: `error`, if it is not about rows.
    """
    kept = _kept_at(source, root)
    kept.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{kept}.lock"):  # one process of many checks
        if is_remembered and kept.exists():
            known = json.loads(kept.read_text(encoding="utf-8"))
            if known["images"] == [[path, _state(path)] for path, _ in known["images"]]:
                return [Problem(*fields) for fields in known["problems"]]
        problems = check_data([source]).problems
        # A file that breaks off has rows nobody knows of.
        if not problems or any(problem.row is None or problem.kind == "broken_file" for problem in problems):
            raise error
        images = [[path, _state(path)] for path in _images_of(source, {problem.row for problem in problems})]
        unfinished = kept.with_suffix(".incomplete")
        unfinished.write_text(json.dumps({"images": images, "problems": problems}), encoding="utf-8")
        unfinished.replace(kept)
        return problems


def _kept_at(source: Source, root: Path) -> Path:
    status = [os.stat(path) for path in source.container.files]
    files = [[one.st_size, one.st_mtime_ns, one.st_ctime_ns, one.st_ino] for one in status]
    images = source.images
    options = [images.folder, images.allow_outside, images.allow_urls]
    identity = [source.where, source.container.files, source.reading, files, options]
    digest = blake2b(json.dumps(identity).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    return root / "llava_bad_rows" / f"{digest}.json"


def _images_of(source: Source, numbers: set[int | None]) -> list[str]:
    """Where the images of some rows would be, whether or not they are there."""
    paths: dict[str, None] = {}
    for number, raw in source.iter_raw():
        if number in numbers:
            try:
                images = source.parse(raw, number)["images"]
            except UserError:
                continue  # no image would make that row a good one
            for image in images:
                if isinstance(image, str) and len(image) < 4096:
                    paths[os.path.join(source.images.folder or "", image)] = None
    return list(paths)


def _state(path: str) -> list[int] | None:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return [status.st_size, status.st_mtime_ns]
