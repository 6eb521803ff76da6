"""Fine-tune LLaVA with transformers, PEFT, accelerate and datasets.

Importing the package registers `LlavaConfig`, `LlavaForCausalLM` and the processor with transformers' Auto classes.
"""

import sys
from importlib import import_module
from pathlib import Path

__version__ = "0.1.0"

# In a checkout that is not installed, the current folder shadows the package map of pyproject.toml and
# `hf_llava_ft.modeling` would not be found: look beside this folder too.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").is_file() and (_checkout / "modeling" / "__init__.py").is_file():
    __path__.append(str(_checkout))
