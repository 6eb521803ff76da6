"""What all sides train: seeded rows, JPEGs cut from photographs, and a small LLaVA of random weights.

Rows have one question and one answer, since the reference's collation reads no more; six of ten have a picture.
Nothing follows the answer's stop token, so that all collations can give the same ids.
"""

import json
import random
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_llava_ft.checkpoints.compose import compose_from_parts, save_composed
from hf_llava_ft.settings.composition import Composition

PHOTOGRAPHS = Path(__file__).parents[2] / "hf_llava_ft" / "quickstart" / "photographs"
VOCABULARY = 32_063  # and <image>
SIZES = {False: (512, 8, 256, 6), True: (64, 2, 32, 3)}  # width and layers of the language model, then of the tower


def write_workload(folder: Path, num_rows: int, tiny: bool, seed: int = 0) -> None:
    """`rows.json`, `images/` and `model/` in `folder`."""
    rows = write_rows(folder, num_rows, random.Random(seed), longest=60 if tiny else 250)
    write_model(folder / "model", [turn["value"] for row in rows for turn in row["conversations"]], tiny, seed)


def write_rows(folder: Path, num_rows: int, draw: random.Random, longest: int) -> list[dict]:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    words = ["".join(draw.choice("bdfgklmnprst") + draw.choice("aeiou") for _ in range(3)) for _ in range(800)]
    photographs = [Image.open(path).convert("RGB") for path in sorted(PHOTOGRAPHS.glob("*.jpg"))]
    rows = []
    for number in range(num_rows):
        length = min(longest, max(16, int(draw.lognormvariate(4.2, 0.8))))
        asked = max(4, int(length * draw.uniform(0.2, 0.7)))
        question, answer = (" ".join(draw.choices(words, k=size)) for size in (asked, max(4, length - asked)))
        row: dict = {"id": str(number)}
        if number % 5 < 3:
            row["image"] = f"{number:04d}.jpg"
            photograph = draw.choice(photographs)
            left, top = draw.randrange(photograph.width // 3), draw.randrange(photograph.height // 3)
            cut = photograph.crop((left, top, photograph.width, photograph.height))
            cut.resize((640, draw.choice((360, 480, 640)))).save(folder / "images" / row["image"], quality=90)
            question = f"<image>\n{question}"
        row["conversations"] = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        rows.append(row)
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    return rows


def write_model(folder: Path, texts: list[str], tiny: bool, seed: int) -> None:
    width, layers, tower_width, tower_layers = SIZES[tiny]
    tokenizer = tokenizer_of(texts)
    torch.manual_seed(seed)
    tower = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=tower_width,
            intermediate_size=4 * tower_width,
            num_hidden_layers=tower_layers,
            num_attention_heads=4,
            image_size=224,
            patch_size=32,
        )
    )
    language_model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=width,
            intermediate_size=int(width * 2.6875),
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            vocab_size=VOCABULARY + 1,
            max_position_embeddings=2048,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    composed = compose_from_parts(tower, language_model, tokenizer, Composition(version="mpt", seed=seed))
    save_composed(*composed, folder)


def tokenizer_of(texts: list[str]) -> PreTrainedTokenizerFast:
    """Trained on `texts`, and filled up to `VOCABULARY` with words that no text has."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=4000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator([*["system", "user", "assistant"] * 4, *texts], trainer)
    described = json.loads(trained.to_str())
    vocabulary = described["model"]["vocab"]
    for number in range(len(vocabulary), VOCABULARY):
        vocabulary[f"unused {number}"] = number
    filled = Tokenizer.from_str(json.dumps(described))
    return PreTrainedTokenizerFast(tokenizer_object=filled, pad_token=special[0], eos_token=special[2])
