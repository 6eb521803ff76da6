"""The door of launchers to `llava-ft evaluate`: `accelerate launch -m hf_llava_ft.evaluate`, `torchrun -m ...`."""

import sys
from collections.abc import Sequence

from hf_llava_ft.cli import main as command_line


def main(argv: Sequence[str] | None = None) -> None:
    """`llava-ft evaluate` with these arguments."""
    sys.argv[1:] = ["evaluate", *(sys.argv[1:] if argv is None else argv)]
    command_line()


if __name__ == "__main__":
    main()
