"""The names that each checkpoint dialect gives to the weights of the one module tree we hold in memory.

In memory: `model.vision_tower.*`, `model.multi_modal_projector.linear_{i}.*`, `model.language_model.*`, `lm_head.*`.
The patterns are regular expressions on the name in the file; transformers applies them when reading and reverses them
when writing. Names are translated here and nowhere else.
"""

import re
from typing import Any

# haotian-liu/LLaVA: one flat language model with the tower and the projector hung into it.
_ORIGINAL_BODY = (
    (r"^model\.vision_tower\.vision_tower\.vision_model\.", "model.vision_tower."),
    (r"^model\.embed_tokens\.", "model.language_model.embed_tokens."),
    (r"^model\.layers\.", "model.language_model.layers."),
    (r"^model\.norm\.", "model.language_model.norm."),
)
# Its projector is one linear layer, or a Sequential in which every second module is one.
_ORIGINAL_LINEAR = tuple(
    (rf"^model\.mm_projector\.{kind}", f"model.multi_modal_projector.linear_1.{kind}") for kind in ("weight", "bias")
)
_MOST_PROJECTOR_LAYERS = 8
_ORIGINAL_MLP = tuple(
    (rf"^model\.mm_projector\.{2 * index}\.", f"model.multi_modal_projector.linear_{index + 1}.")
    for index in range(_MOST_PROJECTOR_LAYERS)
)
ORIGINAL_NAMES = (*_ORIGINAL_BODY, *_ORIGINAL_LINEAR, *_ORIGINAL_MLP)

# llava-hf on the Hub, as transformers 4 wrote it and as every server reads it.
NATIVE_NAMES = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^vision_tower\.vision_model\.", "model.vision_tower."),
    (r"^multi_modal_projector\.", "model.multi_modal_projector."),
    (r"^image_newline", "model.image_newline"),
)


def reading_conversions() -> list[Any]:
    """Renamings under which a checkpoint of either dialect, or one that uses our own names, loads."""
    # transformers 5 and 5-written files also hold the tower without or with `vision_model.` under our own prefix.
    own = ((r"^model\.vision_tower\.vision_model\.", "model.vision_tower."),)
    return _renamings((*ORIGINAL_NAMES, *NATIVE_NAMES, *own))


def native_conversions() -> list[Any]:
    """Renamings whose reversal writes the layout of llava-hf."""
    return _renamings(NATIVE_NAMES)


def original_conversions(projector_type: str) -> list[Any]:
    """Renamings whose reversal writes the layout of haotian-liu/LLaVA."""
    projector = _ORIGINAL_LINEAR if projector_type == "linear" else _ORIGINAL_MLP
    return _renamings((*_ORIGINAL_BODY, *projector))


def _renamings(pairs) -> list[Any]:
    # Imported here: a folder with our names for the weights, which is all that carries this code, loads without it.
    from transformers.core_model_loading import WeightRenaming

    return [WeightRenaming(source, target) for source, target in pairs]


def name_in_memory(name: str) -> str:
    """The name in memory of a weight of either layout; other names come back unchanged."""
    return _renamed(name, (*ORIGINAL_NAMES, *NATIVE_NAMES))


def original_name(name: str, projector_type: str) -> str:
    """The name that haotian-liu/LLaVA gives to a weight; the inverse of `name_in_memory`."""
    projector = _ORIGINAL_LINEAR if projector_type == "linear" else _ORIGINAL_MLP
    pairs = [
        ("^" + re.escape(target), source.strip("^$").replace("\\", ""))
        for source, target in (*_ORIGINAL_BODY, *projector)
    ]
    return _renamed(name, pairs)


def _renamed(name: str, pairs) -> str:
    for pattern, replacement in pairs:
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return renamed
    return name
