"""`python -m tests.faults`: kills and full disks, as often as is asked for, and the table of what came out.

python -m tests.faults --kills 200 --disks 30            # what docs/reliability.md shows; --write puts it there
python -m tests.faults --kills 20 --only merge --seed 7  # one command, other moments
"""

import argparse
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path

from tests.faults.disks import fill_often
from tests.faults.kills import kill_often

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reliability.md"
BEGIN, END = "<!-- table: python -m tests.faults -->", "<!-- end of table -->"


def table(rows: dict[str, Counter], seed: int) -> str:
    """As Markdown: what was done, how often, and what came out."""
    lines = ["| what | how often | what came out |", "| --- | --- | --- |"]
    for name, counts in rows.items():
        told = ", ".join(f"{what}: {count}" for what, count in sorted(counts.items()))
        lines.append(f"| {name} | {sum(counts.values())} | {told} |")
    return "\n".join([*lines, "", f"Seed {seed}."])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--disks", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one command: train, merge, convert, export or check")
    parser.add_argument("--write", action="store_true", help="put the table into docs/reliability.md")
    asked = parser.parse_args()
    from tests.conftest import save_tiny_checkpoint

    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        checkpoint = save_tiny_checkpoint(root / "tiny")
        (root / "kills").mkdir()
        (root / "disks").mkdir()
        killed = kill_often(root / "kills", checkpoint, asked.kills, asked.seed, asked.only)
        rows = {f"kill -9 of {name}, then again": counts for name, counts in killed.items()}
        if asked.disks:
            rows |= fill_often(root / "disks", checkpoint, asked.disks, asked.seed, asked.only)
    shown = table(rows, asked.seed)
    print(shown)
    if asked.write:
        page = PAGE.read_text(encoding="utf-8")
        block = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
        PAGE.write_text(block.sub(lambda _: f"{BEGIN}\n{shown}\n{END}", page), encoding="utf-8")
    return int(any("failed" in counts for counts in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
