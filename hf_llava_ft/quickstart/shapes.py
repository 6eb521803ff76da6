"""`llava-ft shapes`: pictures of coloured shapes with questions, to see whether a model learns or remembers.

A picture holds one to four shapes of one kind, colour and size in one quarter of it. Some pairs of kind and colour,
drawn from the seed, are in no picture that is trained on. Who answers questions about those has learned kinds and
colours, and not pictures.
"""

import json
import math
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from rich.progress import track

from hf_llava_ft.checkpoints.artifact import staged_folder
from hf_llava_ft.errors import UserError

SIZE = 96  # pixels, of height and width
KINDS = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = {
    "red": (214, 40, 40),
    "orange": (245, 140, 20),
    "yellow": (240, 214, 30),
    "green": (40, 150, 60),
    "blue": (40, 80, 210),
    "purple": (130, 50, 160),
    "black": (25, 25, 25),
    "grey": (130, 130, 130),
}
COUNTS = ("one", "two", "three", "four")
PLACES = ("top left", "top right", "bottom left", "bottom right")
SIZES = {"small": 6.5, "large": 10}  # half their width in pixels

QUESTIONS = {
    "kind": "What kind of shape is there?",
    "colour": "What colour is it?",
    "count": "How many are there?",
    "place": "Where in the picture?",
    "size": "How large is it?",
}
CAPTION_REQUEST = "Describe the picture."
# Files of the set, and how many pictures each has, of 100 that are trained on.
PRETRAIN, TRAIN = "pretrain.json", "train.json"
HELD_OUT = {"heldout_pictures": "heldout_pictures.json", "heldout_combinations": "heldout_combinations.json"}
FACTS = "shapes.json"


@dataclass(frozen=True)
class Scene:
    """What is in a picture, in the words that answers use."""

    kind: str
    colour: str
    count: str
    place: str
    size: str

    @property
    def caption(self) -> str:
        return f"{self.count} {self.size} {self.colour} {self.kind}, {self.place}"

    @property
    def pair(self) -> tuple[str, str]:
        return self.kind, self.colour


def held_out_pairs(seed: int) -> list[tuple[str, str]]:
    """Pairs of kind and colour that are never trained on: every kind once, each with another colour."""
    draw = random.Random(f"pairs {seed}")
    return list(zip(KINDS, draw.sample(list(COLOURS), len(KINDS)), strict=True))


def draw_scene(scene: Scene, draw: random.Random) -> Image.Image:
    """RGB, `SIZE` x `SIZE`: shade, background and exact places are drawn anew, so that no two pictures are equal."""
    times = 4  # drawn larger, for smooth edges
    light = draw.randint(215, 255)
    picture = Image.new("RGB", (SIZE * times, SIZE * times), tuple(light - draw.randint(0, 8) for _ in range(3)))
    pen = ImageDraw.Draw(picture)
    row, column = divmod(PLACES.index(scene.place), 2)
    colour = tuple(max(0, min(255, value + draw.randint(-12, 12))) for value in COLOURS[scene.colour])
    cells = draw.sample(range(4), COUNTS.index(scene.count) + 1)
    for cell in cells:
        half = SIZES[scene.size] * draw.uniform(0.92, 1.08)
        room = min(2.5, SIZE / 8 - half - 0.5)  # within its cell, which is a sixteenth of the picture
        x = column * SIZE / 2 + (cell % 2 + 0.5) * SIZE / 4 + draw.uniform(-room, room)
        y = row * SIZE / 2 + (cell // 2 + 0.5) * SIZE / 4 + draw.uniform(-room, room)
        _draw_shape(pen, scene.kind, x * times, y * times, half * times, colour)
    return picture.resize((SIZE, SIZE), Image.Resampling.BOX)


def _draw_shape(pen: ImageDraw.ImageDraw, kind: str, x: float, y: float, half: float, colour: Any) -> None:
    box = (x - half, y - half, x + half, y + half)
    if kind == "circle":
        pen.ellipse(box, fill=colour)
    elif kind == "square":
        pen.rectangle((x - 0.88 * half, y - 0.88 * half, x + 0.88 * half, y + 0.88 * half), fill=colour)
    elif kind == "triangle":
        pen.polygon([(x, y - half), (x + half, y + 0.85 * half), (x - half, y + 0.85 * half)], fill=colour)
    elif kind == "star":
        angles = [math.pi * (step / 5 - 0.5) for step in range(10)]
        radii = [half, 0.42 * half] * 5
        pen.polygon(
            [(x + r * math.cos(a), y + r * math.sin(a)) for r, a in zip(radii, angles, strict=True)], fill=colour
        )
    elif kind == "cross":
        pen.rectangle((x - half, y - 0.3 * half, x + half, y + 0.3 * half), fill=colour)
        pen.rectangle((x - 0.3 * half, y - half, x + 0.3 * half, y + half), fill=colour)
    else:
        pen.ellipse(box, outline=colour, width=round(0.45 * half))


def write_shapes(output_dir: Path, num_pictures: int = 12000, num_held_out: int = 300, seed: int = 42) -> Path:
    """
    Writes the set into a new folder: `images/`, the rows of both stages, the held-out rows, and `shapes.json`, which
    says what is held out. The same set that is there already is left as it is.

    Args:
        num_pictures (`int`): that are trained on.
        num_held_out (`int`): of each of the two kinds of held-out pictures.

    Raises:
        UserError: if there is something at `output_dir`, or a number is too small.
    """
    if num_pictures < 1 or num_held_out < 1:
        raise UserError(f"--num_pictures {num_pictures} and --num_held_out {num_held_out} have to be 1 or more.")
    draw = random.Random(seed)
    apart = held_out_pairs(seed)
    facts = {
        "seed": seed,
        "num_pictures": num_pictures,
        "num_held_out": num_held_out,
        "held_out_combinations": [f"{colour} {kind}" for kind, colour in apart],
    }
    if _facts_of(Path(output_dir)) == facts:
        return Path(output_dir)
    known = [(kind, colour) for kind in KINDS for colour in COLOURS if (kind, colour) not in apart]
    with staged_folder(output_dir) as staged:
        (staged / "images").mkdir()
        scenes = _drawn(staged, "train", known, num_pictures, draw)
        _write_rows(staged / PRETRAIN, (_caption_row(*each) for each in scenes))
        _write_rows(staged / TRAIN, (_conversation(*each, draw) for each in scenes))
        for name, pairs in (("heldout_pictures", known), ("heldout_combinations", apart)):
            scenes = _drawn(staged, name, pairs, num_held_out, draw)
            _write_rows(staged / HELD_OUT[name], (row for each in scenes for row in _questions(*each)))
        (staged / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return Path(output_dir)


def _facts_of(folder: Path) -> Any:
    try:
        return json.loads((folder / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _drawn(
    folder: Path, name: str, pairs: list[tuple[str, str]], num_pictures: int, draw: random.Random
) -> list[tuple[str, Scene]]:
    """(path of the picture below `images/`, what is in it); each pair comes up as often as any other."""
    (folder / "images" / name).mkdir()
    scenes = []
    for place in track(range(num_pictures), description=f"drawing {name}", transient=True):
        kind, colour = pairs[place % len(pairs)]
        scene = Scene(kind, colour, draw.choice(COUNTS), draw.choice(PLACES), draw.choice(list(SIZES)))
        path = f"{name}/{place:05d}.png"
        draw_scene(scene, draw).save(folder / "images" / path)
        scenes.append((path, scene))
    return scenes


def _row(name: str, path: str, turns: Iterable[tuple[str, str]]) -> dict[str, Any]:
    said: list[dict[str, str]] = []
    for question, answer in turns:
        picture = "" if said else "<image>\n"
        said += [{"from": "human", "value": picture + question}, {"from": "gpt", "value": answer}]
    return {"id": name, "image": path, "conversations": said}


def _caption_row(path: str, scene: Scene) -> dict[str, Any]:
    return _row(path.removesuffix(".png"), path, [(CAPTION_REQUEST, scene.caption)])


def _conversation(path: str, scene: Scene, draw: random.Random) -> dict[str, Any]:
    """All questions in an order of its own: each is the first one of some rows, as it is when it is asked alone."""
    about = draw.sample(list(QUESTIONS), len(QUESTIONS))
    return _row(path.removesuffix(".png"), path, [(QUESTIONS[name], getattr(scene, name)) for name in about])


def _questions(path: str, scene: Scene) -> list[dict[str, Any]]:
    return [
        _row(f"{path.removesuffix('.png')}/{name}", path, [(question, getattr(scene, name))])
        for name, question in QUESTIONS.items()
    ]


def _write_rows(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    file.write_text(json.dumps(list(rows), indent=0) + "\n", encoding="utf-8")
