"""A language model in 4 or 8 bits through bitsandbytes (arXiv 2305.14314, 2208.07339).

Tower, projector and head are never quantised: the first two are small and what they lose nothing wins back, and the
head's rows are the answers.
"""

import importlib.util

import torch
from transformers import BitsAndBytesConfig

from hf_llava_ft.errors import UserError

# Matched from the start of the full path or as a suffix: a bare `vision_tower` would skip nothing.
NEVER_QUANTIZED = ("model.vision_tower", "model.multi_modal_projector", "lm_head")
# Activations beyond this are computed in 16 bits by LLM.int8 (arXiv 2208.07339, section 3.2).
INT8_OUTLIERS = 6.0


def few_bits_config(
    bits: int, compute_dtype: torch.dtype, *, double_quant: bool = True, quant_type: str = "nf4"
) -> BitsAndBytesConfig:
    """
    Args:
        bits (`int`): 4 or 8.
        compute_dtype (`torch.dtype`): what 4-bit weights are multiplied in.
        double_quant, quant_type: of 4 bits.

    Raises:
        UserError: if bitsandbytes is not installed, or there is no such number of bits.
    """
    if bits not in (4, 8):
        raise UserError(f"--bits {bits}: weights are quantised to 4 or 8 bits; leave it out for weights as saved.")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"--bits {bits} needs bitsandbytes: pip install 'hf-llava-ft[qlora]'.")
    return BitsAndBytesConfig(
        load_in_4bit=bits == 4,
        load_in_8bit=bits == 8,
        llm_int8_threshold=INT8_OUTLIERS,
        llm_int8_skip_modules=list(NEVER_QUANTIZED),
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_quant_type=quant_type,
    )
