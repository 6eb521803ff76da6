"""Fine-tune LLaVA with transformers, PEFT, accelerate and datasets.

Importing the package registers `LlavaConfig`, `LlavaForCausalLM` and `LlavaProcessor` with transformers' Auto classes:

    import hf_llava_ft
    from transformers import AutoModelForCausalLM, AutoProcessor

    model = AutoModelForCausalLM.from_pretrained("liuhaotian/llava-v1.5-7b")
    processor = AutoProcessor.from_pretrained("liuhaotian/llava-v1.5-7b")
"""

import sys
from importlib import import_module
from itertools import pairwise
from pathlib import Path

__version__ = "0.1.0"

# In a checkout that is not installed, the current folder shadows the package map of pyproject.toml and
# `hf_llava_ft.modeling` would not be found: look beside this folder too.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").is_file() and (_checkout / "modeling" / "__init__.py").is_file():
    __path__.append(str(_checkout))

# Public names, and the modules that are imported when one of them is first used.
_PUBLIC = {
    "LlavaConfig": "modeling.configuration_llava",
    "LlavaForCausalLM": "modeling.modeling_llava",
    "LlavaProcessor": "processing.processing_llava",
    "LlavaTrainer": "training.trainer",
    "LlavaTrainingArguments": "settings.training_arguments",
    "ModelArguments": "settings.arguments",
    "DataArguments": "settings.arguments",
    "TuningArguments": "settings.arguments",
    "LlavaCollator": "data.collator",
    "LlavaConversations": "data.builder",
    "UserError": "errors",
    "load_data": "data.formats",
    "load_llava_json": "data.builder",
    "load_model": "checkpoints.opening",
    "load_processor": "checkpoints.opening",
    "compose_llava": "checkpoints.compose",
    "merge_adapter": "checkpoints.merge",
    "with_tuning": "training.tuning",
    "fine_tune": "from_python",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})


# `python -m hf_llava_ft.train`, by a launcher too. Until Python has found the module, "-m" stands for it.
_module = ""
if sys.argv[:1] == ["-m"]:
    _module = next((name for flag, name in pairwise(sys.orig_argv) if flag == "-m" and name.startswith(__name__)), "")
if _module:
    from hf_llava_ft.releases import say_it_of_uncaught_errors

    say_it_of_uncaught_errors()
if _module == f"{__name__}.train":
    from hf_llava_ft.settings.flags.first_look import end_at_first_look, models_and_words
    from hf_llava_ft.start_up import leave_out_bitsandbytes

    end_at_first_look(sys.argv[1:])
    leave_out_bitsandbytes(*models_and_words(sys.argv[1:]))

# The command line registers in the command that needs it: `llava-ft --help` must not take the seconds torch takes to
# import.
_is_command = Path(sys.argv[0] if sys.argv else "").stem == "llava-ft" or _module in (__name__, f"{__name__}.cli")
if not _is_command:
    from hf_llava_ft.registration import register

    register()
