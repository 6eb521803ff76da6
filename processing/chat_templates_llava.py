r"""Chat templates with `{% generation %}` marks, and how to use a tokenizer's own.

What is supervised is exactly what a template renders inside `{% generation %}`: the answer and what ends it, which
generation also stops on. A template decides where an image stands in the text, so a chat at inference reads like a row
in training. The prompts of the original are in original_templates_llava.py.

Two rules hold for all of them. A leading image is followed by a newline, as every LLaVA was trained. And the space in
front of an answer belongs to the answer, because that is where a SentencePiece token begins; our templates whose
assistant turn begins after a newline trim the answer, because byte-level tokenizers would fuse that newline with the
answer's own.
"""

import re
from dataclasses import dataclass, replace

from .original_templates_llava import IMAGE, ORIGINAL_PROMPTS, Prompt
from .own_template_llava import with_generation_marks

IMAGE_START, IMAGE_END = "<im_start>", "<im_end>"

# Renders the content of a message: a string, or a list of {"type": "image"} and {"type": "text", "text": ...}.
_CONTENT = r"""
{%- set image_markup = 'IMAGE_MARKUP' -%}
{%- macro content_of(message) -%}
    {%- if message['content'] is string -%}
        {{- message['content'] | replace('<image>', image_markup) -}}
    {%- else -%}
        {%- set turn = namespace(leading=true) -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{- image_markup -}}
                {%- set next = loop.nextitem if not loop.last else {} -%}
                {%- set has_newline = next.get('type') == 'text' and next['text'].startswith('\n') -%}
                {%- if turn.leading and next and not has_newline -%}{{- '\n' -}}{%- endif -%}
            {%- else -%}
                {%- set turn.leading = false -%}
                {{- item['text'] | replace('<image>', image_markup) -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
"""

# Splits off the system message, or takes the given default.
_SYSTEM = r"""
{%- if messages and messages[0]['role'] == 'system' -%}
    {%- set system = content_of(messages[0]) -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set system = DEFAULT_SYSTEM -%}
    {%- set turns = messages -%}
{%- endif -%}
"""

_CHATML = r"""
{{- '<|im_start|>system\n' + system + '<|im_end|>\n' if system else '' -}}
{%- for message in turns -%}
    {%- if message['role'] == 'assistant' -%}
        {{- '<|im_start|>assistant\n' -}}
        {%- generation -%}{{- content_of(message) | trim + '<|im_end|>' -}}{%- endgeneration -%}
        {{- '\n' -}}
    {%- else -%}
        {{- '<|im_start|>user\n' + content_of(message) + '<|im_end|>\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""

_MISTRAL = r"""
{%- for message in turns -%}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}{{- ' ' + content_of(message) + eos_token -}}{%- endgeneration -%}
    {%- else -%}
        {{- '[INST] ' -}}
        {{- system + '\n\n' if loop.first and system else '' -}}
        {{- content_of(message) + ' [/INST]' -}}
    {%- endif -%}
{%- endfor -%}
"""

# Makes every content a string, as a text tokenizer's template expects it, before that template runs. Answers are
# trimmed, since it may put them after a newline.
_FLATTEN = r"""
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
    {%- set content = content_of(message) | trim if message['role'] == 'assistant' else content_of(message) -%}
    {%- set flat.messages = flat.messages + [dict(message, content=content)] -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "\\'").replace("\n", "\\n") + "'"


def _joined(*parts: str) -> str:
    """Parts of a template without the newlines between their tags."""
    return "".join(parts).replace("\n{%-", "{%-").strip()


@dataclass(frozen=True)
class ChatTemplate:
    """
    Args:
        source (`str`): the Jinja template, as it is saved with the processor.
        stop_token (`str`, *optional*): the token that ends an answer, where it is not the tokenizer's `eos_token`; a
            tokenizer has to have it.
    """

    source: str
    stop_token: str | None = None


def _chat_template(prompt: Prompt) -> ChatTemplate:
    content = _CONTENT.replace("IMAGE_MARKUP", prompt.image)
    system = _SYSTEM.replace("DEFAULT_SYSTEM", _quoted(prompt.system))
    return ChatTemplate(_joined(content, system, prompt.body), prompt.stop_token)


CHAT_TEMPLATES = {name: _chat_template(prompt) for name, prompt in ORIGINAL_PROMPTS.items()} | {
    "chatml": _chat_template(Prompt(_CHATML, stop_token="<|im_end|>")),
    "qwen": _chat_template(Prompt(_CHATML, "You are a helpful assistant.", stop_token="<|im_end|>")),
    "mistral": _chat_template(Prompt(_MISTRAL)),
}


def own_chat_template(tokenizer) -> ChatTemplate | None:
    """The tokenizer's own template, taught to take images and marked where that can be; `None` if it has none."""
    source = tokenizer.chat_template
    if isinstance(source, dict):
        source = source.get("default")
    if not source:
        return None
    if "content_of" in source:  # one of ours, saved with a tokenizer: it takes images already
        return ChatTemplate(source)
    takes_images = _joined(_CONTENT.replace("IMAGE_MARKUP", IMAGE), _FLATTEN)
    if "endgeneration" in source:
        return ChatTemplate(takes_images + source)
    return ChatTemplate(with_generation_marks(source, tokenizer, takes_images) or takes_images + source)


def chat_template_for(tokenizer, version: str | None = None, image_start_end: bool = False) -> ChatTemplate:
    """
    The template of the name `version`, or where that is `None` the one that suits the tokenizer: its own if it has
    one, `chatml` if it knows that markup, else `v1`.

    Args:
        image_start_end (`bool`): every image stands between `<im_start>` and `<im_end>`, as under the original's
            `mm_use_im_start_end`; in all templates but `plain`, which there has none either.

    Raises:
        ValueError: for an unknown name, or one whose stop token or image tokens the tokenizer does not have.
    """
    vocabulary = tokenizer.get_vocab()
    if version is None:
        template = own_chat_template(tokenizer) or CHAT_TEMPLATES["chatml" if "<|im_end|>" in vocabulary else "v1"]
    elif version in CHAT_TEMPLATES:
        template = CHAT_TEMPLATES[version]
        if template.stop_token and template.stop_token not in vocabulary:
            raise ValueError(
                f"the chat template {version!r} ends an answer with {template.stop_token}, which the tokenizer does "
                f"not have."
            )
    else:
        raise ValueError(f"unknown chat template {version!r}; known: {', '.join(CHAT_TEMPLATES)}.")
    if not image_start_end:
        return template
    if missing := [token for token in (IMAGE_START, IMAGE_END) if token not in vocabulary]:
        raise ValueError(
            f"images between {IMAGE_START} and {IMAGE_END} need these as tokens, and the tokenizer does not have "
            f"{' and '.join(missing)}: add them with tokenizer.add_tokens([...], special_tokens=True)."
        )
    return replace(template, source=_with_image_start_end(template.source))


def takes_texts_as_they_are(source: str) -> bool:
    """
    Whether the template `source` is one of [`CHAT_TEMPLATES`], with images between markers or not. Those look at
    nothing of a text but whether it is empty, the blanks at its ends, a newline in front, and `<image>` in it; they
    write the rest as it is. A tokenizer's own may look at anything.
    """
    ours = {template.source for template in CHAT_TEMPLATES.values()}
    return source in ours or source in {_with_image_start_end(template) for template in ours}


def original_version(text_model_type: str, tokenizer) -> str | None:
    """
    The style in which the original asks a checkpoint of its own; `None` leaves it to [`chat_template_for`].

    The original reads it from the folder's name (`mistral`, `v1.6-34b`, `qwen`, `llama_3`); here the language model
    and its vocabulary say it.
    """
    vocabulary = tokenizer.get_vocab()
    if text_model_type == "mistral":
        return "mistral_instruct"
    if "<|eot_id|>" in vocabulary:
        return "llama_3"
    if "<|im_end|>" in vocabulary:
        return "qwen" if text_model_type == "qwen2" else "chatml_direct"
    return None


def _with_image_start_end(source: str) -> str:
    # The markup is set once, in front of everything; the original wraps `<image>` inside <Image></Image> too.
    marked = rf"\g<1>{IMAGE_START}{IMAGE}{IMAGE_END}"
    return re.sub(rf"(^{{%- set image_markup = '[^']*){IMAGE}", marked, source, count=1)
