"""`llava-ft`: the commands, grouped by subject. Each imports what it needs when it runs, so that `--help` is fast."""

from hf_llava_ft.cli.application import app as app
from hf_llava_ft.noise import hide_noise
from hf_llava_ft.termination import exit_on_sigterm

# They register themselves, and `--help` lists them in this order.
from hf_llava_ft.cli import training, models, answering, evaluation, hub  # noqa: F401  # isort: skip


def main() -> None:
    """Entry point of the console script. Click's own usage errors exit with code 2 too."""
    hide_noise()
    exit_on_sigterm()
    app()
