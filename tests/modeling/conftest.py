"""A LLaVA of each kind with a batch for it: `square` is LLaVA-1.5, `anyres` LLaVA-1.6."""

from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration, LlavaNextForConditionalGeneration

from hf_llava_ft.modeling.anyres_llava import num_crops

PINPOINTS = [[56, 112], [112, 56], [112, 112]]
ANYRES_FIELDS: dict[str, Any] = {
    "image_aspect_ratio": "anyres",
    "patch_merge_type": "spatial_unpad",
    "image_grid_pinpoints": PINPOINTS,
}
# Height and width of the pictures of `llava.batch`: they have 3, 3 and 5 crops.
IMAGE_SIZES = [[60, 150], [130, 45], [96, 96]]


class Llava:
    def __init__(self, kind: str, tiny):
        self.kind, self._tiny = kind, tiny

    def model(self):
        return self._tiny.model(**(ANYRES_FIELDS if self.kind == "anyres" else {}))

    def native(self, model, folder):
        """transformers' own class with the weights of `model`."""
        model.save_pretrained(folder)
        native = LlavaNextForConditionalGeneration if self.kind == "anyres" else LlavaForConditionalGeneration
        return native.from_pretrained(folder).eval()

    def batch(self, model, padding_side: str = "right") -> dict[str, torch.Tensor]:
        """Three rows: one picture, text alone, two pictures. The labels are the ids of words but for the first, which
        only a padding position could predict."""
        batch = self._tiny.batch(padding_side=padding_side)
        if self.kind == "anyres":
            batch = self._anyres(model, padding_side)
        is_word = (batch["input_ids"] != model.config.image_token_id) & (batch["input_ids"] != 1)
        kept = batch["attention_mask"].bool() & is_word
        return {**batch, "labels": batch["input_ids"].masked_fill(~kept, -100)}

    def pictures(self, batch: dict) -> dict[str, torch.Tensor]:
        return {name: batch[name] for name in ("pixel_values", "image_sizes") if name in batch}

    def _anyres(self, model, padding_side) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(2)
        sizes = torch.tensor(IMAGE_SIZES)
        crops = num_crops(sizes, model.config)
        pixels = torch.zeros(len(crops), max(crops), 3, 56, 56)  # filled up with blank ones, as processors do
        for image, count in zip(pixels, crops, strict=True):
            image[:count] = torch.randn(count, 3, 56, 56, generator=generator)
        with torch.no_grad():
            features = model.get_image_features(pixel_values=pixels, image_sizes=sizes).pooler_output
        first, second, third = ([model.config.image_token_id] * len(image) for image in features)

        def words(count):
            return torch.randint(3, 1000, (count,), generator=generator).tolist()

        rows = [[1, *words(4), *first, *words(5)], [1, *words(9)], [1, *second, *words(3), *third, *words(6)]]
        length = max(map(len, rows))
        ids, mask = torch.zeros(2, 3, length, dtype=torch.int64)
        for index, row in enumerate(rows):
            place = slice(0, len(row)) if padding_side == "right" else slice(length - len(row), length)
            ids[index, place] = torch.tensor(row)
            mask[index, place] = 1
        return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, "image_sizes": sizes}


@pytest.fixture(params=["square", "anyres"])
def llava(request, tiny) -> Llava:
    return Llava(request.param, tiny)
