"""One side of the learning curve, in a process of its own: both stages, stopping every so many steps to be examined.

It reads words from its standard input and answers each with a line of JSON: `digest` with what it trains on, `go`
with the CPU seconds of training until its next stop and where its model lies. It imports nothing of the benchmark.
"""

import argparse
import contextlib
import hashlib
import importlib.metadata
import json
import logging
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

EPOCHS = {"captions": 5.0, "questions": 2.5}  # as `llava-ft shapes --learn` has it
FILES = {"captions": "pretrain.json", "questions": "train.json"}
ROWS_COMPARED = 20


class Stops(TrainerCallback):
    """Counts process CPU seconds of the steps, rows read and all; at each stop the model is written and looked at."""

    def __init__(self, every: int, stop: Any):
        self.every, self.stop, self.seconds = every, stop, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self.every and state.global_step != state.max_steps:
            return
        self.seconds += time.process_time() - self.begun
        self.stop(model, self.seconds)
        self.begun = time.process_time()


class Side:
    """What its kinds share; a kind gives `trainer()` for a stage, with the model of the stage before."""

    def __init__(self, args: argparse.Namespace, answers: Any):
        self.args, self.answers, self.folder = args, answers, args.folder
        self.stage = "captions"
        torch.set_num_threads(1)

    def common(self) -> dict[str, Any]:
        return {
            "output_dir": str(self.folder / "runs" / self.args.side),
            "num_train_epochs": EPOCHS[self.stage],
            "per_device_train_batch_size": 32,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.05,
            "optim": "adamw_torch_fused",
            "logging_steps": 1000,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "bf16": False,
            "disable_tqdm": True,
            "seed": 42,
        }

    def run(self) -> None:
        seconds = 0.0
        model = self.first_model()
        for self.stage in EPOCHS:
            trainer = self.trainer(model)
            stops = Stops(self.args.every, lambda at, spent, before=seconds: self.stop(at, before + spent))
            trainer.add_callback(stops)
            trainer.train()
            seconds += stops.seconds
            model = trainer.model
        self.say({"done": True})

    def stop(self, model: Any, seconds: float) -> None:
        folder = self.folder / "models" / self.args.side.replace(" ", "_")
        if self.stage == "questions":
            model.save_pretrained(folder)
        self.say({"seconds": seconds, "stage": self.stage, "model": str(folder)})
        if sys.stdin.readline().strip() != "go":
            sys.exit()

    def say(self, what: dict[str, Any]) -> None:
        print(json.dumps(what), file=self.answers, flush=True)

    def digest(self) -> dict[str, Any]:
        """Of the first rows of both stages, a hash of ids and labels, and the mean of the pixels."""
        found, model = {}, self.first_model()
        for self.stage in EPOCHS:
            trainer = self.trainer(model)
            for number in range(ROWS_COMPARED):
                batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[number]]))
                real = batch["attention_mask"][0].bool()
                text = hashlib.sha256()
                for name in ("input_ids", "labels"):
                    text.update(batch[name][0][real].to(torch.int64).numpy().tobytes())
                found[f"{self.stage} {number}"] = [text.hexdigest(), batch["pixel_values"].double().mean().item()]
        return found


class Ours(Side):
    def __init__(self, args: argparse.Namespace, answers: Any):
        super().__init__(args, answers)
        import hf_llava_ft

        self.library = hf_llava_ft

    def first_model(self) -> Any:
        return self.library.load_model(str(self.folder / "captions"), self.processor())

    def processor(self) -> Any:
        return self.library.load_processor(str(self.folder / self.stage))

    def trainer(self, model: Any) -> Any:
        from hf_llava_ft import TuningArguments, with_tuning

        rows = self.library.load_data(
            str(self.folder / "shapes" / FILES[self.stage]), str(self.folder / "shapes" / "images")
        )
        train_type = "full" if self.stage == "captions" else "freeze_vision"
        model = with_tuning(model, TuningArguments(train_type=train_type), str(self.folder / "captions"))
        rates = {"mm_vision_tower_lr": 1e-3} if self.stage == "captions" else {}
        return self.library.LlavaTrainer(
            model,
            self.library.LlavaTrainingArguments(**self.common(), **rates),
            train_dataset=rows,
            processing_class=self.processor(),
        )


class Native(Side):
    """transformers' own LLaVA: what the plain Trainer and TRL share."""

    def first_model(self) -> Any:
        from transformers import LlavaForConditionalGeneration

        model = LlavaForConditionalGeneration.from_pretrained(str(self.folder / "captions"), dtype=torch.float32)
        model.config.use_cache = model.config.text_config.use_cache = False
        return model

    def processor(self) -> Any:
        from transformers import AutoTokenizer, LlavaProcessor
        from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

        folder = self.folder / self.stage
        settings = json.loads((folder / "processor_config.json").read_text())
        return LlavaProcessor(
            LlavaImageProcessorPil.from_pretrained(folder),
            AutoTokenizer.from_pretrained(folder),
            patch_size=settings["patch_size"],
            vision_feature_select_strategy=settings["vision_feature_select_strategy"],
            num_additional_image_tokens=settings["num_additional_image_tokens"],
            chat_template=(folder / "chat_template.jinja").read_text(),
        )

    def rows(self) -> Any:
        from datasets import Dataset, Image, List

        rows = json.loads((self.folder / "shapes" / FILES[self.stage]).read_text())
        images = [[str(self.folder / "shapes" / "images" / row["image"])] for row in rows]
        made = Dataset.from_dict({"messages": [messages_of(row) for row in rows], "images": images})
        return made.cast_column("images", List(Image()))

    def common(self) -> dict[str, Any]:
        # Its best form: batches of like length.
        return super().common() | {"remove_unused_columns": False}

    def prepared(self, model: Any) -> Any:
        model.model.vision_tower.requires_grad_(self.stage == "captions")
        return model


class PlainCollator:
    """As transformers' documentation has it: the processor renders the conversation and says which tokens are
    answers."""

    def __init__(self, processor: Any):
        self.processor = processor

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        conversations = []
        for row in rows:
            pictures = iter(row["images"])
            said = [
                {
                    "role": turn["role"],
                    "content": [
                        {"type": "image", "image": next(pictures)} if part["type"] == "image" else part
                        for part in turn["content"]
                    ],
                }
                for turn in row["messages"]
            ]
            conversations.append(said)
        batch = self.processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )
        answers = torch.as_tensor(batch.pop("assistant_masks")).bool()
        return dict(batch) | {"labels": batch["input_ids"].masked_fill(~answers, -100)}


class Plain(Native):
    def trainer(self, model: Any) -> Any:
        from transformers import Trainer, TrainingArguments

        return Trainer(
            self.prepared(model),
            TrainingArguments(**self.common()),
            train_dataset=self.rows(),
            data_collator=PlainCollator(self.processor()),
        )


class Trl(Native):
    def trainer(self, model: Any) -> Any:
        from trl import SFTConfig, SFTTrainer

        return SFTTrainer(
            self.prepared(model),
            SFTConfig(**self.common(), gradient_checkpointing=False, max_length=None, assistant_only_loss=True),
            train_dataset=self.rows(),
            processing_class=self.processor(),
        )


def messages_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    messages = []
    for turn in row["conversations"]:
        said = turn["value"]
        picture = [{"type": "image", "text": None}] if "<image>" in said else []
        text = {"type": "text", "text": said.replace("<image>\n", "").replace("\n<image>", "")}
        role = "user" if turn["from"] == "human" else "assistant"
        messages.append({"role": role, "content": [*picture, text]})
    return messages


KINDS = {"ours": Ours, "plain": Plain, "trl": Trl}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--side", required=True, choices=KINDS)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--every", type=int, default=100, help="steps between two stops")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    side = KINDS[args.side](args, answers)
    versions = {}
    for name in ("torch", "transformers", "accelerate", "datasets", "trl"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    side.say({"versions": versions})
    for word in sys.stdin:
        if word.strip() == "digest":
            side.say(side.digest())
            side.stage = "captions"
        else:
            side.run()
            break


if __name__ == "__main__":
    main()
