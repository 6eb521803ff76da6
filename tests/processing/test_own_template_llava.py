"""A tokenizer's own template says the same as before, and which of it is an answer."""

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from hf_llava_ft.processing.own_template_llava import with_generation_marks

ROUND = "{% for message in messages %}{{ message['role'] + '> ' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
PROMPT = "{% if add_generation_prompt %}{{ 'assistant> ' }}{% endif %}"
CHAT = [
    {"role": "user", "content": "What?"},
    {"role": "assistant", "content": "A <|im_end|> cat."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes."},
]


def rendered(source, messages, **options):
    [text], spans = render_jinja_template(
        conversations=[messages], chat_template=source, return_assistant_tokens_mask=True, **options
    )
    return text, [text[start:end] for start, end in spans[0]]


def test_the_text_stays_and_the_answers_are_marked(tokenizer_for):
    source = ROUND + PROMPT + "\n"
    marked = with_generation_marks(source, tokenizer_for("byte-level"))
    for messages, options in ((CHAT, {}), (CHAT[:3], {"add_generation_prompt": True}), (CHAT[:1], {})):
        [expected], _ = render_jinja_template(conversations=[messages], chat_template=source, **options)
        text, answers = rendered(marked, messages, **options)
        assert text == expected
        # Where an answer spells the stop token out, the last one ends it.
        assert answers == ["A <|im_end|> cat.<|im_end|>", "Yes.<|im_end|>"][: len(messages) // 2]


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0]['content'] }}",
        ROUND.replace("<|im_end|>", "") + PROMPT,  # no token ends an answer
        ROUND.replace("message['content']", "('so: ' if loop.last else '') + message['content']") + PROMPT,
        ROUND,  # does not open the turn that it closes
        "{{ raise_exception('no') }}",
    ],
)
def test_what_cannot_be_marked_is_left_alone(tokenizer_for, source):
    assert with_generation_marks(source, tokenizer_for("byte-level")) is None


def test_a_conversation_for_which_an_answer_is_rewritten_is_refused(tokenizer_for):
    source = ROUND.replace(
        "message['content']", "(message['content'] | replace('cat', 'dog' if loop.last else 'cat'))"
    )
    marked = with_generation_marks(source + PROMPT, tokenizer_for("byte-level"))
    with pytest.raises(Exception, match="does not render an answer as its prompt"):
        rendered(marked, CHAT)
