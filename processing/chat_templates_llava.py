r"""Chat templates with `{% generation %}` marks, and how to use a tokenizer's own.

What is supervised is exactly what a template renders inside `{% generation %}`: the answer and the token that ends it,
which generation also stops on. A template decides where an image stands in the text, so a chat at inference reads like
a row in training.

Two rules hold for all of them. A leading image is followed by a newline, as every LLaVA was trained. And the space in
front of an answer belongs to the answer, because that is where a SentencePiece token begins; templates whose assistant
turn begins after a newline trim the answer, because byte-level tokenizers would fuse that newline with the answer's
own.
"""

from dataclasses import dataclass

# Renders the content of a message: a string, or a list of {"type": "image"} and {"type": "text", "text": ...}.
_CONTENT = r"""
{%- macro content_of(message) -%}
    {%- if message['content'] is string -%}
        {{- message['content'] -}}
    {%- else -%}
        {%- set turn = namespace(leading=true) -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{- '<image>' -}}
                {%- set next = loop.nextitem if not loop.last else {} -%}
                {%- set has_newline = next.get('type') == 'text' and next['text'].startswith('\n') -%}
                {%- if turn.leading and next and not has_newline -%}{{- '\n' -}}{%- endif -%}
            {%- else -%}
                {%- set turn.leading = false -%}
                {{- item['text'] -}}
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


def _template(body: str, default_system: str = "") -> str:
    quoted = "'" + default_system.replace("'", "\\'") + "'"
    return (_CONTENT + _SYSTEM.replace("DEFAULT_SYSTEM", quoted) + body).replace("\n{%-", "{%-").strip()


_V1_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_LLAMA_2_SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)

_V1 = _template(
    r"""
{{- system + ' ' if system else '' -}}
{%- for message in turns -%}
    {%- if message['role'] == 'assistant' -%}
        {{- 'ASSISTANT:' -}}
        {%- generation -%}{{- ' ' + content_of(message) + eos_token -}}{%- endgeneration -%}
    {%- else -%}
        {{- 'USER: ' + content_of(message) + ' ' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
""",
    _V1_SYSTEM,
)

# Stage 1: the caption of an image. The words of the user's turn are left out, as the original leaves them out.
_PLAIN = _template(
    r"""
{%- if turns | length > 2 -%}
    {{- raise_exception('the plain template takes an image and its caption, not ' ~ turns | length ~ ' turns') -}}
{%- endif -%}
{%- for message in turns -%}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}{{- content_of(message) + '\n' -}}{%- endgeneration -%}
    {%- else -%}
        {%- set items = [] if message['content'] is string else message['content'] -%}
        {%- set images = items | selectattr('type', 'equalto', 'image') | list -%}
        {%- if not images -%}
            {{- raise_exception('the plain template needs an image in the user turn') -}}
        {%- endif -%}
        {{- '<image>' * images | length -}}
    {%- endif -%}
{%- endfor -%}
"""
)

_LLAVA_LLAMA_2 = _template(
    r"""
{%- for message in turns -%}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}{{- ' ' + content_of(message) + ' ' + eos_token -}}{%- endgeneration -%}
    {%- else -%}
        {{- bos_token if not loop.first else '' -}}
        {{- '[INST] ' -}}
        {{- '<<SYS>>\n' + system + '\n<</SYS>>\n\n' if loop.first and system else '' -}}
        {{- content_of(message) + ' [/INST]' -}}
    {%- endif -%}
{%- endfor -%}
""",
    _LLAMA_2_SYSTEM,
)

_CHATML = _template(
    r"""
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
)

_MISTRAL = _template(
    r"""
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
)


@dataclass(frozen=True)
class ChatTemplate:
    """
    Args:
        source (`str`): the Jinja template, as it is saved with the processor.
        stop (`str`, *optional*): the text of the token that ends an answer; `None` is the tokenizer's `eos_token`.
    """

    source: str
    stop: str | None = None


CHAT_TEMPLATES = {
    "v1": ChatTemplate(_V1),
    "plain": ChatTemplate(_PLAIN, stop="\n"),
    "llava_llama_2": ChatTemplate(_LLAVA_LLAMA_2),
    "chatml": ChatTemplate(_CHATML, stop="<|im_end|>"),
    "mistral": ChatTemplate(_MISTRAL),
}

# Makes every content a string, as a text tokenizer's template expects it, before that template runs. Answers are
# trimmed, since it may put them after a newline.
_FLATTEN = (
    (
        _CONTENT
        + r"""
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
    {%- set content = content_of(message) | trim if message['role'] == 'assistant' else content_of(message) -%}
    {%- set flat.messages = flat.messages + [dict(message, content=content)] -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""
    )
    .replace("\n{%-", "{%-")
    .strip()
)


def own_chat_template(tokenizer) -> ChatTemplate | None:
    """The tokenizer's own template, taught to take images; `None` if it has none."""
    source = tokenizer.chat_template
    if isinstance(source, dict):
        source = source.get("default")
    return ChatTemplate(_FLATTEN + source) if source else None


def chat_template_for(tokenizer, version: str | None = None) -> ChatTemplate:
    """
    The template of the name `version`, or where that is `None` the one that suits the tokenizer: its own if it has
    one, `chatml` if it knows that markup, else `v1`.

    Raises:
        ValueError: for an unknown name, or one whose stop token the tokenizer does not have.
    """
    if version is None:
        own = own_chat_template(tokenizer)
        return own or CHAT_TEMPLATES["chatml" if "<|im_end|>" in tokenizer.get_vocab() else "v1"]
    if version not in CHAT_TEMPLATES:
        raise ValueError(f"unknown chat template {version!r}; known: {', '.join(CHAT_TEMPLATES)}.")
    template = CHAT_TEMPLATES[version]
    if template.stop and template.stop.startswith("<|") and template.stop not in tokenizer.get_vocab():
        raise ValueError(
            f"the chat template {version!r} ends an answer with {template.stop}, which the tokenizer does not have."
        )
    return template
