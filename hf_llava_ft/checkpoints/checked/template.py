"""The chat templates of somebody's folder, tried within bounds before this process renders any.

A template is a program. transformers runs it in jinja2's sandbox, which keeps it from everything but time and memory.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_llava_ft.checkpoints.checked import template_probe
from hf_llava_ft.checkpoints.files import local_file, read_json
from hf_llava_ft.errors import UserError
from hf_llava_ft.processing.chat_templates_llava import CHAT_TEMPLATES
from hf_llava_ft.processing.processing_llava import LlavaProcessor

# A second or two for a busy machine to start Python, beyond what the template may take.
_MAX_SECONDS = template_probe.MAX_SECONDS + 5
_IN_JSON = ("processor_config.json", "chat_template.json", "tokenizer_config.json")


def check_templates(path: str, revision: str | None = None) -> None:
    """
    Tries every chat template in the folder or cached repository `path`.

    Raises:
        UserError: if one does not end, or takes much memory or much text.
    """
    ours = {template.source for template in CHAT_TEMPLATES.values()}
    seen = set()
    for file, text in _templates(path, revision):
        if not text.strip():
            raise UserError(f"{path}: the chat template in {file} is empty: take another folder, or repair it.")
        if text in ours or text in seen:
            continue
        seen.add(text)
        if not _ends(text):
            raise UserError(
                f"{path}: the chat template in {file} does not end within {template_probe.MAX_SECONDS} s, "
                f"{template_probe.MAX_CHARACTERS:,} characters and {template_probe.MAX_BYTES >> 30} GiB for a short "
                f"conversation: it is not used; take another folder, or repair it."
            )


def _templates(path: str, revision: str | None) -> Iterator[tuple[str, str]]:
    file = local_file(path, "chat_template.jinja", revision)
    if file is not None:
        try:
            yield file.name, file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UserError(f"{file} is no text: {error}.") from error
    for name in _IN_JSON:
        if local_file(path, name, revision) is None:
            continue
        found: Any = (read_json(path, name, revision) or {}).get("chat_template")
        for each in found if isinstance(found, list) else [found]:
            text = each.get("template") if isinstance(each, dict) else each
            if isinstance(text, str):
                yield name, text


def _ends(template: str) -> bool:
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    bounds = {"max_seconds": template_probe.MAX_SECONDS, "max_bytes": template_probe.MAX_BYTES}
    try:
        done = subprocess.run(
            [sys.executable, "-I", str(Path(template_probe.__file__))],
            input=json.dumps({"template": template, "special_tokens": tokens} | bounds),
            text=True,
            capture_output=True,
            timeout=_MAX_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def check_rendering(processor: LlavaProcessor, path: str) -> None:
    """
    Renders a question about a picture.

    Raises:
        UserError: if the template of the processor does not take it, or has no place for the picture.
    """
    if processor.chat_template is None:
        raise UserError(
            f"{path} has no chat template, so that nothing can be asked: put a chat_template.jinja there (in "
            f"training, --version names one of ours)."
        )
    if not isinstance(processor.chat_template, str):
        raise UserError(f"{path}: its chat template is no text: take another folder, or repair it.")
    question = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    messages = [{"role": "user", "content": question}]
    try:
        [text], _ = processor._rendered(messages, add_generation_prompt=True)
    except ValueError as error:
        raise UserError(f"{path}: {' '.join(str(error).split()).rstrip('.')}.") from error
    if processor.image_token not in text:
        raise UserError(
            f"{path}: its chat template leaves pictures out, so that the model would never see one: use another "
            f"folder, or one of our templates."
        )
