"""Writes a LLaVA JSON of the size and make-up of mix665k, on which LLaVA-1.5 was tuned, with text that means nothing.

    python benchmarks/synthetic_665k.py --output_dir /tmp/mix [--rows 665298 --seed 0]

`data.json` has rows of the ten sources of mix665k in their numbers: how many turns, how long, which images come back
and which 6 % have none. At the full size it is about 1 GB, indented by two spaces. `images/` has as many names as the
rows need and few files: each name is a hard link to one of 2,000 small JPEGs. The same seed writes the same bytes.
"""

import argparse
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from json.encoder import encode_basestring, encode_basestring_ascii
from pathlib import Path

import numpy as np
from PIL import Image

NUM_ROWS = 665_298
_NUM_FILES = 2_000
_NUM_SENTENCES = 20_000  # of each length, from which turns are put together
_NUM_COCO = 118_287  # pictures that several sources share

# The commonest words of English, most frequent first: few tokens to a word, as in the real text.
_WORDS = (
    "the of and a to in is you that it he was for on are as with his they I at be this have from or one had by word "
    "but not what all were we when your can said there use an each which she do how their if will up other about out "
    "many then them these so some her would make like him into time has look two more write go see number no way "
    "could people my than first water been call who its now find long down day did get come made may part over new "
    "sound take only little work know place year live me back give most very after thing our just name good sentence "
    "man think say great where help through much before line right too mean old any same tell boy follow came want "
    "show also around form three small set put end does another well large must big even such because turn here why "
    "ask went men read need land different home us move try kind hand picture again change off play spell air away "
    "animal house point page letter mother answer found study still learn should world high every near add food "
    "between own below country plant last school father keep tree never start city earth eye light thought head under "
    "story saw left few while along might close something seem next hard open example begin life always those both "
    "paper together got group often run image background person street table white black sitting standing holding "
    "wearing umbrella skateboard giraffe refrigerator snowboarding neighbourhood surrounding atmosphere"
).split()
_SYLLABLES = ("ka", "ri", "ton", "el", "mar", "vi", "so", "ber", "ly", "ca", "der", "pho", "st", "ing", "qua", "xe")


@dataclass(frozen=True)
class Source:
    """One of the sources: its number of rows, where its images are, and how its conversations look.

    `rounds` of a question and an answer, and `question` and `answer` in words, are (least, most).
    """

    name: str
    rows: int
    folder: str | None
    rounds: tuple[int, int]
    question: tuple[int, int]
    answer: tuple[int, int]


_COCO = "coco/train2017"
SOURCES = [
    Source("llava", 157_712, _COCO, (1, 4), (6, 22), (30, 120)),
    Source("sharegpt", 40_688, None, (1, 8), (5, 120), (60, 420)),
    Source("vqav2", 82_783, _COCO, (2, 9), (4, 9), (1, 3)),
    Source("gqa", 72_140, "gqa/images", (6, 16), (5, 12), (1, 2)),
    Source("okvqa", 8_998, _COCO, (1, 2), (5, 12), (1, 3)),
    Source("ocr_vqa", 80_000, "ocr_vqa/images", (3, 6), (4, 10), (1, 8)),
    Source("a_okvqa", 66_160, _COCO, (1, 2), (30, 40), (1, 2)),
    Source("textcaps", 21_953, "textvqa/train_images", (1, 1), (40, 120), (8, 20)),
    Source("refcoco", 48_447, _COCO, (3, 12), (10, 24), (4, 8)),
    Source("vg", 86_417, "vg/VG_100K", (6, 14), (8, 20), (3, 8)),
]


def write(output_dir: Path, num_rows: int = NUM_ROWS, seed: int = 0) -> tuple[Path, Path]:
    """
    Writes the set and returns its file and its image folder. Fewer rows have the same mixture.

    Raises:
        FileExistsError: if the folder already holds a set.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    path, folder = output_dir / "data.json", output_dir / "images"
    folder.mkdir()
    rng = random.Random(seed)
    names: dict[str, None] = {}
    with open(path, "x", encoding="utf-8") as file:
        for number, (row_id, name, turns) in enumerate(_rows(num_rows, rng)):
            if name is not None:
                names[name] = None
            file.write((",\n" if number else "[\n") + _as_json(row_id, name, turns))
        file.write("\n]\n")
    _link_images(folder, list(names), seed)
    return path, folder


def _rows(num_rows: int, rng: random.Random) -> Iterator[tuple[str, str | None, list[str]]]:
    """(id, image or None, the texts of question, answer, question, ...) in mixed order."""
    chosen = [source for source in SOURCES for _ in range(source.rows)]
    rng.shuffle(chosen)
    sentences = _Sentences(rng)
    num_coco = max(1, _NUM_COCO * num_rows // NUM_ROWS)
    for number, source in enumerate(chosen[:num_rows]):
        name = None
        if source.folder is not None:
            picture = rng.randrange(num_coco) if source.folder == _COCO else number
            name = f"{source.folder}/{picture:012d}.jpg"
        row_id = f"{source.name}_{number}" if name is None else f"{picture:012d}"
        turns = []
        for _ in range(rng.randint(*source.rounds)):
            turns.append(sentences.of(rng.randint(*source.question)) + "?")
            turns.append(sentences.of(rng.randint(*source.answer)) + ".")
        if name is not None:
            turns[0] = f"<image>\n{turns[0]}" if rng.random() < 0.9 else f"{turns[0]}\n<image>"
        elif rng.random() < 0.2:
            turns[1] = f"Voilà, “{turns[1]}” 你好 \U0001f431"
        yield row_id, name, turns


class _Sentences:
    """Texts of so many words, put together from a stock of pieces, since drawing every word would take an hour."""

    def __init__(self, rng: random.Random):
        weights = [1 / (rank + 3) for rank in range(len(_WORDS))]
        words = rng.choices(_WORDS, weights, k=_NUM_SENTENCES * 12)
        for place in range(0, len(words), 23):
            words[place] = "".join(rng.choices(_SYLLABLES, k=rng.randint(2, 4)))
        for place in range(5, len(words), 17):
            words[place] += rng.choice([",", ",", ".", ";", "'s"])
        self._words, self._rng = words, rng

    def of(self, num_words: int) -> str:
        pieces = []
        while num_words > 0:
            size = min(num_words, self._rng.randint(8, 60))
            start = self._rng.randrange(len(self._words) - size)
            pieces.append(" ".join(self._words[start : start + size]).capitalize())
            num_words -= size
        return ".\n\n".join(pieces) if len(pieces) > 4 else ". ".join(pieces)


def _as_json(row_id: str, name: str | None, turns: list[str]) -> str:
    # json.dumps writes the same with indent=2, eight times slower.
    encode = encode_basestring if name is None else encode_basestring_ascii
    image = "" if name is None else f'\n    "image": {encode(name)},'
    said = ",".join(
        f'\n      {{\n        "from": "{"gpt" if place % 2 else "human"}",\n        "value": {encode(text)}\n      }}'
        for place, text in enumerate(turns)
    )
    return f'  {{\n    "id": {encode(row_id)},{image}\n    "conversations": [{said}\n    ]\n  }}'


def _link_images(folder: Path, names: list[str], seed: int) -> None:
    rng = np.random.default_rng(seed)
    files = []
    for number in range(min(_NUM_FILES, len(names))):
        width, height = rng.integers(24, 49, size=2)
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        files.append(folder / f".{number}.jpg")
        coarse.resize((int(width), int(height))).save(files[-1], quality=75)
    for parent in {os.path.dirname(name) for name in names}:
        (folder / parent).mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        os.link(files[number % len(files)], f"{folder}/{name}")
    for file in files:
        file.unlink()  # the links remain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=NUM_ROWS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    path, folder = write(args.output_dir, args.rows, args.seed)
    print(f"{path}: {path.stat().st_size / 1e6:.0f} MB; images in {folder}")


if __name__ == "__main__":
    main()
