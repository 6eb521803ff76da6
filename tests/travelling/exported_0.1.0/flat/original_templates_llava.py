r"""The prompts of the original LLaVA, one for each name of its `--version`, as parts that chat_templates_llava.py puts
together.

Facts (system messages, roles, separators) from haotian-liu/LLaVA c121f04, `llava/conversation.py` and
`llava/train/train.py`, and for `llama_3` from LLaVA-VL/LLaVA-NeXT. Rendered, they are what the original trains on,
byte for byte; the image stands where its `preprocess_multimodal` puts it. What differs on purpose is in
docs/parity.md.

What may surprise:
* The `###` prompts are those of its training, lines of `### Human: ...` under a heading. Its chats ask otherwise
  (`...###Human: ...###Assistant:`), in words that no model of it was trained on; ours ask as they train.
* `###` is text, not a token: generation has to look for it, see `ConversationEncoding.stop_string`. So is `<|im_end|>`
  under `mpt` and `chatml_direct` where a tokenizer has no such token.
* `v0` is Vicuna v0's prompt, the same as `llava_v0`. Under that name the original trains its v1 prompt, without a
  word, and answers with an example about energy in front of every question; neither is done here.
* A question without words has no space and no separator under `v1` and `mpt`.
* `mpt` and `chatml_direct` leave the answer as it is, where our own `chatml` trims it.
"""

from typing import NamedTuple

IMAGE = "<image>"


class Prompt(NamedTuple):
    """
    Args:
        body (`str`): Jinja for everything but splitting off the system message.
        system (`str`): what stands for a system message where there is none.
        image (`str`): an image with its markup.
        stop_token (`str`, *optional*): as in `ChatTemplate`.
    """

    body: str
    system: str = ""
    image: str = IMAGE
    stop_token: str | None = None


_CURIOUS_USER = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_CURIOUS_HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
_VISION_ASSISTANT = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
# No space between its last two sentences: so it was trained.
_MMTAG = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant is able to understand the visual content that the user provides, and assist the user with a "
    "variety of tasks using natural language."
    "The visual content will be provided with the following format: <Image>visual content</Image>."
)
# Meta's, two spaces included.
_LLAMA_2_CHAT = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)
_MPT_CHAT = (
    "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
)
_TAGGED_IMAGE = f"<Image>{IMAGE}</Image>"

# Its SeparatorStyle.TWO: a space after a question, the end token after an answer.
_TWO = r"""
{{- system + ' ' if system else '' -}}
{%- for message in turns -%}
    {%- if message['role'] == 'assistant' -%}
        {{- 'ASSISTANT:' -}}
        {%- generation -%}{{- ' ' + content_of(message) + eos_token -}}{%- endgeneration -%}
    {%- else -%}
        {%- set question = content_of(message) -%}
        {{- 'USER: ' + question + ' ' if question else 'USER:' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""

# SeparatorStyle.SINGLE, as `preprocess` of train.py writes it: the `###` that opens a turn ends the one before it.
_SINGLE = r"""
{{- system + '\n\n' if system else '' -}}
{{- '###' -}}
{%- for message in turns -%}
    {%- if message['role'] == 'assistant' -%}
        {{- ' Assistant:' -}}
        {%- generation -%}{{- ' ' + content_of(message) + '\n###' -}}{%- endgeneration -%}
    {%- else -%}
        {{- ' Human: ' + content_of(message) + '\n###' -}}
    {%- endif -%}
{%- endfor -%}
{{- ' Assistant:' if add_generation_prompt else ' ' -}}
"""

# SeparatorStyle.LLAMA_2; SEPARATOR stands in front of every round but the first.
_LLAMA_2 = r"""
{%- for message in turns -%}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}{{- ' ' + content_of(message) + ' ' + eos_token -}}{%- endgeneration -%}
    {%- else -%}
        {{- SEPARATOR if not loop.first else '' -}}
        {{- '[INST] ' -}}
        {{- '<<SYS>>\n' + system + '\n<</SYS>>\n\n' if loop.first and system else '' -}}
        {{- content_of(message) + ' [/INST]' -}}
    {%- endif -%}
{%- endfor -%}
"""

# SeparatorStyle.MPT: ChatML without the newline between turns.
_MPT = r"""
{{- '<|im_start|>system\n' + system + '<|im_end|>' if system else '' -}}
{%- for message in turns -%}
    {%- if message['role'] == 'assistant' -%}
        {{- '<|im_start|>assistant\n' -}}
        {%- generation -%}{{- content_of(message) + '<|im_end|>' -}}{%- endgeneration -%}
    {%- else -%}
        {%- set question = content_of(message) -%}
        {{- '<|im_start|>user\n' + question + ('<|im_end|>' if question else '') -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""

# Stage 1: the image and its caption. The words of the user's turn are left out, as `preprocess_plain` leaves them out,
# and with them any markup around the image.
_PLAIN = r"""
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

# Meta's template, which LLaVA-NeXT takes from the tokenizer. It trims every turn. <|begin_of_text|> is left to the
# tokenizer, which puts it in front.
_LLAMA_3 = r"""
{{- '<|start_header_id|>system<|end_header_id|>\n\n' + system | trim + '<|eot_id|>' if system else '' -}}
{%- for message in turns -%}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' -}}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}{{- content_of(message) | trim + '<|eot_id|>' -}}{%- endgeneration -%}
    {%- else -%}
        {{- content_of(message) | trim + '<|eot_id|>' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}{%- endif -%}
"""

_V1 = Prompt(_TWO, _CURIOUS_USER)
_V0 = Prompt(_SINGLE, _CURIOUS_HUMAN)
_CHATML_DIRECT = Prompt(_MPT, "Answer the questions.")
_CAPTION = Prompt(_PLAIN)

ORIGINAL_PROMPTS = {
    "v1": _V1,
    "vicuna_v1": _V1,
    "plain": _CAPTION,
    "v0_plain": _CAPTION,
    "llava_llama_2": Prompt(_LLAMA_2.replace("SEPARATOR", "bos_token"), _VISION_ASSISTANT),
    "llama_2": Prompt(_LLAMA_2.replace("SEPARATOR", "bos_token"), _LLAMA_2_CHAT),
    "mistral_instruct": Prompt(_LLAMA_2.replace("SEPARATOR", "''")),
    "mpt": Prompt(_MPT, _MPT_CHAT),
    "chatml_direct": _CHATML_DIRECT,
    "mistral_direct": _CHATML_DIRECT,
    "v0": _V0,
    "llava_v0": _V0,
    "v0_mmtag": Prompt(_SINGLE, _MMTAG, _TAGGED_IMAGE),
    "llava_v1": Prompt(_TWO, _CURIOUS_HUMAN),
    "v1_mmtag": Prompt(_TWO, _MMTAG, _TAGGED_IMAGE),
    "llama_3": Prompt(_LLAMA_3, _VISION_ASSISTANT, stop_token="<|eot_id|>"),
}
