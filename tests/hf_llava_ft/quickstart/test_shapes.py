"""The drawn set: what is held out is nowhere else, answers are true of the pictures; a LLaVA learns it."""

import json
import random
from collections import Counter

import numpy as np
import pytest

from hf_llava_ft import load_data
from hf_llava_ft.errors import UserError
from hf_llava_ft.quickstart.learning import PROMISED, Learned, Score, learn_shapes
from hf_llava_ft.quickstart.shapes import (
    COLOURS,
    COUNTS,
    HELD_OUT,
    KINDS,
    PLACES,
    PRETRAIN,
    QUESTIONS,
    SIZE,
    SIZES,
    TRAIN,
    Scene,
    draw_scene,
    held_out_pairs,
    write_shapes,
)

NUM_PICTURES, NUM_HELD_OUT = 96, 12


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("shapes") / "set", NUM_PICTURES, NUM_HELD_OUT, seed=3)


def rows_of(folder, name):
    return json.loads((folder / name).read_text())


def pairs_in(folder, name):
    """(kind, colour) of each picture."""
    said: dict[str, dict[str, str]] = {}
    for row in rows_of(folder, name):
        turns = row["conversations"]
        for asked, answer in zip(turns[::2], turns[1::2], strict=True):
            said.setdefault(row["image"], {})[asked["value"].removeprefix("<image>\n")] = answer["value"]
    return {(answers[QUESTIONS["kind"]], answers[QUESTIONS["colour"]]) for answers in said.values()}


def test_held_out_combinations_are_in_no_training_picture(drawn):
    apart = set(held_out_pairs(3))
    assert pairs_in(drawn, TRAIN) == {(kind, colour) for kind in KINDS for colour in COLOURS} - apart
    assert pairs_in(drawn, HELD_OUT["heldout_combinations"]) == apart
    assert not pairs_in(drawn, HELD_OUT["heldout_pictures"]) & apart
    captions = " ".join(row["conversations"][1]["value"] for row in rows_of(drawn, PRETRAIN))
    assert not [pair for pair in apart if f"{pair[1]} {pair[0]}" in captions]
    assert json.loads((drawn / "shapes.json").read_text())["held_out_combinations"] == [
        f"{colour} {kind}" for kind, colour in held_out_pairs(3)
    ]


def test_every_word_of_a_held_out_combination_is_trained_on():
    for seed in range(20):
        apart = held_out_pairs(seed)
        assert {kind for kind, _ in apart} == set(KINDS) and max(Counter(colour for _, colour in apart).values()) == 1
    assert held_out_pairs(1) != held_out_pairs(2)


def test_no_held_out_picture_is_a_training_picture(drawn):
    bytes_of = {
        name: {path.read_bytes() for path in (drawn / "images" / name).iterdir()} for name in ("train", *HELD_OUT)
    }
    assert [len(found) for found in bytes_of.values()] == [NUM_PICTURES, NUM_HELD_OUT, NUM_HELD_OUT]
    assert not bytes_of["train"] & (bytes_of["heldout_pictures"] | bytes_of["heldout_combinations"])


def test_one_seed_draws_one_set(drawn, tmp_path):
    again = write_shapes(tmp_path / "again", NUM_PICTURES, NUM_HELD_OUT, seed=3)
    other = write_shapes(tmp_path / "other", NUM_PICTURES, NUM_HELD_OUT, seed=4)
    files = sorted(path.relative_to(drawn) for path in drawn.rglob("*") if path.is_file())
    assert [file for file in files if (drawn / file).read_bytes() != (again / file).read_bytes()] == []
    assert (drawn / TRAIN).read_bytes() != (other / TRAIN).read_bytes()


def test_training_reads_every_file(drawn):
    for name, number in ((PRETRAIN, 96), (TRAIN, 96), *((name, 12 * len(QUESTIONS)) for name in HELD_OUT.values())):
        assert len(load_data(drawn / name, drawn / "images")) == number


@pytest.mark.parametrize("kind", KINDS)
def test_the_answers_are_true_of_the_picture(kind):
    """Place, colour, size and number of the shapes, found in the pixels."""
    draw = random.Random(5)
    for colour, count in zip(COLOURS, COUNTS * 2, strict=True):
        place = draw.choice(PLACES)
        area = {}
        for size in SIZES:
            pixels = np.asarray(draw_scene(Scene(kind, colour, count, place, size), draw)).astype(int)
            background = np.median(pixels.reshape(-1, 3), axis=0)
            is_shape = np.abs(pixels - background).sum(axis=2) > 60
            rows, columns = np.nonzero(is_shape)
            vertical, horizontal = place.split()
            assert (rows < SIZE / 2).all() == (vertical == "top") and (columns < SIZE / 2).all() == (
                horizontal == "left"
            )
            clearest = pixels[is_shape][np.abs(pixels[is_shape] - background).sum(axis=1).argsort()[-20:]].mean(axis=0)
            nearest = min(COLOURS, key=lambda name: np.abs(clearest - COLOURS[name]).sum())
            assert nearest == colour
            cells = {(row // (SIZE // 4), column // (SIZE // 4)) for row, column in zip(rows, columns, strict=True)}
            assert len(cells) == COUNTS.index(count) + 1
            area[size] = len(rows)
        assert area["large"] > 1.5 * area["small"]


def test_the_same_set_is_not_drawn_again_and_another_one_not_over_it(drawn):
    before = {path: path.stat().st_mtime_ns for path in drawn.rglob("*")}
    assert write_shapes(drawn, NUM_PICTURES, NUM_HELD_OUT, seed=3) == drawn
    with pytest.raises(UserError):
        write_shapes(drawn, NUM_PICTURES, NUM_HELD_OUT, seed=4)
    assert {path: path.stat().st_mtime_ns for path in drawn.rglob("*")} == before


def test_learning_leaves_a_folder_with_other_things_alone(drawn, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="move it away"):
        learn_shapes(tmp_path, drawn)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError):
        write_shapes(tmp_path, 1, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_model_that_sees_nothing_does_not_pass():
    good = Score(right=0.97, of_blank=0.27, chance=0.28, by_question={})
    blind = Score(right=0.97, of_blank=0.97, chance=0.28, by_question={})
    worse = Score(right=0.84, of_blank=0.27, chance=0.28, by_question={})

    def passed(pictures, combinations):
        scores = {"heldout_pictures": pictures, "heldout_combinations": combinations}
        return Learned(scores, {}, 0.0, "").passed

    assert passed(good, good)
    assert not passed(blind, good) and not passed(good, blind) and not passed(worse, good) and not passed(good, worse)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_llava_from_nothing_learns_what_it_never_saw(tmp_path):
    folder = write_shapes(tmp_path / "shapes", seed=7)
    learned = learn_shapes(folder / "run", folder, seed=7)
    for name, least in PROMISED.items():
        score = learned.scores[name]
        assert score.right >= least, (name, score)
        assert score.of_blank <= score.chance + 0.05, (name, score)
    assert learned.cpu_seconds < 2 * 15 * 60
