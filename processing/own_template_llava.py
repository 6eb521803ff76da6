r"""A tokenizer's own chat template, with `{% generation %}` marks put around its answers.

Such a template is kept whole, as a macro. An answer is what it adds to the prompt that it would generate from, up to
the token that ends the turn, which is not always the `eos_token`: Gemma has `<end_of_turn>`, Phi-3 `<|end|>`. So the
prompts stay byte for byte what the language model was trained on.
"""

from typing import Any

from .bounded_template_llava import render_within_bounds

_MARKED = r"""
{%- set whole = own_template(messages, add_generation_prompt | default(false)) -%}
{%- set written = namespace(end=0) -%}
{%- for message in messages -%}
    {%- if message['role'] == 'assistant' -%}
        {%- set prompt = own_template(messages[:loop.index0], true) -%}
        {%- set answered = own_template(messages[:loop.index], false) -%}
        {%- set found = answered.rfind(STOP, prompt | length) -%}
        {%- set end = found + STOP | length -%}
        {%- if found < 0 or not whole.startswith(prompt) or not whole.startswith(answered[:end]) -%}
            {{- raise_exception('it does not render an answer as its prompt, the answer and ' + STOP) -}}
        {%- endif -%}
        {{- whole[written.end:prompt | length] -}}
        {%- generation -%}{{- whole[prompt | length:end] -}}{%- endgeneration -%}
        {%- set written.end = end -%}
    {%- endif -%}
{%- endfor -%}
{{- whole[written.end:] -}}
"""
# Two rounds: some templates rewrite or drop what stands in earlier turns.
_QUESTION, _ANSWER = "What is it?", "A lighthouse."
_ROUND = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]


def with_generation_marks(source: str, tokenizer, prologue: str = "") -> str | None:
    """
    The Jinja template `source` of `tokenizer`, marked.

    Args:
        prologue (`str`): Jinja that runs first, on messages as a processor gets them; it prints nothing.

    Returns:
        A template with the text of `source` and a mark around each answer and its stop token; `None` if no token of
        the tokenizer ends an answer, or an answer is rendered differently once it is an earlier turn.
    """
    # Jinja drops one newline at the end of a template, and not at the end of a macro.
    macro = (
        f"{{% macro own_template(messages, add_generation_prompt) %}}{source.removesuffix(chr(10))}{{% endmacro %}}"
    )
    plain, _ = _rendered(source, _ROUND, tokenizer)
    stop = None if plain is None else _stop_token(plain, tokenizer)
    if stop is None:
        return None
    quoted = "'" + stop.replace("\\", "\\\\").replace("'", "\\'") + "'"
    marked = prologue + macro + _MARKED.strip().replace("\n", "").replace("STOP", quoted)
    for messages, generates in ((_ROUND, False), (_ROUND * 2, False), (_ROUND + _ROUND[:1], True)):
        expected, _ = _rendered(source, messages, tokenizer, add_generation_prompt=generates)
        text, spans = _rendered(marked, messages, tokenizer, add_generation_prompt=generates)
        if text is None or text != expected:
            return None
        if [text[start:end].lstrip() for start, end in spans] != [_ANSWER + stop] * (len(messages) // 2):
            return None
    return marked


def misplaced_mark(source: str, tokenizer) -> str | None:
    """
    What the marks of the Jinja template `source` hold in place of an answer and the word that ends it; `None` where
    they hold these, and where there are no marks.
    """
    if "endgeneration" not in source:
        return None
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": _QUESTION}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": _ANSWER}]}
    asked_again = {"role": "user", "content": [{"type": "text", "text": _QUESTION}]}
    for messages in ([question, answer], [question, answer, asked_again, answer]):
        text, spans = _rendered(source, messages, tokenizer)
        if text is None:
            continue
        for start, end in spans:
            held = text[start:end].strip()
            ending = held.removeprefix(_ANSWER)
            # A word at most: more is of the next turn.
            if not held.startswith(_ANSWER) or len(ending.split()) > 1:
                return text[start:end]
    return None


def _rendered(source: str, messages: list[dict], tokenizer, **options) -> tuple[str | None, list[tuple[int, int]]]:
    """Text and marks, or `None` and no marks where the template refuses the messages."""
    try:
        rendered: Any = render_within_bounds(
            conversations=[messages],
            chat_template=source,
            return_assistant_tokens_mask="endgeneration" in source,
            **options,
            **tokenizer.special_tokens_map,
        )
    except Exception:  # jinja2's TemplateError, and whatever a template may run into
        return None, []
    texts, marks = rendered
    return texts[0], [(start, end) for start, end in marks[0]] if marks else []


def _stop_token(text: str, tokenizer) -> str | None:
    """The first token that follows the answer at once."""
    rest = text.rpartition(_ANSWER)[2]
    contents = [token.content for token in tokenizer.added_tokens_decoder.values()]
    found = [content for content in contents if rest.lstrip().startswith(content)]
    return max(found, key=len, default=None)
