"""The names that each checkpoint dialect gives to the weights of the one module tree we hold in memory.

In memory: `model.vision_tower.*`, `model.multi_modal_projector.linear_{i}.*`, `model.language_model.*`, `lm_head.*`.
The patterns are regular expressions on the name in the file; transformers applies them when reading and reverses them
when writing. Names are translated here and nowhere else.
"""

import re

from transformers.core_model_loading import WeightRenaming

# haotian-liu/LLaVA: one flat language model with the tower and the projector hung into it.
ORIGINAL_NAMES = (
    (r"^model\.vision_tower\.vision_tower\.vision_model\.", "model.vision_tower."),
    (r"^model\.mm_projector\.0\.", "model.multi_modal_projector.linear_1."),
    (r"^model\.mm_projector\.2\.", "model.multi_modal_projector.linear_2."),
    (r"^model\.mm_projector\.4\.", "model.multi_modal_projector.linear_3."),
    (r"^model\.mm_projector\.6\.", "model.multi_modal_projector.linear_4."),
    (r"^model\.mm_projector\.(weight|bias)$", r"model.multi_modal_projector.linear_1.\1"),
    (r"^model\.embed_tokens\.", "model.language_model.embed_tokens."),
    (r"^model\.layers\.", "model.language_model.layers."),
    (r"^model\.norm\.", "model.language_model.norm."),
)

# llava-hf on the Hub, as transformers 4 wrote it and as every server reads it.
NATIVE_NAMES = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^vision_tower\.vision_model\.", "model.vision_tower."),
    (r"^multi_modal_projector\.", "model.multi_modal_projector."),
)


def reading_conversions() -> list[WeightRenaming]:
    """Renamings under which a checkpoint of either dialect, or one that uses our own names, loads."""
    # transformers 5 and 5-written files also hold the tower without or with `vision_model.` under our own prefix.
    own = ((r"^model\.vision_tower\.vision_model\.", "model.vision_tower."),)
    return [WeightRenaming(source, target) for source, target in (*ORIGINAL_NAMES, *NATIVE_NAMES, *own)]


def native_conversions() -> list[WeightRenaming]:
    """Renamings whose reversal writes the layout of llava-hf."""
    return [WeightRenaming(source, target) for source, target in NATIVE_NAMES]


def name_in_memory(name: str) -> str:
    """The name in memory of a weight of the native layout; other names come back unchanged."""
    for source, target in NATIVE_NAMES:
        renamed, count = re.subn(source, target, name)
        if count:
            return renamed
    return name
