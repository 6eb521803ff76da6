"""Text that others wrote stands for itself in Markdown."""

import html
import re
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from hf_llava_ft.reports.markdown import code_block, escaped, table

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
    row = RENDERER.render(table(["h"], [[escaped(text)]]))
    assert row.count("<td>") == row.count("<th>") == 1
    assert html.unescape(re.search(r"<td>(.*)</td>", row)[1]) == " ".join(text.split())


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
    assert RENDERER.render(code_block("sh", code)) == f'<pre><code class="language-sh">{shown_code}\n</code></pre>\n'
    assert code_block("sh", "a").startswith("```sh\n")
