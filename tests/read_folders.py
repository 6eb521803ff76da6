"""What plain transformers, of whatever version it is started in, makes of folders. It knows nothing of this package.

    python read_folders.py WANTED.json OUT_DIR

WANTED is a list of {"folder", "base" (of an adapter) or null, "texts", "chat" or null, "pictures", "has_model"}. For
the folder of that place OUT_DIR/<place>.json gets ids and texts, OUT_DIR/<place>.safetensors tensors.
"""

import json
import sys
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

MAX_NEW_TOKENS = 16


def read(wanted: dict) -> tuple[dict, dict]:
    processor = AutoProcessor.from_pretrained(wanted["folder"])
    tokenizer = processor.tokenizer
    encoded = {
        "ids": [tokenizer(text)["input_ids"] for text in wanted["texts"]],
        "bare_ids": [tokenizer(text, add_special_tokens=False)["input_ids"] for text in wanted["texts"]],
        "special": {name: str(getattr(tokenizer, name)) for name in ("bos_token", "eos_token", "pad_token")},
        "special_ids": sorted(tokenizer.all_special_ids),
        "size": len(tokenizer),
        "padding_side": tokenizer.padding_side,
        "processor": type(processor).__name__,
    }
    encoded["decoded"] = [tokenizer.decode(ids) for ids in encoded["ids"]]
    encoded["answers"] = [tokenizer.decode(ids, skip_special_tokens=True) for ids in encoded["ids"]]
    tensors = {}
    pictures = [Image.open(path).convert("RGB") for path in wanted["pictures"]]
    for index, picture in enumerate(pictures):
        pixels = processor.image_processor(picture, return_tensors="pt")["pixel_values"]
        tensors[f"pixels.{index}"] = pixels.float().contiguous()
    if not wanted["chat"]:
        return encoded, tensors

    text = processor.apply_chat_template(wanted["chat"], add_generation_prompt=True)
    starts_with_bos = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    inputs = processor(text=[text], images=pictures[:1], add_special_tokens=not starts_with_bos, return_tensors="pt")
    encoded |= {"prompt": text, "prompt_of_tokenizer": tokenizer.chat_template == processor.chat_template}
    tensors["prompt_ids"] = inputs["input_ids"]
    if not wanted["has_model"]:
        return encoded, tensors

    model = AutoModelForImageTextToText.from_pretrained(wanted["base"] or wanted["folder"], dtype="auto").eval()
    if wanted["base"]:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, wanted["folder"]).eval()
    dtypes = {str(parameter.dtype) for name, parameter in model.named_parameters() if "lora_" not in name}
    encoded |= {"dtypes": sorted(dtypes), "stops": model.generation_config.eos_token_id}
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    with torch.no_grad():
        tensors["logits"] = model(**inputs).logits.float().contiguous()
        words = tokenizer("What is it? Nobody knows.", return_tensors="pt")["input_ids"]
        tensors["text_logits"] = model(input_ids=words).logits.float().contiguous()
        answer = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
    tensors["answer_ids"] = answer[:, inputs["input_ids"].shape[1] :].contiguous()
    return encoded, tensors


def main(wanted: str, out_dir: str) -> None:
    for index, each in enumerate(json.loads(Path(wanted).read_text(encoding="utf-8"))):
        try:
            encoded, tensors = read(each)
        except Exception as error:  # one folder that is not read hides nothing of the others
            encoded, tensors = {"error": f"{type(error).__name__}: {error}"}, {}
        Path(out_dir, f"{index}.json").write_text(json.dumps(encoded), encoding="utf-8")
        save_file(tensors, Path(out_dir, f"{index}.safetensors"))


if __name__ == "__main__":
    main(*sys.argv[1:])
