"""Text that others wrote stands for itself in Markdown."""

import html
import re
import string
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import Template, UndefinedError
from markdown_it import MarkdownIt

from hf_llava_ft.reports.markdown import Markdown, card_values, code_span, escaped, fence
from tests.examples import examples

RENDERER = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
HOSTILE = [
    *(
        "<script>alert(1)</script>",
        "<!-- x -->",
        "&lt;b&gt; &amp;",
        "[x](javascript:alert(1))",
        "![x](http://e/x.png)",
    ),
    *(
        "| a | b |",
        "# h",
        "1. a",
        "1) b",
        "- a",
        "+ a",
        "* a",
        "> q",
        "---",
        "===",
        "~~~",
        "```\nx",
        "`a`",
        "    code",
    ),
    *("**b** _i_ ~~s~~", "a\\*b", "a  \nb", "[a]: http://x", "1.", "-", "a.b 1.5 v1.5 www.1", 'It\'s 5% (x); "y": z!'),
]


def shown(markdown: str) -> str:
    """The text of a single paragraph."""
    return html.unescape(re.fullmatch(r"<p>(.*)</p>\n", RENDERER.render(markdown), re.DOTALL)[1])


@pytest.mark.parametrize("text", HOSTILE)
def test_it_is_what_one_reads(text):
    assert shown(escaped(text)) == " ".join(text.split())
    row = RENDERER.render(f"| h |\n| --- |\n| {escaped(text)} |")
    assert row.count("<td>") == row.count("<th>") == 1
    assert html.unescape(re.search(r"<td>(.*)</td>", row)[1]) == " ".join(text.split())


@examples(100)
@given(st.text(alphabet=string.printable, min_size=1).filter(str.strip))
def test_any_printable_text_is_what_one_reads(text):
    visible = "".join(char for char in " ".join(text.split()) if char.isprintable())
    if visible.strip() == visible and visible:
        assert shown(escaped(text)) == visible


def test_without_escaping_it_would_not_be():
    changed = [text for text in HOSTILE if RENDERER.render(text) != f"<p>{html.escape(text, quote=False)}</p>\n"]
    assert len(changed) > 20


@pytest.mark.parametrize("text", ["http://x.org", "www.x.org", "https://x", "me@x.org", "mailto:me@x"])
def test_no_address_becomes_a_link_where_bare_ones_do(text):
    """GitHub's and the Hub's Markdown look for these in the source."""
    assert not re.search(r"://|www\.|@|\w\.\w|mailto:", escaped(text))


def test_invisible_signs_are_left_out():
    assert escaped("a\u202eb\u2066c\x00d\x1be\ud800f") == "abcdef"
    assert escaped("\u0627\u0644\u200d\u0631 \U0001f468\u200d\U0001f469 \u4f60") == (
        "\u0627\u0644\u200d\u0631 \U0001f468\u200d\U0001f469 \u4f60"
    )


@pytest.mark.parametrize("code", ["a = 1", "x\n```\n# y", "````` x"])
def test_code_cannot_end_its_block(code):
    shown_code = html.escape(code, quote=False)
    block = f"{fence('a', code)}sh\n{code}\n{fence('a', code)}"
    assert RENDERER.render(block) == f'<pre><code class="language-sh">{shown_code}\n</code></pre>\n'
    assert fence("a") == "```"


@pytest.mark.parametrize("text", HOSTILE + ["adamw_torch", "0.1-a+b"])
def test_a_word_in_the_letters_of_code_is_what_one_reads(text):
    row = RENDERER.render(f"| h |\n| --- |\n| {code_span(text)} |")
    assert html.unescape(re.search(r"<td><code>(.*)</code></td>", row)[1]) == " ".join(text.split())


@dataclass
class Facts:
    name: str
    parts: tuple


def test_a_card_gets_no_text_that_is_not_escaped():
    hostile = "<b>&{{ 7*7 }}|`"
    values = card_values({"a": hostile, "b": [hostile, {"c": (hostile,)}], "d": Facts(hostile, (hostile, 1, None))})
    shown = [values["a"], values["b"][0], values["b"][1]["c"][0], values["d"]["name"], values["d"]["parts"][0]]
    assert shown == [escaped(hostile)] * 5 and "<" not in shown[0] and "{" not in shown[0]
    assert values["d"]["parts"][1:] == [1, None]
    assert card_values(Markdown("*a*")) == "*a*" and card_values(str(Markdown("*a*"))) == "&#42;a&#42;"


def test_what_was_put_together_of_markdown_is_text_again():
    assert card_values(f"{Markdown('*a*')}") == card_values(Markdown("*a*") + "") == "&#42;a&#42;"


@pytest.mark.parametrize("value", [b"a", object(), {"a": [{1}]}, Facts], ids=lambda value: type(value).__name__)
def test_a_card_gets_nothing_but_text_and_numbers(value):
    with pytest.raises(TypeError, match="a card shows text and numbers"):
        card_values(value)


def test_a_name_that_is_missing_is_an_error():
    values = card_values({"a": {"b": 1}})
    assert Template("{{ a.b }}").render(values) == "1"
    with pytest.raises(UndefinedError, match="names 'c', and there are 'b'"):
        Template("{% if a.c %}{% endif %}").render(values)
    assert Template("{{ a.c }}").render({"a": {"b": 1}}) == ""  # jinja2's own way, which huggingface_hub uses
