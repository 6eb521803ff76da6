"""Renders a chat template within bounds of time, memory and output: a program, run by `checked_template.py`.

It reads JSON from stdin, `template`, `special_tokens`, `max_seconds` and `max_bytes`, and needs jinja2 alone, so that
it starts at once. What the template raises is nothing here: whether it takes a conversation is seen when it is used.
"""

import json
import sys

from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_SECONDS, MAX_BYTES, MAX_CHARACTERS = 5, 2 * 2**30, 1_000_000
TOO_LONG = 3


class GenerationTag(Extension):
    """transformers' `{% generation %}`, as a block that prints what is in it."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def limit_this_process(max_seconds: int, max_bytes: int) -> None:
    try:
        import resource
    except ImportError:  # Windows: the time alone is limited, by who started this
        return
    resource.setrlimit(resource.RLIMIT_CPU, (max_seconds, max_seconds))
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (max_bytes, max_bytes))


def conversations() -> list[list[dict]]:
    """With content as a text, and as a list with a picture."""
    parts = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    answer = [{"type": "text", "text": "A cat."}]
    return [
        [{"role": "user", "content": "What is this?"}, {"role": "assistant", "content": "A cat."}],
        [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}],
        [{"role": "user", "content": parts}],
    ]


def refuse(message: str) -> None:
    raise ValueError(message)


def main() -> int:
    given = json.load(sys.stdin)
    limit_this_process(given["max_seconds"], given["max_bytes"])
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False)
    environment.globals.update(raise_exception=refuse, strftime_now=lambda _: "01 Jan 2026")
    for messages in conversations():
        characters = 0
        try:
            template = environment.from_string(given["template"])
            for piece in template.generate(
                messages=messages, add_generation_prompt=len(messages) == 1, **given["special_tokens"]
            ):
                characters += len(piece)
                if characters > MAX_CHARACTERS:
                    return TOO_LONG
        except MemoryError:
            return TOO_LONG
        except Exception:
            continue
    return 0


if __name__ == "__main__":
    sys.exit(main())
