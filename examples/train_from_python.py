"""LoRA from Python, with an ordinary callback of transformers' Trainer.

    python examples/train_from_python.py llava-hf/llava-1.5-7b-hf data.json images my-adapter

Data of any format that `llava-ft train` takes. Afterwards: llava-ft chat --model my-adapter
"""

import argparse

from transformers import TrainerCallback

from hf_llava_ft import (
    LlavaTrainer,
    LlavaTrainingArguments,
    TuningArguments,
    load_data,
    load_model,
    load_processor,
    with_tuning,
)


class EpochLoss(TrainerCallback):
    """Prints the mean of the losses that were logged in each epoch."""

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.first = len(state.log_history)

    def on_epoch_end(self, args, state, control, **kwargs):
        losses = [entry["loss"] for entry in state.log_history[self.first :] if "loss" in entry]
        if losses and state.is_world_process_zero:
            print(f"epoch {state.epoch:.0f}: loss {sum(losses) / len(losses):.3f}")


def main(model_name: str, data_path: str, image_folder: str, output_dir: str) -> None:
    processor = load_processor(model_name)
    data = load_data(data_path, image_folder)
    # What is not said, such as rank and learning rates, follows from what trains and from the rows (docs/settings.md).
    model = with_tuning(load_model(model_name, processor), TuningArguments(train_type="lora"), num_rows=len(data))
    args = LlavaTrainingArguments(output_dir, num_train_epochs=3)
    trainer = LlavaTrainer(model, args, train_dataset=data, processing_class=processor, callbacks=[EpochLoss()])
    trainer.train()
    trainer.save_model(output_dir)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("model_name", "data_path", "image_folder", "output_dir"):
        parser.add_argument(name)
    main(**vars(parser.parse_args()))
