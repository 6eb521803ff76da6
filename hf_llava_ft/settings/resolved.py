"""The settings of a run, each with its origin."""

import dataclasses
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from hf_llava_ft.errors import UserError
from hf_llava_ft.processing.chat_templates_llava import CHAT_TEMPLATES
from hf_llava_ft.settings.arguments import DataArguments, ModelArguments, TuningArguments
from hf_llava_ft.settings.defaults import DEFAULT, UNTIL_KNOWN, is_by_what_trains
from hf_llava_ft.settings.machine import machine_problems, settles_precision, without_missing_tf32
from hf_llava_ft.settings.ranges import check_ranges
from hf_llava_ft.settings.training_arguments import LlavaTrainingArguments

ARGUMENT_CLASSES: tuple[Any, ...] = (ModelArguments, DataArguments, TuningArguments, LlavaTrainingArguments)
SECRET = re.compile(r"token$|password|secret")


class _OnNoDevice(LlavaTrainingArguments):
    """Checks values as its parent does, without touching a device or starting processes."""

    device = torch.device("cpu")  # type: ignore[assignment]
    # What a machine has to have, or a launcher to start: `machine_problems` speaks of it.
    NEEDS_A_MACHINE = {"use_cpu": True, "tf32": None, "deepspeed": None, "fsdp": None, "report_to": "none"}


@dataclass(frozen=True)
class Setting:
    """
    Args:
        value: as parsed.
        origin (`str`): `default`, `preset NAME`, `recipe FILE`, `flag`, `translated from --FLAG`, or whose default.
    """

    value: Any
    origin: str


@dataclass(frozen=True)
class Settings:
    """
    All settings of a run.

    Args:
        by_name (`dict[str, Setting]`): every field of the four classes of arguments.
        notes (`list[str]`): what was translated, one line each.
        assumed (`frozenset[str]`): see `ModelArguments`.
        dry_run (`bool`): only show them.
    """

    by_name: dict[str, Setting]
    notes: list[str]
    assumed: frozenset[str] = frozenset()
    dry_run: bool = False

    def with_chosen_precision(self, has_bf16: bool) -> "Settings":
        """
        With `bf16` where nobody said in what is computed, and a note of it.

        Args:
            has_bf16 (`bool`): whether there is a GPU that computes in bfloat16.
        """
        if not has_bf16 or self._says_precision():
            left_out = Setting(bool(self.by_name["bf16"].value), self.by_name["bf16"].origin)
            return dataclasses.replace(self, by_name=self.by_name | {"bf16": left_out})
        note = "--bf16 True: chosen, since this GPU has it and nothing else was said; --bf16 False leaves it out."
        by_name = self.by_name | {"bf16": Setting(True, "chosen for this GPU")}
        return dataclasses.replace(self, by_name=by_name, notes=[*self.notes, note])

    def _says_precision(self) -> bool:
        said = {name for name, setting in self.by_name.items() if setting.origin != DEFAULT}
        use_cpu, dtype, deepspeed = (self.by_name[name].value for name in ("use_cpu", "dtype", "deepspeed"))
        if said & {"bf16", "fp16"} or ("dtype" in said and dtype == "float32"):
            return True
        return settles_precision(use_cpu, deepspeed)

    def build(self) -> tuple[ModelArguments, DataArguments, TuningArguments, LlavaTrainingArguments]:
        """
        The settings as objects; the last one chooses the device and joins the processes of a launcher.

        Raises:
            UserError: if they contradict each other, or this machine lacks something that they need.
        """
        model, data, tuning = self._checked()
        values = self._of(LlavaTrainingArguments)
        for problem in machine_problems({name: setting.value for name, setting in self.by_name.items()}):
            raise UserError(problem)
        training = _built(LlavaTrainingArguments, without_missing_tf32(values))
        training.leave_open(name for name in UNTIL_KNOWN if is_by_what_trains(self.by_name[name].origin))
        return model, data, tuning, training

    def to_json(self, check_model: Callable[[ModelArguments, TuningArguments], TuningArguments] | None = None) -> str:
        """
        The settings as JSON, one on a line: `settings` (`value` and `from` of each), `translated` (the notes), and
        `missing_on_this_machine` (what would stop the run here). Secrets are left out.

        Args:
            check_model: asked about a model that is a folder here, for which nothing is fetched; gives the tuning that
                holds for it, of which an adapter decides a part.

        Raises:
            UserError: if the settings contradict each other.
        """
        model, data, tuning = self._checked()
        decided = vars(tuning)
        if check_model is not None and Path(model.model_name_or_path).is_dir():
            decided = vars(check_model(model, tuning))
        derived = {name: value for part in (model, data, tuning) for name, value in vars(part).items()}
        settings = {}
        for name, setting in self.by_name.items():
            value, origin = derived.get(name, setting.value), setting.origin
            if value != setting.value:
                origin = f"{origin}, said as {setting.value}"
            if name in decided and decided[name] != value:
                value, origin = decided[name], "the adapter that is trained further"
            if SECRET.search(name) and value is not None:
                value = "(hidden)"
            settings[name] = {"value": value.value if isinstance(value, Enum) else value, "from": origin}
        problems = machine_problems({name: setting["value"] for name, setting in settings.items()})
        lines = ",\n".join(f'    "{name}": {_json(setting)}' for name, setting in settings.items())
        others = {"translated": self.notes, "missing_on_this_machine": problems}
        return f'{{\n  "settings": {{\n{lines}\n  }},{_json(others, indent=2)[1:]}'

    def _checked(self) -> tuple[ModelArguments, DataArguments, TuningArguments]:
        for name, setting in self.by_name.items():
            if setting.value is dataclasses.MISSING:
                raise UserError(f"--{name} is missing; llava-ft train --help says what it is.")
        version = self.by_name["version"].value
        if version is not None and version not in CHAT_TEMPLATES:
            raise UserError(f"--version: unknown chat template {version!r}; known: {', '.join(CHAT_TEMPLATES)}.")
        check_ranges({name: setting.value for name, setting in self.by_name.items()})
        model = _built(ModelArguments, self._of(ModelArguments))
        model.assumed = self.assumed
        data, tuning = (_built(each, self._of(each)) for each in (DataArguments, TuningArguments))
        tuning.said = frozenset(name for name, each in self.by_name.items() if not each.origin.startswith("default"))
        _built(_OnNoDevice, self._of(LlavaTrainingArguments) | _OnNoDevice.NEEDS_A_MACHINE)
        return model, data, tuning

    def _of(self, kind: type) -> dict[str, Any]:
        return {field.name: self.by_name[field.name].value for field in dataclasses.fields(kind) if field.init}


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=False, default=str)


def default_of(field: dataclasses.Field) -> Any:
    """The default of a field; `dataclasses.MISSING` for one that has to be given."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _built(kind: type, values: dict[str, Any]) -> Any:
    try:
        return kind(**values)
    except UserError:
        raise
    except (ValueError, ImportError, OSError) as error:  # a setting may name a file of settings
        raise UserError(str(error).strip().splitlines()[0]) from error
