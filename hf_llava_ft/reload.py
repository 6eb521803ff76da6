"""What a stranger does with a folder: loads it, asks it, and writes down what came out.

Run as a program in a fresh process, it uses plain transformers alone when the folder is a native `llava`, so that what
it reports holds for people who do not have this package. `verify.py` starts it, and calls `probe_outputs` for the
reference.

    python reload.py MODEL_DIR BASE_OR_EMPTY PROBE_DIR OUTPUT.safetensors
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
    bos = processor.tokenizer.bos_token  # some templates write it themselves; the tokenizer would add a second
    add_special_tokens = not (bos and text.startswith(bos))
    inputs = processor(
        text=[text], images=images or None, add_special_tokens=add_special_tokens, return_tensors="pt"
    ).to(model.device)
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


def is_native(folder: str | Path) -> bool:
    """Whether plain transformers loads the whole model in `folder`."""
    try:
        config = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    return config.get("model_type") == "llava" and "text_config" in config


def load(model_dir: str, base: str) -> tuple[Any, Any]:
    """Model and processor: by plain transformers and PEFT where the folders allow it, by this package otherwise."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    is_adapter = Path(model_dir, "adapter_config.json").is_file()
    if not is_adapter and is_native(model_dir):
        return AutoModelForImageTextToText.from_pretrained(model_dir, dtype="auto"), AutoProcessor.from_pretrained(
            model_dir
        )
    if is_adapter and is_native(base) and not Path(model_dir, "config.json").is_file():
        from peft import PeftModel

        whole = AutoModelForImageTextToText.from_pretrained(base, dtype="auto")
        return PeftModel.from_pretrained(whole, model_dir), AutoProcessor.from_pretrained(model_dir)
    from hf_llava_ft.checkpoints import load_model, load_processor

    processor = load_processor(model_dir, base=base or None)
    return load_model(model_dir, processor, base=base or None), processor


def main(model_dir: str, base: str, probe_dir: str, output: str) -> None:
    from safetensors.torch import save_file

    model, processor = load(model_dir, base)
    outputs = {}
    for index, probe in enumerate(json.loads(Path(probe_dir, "probes.json").read_text(encoding="utf-8"))):
        images = [Image.open(Path(probe_dir, name)) for name in probe["images"]]
        for name, tensor in probe_outputs(model, processor, probe["messages"], images).items():
            outputs[f"{index}.{name}"] = tensor
    save_file(outputs, output)


if __name__ == "__main__":
    main(*sys.argv[1:])
