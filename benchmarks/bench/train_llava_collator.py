"""The collation of yjin07/train-llava, also for rows without a picture."""

from typing import Any

import torch
from PIL import Image


class TrainLlavaCollator:
    """Question through the processor, answer through the tokenizer, row by row; joined, and padded on the left."""

    def __init__(self, processor: Any):
        self.processor = processor

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        pieces, pixels = [], []
        stop = torch.tensor([self.processor.tokenizer.eos_token_id])
        for row in rows:
            question, answer = row["messages"]
            prompt = self.processor.apply_chat_template([question], tokenize=False, add_generation_prompt=True)
            pictures = [Image.open(path).convert("RGB") for path in row["images"]]
            asked = self.processor(text=prompt, images=pictures or None, return_tensors="pt")
            if pictures:
                pixels.append(asked["pixel_values"])
            answer = answer["content"][0]["text"]
            said = self.processor.tokenizer(answer, return_tensors="pt", add_special_tokens=False)["input_ids"][0]
            ids = asked["input_ids"][0]
            labels = torch.cat([torch.full_like(ids, -100), said, stop])
            pieces.append((torch.cat([ids, said, stop]), labels))
        longest = max(len(ids) for ids, _ in pieces)
        pad = self.processor.tokenizer.pad_token_id
        fill = torch.nn.functional.pad
        batch = {
            "input_ids": torch.stack([fill(ids, (longest - len(ids), 0), value=pad) for ids, _ in pieces]),
            "labels": torch.stack([fill(labels, (longest - len(labels), 0), value=-100) for _, labels in pieces]),
        }
        batch["attention_mask"] = (batch["input_ids"] != pad).long()
        return batch | ({"pixel_values": torch.cat(pixels)} if pixels else {})
