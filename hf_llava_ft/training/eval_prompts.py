"""Questions that the model answers before training and at each evaluation: those of `--eval_prompts`, else the first
ones of some rows that are evaluated, and so not trained on."""

import json
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from rich.console import Console
from transformers import TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled

from hf_llava_ft.answering.batches import Question, answer_all
from hf_llava_ft.checkpoints.run_files import ANSWERS_FILE, PICTURES_FOLDER
from hf_llava_ft.data.formats.images import ImageStore, StoredImage
from hf_llava_ft.data.pictures import open_picture
from hf_llava_ft.data.schema import row_place
from hf_llava_ft.data.values import row_images
from hf_llava_ft.errors import UserError
from hf_llava_ft.processing.picture_opening_llava import PictureOpening
from hf_llava_ft.reports.page import THUMBNAIL_PIXELS
from hf_llava_ft.settings.arguments import DataArguments
from hf_llava_ft.training.answer_logs import AnswerLogs
from hf_llava_ft.training.evaluation import untouched_rng
from hf_llava_ft.training.fsdp import uses_fsdp
from hf_llava_ft.training.throughput import Throughput
from hf_llava_ft.whole_files import write_atomically


@dataclass(frozen=True)
class EvalPrompt:
    """
    Args:
        question (`str`): without image placeholders; the images go in front of it.
        images (`list[str]`): as the file names them.
        stored (`list[StoredImage]`): where they are.
        expected (`str`, *optional*): the answer of the data.
        messages (`list[dict]`, *optional*): what is asked, where it is more than the images and the question.
    """

    question: str
    images: list[str]
    stored: list[StoredImage]
    expected: str | None = None
    messages: list[dict[str, Any]] | None = None

    def conversation(self) -> list[dict[str, Any]]:
        """What is asked, as a chat template takes it."""
        if self.messages is not None:
            return self.messages
        content = [{"type": "image"} for _ in self.stored] + [{"type": "text", "text": self.question}]
        return [{"role": "user", "content": content}]

    def pictures(self, opening: PictureOpening) -> list[Image.Image]:
        """Decoded, in RGB."""
        return [open_picture(dict(image), opening) for image in self.stored]


def read_eval_prompts(path: str | Path, images: ImageStore) -> list[EvalPrompt]:
    """
    The prompts of a JSON or JSONL file.

    A row has `prompt`, and `image` or `images` if it is about pictures; or it is a row of LLaVA JSON, whose first
    question is asked.

    Raises:
        UserError: if the file can't be read, a row is neither, or an image is missing or no picture.
    """
    prompts = []
    for number, row in enumerate(_rows(Path(path)), 1):
        if not isinstance(row, dict):
            raise UserError(f"{path}: row {number} is no JSON object: give it a prompt and an image.")
        place = row_place(str(path), number, row.get("id"))
        question = _question(row, place).replace("<image>", "").strip()
        if not question:
            raise UserError(f"{place} asks nothing: give it a prompt.")
        refs = row_images(row, place)
        prompt = EvalPrompt(
            question,
            [ref if isinstance(ref, str) else "(embedded)" for ref in refs],
            [images.locate(ref, place) for ref in refs],
            _expected(row),
        )
        try:
            prompt.pictures("upright")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(f"{place}: its image cannot be read: {error}.") from error
        prompts.append(prompt)
    if not prompts:
        raise UserError(f"{path} holds no prompt.")
    return prompts


def open_eval_prompts(data_args: DataArguments) -> list[EvalPrompt]:
    """The prompts that the settings name; images are found as those of the rows to evaluate are."""
    if data_args.eval_prompts is None:
        return []
    folder = data_args.eval_image_folder or data_args.image_folder
    images = ImageStore(folder, data_args.allow_images_outside, data_args.allow_image_urls)
    return read_eval_prompts(data_args.eval_prompts, images)


def held_out_prompts(dataset: Dataset | None, number: int) -> list[EvalPrompt]:
    """The first questions of so many of the rows, evenly spaced, with the answers that the data has."""
    if dataset is None or not number:
        return []
    number = min(number, len(dataset))
    return [_prompt_of_row(dataset[index * len(dataset) // number]) for index in range(number)]


def _prompt_of_row(row: dict[str, Any]) -> EvalPrompt:
    turns = [message["role"] for message in row["messages"]].index("assistant")
    messages = [
        {
            "role": message["role"],
            "content": [
                {"type": "image"} if part["type"] == "image" else {"type": "text", "text": part["text"]}
                for part in message["content"]
            ],
        }
        for message in row["messages"][:turns]
    ]
    parts = [part for message in messages for part in message["content"]]
    stored = row["images"][: sum(part["type"] == "image" for part in parts)]
    return EvalPrompt(
        _text_of(messages[-1]["content"]) if messages else "",
        [Path(image["path"]).name if image["path"] else "(embedded)" for image in stored],
        stored,
        _text_of(row["messages"][turns]["content"]),
        messages,
    )


def _text_of(content: list[dict[str, Any]]) -> str:
    return "".join(part.get("text") or "" for part in content).strip()


def _rows(path: Path) -> list[Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"--eval_prompts {path} is not UTF-8 text; save it as UTF-8.") from error
    except OSError as error:
        raise UserError(f"--eval_prompts {path} cannot be read: {error.strerror or error}.") from error
    try:
        if text.lstrip().startswith("["):
            return json.loads(text)
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except (ValueError, RecursionError) as error:
        raise UserError(f"--eval_prompts {path} is neither a JSON list nor JSON lines: {error}.") from error


def _question(row: dict[str, Any], place: str) -> str:
    if isinstance(row.get("prompt"), str):
        return row["prompt"]
    turns = row.get("conversations")
    for turn in turns if isinstance(turns, list) else []:
        if isinstance(turn, dict) and turn.get("from") == "human" and isinstance(turn.get("value"), str):
            return turn["value"]
    raise UserError(f"{place} has no prompt: give it one, or the conversations of LLaVA JSON.")


def _expected(row: dict[str, Any]) -> str | None:
    if isinstance(row.get("expected"), str):
        return row["expected"]
    turns = row.get("conversations")
    for turn in turns if isinstance(turns, list) else []:
        if isinstance(turn, dict) and turn.get("from") == "gpt" and isinstance(turn.get("value"), str):
            return turn["value"]
    return None


class EvalAnswers(TrainerCallback):
    """
    Answers the prompts greedily before the first step, which is step 0, and at each evaluation: printed, kept in
    `eval_answers.jsonl` of the output folder, with small pictures beside it, and shown where the Trainer reports to.

    Training goes on as if it had not been. Under ZeRO-3 and FSDP, where no process has all the weights, all of them
    answer together; else the first one does, and the others wait.

    Args:
        prompts (`list[EvalPrompt]`): asked in batches of `per_device_eval_batch_size`.
        processor (`LlavaProcessor`): of the model.
        max_new_tokens (`int`): longest answer.
        console (`rich.console.Console`): where to print.

    Attributes:
        answers (`list[dict]`): the lines of the file: `step`, `index`, `prompt`, `images`, `answer`, and `expected`
            where that is known.
        logs (`AnswerLogs`): where they are shown besides.
        throughput (`Throughput`, *optional*): the Trainer's, which the answers before the first step pause.
    """

    def __init__(self, prompts: list[EvalPrompt], processor: Any, max_new_tokens: int, console: Console):
        self.prompts, self.processor, self.max_new_tokens, self.console = prompts, processor, max_new_tokens, console
        self.answers: list[dict[str, Any]] = []
        self.logs = AnswerLogs()
        self.throughput: Throughput | None = None
        self._asked_at: int | None = None  # the last step, in every process
        self._kept_pictures = False

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        path = Path(str(args.output_dir), ANSWERS_FILE)
        if state.is_world_process_zero and path.exists():
            # Of the steps that a resumed run goes on from; those behind them are asked again, and other runs are over.
            try:
                answers = list(map(json.loads, path.read_text(encoding="utf-8").splitlines()))
                self.answers = [answer for answer in answers if answer["step"] <= state.global_step > 0]
            except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
                raise UserError(f"{path} holds no answers of a run: move it elsewhere, or repair it.") from error
            self._write(path)
        if state.global_step == 0:
            with nullcontext() if self.throughput is None else self.throughput.paused():
                self.on_evaluate(args, state, control, model=model)

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        if self._asked_at == state.global_step:
            return
        self._asked_at = state.global_step
        is_first = state.is_world_process_zero
        if not is_first and not is_deepspeed_zero3_enabled() and not uses_fsdp(args):
            return
        was_training = model.training
        model.eval()
        try:
            with untouched_rng():
                said = self._answers(model, args)
        finally:
            model.train(was_training)
        if not is_first:
            return
        # A run that is resumed behind its last step is asked there again.
        self.answers = [answer for answer in self.answers if answer["step"] != state.global_step]
        for index, (prompt, answer) in enumerate(zip(self.prompts, said, strict=True)):
            line = {"step": state.global_step, "index": index, "prompt": prompt.question, "images": prompt.images}
            known = {} if prompt.expected is None else {"expected": prompt.expected}
            self.answers.append({**line, "answer": answer, **known})
            named = f" ({', '.join(prompt.images)})" if prompt.images else ""
            expected = "" if prompt.expected is None else f"\n  (expected: {prompt.expected})"
            self.console.print(
                f"step {state.global_step}  {prompt.question}{named}\n  {answer}{expected}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
        self._write(Path(str(args.output_dir), ANSWERS_FILE))
        self._keep_pictures(Path(str(args.output_dir), PICTURES_FOLDER))
        self.logs.show(self.answers, state.global_step, self.thumbnails)

    @property
    def a_picture(self) -> str | None:
        """Path of the first picture that is a file."""
        paths = (image["path"] for prompt in self.prompts for image in prompt.stored)
        return next((path for path in paths if path and Path(path).is_file()), None)

    def thumbnails(self) -> list[list[Image.Image]]:
        """The pictures of each prompt, small."""
        small = [prompt.pictures(self.processor.picture_opening) for prompt in self.prompts]
        for picture in (picture for pictures in small for picture in pictures):
            picture.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
        return small

    def _keep_pictures(self, folder: Path) -> None:
        """Small ones, as a model card shows them: `0-0.jpg` is the first of the first prompt."""
        if self._kept_pictures or not any(prompt.images for prompt in self.prompts):
            return
        self._kept_pictures = True
        folder.mkdir(exist_ok=True)
        for index, pictures in enumerate(self.thumbnails()):
            for number, picture in enumerate(pictures):
                picture.save(folder / f"{index}-{number}.jpg", quality=90)

    def _answers(self, model: Any, args: Any) -> list[str]:
        questions = [
            Question(prompt.conversation(), [dict(image) for image in prompt.stored], self._longest_answer(prompt))
            for prompt in self.prompts
        ]
        dtype = torch.float16 if args.fp16 else torch.bfloat16
        # Neither inference mode, whose tensors a backward pass refuses, nor the cache that checkpointing has off.
        with torch.no_grad(), torch.autocast(args.device.type, dtype, enabled=bool(args.fp16 or args.bf16)):
            said = answer_all(model, self.processor, questions, batch_size=args.per_device_eval_batch_size)
            found = dict(said)
        return [found[place].text or found[place].error for place in range(len(questions))]

    def _longest_answer(self, prompt: EvalPrompt) -> int:
        """Of a row of the data, twice its answer and a little: who asked for nothing shall not wait for rambling."""
        if prompt.messages is None or prompt.expected is None:
            return self.max_new_tokens
        return min(self.max_new_tokens, 2 * len(self.processor.tokenizer.tokenize(prompt.expected)) + 16)

    def _write(self, path: Path) -> None:
        lines = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in self.answers)
        write_atomically(path, lambda temporary: temporary.write_text(lines, encoding="utf-8", errors="replace"))
