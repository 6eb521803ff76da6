#!/usr/bin/env bash
# datasets 5.2.0: the JSON reader changes texts without a word where a column mixes texts and numbers. In the first 10 MB
# the column becomes of the type `Json`, in which "000123" is read as 123 and "true" as True. Behind them, one number in a
# part of the file puts quotes around every text of that part.
# Seen: "mixed at once: [123, True, 'a text', 5]; mixed late: 98 of 2001 rows have quotes around them".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet datasets==5.2.0
HF_HUB_OFFLINE=1 HF_HOME="$folder/home" "$folder/venv/bin/python" - "$folder" <<'PROGRAM'
import json
import sys
from pathlib import Path

import datasets

datasets.disable_progress_bars()
folder = Path(sys.argv[1])


def read(name, rows):
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return datasets.load_dataset("json", data_files=str(path), split="train")


at_once = read("at_once", [{"text": text} for text in ("000123", "true", "a text", 5)])["text"][:]
filler = "x" * 11_000  # a thousand rows are more than the 10 MB that are looked at first
rows = [{"text": "a text", "filler": filler} for _ in range(2000)] + [{"text": 5, "filler": filler}]
late = read("late", rows)["text"][:]
quoted = sum(text == '"a text"' for text in late)
print(f"mixed at once: {at_once}; mixed late: {quoted} of {len(rows)} rows have quotes around them")
sys.exit(0 if at_once == [123, True, "a text", 5] and 0 < quoted < len(rows) else 1)
PROGRAM
