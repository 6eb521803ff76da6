"""Preferences with TRL's DPOTrainer: of two answers to a question about a picture, one is preferred.

    pip install trl
    llava-ft check preferences.json --image_folder images --model my-model
    python examples/dpo_with_trl.py my-model preferences.json images my-preferences
    llava-ft merge --adapter my-preferences --output_dir preferred

Rows are {"prompt": "<image>\nWhat is it?", "chosen": "A cat.", "rejected": "A dog.", "image": "1.jpg"}, in any file
that `llava-ft train` reads. Model, processor and adapter are ours; the Trainer and its loss are TRL's.
"""

import argparse

import torch
from transformers import set_seed
from trl import DPOConfig, DPOTrainer

from hf_llava_ft import TuningArguments, load_model, load_processor, with_tuning
from hf_llava_ft.data.preferences import load_preferences


def main(model_name: str, data_path: str, image_folder: str, output_dir: str, max_steps: int) -> None:
    data = load_preferences(data_path, image_folder)
    processor = load_processor(model_name)
    set_seed(42)  # of LoRA's first weights
    # LoRA and the projector, as `llava-ft train` does it. TRL keeps a frozen copy of both for the reference.
    model = with_tuning(load_model(model_name, processor), TuningArguments(train_type="lora"), num_rows=len(data))
    args = DPOConfig(
        output_dir,
        max_steps=max_steps,
        learning_rate=5e-6,
        per_device_train_batch_size=2,
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(),  # on by default, and refused on a CPU
        max_length=None,  # TRL would cut within a picture
        logging_steps=1,
        report_to="none",
    )
    trainer = DPOTrainer(model, args=args, train_dataset=data, processing_class=processor)
    trainer.train()
    trainer.model.save_pretrained(output_dir, selected_adapters=["default"])  # without the reference
    processor.save_pretrained(output_dir)
    for entry in trainer.state.log_history:
        if "rewards/margins" in entry:
            print(f"step {entry['step']}: loss {entry['loss']:.4f}, margin {entry['rewards/margins']:.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("model_name", "data_path", "image_folder", "output_dir"):
        parser.add_argument(name)
    parser.add_argument("--max_steps", type=int, default=-1, help="default: three epochs")
    main(**vars(parser.parse_args()))
