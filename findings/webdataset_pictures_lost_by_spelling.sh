#!/usr/bin/env bash
# datasets 5.2.0: of a WebDataset whose first pictures end in .jpg, those that end in .JPG or .jpeg come as None, without a
# word: the columns are those of the first five rows, by the spelling of their endings.
# Seen: "6 pictures, then ['None', 'None']".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet datasets==5.2.0 pillow==12.0.0
HF_HUB_OFFLINE=1 HF_HOME="$folder/home" "$folder/venv/bin/python" - "$folder" <<'PROGRAM'
import io
import sys
import tarfile
from pathlib import Path

import datasets
from PIL import Image

datasets.disable_progress_bars()
picture = io.BytesIO()
Image.new("RGB", (8, 8)).save(picture, "JPEG")
path = Path(sys.argv[1], "data.tar")
with tarfile.open(path, "w") as archive:
    for number, ending in enumerate(["jpg"] * 6 + ["JPG", "jpeg"]):
        for name, content in ((f"{number}.{ending}", picture.getvalue()), (f"{number}.txt", b"A square.")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
found = [row["jpg"] for row in datasets.load_dataset("webdataset", data_files=str(path), split="train")]
whole = sum(each is not None for each in found[:6])
print(f"{whole} pictures, then {[str(each) for each in found[6:]]}")
sys.exit(0 if whole == 6 and found[6:] == [None, None] else 1)
PROGRAM
