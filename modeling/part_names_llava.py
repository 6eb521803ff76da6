"""The names of a LLaVA's parts, as modules, in adapters, tables and settings alike."""

LANGUAGE_MODEL, PROJECTOR, VISION_TOWER, LM_HEAD = "language_model", "multi_modal_projector", "vision_tower", "lm_head"
PARTS = (VISION_TOWER, PROJECTOR, LANGUAGE_MODEL, LM_HEAD)
OTHER = "other"  # what hangs in no part, such as LLaVA-1.6's image_newline


def part_of(parameter_name: str) -> str:
    """Which of `PARTS` a parameter belongs to, from its name in the model or in a PEFT model around it."""
    return next((part for part in PARTS if f".{part}." in f".{parameter_name}"), OTHER)
