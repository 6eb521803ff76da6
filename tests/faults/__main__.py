"""`python -m tests.faults`: what can go wrong around a command, done to it on purpose, and the table of what came out.

python -m tests.faults                                      # every part, in minutes
python -m tests.faults --long --write                       # 200 kills, 50,000 examples, the slow tests; for docs/
python -m tests.faults --part kills --kills 60 --seed 7     # one part, other moments
python -m tests.faults --part signals --only merge
"""

import argparse
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests.faults.disks import fill_often
from tests.faults.kills import OPERATIONS, signal_often
from tests.faults.suites import SUITES, draw_often, run_suites

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"
BEGIN, END = "<!-- table: python -m tests.faults -->", "<!-- end of table -->"
SOFT = (signal.SIGTERM, signal.SIGUSR1)
# Only in the long form, unless asked for by name.
LONG_ONLY = ("pushes", "engines")
PARTS = ["kills", "signals", "disks", *SUITES, "properties"]


def table(rows: dict[str, Counter], seed: int, before: str = "") -> str:
    """As Markdown: what was done, how often, and what came out; rows of the table `before` stay where they are not of
    this run."""
    lines = {line.split("|")[1].strip(): line for line in before.splitlines() if line.startswith("|")}
    lines = {"what": "| what | seed | how often | what came out |", "---": "| --- | --- | --- | --- |"} | lines
    for name, counts in rows.items():
        told = ", ".join(f"{what}: {count:,}" for what, count in sorted(counts.items()))
        lines[name] = f"| {name} | {seed} | {sum(counts.values()):,} | {told} |"
    return "\n".join(lines.values())


def outcomes(asked: argparse.Namespace) -> Iterator[dict[str, Counter]]:
    """The rows of the parts that are asked for, part by part."""
    from tests.tiny_models import save_tiny_checkpoint

    kills = asked.kills if asked.kills is not None else (200 if asked.long else 20)
    disks = asked.disks if asked.disks is not None else (30 if asked.long else 6)
    times = asked.times if asked.times is not None else (9 if asked.long else 1)
    parts = asked.part or [part for part in PARTS if asked.long or part not in LONG_ONLY]
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        checkpoint = save_tiny_checkpoint(root / "tiny")
        for part in parts:
            began = time.monotonic()
            folder = root / part
            folder.mkdir()
            if part == "kills":
                yield signal_often(folder, checkpoint, kills, asked.seed, asked.only)
            elif part == "signals":
                yield signal_often(folder, checkpoint, kills, asked.seed, asked.only, SOFT)
            elif part == "disks":
                yield fill_often(folder, checkpoint, disks, asked.seed, asked.only)
            elif part == "properties":
                yield draw_often(times, asked.seed)
            else:
                yield run_suites(part, is_long=asked.long or bool(asked.part))
            print(f"{part}: {time.monotonic() - began:.0f} s", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=PARTS, help="this one alone; may be repeated")
    parser.add_argument("--long", action="store_true", help="as often as docs/reliability.md asks for; hours")
    parser.add_argument("--kills", type=int, help="kills in all, and as many softer signals; 20, or 200 with --long")
    parser.add_argument("--disks", type=int, help="full disks in all; 6, or 30 with --long")
    parser.add_argument("--times", type=int, help="as many examples as make test draws; 1, or 9 with --long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=[each.name for each in OPERATIONS], help="of kills, signals and disks")
    parser.add_argument("--write", action="store_true", help="put the rows into the table of docs/reliability.md")
    asked = parser.parse_args()
    rows: dict[str, Counter] = {}
    for found in outcomes(asked):
        rows |= found
    print(table(rows, asked.seed))
    if asked.write:
        page = PAGE.read_text(encoding="utf-8")
        before, rest = page.split(BEGIN)[1].split(END)
        shown = table(rows, asked.seed, before)
        PAGE.write_text(f"{page.split(BEGIN)[0]}{BEGIN}\n{shown}\n{END}{rest}", encoding="utf-8")
    return int(any("failed" in counts for counts in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
