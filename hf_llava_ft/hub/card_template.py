"""A card out of a template in `templates/`, as huggingface_hub makes it, but escaped and with every value there."""

from functools import cache
from importlib.resources import files
from typing import Any, TypeVar

from huggingface_hub import CardData, RepoCard
from jinja2 import Environment, Template, UndefinedError, meta, nodes

from hf_llava_ft.reports.markdown import card_values

_WHOLE = "whole_card"  # no template names it
_Card = TypeVar("_Card", bound=RepoCard)


def card_of(kind: type[_Card], data: CardData, template: str, values: dict[str, Any], **parts: str) -> _Card:
    """
    Args:
        kind (`type`): `ModelCard` or `DatasetCard`.
        data (`CardData`): the metadata, which the template names `card_data`.
        template (`str`): its name in `templates/`.
        values (`dict`): what it names; see [`~hf_llava_ft.reports.markdown.card_values`].
        parts (`str`): other templates, by the name that it includes them under.

    Raises:
        jinja2.UndefinedError: if the template names what is not among the values.
    """
    text, sources = _read(template), {name: _read(part) for name, part in parts.items()}
    # Without this, huggingface_hub would offer the metadata under names of their own, as they are.
    for source in (text, *sources.values()):
        missing = _names_in(source) - {*values, *parts, "card_data"}
        if missing:
            raise UndefinedError(f"{template} names {', '.join(sorted(missing))}, and the card has no such value")
    included: dict[str, Any] = {name: _compiled(source) for name, source in sources.items()} | {
        _WHOLE: _compiled(text)
    }
    # Included, so that it is compiled once: each checkpoint has a card.
    whole = f"{{% include {_WHOLE} %}}"
    return kind.from_template(data, template_str=whole, **card_values(values), **included)


@cache
def _names_in(source: str) -> set[str]:
    """Those that it does not give a value itself."""
    tree = Environment().parse(source)
    of_its_own = {name.name for name in tree.find_all(nodes.Name) if name.ctx == "store"}
    return meta.find_undeclared_variables(tree) - of_its_own


@cache
def _compiled(source: str) -> Template:
    return Template(source)


def _read(name: str) -> str:
    return (files("hf_llava_ft.hub") / "templates" / name).read_text(encoding="utf-8")
