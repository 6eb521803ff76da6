"""Cards are huggingface_hub's templates, and nothing gets into them unescaped or goes missing."""

import pytest
from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Template, UndefinedError

from hf_llava_ft.hub import card_template
from hf_llava_ft.hub.card_template import card_of
from hf_llava_ft.reports.markdown import Markdown

DATA = ModelCardData(license="<b>mit", tags=["a"])
HOSTILE = [
    "<script>alert(1)</script>",
    "a | b",
    "# h",
    "**b**",
    "[x](http://e)",
    "`c`",
    "{{ 7*7 }}",
    "{% raw %}",
    "&amp;",
]


@pytest.fixture
def templates(monkeypatch):
    """A dictionary whose entries stand in place of the files in `templates/`."""
    sources = {}
    monkeypatch.setattr(card_template, "_read", sources.__getitem__)
    return sources


@pytest.mark.parametrize("text", HOSTILE)
def test_text_stands_for_itself(templates, text):
    templates["card.md"] = "---\n{{ card_data }}\n---\n{{ a }} {{ b.c[0] }} {{ [a, b.c[0]] | join(', ') }} {{ d }}"
    card = card_of(ModelCard, DATA, "card.md", {"a": text, "b": {"c": [text]}, "d": Markdown("*d*")})
    assert not set("<|*[`{}") & set(card.text.removesuffix("*d*")) and "49" not in card.text
    assert card.text.endswith(" *d*")
    # Without us it would not.
    theirs = ModelCard.from_template(DATA, template_str="---\n{{ card_data }}\n---\n{{ a }}", a=text)
    assert text in theirs.text


@pytest.mark.parametrize(
    "template", ["{{ a }}", "{% if a %}{% endif %}", "{{ license }}", "{% include part %}", "{{ b.missing }}"]
)
def test_a_value_that_is_missing_is_an_error(templates, template):
    templates |= {"card.md": f"---\n{{{{ card_data }}}}\n---\n{template}", "part.md": "{{ a }}"}
    with pytest.raises(UndefinedError):
        card_of(ModelCard, DATA, "card.md", {"b": {"c": 1}}, part="part.md")


def test_the_metadata_is_no_value(templates):
    """huggingface_hub offers it by name, unescaped: a license out of another card."""
    template = "---\n{{ card_data }}\n---\n{{ license }}"
    assert "<b>mit" in ModelCard.from_template(DATA, template_str=template).text
    templates["card.md"] = template
    assert "<" not in card_of(ModelCard, DATA, "card.md", {"license": "<b>mit"}).text


def test_a_part_sees_what_the_whole_sees(templates):
    templates |= {"card.md": "---\n{{ card_data }}\n---\n{% set x = 1 %}{% include part %}", "part.md": "{{ a }}"}
    assert card_of(ModelCard, DATA, "card.md", {"a": "<"}, part="part.md").text == "&#60;"


def test_a_template_is_compiled_once(templates, monkeypatch):
    compiled = []
    monkeypatch.setattr(card_template, "Template", lambda source: compiled.append(source) or Template(source))
    templates |= {
        "card.md": "---\n{{ card_data }}\n---\n{{ a }}, once. {% include part %}",
        "part.md": "A part: {{ a }}",
    }
    texts = [card_of(ModelCard, DATA, "card.md", {"a": a}, part="part.md").text for a in ("x", "y")]
    assert texts == ["x, once. A part: x", "y, once. A part: y"]
    assert sorted(compiled) == sorted(templates.values())
