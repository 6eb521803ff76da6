"""Nothing is published unverified: a written model is loaded again in a fresh process and must answer like the one in
memory.

A broken model often loads without an error and generates nonsense. So outputs are compared: the ids and
pixels that the saved processor makes, the logits, and a greedy answer. Where transformers can load the folder without
this package, the check is made without it.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file

from hf_llava_ft.checkpoints import reload
from hf_llava_ft.checkpoints.files import settings_folder
from hf_llava_ft.checkpoints.reload import Loader
from hf_llava_ft.checkpoints.remote_code import carries_our_code, runs_only_our_code
from hf_llava_ft.errors import UserError
from hf_llava_ft.processing.picture_opening_llava import rgb_picture

# Largest difference of two logits, relative to the largest logit: rounding of merged weights in that dtype.
LOGIT_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
# One level of 255, divided by the smallest standard deviation of CLIP and SigLIP: the torchvision backend rounds so.
PIXEL_TOLERANCE = 1 / 255 / 0.26 + 1e-6


def default_image() -> Image.Image:
    """A picture of colour ramps: the same on every machine, and different in every patch."""
    ramp = Image.linear_gradient("L").resize((320, 240))
    return Image.merge(
        "RGB", (ramp, ramp.transpose(Image.Transpose.ROTATE_180), Image.radial_gradient("L").resize((320, 240)))
    )


def default_messages() -> list[dict]:
    question = {"type": "text", "text": "What is in the picture?"}
    return [{"role": "user", "content": [{"type": "image"}, question]}]


@dataclass(frozen=True)
class Probe:
    """A question with its pictures, and how many tokens of the answer are compared."""

    messages: list[dict] = field(default_factory=default_messages)
    images: list[Image.Image] = field(default_factory=lambda: [default_image()])
    max_new_tokens: int = field(default_factory=lambda: reload.MAX_NEW_TOKENS)


@dataclass(frozen=True)
class AgainstAdapter:
    """
    How far a merged model is from the adapter that it was made of, unmerged and in float32.

    Args:
        logit_difference (`float`): largest difference of two logits, relative to the largest logit.
        lost_share (`float`): norm of what the weights differ by, over the norm of what the adapter changes.
    """

    logit_difference: float
    lost_share: float


@dataclass(frozen=True)
class Verification:
    """
    Args:
        differences (`list[str]`): what was not the same, in words; empty when all was.
        logit_difference (`float`): largest difference of two logits, relative to the largest logit.
        answer (`str`): what the reloaded model answered.
        loader (`Loader`): what loaded the folder: plain `"transformers"`; transformers and the folder's own code,
            `"trust_remote_code"`; or `"hf_llava_ft"`. But for the last, this package could not be imported.
        notes (`list[str]`): sentences on what is to be known though all else was the same.
        against_adapter (`AgainstAdapter`, *optional*): where an adapter was named to compare with.
    """

    differences: list[str]
    logit_difference: float
    answer: str
    loader: Loader
    notes: list[str] = field(default_factory=list)
    against_adapter: AgainstAdapter | None = None

    @property
    def ok(self) -> bool:
        return not self.differences


def reference_outputs(model, processor, probe: Probe) -> dict[str, torch.Tensor]:
    """What the model in memory makes of `probe`, and its processor of pictures that are hard to open; see
    `reload.probe_outputs` and `reload.opened_pixels`."""
    with tempfile.TemporaryDirectory() as folder:
        reload.write_hard_pictures(folder)
        opening: Any = getattr(processor, "picture_opening", "upright")  # of a processor of transformers' own
        opened = reload.opened_pixels(processor, folder, lambda path: rgb_picture(Image.open(path), opening))
    return reload.probe_outputs(model, processor, probe.messages, probe.images, probe.max_new_tokens) | opened


def loader_for(model_dir: str | Path, base: str | None = None) -> Loader:
    """What it takes to load `model_dir`, which may be an adapter of `base`."""
    whole, _ = _whole_model(model_dir, base)
    if reload.is_native(whole):
        return "transformers"
    # An adapter has a processor of its own.
    return "trust_remote_code" if carries_our_code(whole) and runs_only_our_code(model_dir) else "hf_llava_ft"


def _whole_model(model_dir: str | Path, base: str | None) -> tuple[Path, str]:
    """A folder with settings and code of the whole model, and the commit they are of if that is on the Hub."""
    whole = reload.whole_model(model_dir, base)
    if Path(whole).is_dir():
        return Path(whole), ""
    return settings_folder(whole, reload.base_revision(model_dir, whole))


def fresh_python(arguments: list[str], cwd: str | None, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,  # so that nobody can be asked to trust anything
        capture_output=True,
        text=True,
        check=False,
    )


def reloaded_outputs(
    model_dir: str | Path, probes: list[Probe], base: str | None = None, loader: Loader | None = None
) -> list[dict[str, torch.Tensor]]:
    """
    What the model in `model_dir`, loaded in a fresh process, makes of each probe; see `reload.probe_outputs`.

    Args:
        base (`str`, *optional*): of an adapter or projector.
        loader (`Loader`, *optional*): by default the one that asks least of whoever loads the folder.

    Raises:
        UserError: if the folder does not load.
    """
    loader = loader or loader_for(model_dir, base)
    with tempfile.TemporaryDirectory() as scratch:
        described = []
        for probe_index, probe in enumerate(probes):
            names = [f"{probe_index}-{index}.png" for index in range(len(probe.images))]
            for name, image in zip(names, probe.images, strict=True):
                image.save(Path(scratch, name))
            described.append({"messages": probe.messages, "images": names, "max_new_tokens": probe.max_new_tokens})
        Path(scratch, "probes.json").write_text(json.dumps(described), encoding="utf-8")
        output = Path(scratch, "outputs.safetensors")
        # The source as a string, in an empty folder where the package is not needed: nothing of it or of the current
        # folder is importable by accident of the path. Else base or tower may be named relative to this folder.
        program = Path(reload.__file__).read_text(encoding="utf-8")
        if base and Path(base).is_dir():
            base = os.fspath(Path(base).resolve())
        _, commit = _whole_model(model_dir, base)
        arguments = [os.fspath(Path(model_dir).resolve()), base or "", commit, loader, scratch, os.fspath(output)]
        done = fresh_python(
            ["-c", f"import gc; gc.disable()\n{program}", *arguments],
            cwd=None if loader == "hf_llava_ft" else scratch,
            # transformers copies a folder's code to where it imports it from.
            env={
                **os.environ,
                "HF_MODULES_CACHE": os.fspath(Path(scratch, "modules")),
                reload.PARENT_VARIABLE: str(os.getpid()),
            },
        )
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"{model_dir} does not load in a fresh process: {last}")
        tensors = load_file(output)
    results: list[dict[str, torch.Tensor]] = [{} for _ in probes]
    for name, tensor in tensors.items():
        index, _, field_name = name.partition(".")
        results[int(index)][field_name] = tensor
    return results


def verify(
    model_dir: str | Path,
    reference: dict[str, torch.Tensor],
    processor,
    probe: Probe,
    dtype: torch.dtype = torch.float32,
    base: str | None = None,
) -> Verification:
    """
    Loads `model_dir` in a fresh process and compares what it makes of `probe` with `reference`.

    Args:
        reference: of [`reference_outputs`].
        dtype (`torch.dtype`): what the weights are kept in; it decides how much of a difference is rounding.
        base (`str`, *optional*): of an adapter or projector.

    Raises:
        UserError: if the folder does not load.
    """
    loader = loader_for(model_dir, base)
    [reloaded] = reloaded_outputs(model_dir, [probe], base, loader)
    return compare_outputs(reference, reloaded, processor, LOGIT_TOLERANCE[dtype], loader)


def compare_outputs(
    reference: dict[str, torch.Tensor], reloaded: dict[str, torch.Tensor], processor, tolerance: float, loader: Loader
) -> Verification:
    """
    Args:
        reference, reloaded: of `reload.probe_outputs`.
        tolerance (`float`): largest difference of two logits that is rounding, relative to the largest logit.
        loader (`Loader`): what loaded the folder that `reloaded` is of.
    """
    answer = processor.tokenizer.decode(reloaded["answer_ids"][0], skip_special_tokens=True).strip()
    if not torch.equal(reference["input_ids"], reloaded["input_ids"]):
        differences = ["the saved processor turns the same question into other tokens"]
        return Verification(differences, float("inf"), answer, loader)
    differences = []
    if "pixel_values" in reference:
        off = (reference["pixel_values"] - reloaded["pixel_values"]).abs().max().item()
        if off > PIXEL_TOLERANCE:
            differences.append(f"the saved processor turns the same picture into other pixels (by up to {off:.3g})")
    unlike = opened_otherwise(reference, reloaded)
    notes = []
    if unlike and loader != "hf_llava_ft" and getattr(processor, "picture_opening", "upright") == "original":
        notes.append(
            f"Pictures were opened as the original LLaVA opens them (picture_opening original, which is written in "
            f"the folder): whoever asks through transformers sees {' and '.join(unlike)} otherwise."
        )
    elif unlike:
        differences.append(f"who loads the folder sees {' and '.join(unlike)} otherwise")
    scale = reference["logits"].abs().max()
    logit_difference = ((reference["logits"] - reloaded["logits"]).abs().max() / scale).item()
    if not logit_difference <= tolerance:  # also true for NaN
        differences.append(f"the logits differ by {logit_difference:.3g} of the largest (allowed {tolerance:g})")
    place = _first_difference(reference["answer_ids"][0], reloaded["answer_ids"][0])
    if place is not None:
        before = processor.tokenizer.decode(reference["answer_ids"][0], skip_special_tokens=True).strip()
        # Each of two candidates may be off by the tolerance. An answer that only ends earlier had other settings.
        ends_early = place == min(len(each["answer_ids"][0]) for each in (reference, reloaded))
        if not ends_early and reference["answer_margins"][0, place] <= 2 * tolerance * scale:
            notes.append(
                f"The answers were compared up to their token {place + 1}, where two candidates are so close that "
                f"rounding decides: {answer!r} and {before!r}."
            )
        else:
            differences.append(f"the answer is {answer!r} instead of {before!r}")
    return Verification(differences, logit_difference, answer, loader, notes)


def _first_difference(ids: torch.Tensor, others: torch.Tensor) -> int | None:
    """Where two greedy answers `int64[K]` part; `None` if they are the same."""
    if torch.equal(ids, others):
        return None
    length = min(len(ids), len(others))
    parted = (ids[:length] != others[:length]).nonzero()
    return int(parted[0]) if len(parted) else length


_HARD_PICTURES = dict(
    zip(
        reload.HARD_PICTURES,
        (
            "a picture that its EXIF data turn",
            "a picture with an alpha channel",
            "a palette with a transparent colour",
        ),
        strict=True,
    )
)


def opened_otherwise(reference: dict[str, torch.Tensor], reloaded: dict[str, torch.Tensor]) -> list[str]:
    """Which of the pictures that are hard to open became other pixels, in words."""
    unlike = []
    for name, described in _HARD_PICTURES.items():
        ours, theirs = reference.get(reload.OPENED + name), reloaded.get(reload.OPENED + name)
        if ours is None or theirs is None:
            continue
        if ours.shape != theirs.shape or (ours - theirs).abs().max().item() > PIXEL_TOLERANCE:
            unlike.append(described)
    return unlike
