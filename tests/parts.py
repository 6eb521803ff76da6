"""A tiny model and a processor that fit each other."""

import hf_llava_ft
from hf_llava_ft.checkpoints.opening import fit_to_processor
from hf_llava_ft.processing.tokenizer_llava import load_tokenizer


def parts_of(tiny, golden, text="llama", vision="clip", tie=False, **fields):
    """A model and a processor that fit each other."""
    model = tiny.model(text, vision, tie, **fields)
    processor = hf_llava_ft.LlavaProcessor.build(
        load_tokenizer(golden / "tokenizer_tiny"),
        model.config.vision_config,
        version="v1",
        image_aspect_ratio=fields.get("image_aspect_ratio", "pad"),
        vision_feature_select_strategy=model.config.vision_feature_select_strategy,
        image_grid_pinpoints=fields.get("image_grid_pinpoints"),
        patch_merge_type=fields.get("patch_merge_type", "flat"),
    )
    fit_to_processor(model, processor)
    return model, processor
