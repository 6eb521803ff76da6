"""One side of the comparison, in a process of its own, which trains the workload as often as it is told to.

It reads words from its standard input and answers each with a line of JSON: `digest` with what it trains on, `train`
with one epoch's process CPU seconds, peak of memory and loss. Run by the environment and the code that it measures:
it imports nothing of the benchmark but the file beside it.
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
from train_llava_collator import TrainLlavaCollator
from transformers import TrainerCallback

LORA = {"r": 64, "lora_alpha": 128, "lora_dropout": 0.05}


class Clock(TrainerCallback):
    """Process CPU seconds of an epoch: rows read, steps taken, nothing before and behind."""

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        self.begin = time.process_time()

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds = time.process_time() - self.begin


def memory_of(field: str) -> int | None:
    """Bytes of this process by Linux's own name, `VmRSS` or `VmHWM`."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


class Side:
    """What its kinds share; a kind gives `trainer()`, with a new model each time."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.folder = args, args.folder
        torch.set_num_threads(1)

    def common(self) -> dict[str, Any]:
        return {
            "output_dir": str(self.folder / "runs" / self.args.side),
            "num_train_epochs": 1,
            "per_device_train_batch_size": self.args.batch_size,
            "learning_rate": 1e-4,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "optim": "adamw_torch_fused",
            "logging_steps": 1000,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "bf16": False,
            "disable_tqdm": True,
            "seed": self.args.seed,
        }

    def trainer(self) -> Any:
        raise NotImplementedError

    def train(self, epoch: int) -> dict[str, Any]:
        self.args.seed = epoch
        torch.manual_seed(epoch)
        trainer, clock = self.trainer(), Clock()
        trainer.add_callback(clock)
        positions, real, inner = 0, 0, trainer.training_step

        def counted(model: Any, inputs: dict[str, Any], *rest: Any) -> Any:
            nonlocal positions, real
            positions, real = positions + inputs["input_ids"].numel(), real + int(inputs["attention_mask"].sum())
            return inner(model, inputs, *rest)

        trainer.training_step = counted
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        loaded = memory_of("VmRSS")
        loss = trainer.train().training_loss
        peak = memory_of("VmHWM")
        return {
            "seconds": clock.seconds,
            "above_model": None if peak is None or loaded is None else peak - loaded,
            "peak": peak,
            "padding": 1 - real / positions,
            "tokens": real,
            "loss": loss,
        }

    def digest(self) -> dict[str, Any]:
        """Of each row, by its number: a hash of its ids and labels, and sum and deviation of its pixels."""
        trainer, found = self.trainer(), {}
        for number in range(len(trainer.train_dataset)):
            batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[number]]))
            real = batch["attention_mask"][0].bool()
            text = hashlib.sha256()
            for name in ("input_ids", "labels"):
                text.update(batch[name][0][real].to(torch.int64).numpy().tobytes())
            pixels = batch.get("pixel_values")
            if pixels is None:
                seen = []
            else:
                seen = [pixels.double().mean().item(), pixels.double().std().item(), *pixels[0, :, 70, 70].tolist()]
            found[number] = [text.hexdigest(), seen]
        return found


class Ours(Side):
    """This package, or an earlier build of it, by its own defaults."""

    def __init__(self, args: argparse.Namespace):
        super().__init__(args)
        import hf_llava_ft

        self.library = hf_llava_ft
        self.processor = hf_llava_ft.load_processor(str(self.folder / "model"))
        cache = str(self.folder / f"cache-{args.side}")
        self.rows = hf_llava_ft.load_data(str(self.folder / "rows.json"), str(self.folder / "images"), cache_dir=cache)

    def trainer(self) -> Any:
        path = str(self.folder / "model")
        if self.args.side == "345f9fe":
            from hf_llava_ft.arguments import TuningArguments
            from hf_llava_ft.tuning import with_tuning
        else:
            from hf_llava_ft import TuningArguments, with_tuning
        lora = {"lora_r": LORA["r"], "lora_alpha": LORA["lora_alpha"], "lora_dropout": LORA["lora_dropout"]}
        tuning = TuningArguments(train_type="lora" if self.args.lora else "freeze_vision", **lora)
        model = with_tuning(self.library.load_model(path, self.processor), tuning, path)
        return self.library.LlavaTrainer(
            model,
            self.library.LlavaTrainingArguments(**self.common()),
            train_dataset=self.rows,
            processing_class=self.processor,
        )


class Native(Side):
    """transformers' own LLaVA: what the plain Trainer and TRL share."""

    def __init__(self, args: argparse.Namespace):
        super().__init__(args)
        from datasets import Dataset
        from transformers import AutoTokenizer, LlavaProcessor
        from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

        path = str(self.folder / "model")
        settings = json.loads((self.folder / "model" / "processor_config.json").read_text())
        self.processor = LlavaProcessor(
            LlavaImageProcessorPil.from_pretrained(path),
            AutoTokenizer.from_pretrained(path),
            patch_size=settings["patch_size"],
            vision_feature_select_strategy=settings["vision_feature_select_strategy"],
            num_additional_image_tokens=settings["num_additional_image_tokens"],
            chat_template=(self.folder / "model" / "chat_template.jinja").read_text(),
        )
        rows = json.loads((self.folder / "rows.json").read_text())
        images = [[str(self.folder / "images" / row["image"])] if "image" in row else [] for row in rows]
        self.rows = Dataset.from_dict({"messages": [messages_of(row) for row in rows], "images": images})
        if self.args.side.endswith("grouped"):  # known to the sampler before training, and not counted as its time
            collate = self.collator()
            lengths = [collate([row])["input_ids"].shape[1] for row in self.decoded()]
            self.rows = self.rows.add_column("length", lengths)

    def decoded(self) -> Any:
        return self.rows

    def collator(self) -> Any:
        return TrainLlavaCollator(self.processor)

    def model(self) -> Any:
        from peft import LoraConfig, get_peft_model
        from transformers import LlavaForConditionalGeneration

        model = LlavaForConditionalGeneration.from_pretrained(str(self.folder / "model"), dtype=torch.float32)
        model.model.vision_tower.requires_grad_(False)
        model.config.use_cache = model.config.text_config.use_cache = False
        if not self.args.lora:
            return model
        layers = r"model\.language_model\..*\.(q|k|v|o|gate|up|down)_proj"
        return get_peft_model(
            model, LoraConfig(**LORA, target_modules=layers, modules_to_save=["multi_modal_projector"])
        )

    def common(self) -> dict[str, Any]:
        grouped = {"train_sampling_strategy": "group_by_length"} if self.args.side.endswith("grouped") else {}
        return super().common() | {"remove_unused_columns": False} | grouped


class Plain(Native):
    def trainer(self) -> Any:
        from transformers import Trainer, TrainingArguments

        return Trainer(
            self.model(),
            TrainingArguments(**self.common()),
            train_dataset=self.rows,
            data_collator=self.collator(),
        )


class Trl(Native):
    """Its default with checkpointed activations; `trl grouped` without, and with rows by their length."""

    def decoded(self) -> Any:
        return self._with_images()

    def collator(self) -> Any:
        from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

        return DataCollatorForVisionLanguageModeling(self.processor, assistant_only_loss=True)

    def _with_images(self) -> Any:
        from datasets import Image, List

        return self.rows.cast_column("images", List(Image()))

    def trainer(self) -> Any:
        from trl import SFTConfig, SFTTrainer

        best = {"gradient_checkpointing": False} if self.args.side.endswith("grouped") else {}
        return SFTTrainer(
            self.model(),
            SFTConfig(**self.common(), **best, max_length=None, assistant_only_loss=True),
            train_dataset=self._with_images(),
            processing_class=self.processor,
        )


def messages_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    question, answer = (turn["value"] for turn in row["conversations"])
    picture = [{"type": "image", "text": None}] if "image" in row else []
    content = [*picture, {"type": "text", "text": question.removeprefix("<image>\n")}]
    said = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    return [{"role": "user", "content": content}, said]


KINDS = {"ours": Ours, "345f9fe": Ours, "plain": Plain, "trl": Trl}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--side", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--lora", action="store_true")
    args = parser.parse_args()
    args.seed = 0
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    side = KINDS[args.side.partition(" ")[0]](args)
    names = ("torch", "transformers", "peft", "accelerate", "datasets", "trl")
    versions = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    print(json.dumps({"versions": versions}), file=answers, flush=True)
    for epoch, word in enumerate(sys.stdin):
        answer = side.digest() if word.strip() == "digest" else side.train(epoch)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
