"""What other users do with a folder: load it and ask it; the results are written to a file.

Run as a program in a fresh process, it cannot import this package when transformers alone can load the folder, with or
without the code that the folder carries, so that what it reports holds for people who do not have this package.
`verify.py` starts it and says which loader to take, and calls `probe_outputs` for the reference.

    python reload.py MODEL_DIR BASE_OR_EMPTY COMMIT_OR_EMPTY LOADER PROBE_DIR OUTPUT.safetensors

The commit is that of a base on the Hub.
"""

import ctypes
import gc
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

# What it takes to load a folder: transformers; transformers with leave to run the folder's code; this package.
Loader = Literal["transformers", "trust_remote_code", "hf_llava_ft"]
MAX_NEW_TOKENS = 16
# Pictures that readers open in different ways: they are compared as files, up to the pixels that a model gets.
HARD_PICTURES = ("turned.jpg", "alpha.png", "palette.png")
OPENED = "opened."
# Set by who starts it: its process id, with which this one ends.
PARENT_VARIABLE = "HF_LLAVA_FT_PARENT"
_PR_SET_PDEATHSIG = 1  # of prctl(2)
# The kinds of LLaVA that transformers has a class for.
NATIVE_MODEL_TYPES = ("llava", "llava_next")


def probe_outputs(
    model, processor, messages: list[dict], images: list, max_new_tokens: int
) -> dict[str, torch.Tensor]:
    """
    The answer of `model` to `messages`, as tensors.

    Returns:
        `input_ids` `int64[1, T]`, `pixel_values` `float32[N, 3, H, W]` if there are images, `logits` `float32[1, T,
        V]`, `answer_ids` `int64[1, K]`, decoded greedily, and `answer_margins` `float32[1, K]`, by how much each of
        these was ahead of the second best.
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
        generated = model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            use_cache=True,
            output_scores=True,
            return_dict_in_generate=True,
        )
    best = torch.stack(generated.scores, dim=1).float().topk(2).values  # (1, K, 2)
    model.train(was_training)
    outputs = {
        "input_ids": inputs["input_ids"],
        "logits": logits.float(),
        "answer_ids": generated.sequences[:, inputs["input_ids"].shape[1] :],
        "answer_margins": best[..., 0] - best[..., 1],
    }
    if images:
        outputs["pixel_values"] = inputs["pixel_values"].float()
    return {name: tensor.detach().cpu().contiguous() for name, tensor in outputs.items()}


def write_hard_pictures(folder: str | Path) -> None:
    """Writes [`HARD_PICTURES`]: one that its EXIF data turn by a quarter, one with an alpha channel, and one whose
    palette has a transparent colour."""
    ramp = Image.linear_gradient("L").resize((320, 240))
    flipped, rings = ramp.transpose(Image.Transpose.ROTATE_180), Image.radial_gradient("L").resize((320, 240))
    picture, exif = Image.merge("RGB", (ramp, flipped, rings)), Image.Exif()
    exif[0x0112] = 6
    turned, with_alpha, palette = (Path(folder, name) for name in HARD_PICTURES)
    picture.save(turned, exif=exif, quality=95)
    Image.merge("RGBA", (*picture.split(), rings)).save(with_alpha)
    picture.quantize(16, Image.Quantize.FASTOCTREE).save(palette, transparency=0)


def opened_pixels(processor, folder: str | Path, open_file: Callable[[str], Image.Image]) -> dict[str, torch.Tensor]:
    """`opened.NAME`, `float32[1, ..., 3, H, W]`, of each of [`HARD_PICTURES`] in `folder`, opened by `open_file`."""
    opened = {}
    for name in HARD_PICTURES:
        inputs = processor.image_processor([open_file(str(Path(folder, name)))], return_tensors="pt")
        opened[f"{OPENED}{name}"] = torch.as_tensor(inputs["pixel_values"]).float().contiguous()
    return opened


def is_native(folder: str | Path) -> bool:
    """Whether plain transformers loads the whole model in `folder`."""
    try:
        config = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    return config.get("model_type") in NATIVE_MODEL_TYPES and "text_config" in config


def whole_model(model_dir: str | Path, base: str | None) -> str:
    """Where the whole model is: `base` if `model_dir` is an adapter of PEFT, else `model_dir` itself."""
    is_adapter = Path(model_dir, "adapter_config.json").is_file() and not Path(model_dir, "config.json").is_file()
    return base if base and is_adapter else str(model_dir)


def base_revision(model_dir: str | Path, base: str) -> str | None:
    """The revision of `base` that the adapter in `model_dir` was trained on, if that is its base."""
    settings = json.loads(Path(model_dir, "adapter_config.json").read_text(encoding="utf-8"))
    return settings.get("revision") if settings.get("base_model_name_or_path") == base else None


def load(model_dir: str, base: str, commit: str, loader: Loader) -> tuple[Any, Any]:
    """Model and processor."""
    if loader == "hf_llava_ft":
        from hf_llava_ft.checkpoints.opening import load_model, load_processor

        _collect_again()
        processor = load_processor(model_dir, base=base or None)
        return load_model(model_dir, processor, base=base or None), processor

    sys.modules["hf_llava_ft"] = None  # type: ignore[assignment]  # from here on, importing it is an error
    from transformers import AutoModelForImageTextToText, AutoProcessor

    _collect_again()
    whole, trust = whole_model(model_dir, base), loader == "trust_remote_code"
    model: Any = AutoModelForImageTextToText.from_pretrained(
        whole, revision=commit or None, dtype="auto", trust_remote_code=trust
    )
    if whole != model_dir:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, model_dir)
    return model, AutoProcessor.from_pretrained(model_dir, trust_remote_code=trust)


def _collect_again() -> None:
    """As `start_up.importing` ends, which is not at hand here; who starts this program has it begin."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


def end_with_parent(parent: int) -> None:
    """Has Linux kill this process when the one that started it is gone, by kill -9 too."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it was gone before
            sys.exit(1)


def main(model_dir: str, base: str, commit: str, loader: Loader, probe_dir: str, output: str) -> None:
    from safetensors.torch import save_file

    model, processor = load(model_dir, base, commit, loader)
    if loader == "hf_llava_ft":
        from hf_llava_ft.processing.picture_opening_llava import rgb_picture

        def open_file(path: str) -> Image.Image:
            return rgb_picture(Image.open(path), processor.picture_opening)
    else:
        from transformers.image_utils import load_image as open_file  # type: ignore[assignment]
    write_hard_pictures(probe_dir)
    outputs = {}
    for index, probe in enumerate(json.loads(Path(probe_dir, "probes.json").read_text(encoding="utf-8"))):
        images = [Image.open(Path(probe_dir, name)) for name in probe["images"]]
        found = probe_outputs(model, processor, probe["messages"], images, probe["max_new_tokens"])
        for name, tensor in found.items():
            outputs[f"{index}.{name}"] = tensor
        for name, tensor in opened_pixels(processor, probe_dir, open_file).items():
            outputs[f"{index}.{name}"] = tensor
    save_file(outputs, output)


if __name__ == "__main__":
    if PARENT_VARIABLE in os.environ:
        end_with_parent(int(os.environ[PARENT_VARIABLE]))
    main(*sys.argv[1:])  # type: ignore[arg-type]
