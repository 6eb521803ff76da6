"""How many examples a property test draws: a fixed few in `make test`, the same each time; or `EXAMPLES_TIMES` as many
from a seed, which `python -m tests.faults --part properties` asks for."""

import os
from typing import Any

from hypothesis import settings

TIMES = int(os.environ.get("EXAMPLES_TIMES", "1"))


def examples(number: int, **further: Any) -> settings:
    """
    For a test that draws `number` examples in `make test`.

    A seed (`--hypothesis-seed`) counts for nothing where examples are derived from the test alone.
    """
    return settings(max_examples=number * TIMES, deadline=None, derandomize=TIMES == 1, database=None, **further)
