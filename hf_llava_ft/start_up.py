"""What makes a command start sooner: torch, transformers and PEFT are imported with nothing around it, and without
bitsandbytes where nothing is in few bits."""

import gc
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_BITSANDBYTES = "bitsandbytes"
# In a word of a command line or a recipe: --bits, qlora, double_quant, adamw_bnb_8bit, paged_adamw, loftq.
_WORDS_OF_FEW_BITS = ("bit", "qlora", "quant", "bnb", "paged", "loftq")


@contextmanager
def importing() -> Iterator[None]:
    """
    Around a command's imports, of its own program: the million objects that they make all stay, so the garbage
    collector does not look through them while they are made, nor ever after. That takes a fifth of the imports' time,
    and each later collection is shorter. Does nothing where torch was there before.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


def leave_out_bitsandbytes(models: Sequence[str | None], words: Sequence[str] = ()) -> None:
    """
    PEFT imports bitsandbytes wherever it is installed, and that torch._inductor. Here it is as if it were not
    installed, if nothing that this process does can need it: what is said names no few bits, and the settings of each
    model are at hand and of weights as they are. In doubt, and where PEFT is imported already, nothing happens.

    Args:
        models: folders or Hub ids of what is loaded; those that are `None` are none.
        words (*optional*): what the user said, of which any may ask for few bits.
    """
    if _BITSANDBYTES in sys.modules or "peft" in sys.modules:
        return
    named = [model for model in models if model is not None]
    may_need_it = any(part in word.lower() for word in words for part in _WORDS_OF_FEW_BITS)
    if named and not may_need_it and all(map(_has_all_its_bits, named)):
        # The word of Python for a module that is not to be found: find_spec, by which PEFT looks, then says None.
        sys.modules[_BITSANDBYTES] = None  # type: ignore[assignment]


def _has_all_its_bits(model: str, may_be_adapter: bool = True) -> bool:
    """Whether it is certain that the weights of `model`, or of the base of that adapter, are not quantised."""
    config = _settings(model, "config.json")
    if config is not None:
        return "quantization_config" not in config
    adapter = _settings(model, "adapter_config.json") if may_be_adapter else None
    if adapter is None:
        return False
    try:
        base = json.loads(adapter).get("base_model_name_or_path")
    except (ValueError, AttributeError):
        return False  # said by who reads it
    return isinstance(base, str) and "loftq" not in adapter.lower() and _has_all_its_bits(base, may_be_adapter=False)


def _settings(model: str, name: str) -> str | None:
    """The text of a file of a folder, or of the main revision in the cache of the Hub."""
    from huggingface_hub import try_to_load_from_cache

    path = Path(model, name)
    try:
        if not Path(model).is_dir():
            cached = try_to_load_from_cache(model, name)
            if not isinstance(cached, str):
                return None
            path = Path(cached)
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):  # the second: no id of the Hub, or no text
        return None
