"""How to serve an exported folder: the commands, as they are printed and written to its SERVING.md."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from hf_llava_ft.serving.adapter_for_vllm import ADAPTER, BASE
from hf_llava_ft.serving.limits import Server
from hf_llava_ft.serving.parts import LANGUAGE_MODEL, PROJECTOR, VISION

GUIDE = "SERVING.md"
# Go's text/template, with the pieces of a prompt in square brackets.
_GO_TEMPLATE = (
    "{{ if .System }}[before_system]{{ .System }}[after_system]{{ else }}[default_system]{{ end }}"
    '{{ range .Messages }}{{ if eq .Role "user" }}[before_question]{{ .Content }}[after_question]'
    '{{ else if eq .Role "assistant" }}[before_answer]{{ .Content }}[after_answer]{{ end }}{{ end }}[generation]'
)
_GGUF, _MMPROJ = "language_model.gguf", "mmproj-model-f16.gguf"


def commands(server: Server, config: Any, image_processor: Any, adapter_rank: int = 0) -> list[str]:
    """
    Commands to be run inside the folder, in their order. `llama.cpp` in them is a checkout of it.

    Args:
        adapter_rank (`int`): largest rank in an adapter that stands beside its base, for vLLM; 0 if there is none.
    """
    if server == "vllm":
        if adapter_rank:
            rank = _allowed_rank(adapter_rank)
            return [f"vllm serve {BASE} --enable-lora --max-lora-rank {rank} --lora-modules tuned={ADAPTER}"]
        return ["vllm serve ."]
    if server == "sglang":
        return ["python -m sglang.launch_server --model-path . --model-impl transformers"]
    if server == "endpoints":
        return []
    is_siglip = config.vision_config.model_type == "siglip_vision_model"
    normalize = [
        f"--image-{name} {' '.join(map(str, values))}"
        for name, values in (("mean", image_processor.image_mean), ("std", image_processor.image_std))
    ]
    encoder = " ".join(
        [
            "python llama.cpp/tools/mtmd/legacy-models/convert_image_encoder_to_gguf.py",
            f"-m {VISION} --clip-model-is-vision",
            *(["--clip-model-is-siglip"] if is_siglip else []),
            *normalize,
            f"--llava-projector {VISION}/{PROJECTOR} --output-dir .",
        ]
    )
    convert = [
        "pip install -r llama.cpp/tools/mtmd/requirements.txt",
        f"python llama.cpp/convert_hf_to_gguf.py {LANGUAGE_MODEL} --outtype f16 --outfile {_GGUF}",
        encoder,
    ]
    if server == "ollama":
        return [*convert, "ollama create llava-tuned -f Modelfile"]
    return [*convert, f"llama-server -m {_GGUF} --mmproj {_MMPROJ} --jinja"]


def _allowed_rank(rank: int) -> int:
    """The smallest `--max-lora-rank` that vLLM takes and that is not below `rank`."""
    return next((allowed for allowed in (16, 32, 64, 128, 256, 320, 512) if allowed >= rank), rank)


def write_guide(folder: Path, title: str, lines: list[str], notes: list[str]) -> None:
    """Writes the commands `lines` and the sentences `notes` to `folder`."""
    text = [f"# {title}", ""]
    if lines:
        text += ["Run in this folder:", "", "```bash", *lines, "```", ""]
    if notes:
        text += ["What to know:", "", *(f"* {note}" for note in notes), ""]
    (folder / GUIDE).write_text("\n".join(text), encoding="utf-8")


def write_modelfile(folder: Path, processor: Any) -> bool:
    """Writes Ollama's Modelfile; says whether the prompt could be put in it."""
    lines = [f"FROM ./{_GGUF}", f"FROM ./{_MMPROJ}"]
    template = go_template(processor)
    if template is not None:
        lines.append(f'TEMPLATE """{template}"""')
    stop = processor.tokenizer.convert_ids_to_tokens(processor.stop_token_id)
    lines.append(f'PARAMETER stop "{stop}"')
    (folder / "Modelfile").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return template is not None


def go_template(processor: Any) -> str | None:
    """
    The chat template in the words of Ollama: what stands around system message, question and answer.

    It is read off rendered conversations, put together again and compared with others; `None` where they differ, as
    they do where the system message is part of the first question.
    """
    bos = processor.tokenizer.bos_token or ""

    def render(*turns: tuple[str, str], prompt: bool = False) -> str:
        messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
        return processor.apply_chat_template(messages, add_generation_prompt=prompt).removeprefix(bos)

    system, question, answer, more = ("system", "{S}"), ("user", "{Q}"), ("assistant", "{A}"), ("user", "{R}")
    try:
        pieces = _pieces(render)
        conversations = [(question,), (question, ("assistant", "4"), more), (system, ("user", "2"), answer, more)]
        if any(render(*turns, prompt=True) != _assembled(pieces, turns) for turns in conversations):
            return None
    except (TemplateError, TypeError, ValueError):  # a template may refuse a system message
        return None
    if any("{{" in piece or '"""' in piece for piece in pieces.values()):
        return None
    return re.sub(r"\[(\w+)\]", lambda match: pieces[match[1]], _GO_TEMPLATE)


def _pieces(render: Callable[..., str]) -> dict[str, str]:
    """What stands where in `_GO_TEMPLATE`, read off three conversations."""
    question, answer = ("user", "{Q}"), ("assistant", "{A}")
    before, _, rest = render(question, answer, ("user", "{R}")).partition("{Q}")
    middle, _, rest = rest.partition("{A}")
    between, _, after_question = rest.partition("{R}")
    after_answer = render(question, answer).partition("{A}")[2]
    before_question = between.removeprefix(after_answer)
    before_system, _, rest = render(("system", "{S}"), question).partition("{S}")
    return {
        "before_system": before_system,
        "after_system": rest.partition("{Q}")[0].removesuffix(before_question),
        "default_system": before.removesuffix(before_question),
        "before_question": before_question,
        "after_question": after_question,
        "before_answer": middle.removeprefix(after_question),
        "after_answer": after_answer,
        "generation": render(question, prompt=True).partition("{Q}")[2].removeprefix(after_question),
    }


def _assembled(pieces: dict[str, str], turns: Iterable[tuple[str, str]]) -> str:
    """What Ollama makes of `turns` and the prompt for an answer."""
    start, text = pieces["default_system"], ""
    for role, content in turns:
        if role == "system":
            start = pieces["before_system"] + content + pieces["after_system"]
        else:
            part = "question" if role == "user" else "answer"
            text += pieces[f"before_{part}"] + content + pieces[f"after_{part}"]
    return start + text + pieces["generation"]
