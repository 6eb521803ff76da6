"""Tiny real models and processors, made in seconds, and the reference outputs of the original."""

import gc
import os
import shutil
from pathlib import Path

# Before anything imports huggingface_hub: no test may need the network.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig, MistralConfig, Qwen2Config, SiglipVisionConfig, set_seed

import hf_llava_ft
from hf_llava_ft.checkpoints import verify
from hf_llava_ft.processing.tokenizer_llava import load_tokenizer
from tests import warm_python

GOLDEN = Path(__file__).parent / "golden"
CHECKOUT = Path(__file__).parent.parent

NEW_PYTHON = verify.fresh_python  # as it is outside the tests
TEXT_CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}


def pytest_addoption(parser):
    parser.addoption("--new-python", action="store_true", help="no fork of a warm process: a new Python each time")


def pytest_collection_finish():
    """What has been imported stays: without this, every collection of garbage goes through a million such objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _warm_python(request):
    """What is written is verified in forks of a warm process too."""
    with pytest.MonkeyPatch.context() as patch:
        if request.config.getoption("--new-python"):
            patch.setattr(warm_python, "ALWAYS_NEW", True)
        else:
            patch.setattr(verify, "fresh_python", warm_python.run)
        yield


@pytest.fixture(autouse=True)
def _new_python(request):
    with pytest.MonkeyPatch.context() as patch:
        if request.node.get_closest_marker("new_python"):
            patch.setattr(warm_python, "ALWAYS_NEW", True)
            patch.setattr(verify, "fresh_python", NEW_PYTHON)
        yield


@pytest.fixture(scope="session")
def golden() -> Path:
    return GOLDEN


@pytest.fixture(scope="session")
def checkout() -> Path:
    return CHECKOUT


def tiny_config(
    text: str = "llama", vision: str = "clip", tie: bool = False, rope: dict | None = None, **fields
) -> hf_llava_ft.LlavaConfig:
    """2 layers of width 64, a vocabulary of 1024 + 64, and a tower of 3 layers of width 32 with 16 patches."""
    text_config = TEXT_CONFIGS[text](
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=1088,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=tie,
        rope_parameters=rope and dict(rope),
    )
    sizes = {
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 56,
        "patch_size": 14,
    }
    if vision == "clip":
        vision_config = CLIPVisionConfig(hidden_size=32, projection_dim=16, **sizes)
    else:
        vision_config = SiglipVisionConfig(hidden_size=32, **sizes)
    fields = {"image_token_index": 1024, "image_seq_length": 16, "tie_word_embeddings": tie, **fields}
    strategy = "default" if vision == "clip" else "full"
    return hf_llava_ft.LlavaConfig(
        text_config=text_config, vision_config=vision_config, vision_feature_select_strategy=strategy, **fields
    )


def tiny_model(text: str = "llama", vision: str = "clip", tie: bool = False, **fields) -> hf_llava_ft.LlavaForCausalLM:
    """Random weights large enough that every part of the input shows in the logits."""
    set_seed(0)
    model = hf_llava_ft.LlavaForCausalLM(tiny_config(text, vision, tie, **fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.1)
    return model


def tiny_batch(image_token_id: int = 1024, image_seq_length: int = 16, padding_side: str = "right") -> dict:
    """Three rows: one image, text alone, two images; the labels are the ids, so that masking is up to the model."""
    generator = torch.Generator().manual_seed(1)

    def words(count):
        return torch.randint(3, 1000, (count,), generator=generator).tolist()

    image = [image_token_id] * image_seq_length
    rows = [[1, *words(4), *image, *words(5)], [1, *words(9)], [1, *image, *words(3), *image, *words(6)]]
    length = max(map(len, rows))
    ids = torch.zeros(3, length, dtype=torch.int64)
    mask = torch.zeros(3, length, dtype=torch.int64)
    for index, row in enumerate(rows):
        place = slice(0, len(row)) if padding_side == "right" else slice(length - len(row), length)
        ids[index, place] = torch.tensor(row)
        mask[index, place] = 1
    pixels = torch.randn(3, 3, 56, 56, generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.clone(), "pixel_values": pixels}


@pytest.fixture(scope="session")
def tiny():
    """`tiny.config`, `tiny.model`, `tiny.batch`: see the functions above."""

    class Tiny:
        config = staticmethod(tiny_config)
        model = staticmethod(tiny_model)
        batch = staticmethod(tiny_batch)

    return Tiny


def build_tiny_processor() -> hf_llava_ft.LlavaProcessor:
    config = tiny_config()
    return hf_llava_ft.LlavaProcessor.build(
        load_tokenizer(GOLDEN / "tokenizer_tiny"), config.vision_config, version="v1", image_aspect_ratio="pad"
    )


def save_tiny_checkpoint(folder: Path) -> Path:
    """A whole native `llava` folder: model and processor."""
    model = tiny_model()
    model.generation_config.eos_token_id = [2]
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    build_tiny_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_processor():
    return build_tiny_processor()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """A whole native `llava` folder: model and processor. It is of all tests: what one writes into it, others read."""
    folder = save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")
    files = sorted(path.name for path in folder.iterdir())
    yield folder
    assert sorted(path.name for path in folder.iterdir()) == files, "a test wrote into tiny_checkpoint"


@pytest.fixture
def own_checkpoint(tiny_checkpoint, tmp_path) -> Path:
    """A copy of `tiny_checkpoint` to write into, as `llava-ft evaluate` does."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "own")


@pytest.fixture
def llava_json(tmp_path):
    """A function that writes a LLaVA JSON of `count` rows with pictures of different colours; returns file and
    folder."""
    import json

    def write(count: int = 4, with_text_rows: bool = False) -> tuple[Path, Path]:
        folder = tmp_path / "images"
        folder.mkdir(exist_ok=True)
        rows = []
        for index in range(count):
            question, answer = f"What is number {index}?", f"It is the number {index * 7}."
            turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
            row = {"id": f"row{index}", "conversations": turns}
            if not (with_text_rows and index % 3 == 2):
                Image.new("RGB", (60 + index, 40), (40 * index % 256, 90, 200)).save(folder / f"{index}.png")
                row["image"] = f"{index}.png"
                turns[0]["value"] = f"<image>\n{question}"
            rows.append(row)
        path = tmp_path / "data.json"
        path.write_text(json.dumps(rows))
        return path, folder

    return write
