"""`llava-ft shapes --learn`: a LLaVA of nothing but random weights learns the shapes in two stages, and is examined.

Tower, language model and projector are new and small, so that two CPU cores suffice. Both stages are runs of
`llava-ft train`: captions first, for everything together, since the tower has never seen a picture; then questions and
answers over the frozen tower, as in LLaVA's own second stage.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    set_seed,
)

from hf_llava_ft.answering.batches import Question, answer_all
from hf_llava_ft.answering.loading import load_for_answering
from hf_llava_ft.errors import UserError
from hf_llava_ft.quickstart.shapes import HELD_OUT, PRETRAIN, QUESTIONS, SIZE, TRAIN
from hf_llava_ft.train import parse_arguments, train

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Whose folder it is, and what is written there besides result.json.
MARK, WRITTEN = ".shapes", ("tower", "language_model", "stage1", "stage2")
PROMISED = {"heldout_pictures": 0.95, "heldout_combinations": 0.85}


@dataclass(frozen=True)
class Score:
    """
    Args:
        right (`float`): share of the questions answered word for word.
        of_blank (`float`): the same where every picture is blank.
        chance (`float`): the share that the most frequent answer to each question gets.
        by_question (`dict[str, float]`): as `right`, for each question.
    """

    right: float
    of_blank: float
    chance: float
    by_question: dict[str, float]


@dataclass(frozen=True)
class Learned:
    """The content of result.json."""

    scores: dict[str, Score]
    losses: dict[str, list[float]]
    cpu_seconds: float
    model_dir: str

    @property
    def passed(self) -> bool:
        return all(
            self.scores[name].right >= least and self.scores[name].of_blank <= self.scores[name].chance + 0.05
            for name, least in PROMISED.items()
        )


def write_parts(output_dir: Path, data_dir: Path, seed: int) -> tuple[Path, Path]:
    """Folders of a tower and a language model with random weights, and a tokenizer of the words of the set."""
    set_seed(seed)
    tower = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=SIZE,
            patch_size=24,  # one for each cell that may hold a shape
            projection_dim=128,
        )
    )
    # CLIP begins with positions of 0.02 beside patches of about 1.6: where a shape is would be learned very late.
    for name, parameter in tower.named_parameters():
        if "position_embedding" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    tokenizer = _tokenizer(data_dir)
    language_model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            initializer_range=0.06,  # 0.02 is for models thirty times as wide; these would look at nothing for long
            max_position_embeddings=512,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    tower_dir, language_dir = output_dir / "tower", output_dir / "language_model"
    tower.save_pretrained(tower_dir)
    language_model.save_pretrained(language_dir)
    tokenizer.save_pretrained(language_dir)
    return tower_dir, language_dir


def _tokenizer(data_dir: Path) -> PreTrainedTokenizerFast:
    """Any text can be written in it; the words of the set are one token each."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    rows = json.loads((data_dir / PRETRAIN).read_text(encoding="utf-8"))
    rows += json.loads((data_dir / TRAIN).read_text(encoding="utf-8"))
    texts = (turn["value"] for row in rows for turn in row["conversations"])
    markup = ["system", "user", "assistant", "\n"] * 4
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*markup, *texts], trainer)
    end, _, stop = SPECIAL
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=end, eos_token=stop)


def stages(
    output_dir: Path, data_dir: Path, seed: int, epochs: tuple[float, float] = (5, 2.5)
) -> list[dict[str, Any]]:
    """The flags of both runs of `llava-ft train`."""
    both = {
        "image_folder": data_dir / "images",
        "image_aspect_ratio": "square",
        "per_device_train_batch_size": 32,
        "gradient_accumulation_steps": 1,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "save_strategy": "no",
        "logging_steps": 10,
        "seed": seed,
        "num_eval_answers": 0,
    }
    first = {
        "model_name_or_path": output_dir / "language_model",
        "vision_tower": output_dir / "tower",
        "mm_vision_select_layer": -1,
        "version": "plain",
        "train_type": "full",
        "learning_rate": 1e-3,
        "mm_vision_tower_lr": 1e-3,
        "data_path": data_dir / PRETRAIN,
        "num_train_epochs": epochs[0],
        "output_dir": output_dir / "stage1",
    }
    second = {
        "model_name_or_path": output_dir / "stage1",
        "version": "chatml",
        "train_type": "freeze_vision",
        "learning_rate": 1e-3,
        "data_path": data_dir / TRAIN,
        "num_train_epochs": epochs[1],
        "output_dir": output_dir / "stage2",
    }
    return [both | first, both | second]


def learn_shapes(
    output_dir: Path,
    data_dir: Path,
    seed: int = 42,
    epochs: tuple[float, float] = (5, 2.5),
    console: Console | None = None,
) -> Learned:
    """Trains both stages on the set at `data_dir` and examines the result; `result.json` holds what comes out."""
    console = console or Console(stderr=True)
    started = _cpu_seconds()
    _make_room(output_dir)
    write_parts(output_dir, data_dir, seed)
    losses = {}
    for name, flags in zip(("captions", "questions"), stages(output_dir, data_dir, seed, epochs), strict=True):
        console.rule(f"Stage: {name}")
        words = [text for flag, value in flags.items() for text in (f"--{flag}", str(value))]
        losses[name] = train(*parse_arguments(words), console=console).losses
    console.rule("Questions about pictures that it has not seen")
    model, processor = load_for_answering(str(output_dir / "stage2"))
    scores = {name: examined(model, processor, data_dir, name) for name in HELD_OUT}
    learned = Learned(scores, losses, round(_cpu_seconds() - started, 1), str(output_dir / "stage2"))
    (output_dir / "result.json").write_text(json.dumps(asdict(learned), indent=2) + "\n", encoding="utf-8")
    _show(learned, console)
    return learned


def _make_room(output_dir: Path) -> None:
    """An empty folder; what an earlier run left in it is removed, and anything else is not touched."""
    if output_dir.is_dir() and any(output_dir.iterdir()):
        if not (output_dir / MARK).is_file():
            raise UserError(f"{output_dir} holds what no run of this command wrote: move it away.")
        for name in WRITTEN:
            shutil.rmtree(output_dir / name, ignore_errors=True)
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / MARK).touch()


def examined(model: Any, processor: Any, data_dir: Path, name: str) -> Score:
    """The answers to all questions of a held-out file, and to the same questions about blank pictures."""
    rows = json.loads((data_dir / HELD_OUT[name]).read_text(encoding="utf-8"))
    about = [row["id"].rpartition("/")[2] for row in rows]
    expected = [row["conversations"][1]["value"] for row in rows]
    pictures = [{"path": str(data_dir / "images" / row["image"])} for row in rows]
    right = [
        said == wanted for said, wanted in zip(_answers(model, processor, about, pictures), expected, strict=True)
    ]
    blank = Image.new("RGB", (SIZE, SIZE), (235, 235, 235))
    blind = dict(zip(QUESTIONS, _answers(model, processor, list(QUESTIONS), [blank] * len(QUESTIONS)), strict=True))
    frequent = {
        question: max(set(answers), key=answers.count)
        for question in QUESTIONS
        for answers in [[text for text, name in zip(expected, about, strict=True) if name == question]]
    }
    return Score(
        right=_share(right),
        of_blank=_share(blind[question] == wanted for question, wanted in zip(about, expected, strict=True)),
        chance=_share(frequent[question] == wanted for question, wanted in zip(about, expected, strict=True)),
        by_question={
            question: _share(each for each, name in zip(right, about, strict=True) if name == question)
            for question in QUESTIONS
        },
    )


def _answers(model: Any, processor: Any, about: list[str], pictures: list[Any]) -> list[str]:
    questions = [
        Question(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTIONS[name]}]}], [picture]
        )
        for name, picture in zip(about, pictures, strict=True)
    ]
    with torch.inference_mode():
        said = dict(answer_all(model, processor, questions, batch_size=64, max_new_tokens=8))
    return [said[place].text for place in range(len(questions))]


def _share(right: Any) -> float:
    right = list(right)
    return round(sum(right) / len(right), 4)


def _cpu_seconds() -> float:
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def _show(learned: Learned, console: Console) -> None:
    table = Table(title="Answers that are right word for word")
    for heading in ("", "all", *QUESTIONS, "blank pictures", "chance"):
        table.add_column(heading)
    for name, score in learned.scores.items():
        shares = (score.right, *score.by_question.values(), score.of_blank, score.chance)
        table.add_row(name.replace("_", " "), *(f"{share:.1%}" for share in shares))
    console.print(table)
    console.print(f"{learned.cpu_seconds:.0f} CPU seconds. Talk with it: llava-ft chat --model {learned.model_dir}")
