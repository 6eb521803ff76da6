"""What a check found, as Python objects and as JSON."""

from dataclasses import dataclass, field
from typing import Any

from hf_llava_ft.checking.rows import Sample
from hf_llava_ft.data.problems import Problem
from hf_llava_ft.processing.picture_opening_llava import PictureOpening


@dataclass
class CheckResult:
    """
    What a check found.

    Args:
        sources (`list[str]`): each as `Source.describe` tells it.
        rows (`int`): all that were read.
        rows_by_kind (`dict[str, int]`): text, image, multi_image; rows that can't be read are in none.
        image_places (`int`): in the rows.
        images, missing_images, unreadable_images, decompression_bombs, extreme_images, turned_images,
        transparent_images (`int`): distinct files and embedded pictures.
        holds_preferences (`bool`): a source has chosen and rejected answers, which TRL's DPOTrainer learns.
        picture_opening (`str`): how training under the model opens them.
        image_formats (`dict[str, int]`): Pillow's names.
        duplicate_rows (`int`): rows that say the same as an earlier one.
        reused_images (`int`): files that several places name, which is usual.
        tokens (`dict`, *optional*): None without a model. See [`to_json`].
        problems, warnings (`list[Problem]`): in the order of sources and rows.
        samples (`dict[str, Sample]`): rows worth showing, by what they are.
    """

    sources: list[str] = field(default_factory=list)
    rows: int = 0
    rows_by_kind: dict[str, int] = field(default_factory=dict)
    image_places: int = 0
    images: int = 0
    missing_images: int = 0
    unreadable_images: int = 0
    decompression_bombs: int = 0
    extreme_images: int = 0
    turned_images: int = 0
    transparent_images: int = 0
    holds_preferences: bool = False
    picture_opening: PictureOpening = "upright"
    image_formats: dict[str, int] = field(default_factory=dict)
    duplicate_rows: int = 0
    reused_images: int = 0
    tokens: dict[str, Any] | None = None
    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)
    samples: dict[str, Sample] = field(default_factory=dict)

    @property
    def trainable(self) -> bool:
        """Whether training would take every row."""
        return not self.problems

    def num_rows_with(self, kind: str) -> int:
        """How many rows have a problem of that kind."""
        return len({(problem.file, problem.row) for problem in self.problems if problem.kind == kind})

    def to_json(self) -> dict[str, Any]:
        """Plain data; what is about tokens is null without a model."""
        tokens = self.tokens or {}
        return {
            "trainable": self.trainable,
            "sources": self.sources,
            "rows": self.rows,
            "rows_by_kind": self.rows_by_kind,
            "image_places": self.image_places,
            "images": self.images,
            "missing_images": self.missing_images,
            "unreadable_images": self.unreadable_images,
            "decompression_bombs": self.decompression_bombs,
            "extreme_images": self.extreme_images,
            "turned_images": self.turned_images,
            "transparent_images": self.transparent_images,
            "holds_preferences": self.holds_preferences,
            "picture_opening": self.picture_opening,
            "image_formats": self.image_formats,
            "reused_images": self.reused_images,
            "duplicate_rows": self.duplicate_rows,
            "placeholder_mismatches": self.num_rows_with("placeholder_mismatch"),
            "turn_order": self.num_rows_with("turn_order"),
            "empty_answers": self.num_rows_with("empty_answer"),
            "images_in_answers": self.num_rows_with("image_in_answer"),
            "control_text_rows": len({(w.file, w.row) for w in self.warnings if w.kind == "control_text"}),
            "unsupervised_rows": self.num_rows_with("unsupervised") if self.tokens is not None else None,
            "over_length_rows": self.num_rows_with("too_long") if self.tokens is not None else None,
            **{
                name: tokens.get(name)
                for name in (
                    "model_max_length",
                    "tokens",
                    "image_tokens",
                    "supervised_tokens",
                    "supervised_share",
                    "token_lengths",
                    "cut",
                    "padding_waste",
                    "steps",
                )
            },
            "problems": [_as_json(problem) for problem in self.problems],
            "warnings": [_as_json(problem) for problem in self.warnings],
        }


def _as_json(problem: Problem) -> dict[str, Any]:
    named = problem._asdict()
    del named["place"]
    return named
