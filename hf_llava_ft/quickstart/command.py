"""The whole job once, on real photographs: compose, ask, fine-tune, merge, verify, ask again, show.

It shows the machinery, not a good model: 137 million parameters, and a vision tower with random weights that is
frozen. But it can learn five photographs by heart and answer from the pixels, so one sees that everything works before
bringing a real model.
"""

import json
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from hf_llava_ft.answering.batches import Question, answer_all
from hf_llava_ft.answering.loading import load_for_answering
from hf_llava_ft.answering.pictures import open_image
from hf_llava_ft.checkpoints.artifact import check_writable
from hf_llava_ft.checkpoints.compose import save_composed
from hf_llava_ft.checkpoints.folder_lock import locked_folder
from hf_llava_ft.checkpoints.merge import merge_adapter
from hf_llava_ft.checkpoints.verify import Probe, reloaded_outputs
from hf_llava_ft.errors import UserError
from hf_llava_ft.quickstart import photographs as quickstart_data
from hf_llava_ft.quickstart.report import AnsweredPhoto, answers_picture, write_report
from hf_llava_ft.quickstart.small_llava import compose_small_llava
from hf_llava_ft.reports.plots import save_loss_plot
from hf_llava_ft.train import TrainingResult, parse_arguments, train
from hf_llava_ft.training.tuning import learning_rate_of

DATA = Path(quickstart_data.__file__).parent
QUESTION = "What is in the picture?"
NOTE = (
    "This shows that the machinery works, not a good model: a language model of 135 million parameters, a small "
    "vision tower with random, untrained weights, and five photographs learned by heart."
)
# Everything a run writes; what an earlier run left under these names is replaced, other files are not touched.
WRITTEN = ("photos", "base", "adapter", "merged", "result.json", "report.html", "loss.png", "answers.png")
# Whose a folder is: others have folders called photos too. Those of hf_llava_ft 0.1 are known by their result alone.
MARK, RESULT = ".quickstart", "result.json"
MAX_NEW_TOKENS = 48
VERIFIED_TOKENS = 48  # all of an answer, since the report shows it


@dataclass(frozen=True)
class QuickstartResult:
    """The content of result.json; lists are in the order of conversations.json."""

    before: list[str]
    after: list[str]
    expected: list[str]
    swapped: list[str]
    swapped_ok: bool
    verified: bool
    losses: list[float]
    adapter_dir: str
    merged_dir: str
    seconds: float

    @property
    def passed(self) -> bool:
        return self.verified and self.swapped_ok and self.after == self.expected


def run_quickstart(output_dir: Path, seed: int = 42, console: Console | None = None) -> QuickstartResult:
    """
    Runs all steps and writes `result.json`, `report.html`, `loss.png`, `answers.png` and the models under
    `output_dir`.

    Raises:
        UserError: if `output_dir` cannot be written, or a step fails.
    """
    check_writable(output_dir)
    with locked_folder(output_dir):
        return _run(output_dir, seed, console or Console(stderr=True))


def _run(output_dir: Path, seed: int, console: Console) -> QuickstartResult:
    output_dir = _fresh(output_dir)
    rows = json.loads((DATA / "conversations.json").read_text(encoding="utf-8"))
    photos = [output_dir / "photos" / row["image"] for row in rows]
    (output_dir / "photos").mkdir()
    for photo in photos:
        shutil.copyfile(DATA / photo.name, photo)
    pictures = [open_image(photo) for photo in photos]
    expected = [row["conversations"][1]["value"] for row in rows]

    console.rule("1. Compose: SmolLM2-135M-Instruct + a small CLIP-type tower + a new projector")
    console.print(NOTE, highlight=False)
    base, base_processor = compose_small_llava(seed)
    save_composed(base, base_processor, output_dir / "base")
    del base

    console.rule(f"2. Ask the new model: {QUESTION}")
    model, processor = load_for_answering(str(output_dir / "base"))
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    questions = [Question([{"role": "user", "content": content}], [picture]) for picture in pictures]
    with torch.inference_mode():
        said = dict(answer_all(model, processor, questions, max_new_tokens=MAX_NEW_TOKENS))
    before = [said[place].text for place in range(len(pictures))]
    del model

    console.rule("3. Fine-tune: LoRA on the language model, and the projector")
    model_args, data_args, tuning_args, training_args = parse_arguments(_training_flags(output_dir, seed))
    trained = train(model_args, data_args, tuning_args, training_args, console=console)

    console.rule("4. Merge, and verify in a fresh process")
    merged = merge_adapter(output_dir / "adapter", output_dir / "merged", probe=_probe(pictures[0]))
    console.print(
        f"largest logit difference: {merged.verification.logit_difference:.1e} of the largest", highlight=False
    )

    console.rule("5. Ask the merged model in a fresh process, with plain transformers")
    # A second time with the pictures passed on by one: the answers have to move along.
    shifted = [*pictures[1:], pictures[0]]
    outputs = reloaded_outputs(output_dir / "merged", [_probe(picture) for picture in (*pictures, *shifted)])
    answers = [processor.tokenizer.decode(out["answer_ids"][0], skip_special_tokens=True).strip() for out in outputs]
    after, swapped = answers[: len(rows)], answers[len(rows) :]

    result = QuickstartResult(
        before=before,
        after=after,
        expected=expected,
        swapped=swapped,
        swapped_ok=swapped == [*expected[1:], expected[0]],
        verified=merged.verification.ok,
        losses=trained.losses,
        adapter_dir=str(output_dir / "adapter"),
        merged_dir=str(merged.output_dir),
        seconds=round(trained.seconds, 1),
    )
    _write(output_dir, result, photos, trained, training_args, console)
    return result


def _fresh(output_dir: Path) -> Path:
    output_dir = Path(output_dir)
    output_dir.mkdir(exist_ok=True)
    names = sorted(path.name for path in output_dir.iterdir())
    is_ours = MARK in names or _is_result(output_dir / RESULT)
    # What a killed process left: its lock, and what was being written.
    left = [name for name in names if name.startswith(".") and (".lock" in name or ".partial-" in name)]
    foreign = [name for name in names if name not in left and not (is_ours and name in (*WRITTEN, MARK))]
    if foreign:
        raise UserError(f"{output_dir} holds {foreign[0]}, which no quickstart wrote: choose another --output_dir.")
    for name in WRITTEN:
        path = output_dir / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    (output_dir / MARK).touch()
    return output_dir


def _is_result(file: Path) -> bool:
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(told, dict) and {field.name for field in fields(QuickstartResult)} <= set(told)


def _training_flags(output_dir: Path, seed: int) -> list[str]:
    """The command line that `llava-ft train` would be called with."""
    flags = {
        "model_name_or_path": output_dir / "base",
        "data_path": DATA / "conversations.json",
        "image_folder": DATA,
        "output_dir": output_dir / "adapter",
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0,
        "learning_rate": 2e-3,
        "mm_projector_lr": 2e-3,
        "max_steps": 14,
        "warmup_steps": 0,
        "per_device_train_batch_size": 5,
        "save_strategy": "no",
        "seed": seed,
    }
    return [text for name, value in flags.items() for text in (f"--{name}", str(value))]


def _probe(picture: Image.Image) -> Probe:
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    return Probe(messages=[{"role": "user", "content": content}], images=[picture], max_new_tokens=VERIFIED_TOKENS)


def _write(
    output_dir: Path, result: QuickstartResult, photos, trained: TrainingResult, training_args, console: Console
) -> None:
    answers = [
        AnsweredPhoto(photo, QUESTION, before, after, expected)
        for photo, before, after, expected in zip(photos, result.before, result.after, result.expected, strict=True)
    ]
    command = f"llava-ft chat --model {result.merged_dir} --image {photos[0]}"
    (output_dir / "result.json").write_text(json.dumps(asdict(result), indent=2) + "\n", encoding="utf-8")
    save_loss_plot(result.losses, output_dir / "loss.png")
    answers_picture(answers, result.losses, output_dir / "answers.png")
    write_report(
        output_dir / "report.html",
        title="LLaVA quickstart",
        note=NOTE,
        answers=answers,
        losses=result.losses,
        facts=[
            ("merged model verified in a fresh process", "yes" if result.verified else "no"),
            ("answers follow swapped pictures", "yes" if result.swapped_ok else "no"),
            ("seconds of training", f"{result.seconds:g}"),
            ("steps", str(len(result.losses))),
            ("device", "GPU" if torch.cuda.is_available() else "CPU"),
            ("adapter", result.adapter_dir),
            ("merged model", result.merged_dir),
        ],
        trained=[
            (part.part, part.num_trainable, part.num_total, learning_rate_of(part, training_args))
            for part in trained.trained
        ],
        command=command,
    )
    table = Table(title=QUESTION, show_lines=True)
    for heading in ("photo", "before", "after", "expected"):
        table.add_column(heading, overflow="fold")
    for answer in answers:
        table.add_row(answer.photo.name, answer.before, answer.after, answer.expected)
    console.print(table, markup=False)
    num_right = sum(answer.is_expected(answer.after) for answer in answers)
    console.print(
        f"{num_right} of {len(answers)} answers as expected; the answers follow swapped pictures: "
        f"{'yes' if result.swapped_ok else 'no'}; merged model verified: {'yes' if result.verified else 'no'}; "
        f"{result.seconds:g} s of training.\nSee {output_dir / 'report.html'}. Talk with it: {command}",
        highlight=False,
        soft_wrap=True,
    )
