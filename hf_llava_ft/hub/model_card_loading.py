"""How to load what is on the Hub: the part of a card that people copy. A test runs each of these programs."""

import json
from collections.abc import Callable

from hf_llava_ft.checkpoints.opening import Kind
from hf_llava_ft.checkpoints.original_folders import PROJECTOR_FILE
from hf_llava_ft.checkpoints.reload import Loader
from hf_llava_ft.reports.markdown import code_block

_ASK = """
messages = [
    {"role": "user", "content": [
        {"type": "image", "path": "photo.jpg"},
        {"type": "text", "text": "What is in the picture?"},
    ]}
]
inputs = processor.apply_chat_template(
    messages,
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
).to(model.device, model.dtype)
ids = model.generate(**inputs, max_new_tokens=128)
print(processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""

_MODEL = """
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(
    {repo_id}, dtype="auto", device_map="auto"{trust}
)
processor = AutoProcessor.from_pretrained({repo_id}{trust})
"""

_PIPELINE = """
from transformers import pipeline

ask = pipeline(
    "image-text-to-text", model={repo_id}, dtype="auto", device_map="auto"{trust}
)
content = [
    {{"type": "image", "path": "photo.jpg"}},
    {{"type": "text", "text": "What is in the picture?"}},
]
messages = [{{"role": "user", "content": content}}]
print(ask(messages, max_new_tokens=128, return_full_text=False)[0]["generated_text"])
"""

_ADAPTER = """
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

base = AutoModelForImageTextToText.from_pretrained(
    {base},{revision}
    dtype="auto",
    device_map="auto",{trust_line}
)
model = PeftModel.from_pretrained(base, {repo_id})
processor = AutoProcessor.from_pretrained({repo_id}{trust})
"""

_THIS_PACKAGE = """
from hf_llava_ft.answering.conversation import Conversation, load_for_answering, open_image

model, processor = load_for_answering({repo_id})
photo = open_image("photo.jpg", processor.picture_opening)
print(Conversation(model, processor).ask("What is in the picture?", [photo]))
"""

_PROJECTOR = """
hf download {repo_id} --local-dir projector
llava-ft train --model_name_or_path {base} {tower}--pretrain_mm_mlp_adapter projector/{file} \\
    --train_type freeze_vision --data_path data.json --image_folder images --output_dir runs/stage2
"""


def loading_section(
    kind: Kind,
    repo_id: str,
    loader: Loader,
    *,
    base: str | None = None,
    base_revision: str | None = None,
    vision_tower: str | None = None,
) -> str:
    """
    The section "How to use it", with a program for each way there is.

    Args:
        loader (`Loader`): what it takes to load the whole model.
        base (`str`, *optional*): Hub id of the base of an adapter or a projector.
        vision_tower (`str`, *optional*): Hub id of the tower that a projector belongs to.
    """
    trusts = loader == "trust_remote_code"
    values = {
        "repo_id": json.dumps(repo_id),
        "base": json.dumps(base),
        "revision": f"\n    revision={json.dumps(base_revision)}," if base_revision else "",
        "trust": ", trust_remote_code=True" if trusts else "",
        "trust_line": "\n    trust_remote_code=True," if trusts else "",
    }

    def python(template: str, then: str = "") -> str:
        return code_block("python", template.format(**values).strip() + ("\n" + then if then else ""))

    on_the_command_line = ["With hf_llava_ft, on the command line:", _chat(repo_id)]
    if kind == "projector":
        parts = _of_projector(repo_id, base, vision_tower)
    elif loader == "hf_llava_ft" or (kind == "adapter" and base is None) or kind == "original_lora":
        parts = _of_this_package(kind, repo_id, python)
    elif kind == "adapter":
        parts = [_trust("The base", loader), "With PEFT, on its base:", python(_ADAPTER, _ASK), *on_the_command_line]
    else:
        parts = [_trust("The model", loader), "With transformers:", python(_MODEL, _ASK)]
        parts += ["Or shorter:", python(_PIPELINE), *on_the_command_line]
    return "\n\n".join(["## How to use it", *filter(None, parts)])


def _trust(what: str, loader: Loader) -> str:
    if loader != "trust_remote_code":
        return ""
    return (
        f"{what} is of a kind that transformers has no class of its own for. Its code comes with it and runs with "
        f"`trust_remote_code=True` alone. Read it first."
    )


def _of_this_package(kind: Kind, repo_id: str, python: Callable[[str], str]) -> list[str]:
    if kind == "adapter":
        told = "With hf_llava_ft, which finds the base:"
    else:
        told = "In the format of haotian-liu/LLaVA, which transformers alone does not load. With hf_llava_ft:"
    return [told, python(_THIS_PACKAGE), "Or on the command line:", _chat(repo_id)]


def _chat(repo_id: str) -> str:
    return code_block("sh", f"llava-ft chat --model {repo_id} --image photo.jpg")


def _of_projector(repo_id: str, base: str | None, vision_tower: str | None) -> list[str]:
    tower = f"--vision_tower {vision_tower} " if vision_tower else ""
    command = _PROJECTOR.format(repo_id=repo_id, base=base or "LANGUAGE_MODEL", tower=tower, file=PROJECTOR_FILE)
    return [
        "A projector is no model by itself: it is the part between a vision tower and a language model. Stage 2 of "
        "LLaVA's training, with hf_llava_ft, starts from it:",
        code_block("sh", command),
    ]
