"""Loading in 4 and 8 bits on the CPU, and training LoRA on top."""

import bitsandbytes
import pytest
import torch
from transformers import BitsAndBytesConfig

import hf_llava_ft
from hf_llava_ft.arguments import TuningArguments
from hf_llava_ft.tuning import with_lora

# Matched from the start of the full path or as a suffix: a bare `vision_tower` would skip nothing.
NEVER_QUANTISED = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_model_trains_lora_and_projector(tiny, tiny_checkpoint, bits):
    quantization = BitsAndBytesConfig(
        load_in_4bit=bits == 4,
        load_in_8bit=bits == 8,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=NEVER_QUANTISED,
    )
    model = hf_llava_ft.load_model(str(tiny_checkpoint), quantization_config=quantization, dtype=torch.float32)
    quantised = bitsandbytes.nn.Linear4bit if bits == 4 else bitsandbytes.nn.Linear8bitLt
    names = {name for name, module in model.named_modules() if isinstance(module, quantised)}
    assert len(names) == 14 and all(name.startswith("model.language_model.") for name in names)
    plain = hf_llava_ft.load_model(str(tiny_checkpoint))(**tiny.batch()).loss
    assert abs(model(**tiny.batch()).loss - plain) < 0.2 * plain

    peft_model = with_lora(model, TuningArguments(lora_r=4, lora_dropout=0.0), str(tiny_checkpoint)).train()
    peft_model(**tiny.batch()).loss.backward()
    trainable = {name: p for name, p in peft_model.named_parameters() if p.requires_grad}
    assert trainable and all(p.grad is not None for p in trainable.values())
    assert any("multi_modal_projector" in name and p.grad.any() for name, p in trainable.items())
