"""Differences between the library releases that we support: handled here, and nowhere else in this folder.

Each name says what is needed. The release that ends a difference is named beside it: it goes when no older one is
supported.
"""

from functools import cache
from typing import Any

from huggingface_hub.errors import HfHubHTTPError

# Of httpx, or of httpx2 in newer versions of huggingface_hub: what goes wrong on the way to a server.
HTTPError: type[Exception] = HfHubHTTPError.__bases__[0]


@cache
def checkpointing_flags() -> tuple[str, ...]:
    """The names of transformers for computing activations again in the backward pass, its newest first."""
    from transformers import TrainingArguments

    # 5.17 has the second alone; 6 is to have the first alone.
    known = ("activation_checkpointing", "gradient_checkpointing")
    return tuple(name for name in known if name in TrainingArguments.__dataclass_fields__)


def open_as_causal_lm(native_config: type, model_class: type) -> None:
    """Lets `AutoModelForCausalLM` give `model_class` for a configuration of transformers' own.

    Not through `AutoModelForCausalLM.register`, which wants the class of the configuration to be the model's own.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    mapping: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    mapping.register(native_config, model_class, exist_ok=True)
    if native_config not in mapping:  # transformers 5.17 passes over configurations of its own
        mapping._extra_content[native_config] = model_class
