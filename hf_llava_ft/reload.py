"""What a stranger does with a folder: loads it, asks it, and writes down what came out.

Run as a program in a fresh process, it uses plain transformers alone when the folder is a native `llava`, so that what
it reports holds for people who do not have this package. `verify.py` starts it, and calls `probe_outputs` for the
reference.

    python reload.py MODEL_DIR PROBE_DIR OUTPUT.safetensors
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image

MAX_NEW_TOKENS = 48


def probe_outputs(model, processor, messages: list[dict], images: list) -> dict[str, torch.Tensor]:
    """
    The answer of `model` to `messages`, as tensors.

    Returns:
        `input_ids` `int64[1, T]`, `pixel_values` `float32[N, 3, H, W]` if there are images, `logits` `float32[1, T,
        V]` and `answer_ids` `int64[1, K]`, decoded greedily.
    """
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=[text], images=images or None, return_tensors="pt").to(model.device)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS, use_cache=True)
    model.train(was_training)
    outputs = {
        "input_ids": inputs["input_ids"],
        "logits": logits.float(),
        "answer_ids": ids[:, inputs["input_ids"].shape[1] :],
    }
    if images:
        outputs["pixel_values"] = inputs["pixel_values"].float()
    return {name: tensor.detach().cpu().contiguous() for name, tensor in outputs.items()}


def main(model_dir: str, probe_dir: str, output: str) -> None:
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

    config = json.loads(Path(model_dir, "config.json").read_text(encoding="utf-8"))
    auto_model: Any = AutoModelForImageTextToText
    if config["model_type"] != "llava":
        import hf_llava_ft  # noqa: F401  (registers the architectures that transformers cannot express)

        auto_model = AutoModelForCausalLM
    model = auto_model.from_pretrained(model_dir, dtype="auto")
    processor = AutoProcessor.from_pretrained(model_dir)
    outputs = {}
    for index, probe in enumerate(json.loads(Path(probe_dir, "probes.json").read_text(encoding="utf-8"))):
        images = [Image.open(Path(probe_dir, name)) for name in probe["images"]]
        for name, tensor in probe_outputs(model, processor, probe["messages"], images).items():
            outputs[f"{index}.{name}"] = tensor
    save_file(outputs, output)


if __name__ == "__main__":
    main(*sys.argv[1:])
