"""`--retention_probe true`: forty questions of our own before the first step and after the last: did it forget?

A run that goes on keeps what the model said before its first step, in `retention.json`.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers.integrations import is_deepspeed_zero3_enabled

from hf_llava_ft.checkpoints.run_files import RETENTION_FILE
from hf_llava_ft.errors import UserError
from hf_llava_ft.evaluation.metrics.given import Given
from hf_llava_ft.evaluation.retention import ask_retention, retention_scores, told_of_retention
from hf_llava_ft.settings.training_arguments import LlavaTrainingArguments
from hf_llava_ft.training.evaluation import untouched_rng
from hf_llava_ft.training.fsdp import uses_fsdp
from hf_llava_ft.whole_files import write_atomically


def check_retention(args: LlavaTrainingArguments) -> None:
    """
    Raises:
        UserError: if the weights will be shared out, so that no process could answer.
    """
    if uses_fsdp(args) or is_deepspeed_zero3_enabled():
        raise UserError(
            "--retention_probe asks the model in one process, and FSDP and ZeRO-3 share it out: leave it out, and run "
            "llava-ft evaluate --retention on the result."
        )


class RetentionProbe:
    """
    Args:
        model: what trains, on its device.
        processor: of the model.
        output_dir (`Path`): of the run.
    """

    def __init__(self, model: Any, processor: Any, output_dir: Path):
        self._model, self._processor = model, processor
        self._file = Path(output_dir, RETENTION_FILE)
        self._before: list[Given] | None = None

    def ask_before(self, *, goes_on: bool) -> None:
        """Asks the model as it starts; of a run that goes on, what it said then is read again."""
        if goes_on:
            self._before = self._read()
            return
        self._before = self._ask()
        self._write({"before": [asdict(each) for each in self._before]})

    def told_after(self) -> str:
        """Asks it again, and says whether it forgot."""
        if self._before is None:
            return "The retention probe has nothing to compare with: this run began without it."
        after = self._ask()
        scores = retention_scores(after, self._before)
        said = {name: [asdict(each) for each in given] for name, given in (("before", self._before), ("after", after))}
        self._write({"figures": [figure.as_json() for figure in scores.figures], **said})
        return told_of_retention(scores)

    def _ask(self) -> list[Given]:
        with untouched_rng():
            return ask_retention(self._model, self._processor)

    def _read(self) -> list[Given] | None:
        if not self._file.is_file():
            return None
        lines = json.loads(self._file.read_text(encoding="utf-8"))["before"]
        return [
            Given(
                line["answer"],
                tuple(line["references"]),
                tuple(line["choices"]),
                tuple(line["loss"]),
                tuple(line["choice_losses"]),
            )
            for line in lines
        ]

    def _write(self, content: dict[str, Any]) -> None:
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        write_atomically(self._file, lambda path: path.write_text(text, encoding="utf-8"))
