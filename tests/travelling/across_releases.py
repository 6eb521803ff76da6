"""`make test-travelling`: exported folders under each minor release of transformers, without this package.

Folders that this version writes must do everything that `loading.py` tries, under every release; else this ends with
exit code 1. What folders of earlier versions can still do is printed as well, and must be what `docs/travelling.md`
says of it.
`python -m tests.travelling.across_releases 5.17.0 5.24.0` tries those releases alone.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.travelling.environments import CHECKOUT, RELEASES, python_with
from tests.travelling.loading import CHECKS, RESULT

HERE = Path(__file__).parent
EARLIER = HERE / "exported_0.1.0"
DOCUMENTATION = CHECKOUT / "docs" / "travelling.md"

# Folder -> what failed there, and its error; nothing if all went well.
Failures = dict[str, dict[str, str]]


def exported_now(output_dir: Path) -> list[Path]:
    """Folders that the version in this checkout writes, in the environment of this interpreter."""
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(HERE / "exporting.py"), str(output_dir)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"this version cannot export: {done.stderr.strip().splitlines()[-1]}")
    return sorted(path for path in output_dir.iterdir() if path.is_dir())


def failures_under(python: Path, folders: list[Path]) -> Failures:
    """What of `folders` fails for a stranger who has `python`; all are loaded in one fresh process."""
    with tempfile.TemporaryDirectory() as elsewhere:
        # PYTHONPATH and the user's own packages would be seen by the small environment.
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
        environment = {**kept, "PYTHONNOUSERSITE": "1", "HF_HOME": elsewhere, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [str(python), str(HERE / "loading.py"), *map(str, folders)],
            cwd=elsewhere,
            env=environment,
            stdin=subprocess.DEVNULL,  # so that nobody can be asked to trust anything
            capture_output=True,
            text=True,
            check=False,
        )
    results = [json.loads(line[len(RESULT) :]) for line in done.stdout.splitlines() if line.startswith(RESULT)]
    if done.returncode != 0 or len(results) != len(folders):
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {folder.name: {"loading": last} for folder in folders}
    return {
        folder.name: {name: error for name, error in result.items() if error is not None}
        for folder, result in zip(folders, results, strict=True)
    }


def cell(failures: dict[str, str]) -> str:
    """A cell of the table: `ok`, or what fails."""
    if not failures:
        return "ok"
    if "loading" in failures:
        return "does not load"
    if len(failures) > len(CHECKS) // 2:
        return "only " + ", ".join(name for name in CHECKS if name not in failures)
    return "not " + ", ".join(failures)


def table(results: dict[str, Failures]) -> list[str]:
    """Lines of Markdown: releases down, folders across."""
    names = list(next(iter(results.values())))
    lines = [f"| transformers | {' | '.join(names)} |", f"|{' --- |' * (len(names) + 1)}"]
    for release, of_folder in results.items():
        lines.append(f"| {release} | {' | '.join(cell(of_folder[name]) for name in names)} |")
    return lines


def print_results(title: str, results: dict[str, Failures]) -> None:
    print(f"\n{title}\n")
    print("\n".join(table(results)))
    where: dict[str, list[str]] = {}
    for release, of_folder in results.items():
        for name, failures in of_folder.items():
            for what, error in failures.items():
                where.setdefault(error, []).append(f"{release} {name}: {what}")
    for error, places in where.items():
        print(f"\n{error}")
        print("\n".join(f"    {place}" for place in places))


def main(releases: list[str]) -> int:
    earlier, now = {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        ours = exported_now(Path(scratch))
        theirs = sorted(path for path in EARLIER.iterdir() if path.is_dir())
        for release in releases:
            print(f"transformers {release}", flush=True)
            try:
                python = python_with(release)
            except RuntimeError as error:
                sys.exit(f"no environment with transformers {release} could be made: {error}")
            now[release] = failures_under(python, ours)
            earlier[release] = failures_under(python, theirs)
    print_results("Folders written by this version", now)
    print_results("Folders written by version 0.1.0", earlier)
    told = DOCUMENTATION.read_text(encoding="utf-8").splitlines()
    untold = [line for line in table(earlier) if line not in told]
    for line in untold:
        print(f"\n{DOCUMENTATION} does not say: {line}")
    failed = any(failures for of_folder in now.values() for failures in of_folder.values())
    return 1 if failed or untold else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or list(RELEASES)))
