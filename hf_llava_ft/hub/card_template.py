"""A card out of a template in `templates/`, as huggingface_hub makes it, but escaped and with every value there."""

from importlib.resources import files
from typing import Any, TypeVar

from huggingface_hub import CardData, RepoCard
from jinja2 import Environment, Template, UndefinedError, meta, nodes

from hf_llava_ft.reports.markdown import card_values

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
        tree = Environment().parse(source)
        of_its_own = {name.name for name in tree.find_all(nodes.Name) if name.ctx == "store"}
        missing = meta.find_undeclared_variables(tree) - {*values, *parts, *of_its_own, "card_data"}
        if missing:
            raise UndefinedError(f"{template} names {', '.join(sorted(missing))}, and the card has no such value")
    included = {name: Template(source) for name, source in sources.items()}
    return kind.from_template(data, template_str=text, **card_values(values), **included)


def _read(name: str) -> str:
    return (files("hf_llava_ft.hub") / "templates" / name).read_text(encoding="utf-8")
