"""What is written here is the same to transformers 4.57 as to the transformers that wrote it: ids, pixels, logits,
answers. Read there in an environment of its own; see `older_reader.py`."""

import importlib.util
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from tokenizers import pre_tokenizers
from transformers import CLIPVisionModel, Qwen2Tokenizer, SiglipVisionModel, set_seed

import hf_llava_ft
from hf_llava_ft.checkpoints.convert import convert
from hf_llava_ft.checkpoints.merge import merge_adapter
from hf_llava_ft.checkpoints.opening import fit_to_processor, load_model, load_processor
from hf_llava_ft.checkpoints.verify import Probe, default_image, default_messages, reference_outputs
from hf_llava_ft.processing.chat_templates_llava import CHAT_TEMPLATES
from hf_llava_ft.processing.tokenizer_llava import load_tokenizer, prepare_tokenizer
from hf_llava_ft.quickstart.small_llava import LANGUAGE_MODEL_FILE, LANGUAGE_MODEL_PACKAGE
from hf_llava_ft.serving import export_for_serving
from hf_llava_ft.settings.arguments import TuningArguments
from hf_llava_ft.training.tuning import with_lora
from tests.hf_llava_ft.checkpoints.test_compose_kinds import CASES as KIND_CASES
from tests.hf_llava_ft.checkpoints.test_compose_kinds import write_language_model
from tests.older_reader import Read, Wanted, older_python, read_by
from tests.processing.conftest import byte_level_tokenizer
from tests.read_folders import MAX_NEW_TOKENS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

HOSTILE = [
    "",
    " ",
    "a",
    "  two spaces in front, three   inside, two behind  ",
    "\n\n\na new line first\r\nand\ttabs\t\t",
    "<s> and </s> and <unk> and <pad> in the text</s>",
    "<|im_start|>user\nnot markup<|im_end|>\n<|endoftext|>",
    "<image>",
    "<image>\nWhat is it?",
    " <image> <image>text<image>  text",
    "<im_start><image><im_end> and <imag e>",
    "Über straße, naïve façade, ¿qué? Привет, мир. 图片里有什么？ 日本語 한국어 عربى",
    "😀👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 \u200b\u00a0\u3000\ufeff",
    "▁ ▁▁ is SentencePiece's own space",
    "a" * 3000,
    " " * 700,
    "!?" * 500,
    "for index in range(10):\n    print(f'{index!r}')  # 3.14159 x 1,000,000 = $4?",
    "\x00\x01\x7f",
]
# Every picture of the reference set whose number of channels transformers 4 does not have to guess from its sides.
PICTURES = ("exact56", "gray_L", "odd_101x67", "palette_P", "rgba", "square", "tall", "tiny_4x7", "wide")


class Folders:
    """Folders that were written, and what the model in memory said, by a name that says what they are."""

    def __init__(self, root: Path, pictures: list[Path]):
        self.root, self.pictures = root, pictures
        self.wanted: dict[str, Wanted] = {}
        self.memory: dict[str, dict[str, torch.Tensor]] = {}

    def add(self, name: str, folder: Path, model=None, processor=None, base: Path | None = None) -> None:
        has_model = processor is not None
        self.wanted[name] = Wanted(folder, HOSTILE, self.pictures, default_messages(), has_model=has_model, base=base)
        if model is not None:
            picture = Image.open(self.pictures[0]).convert("RGB")
            probe = Probe(default_messages(), [picture], MAX_NEW_TOKENS)
            self.memory[name] = reference_outputs(model, processor, probe)


# ---------------------------------------------------------------------- what is written

ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "another base": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 20000.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6, "original_max_position_embeddings": 32},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
PINPOINTS = [[112, 56], [56, 112], [112, 112], [168, 56]]
# Name: text model, tower, tied, rope, and fields of the configuration.
MODELS = {
    "llama, clip": ("llama", "clip", False, "default", {}),
    "llama, siglip, tied, llama3": ("llama", "siglip", True, "llama3", {}),
    "llama, linear": ("llama", "clip", False, "linear", {}),
    "llama, dynamic": ("llama", "clip", False, "dynamic", {}),
    "mistral, another base": ("mistral", "clip", False, "another base", {}),
    "qwen2, siglip, tied, yarn": ("qwen2", "siglip", True, "yarn", {}),
    "qwen2, several layers": ("qwen2", "clip", False, "another base", {"vision_feature_layer": [-2, -1]}),
    "1.6, llama, linear": ("llama", "clip", False, "linear", {"image_aspect_ratio": "anyres"}),
    "1.6, qwen2, siglip, tied": ("qwen2", "siglip", True, "another base", {"image_aspect_ratio": "anyres"}),
}


def model_and_processor(tiny, golden, text, vision, tie, rope, fields, tokenizer="tokenizer_tiny"):
    if fields.get("image_aspect_ratio") == "anyres":
        fields = {**fields, "patch_merge_type": "spatial_unpad", "image_grid_pinpoints": PINPOINTS}
    model = tiny.model(text, vision, tie, rope=ROPES[rope], **fields)
    processor = hf_llava_ft.LlavaProcessor.build(
        load_tokenizer(golden / tokenizer),
        model.config.vision_config,
        version="v1",
        image_aspect_ratio=fields.get("image_aspect_ratio", "pad"),
        vision_feature_select_strategy=model.config.vision_feature_select_strategy,
        image_grid_pinpoints=fields.get("image_grid_pinpoints"),
    )
    fit_to_processor(model, processor)
    return model, processor


def save(model, processor, folder: Path) -> Path:
    model.save_pretrained(folder, checkpoint_format="llava-hf")
    processor.save_pretrained(folder)
    return folder


def moved(model):
    """The parameters of an adapter, far enough from where they begin to show."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def write_models(folders: Folders, tiny, golden) -> None:
    for name, parts in MODELS.items():
        model, processor = model_and_processor(tiny, golden, *parts)
        folders.add(name, save(model, processor, folders.root / name), model, processor)
    model, processor = model_and_processor(tiny, golden, "llama", "clip", True, "another base", {})
    model.to(torch.bfloat16)
    folders.add("bfloat16", save(model, processor, folders.root / "bfloat16"), model, processor)


def write_adapters(folders: Folders, tiny, golden) -> None:
    """An adapter of ours, merged, exported; and one of PEFT that unties a tied base."""
    for name, parts in {"llama": MODELS["llama, linear"], "1.6": MODELS["1.6, llama, linear"]}.items():
        base = save(*model_and_processor(tiny, golden, *parts), folders.root / f"base of {name}")
        processor = load_processor(str(base))
        tuning = TuningArguments(lora_r=4, lora_alpha=8, lora_dropout=0.0, lora_vision_tower=name == "1.6")
        model = moved(with_lora(load_model(str(base), processor), tuning, str(base)))
        folder = folders.root / f"adapter, {name}"
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        folders.add(f"adapter, {name}", folder, model, processor, base=base)
        merged = merge_adapter(folder, folders.root / f"merged, {name}").output_dir
        folders.add(f"merged, {name}", merged, model, processor)
    served = export_for_serving(str(folder), folders.root / "served", "vllm").output_dir
    folders.add("exported", served, model, processor)

    base = save(*model_and_processor(tiny, golden, *MODELS["qwen2, siglip, tied, yarn"]), folders.root / "tied base")
    processor = load_processor(str(base))
    config = LoraConfig(
        r=4, target_modules=r".*language_model.*\.q_proj", modules_to_save=["embed_tokens"], task_type="CAUSAL_LM"
    )
    model = moved(get_peft_model(load_model(str(base), processor), config))
    model.save_pretrained(folders.root / "embeddings adapter")
    processor.save_pretrained(folders.root / "embeddings adapter")
    merged = merge_adapter(folders.root / "embeddings adapter", folders.root / "untied").output_dir
    folders.add("merged, untied", merged, model, processor)


def write_converted(folders: Folders, golden) -> None:
    for name, place in {"converted, 1.5": "mlp2x_patch", "converted, 1.6": "anyres_spatial_unpad"}.items():
        source = str(folders.root / f"original, {name}")
        shutil.copytree(golden / "c_forward" / place / "checkpoint", source)
        shutil.copytree(golden / "tokenizer_tiny", source, dirs_exist_ok=True)
        folder = convert(source, folders.root / name, "llava-hf").output_dir
        processor = load_processor(source)
        model = load_model(source, processor)
        folders.add(name, folder, model, processor)


def write_composed(folders: Folders, tiny, golden) -> None:
    for name, tie in KIND_CASES:
        language, folder = folders.root / f"language {name} {tie}", folders.root / f"composed {name} {tie}"
        write_language_model(language, name, tie, golden)
        vision = "siglip" if name == "qwen2" else "clip"
        set_seed(0)
        tower = {"clip": CLIPVisionModel, "siglip": SiglipVisionModel}[vision](
            tiny.config(vision=vision).vision_config
        )
        tower.save_pretrained(folders.root / vision)
        hf_llava_ft.compose_llava(str(folders.root / vision), str(language), folder)
        processor = load_processor(str(folder))
        folders.add(f"composed, {name}, tied {tie}", folder, load_model(str(folder), processor), processor)


def write_processors(folders: Folders, tiny, golden) -> None:
    """Every kind of tokenizer, and every template, as in the folder of an adapter."""

    def write(name: str, tokenizer, version: str | None, image_start_end: bool = False) -> None:
        processor = hf_llava_ft.LlavaProcessor.build(
            tokenizer,
            tiny.config().vision_config,
            version=version,
            image_aspect_ratio="pad",
            image_start_end=image_start_end,
        )
        processor.save_pretrained(folders.root / name)
        folders.add(name, folders.root / name)

    for kind, make in tokenizers(golden).items():
        write(f"tokenizer, {kind}", make(), None)
        write(f"tokenizer, {kind}, start and end", make(), None, image_start_end=True)
    for template in CHAT_TEMPLATES:
        tokenizer = load_tokenizer(golden / "tokenizer_tiny")
        tokenizer.add_tokens(["<|im_end|>", "<|eot_id|>"], special_tokens=True)  # by which some templates stop
        write(f"template, {template}", tokenizer, template)


def tokenizers(golden) -> dict:
    """Functions that make a tokenizer, by its kind."""

    def byte_level(add_prefix_space: bool):
        tokenizer = byte_level_tokenizer(trim_offsets=True)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
        return tokenizer

    def qwen2():
        state = json.loads(byte_level(False).backend_tokenizer.to_str())
        merges = [tuple(pair) for pair in state["model"]["merges"]]
        return Qwen2Tokenizer(vocab=state["model"]["vocab"], merges=merges)

    def smollm2():
        package = importlib.util.find_spec(LANGUAGE_MODEL_PACKAGE)
        tokenizer = load_tokenizer(str(Path(package.origin).parent), gguf_file=LANGUAGE_MODEL_FILE)
        tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
        return tokenizer

    return {
        "llama": lambda: load_tokenizer(golden / "tokenizer_llama"),
        "tiny": lambda: load_tokenizer(golden / "tokenizer_tiny"),
        "byte-level": lambda: byte_level(False),
        "byte-level, space in front": lambda: byte_level(True),
        "qwen2": qwen2,
        "smollm2": smollm2,
    }


@pytest.fixture(scope="module")
def folders(tiny, golden, tmp_path_factory) -> Folders:
    root = tmp_path_factory.mktemp("folders")
    default_image().save(root / "ramps.png")
    pictures = [root / "ramps.png", *(golden / "b_images" / "png" / f"{name}.png" for name in PICTURES)]
    written = Folders(root, pictures)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(golden)  # the reference folders name their tower relative to this one
        write_models(written, tiny, golden)
        write_adapters(written, tiny, golden)
        write_converted(written, golden)
        write_composed(written, tiny, golden)
        write_processors(written, tiny, golden)
    return written


@pytest.fixture(scope="module")
def read(folders) -> dict[str, tuple[Read, Read]]:
    """What a stranger reads with the transformers that wrote, and with 4.57."""
    wanted = list(folders.wanted.values())
    here = read_by(sys.executable, wanted, folders.root / "read here")
    there = read_by(older_python(), wanted, folders.root / "read there")
    return dict(zip(folders.wanted, zip(here, there, strict=True), strict=True))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


# ---------------------------------------------------------------------- what is read


def test_every_folder_is_read(read):
    errors = {name: each.encoded["error"] for name, pair in read.items() for each in pair if "error" in each.encoded}
    assert not errors


def test_texts_become_the_same_ids(read):
    different = []
    for name, (here, there) in read.items():
        for field in ("ids", "bare_ids", "decoded", "answers"):
            for text, mine, theirs in zip(HOSTILE, here.encoded[field], there.encoded[field], strict=True):
                if mine != theirs:
                    different.append((name, field, text[:40], mine[:30], theirs[:30]))
        for field in ("special", "special_ids", "size", "padding_side", "processor", "prompt", "prompt_of_tokenizer"):
            if here.encoded[field] != there.encoded[field]:
                different.append((name, field, here.encoded[field], there.encoded[field]))
        if not torch.equal(here.tensors["prompt_ids"], there.tensors["prompt_ids"]):
            different.append((name, "prompt_ids"))
    assert not different, "\n".join(map(str, different[:40]))


def test_the_ids_of_a_folder_are_those_of_the_tokenizer_that_was_saved(read, golden):
    for kind, make in tokenizers(golden).items():
        tokenizer = prepare_tokenizer(make())
        expected = [tokenizer(text)["input_ids"] for text in HOSTILE]
        for each in read[f"tokenizer, {kind}"]:
            assert each.encoded["ids"] == expected, kind


def test_pictures_become_the_same_pixels(read):
    for name, (here, there) in read.items():
        for field in here.tensors:
            if field.startswith("pixels"):
                assert here.tensors[field].shape == there.tensors[field].shape, (name, field)
                assert (here.tensors[field] - there.tensors[field]).abs().max() < 1e-6, (name, field)


# transformers 4 multiplies the features of a picture by the square root of Gemma's width, as it does with words, and
# transformers 5 does not. And it has a module between the tower and its layers, so that PEFT finds no place for LoRA
# on the tower. No file can say that: merged, the second is the same.
OTHER_THERE = ("composed, gemma, ", "composed, gemma2, ", "adapter, 1.6")


def test_what_no_file_can_say_is_another_model_there(folders, read):
    names = [name for name in folders.memory if name.startswith(OTHER_THERE)]
    assert len(names) == 5
    for name in names:
        here, there = read[name]
        assert relative(here.tensors["logits"], folders.memory[name]["logits"]) < 1e-5, name
        assert relative(there.tensors["logits"], folders.memory[name]["logits"]) > 1e-3, name
        assert relative(there.tensors["text_logits"], here.tensors["text_logits"]) < 1e-5, name


def test_models_give_the_same_logits_and_answers(folders, read):
    different = []
    for name, memory in folders.memory.items():
        readers = ("here",) if name.startswith(OTHER_THERE) else ("here", "4.57")
        for reader, each in zip(readers, read[name], strict=False):
            assert torch.equal(each.tensors["prompt_ids"], memory["input_ids"]), (name, reader)
            tolerance = 2e-2 if name == "bfloat16" else 1e-5
            difference = relative(each.tensors["logits"], memory["logits"])
            if difference > tolerance:
                different.append((name, reader, difference))
            length = each.tensors["answer_ids"].shape[1]
            if name != "bfloat16" and not torch.equal(each.tensors["answer_ids"], memory["answer_ids"][:, :length]):
                different.append((name, reader, each.tensors["answer_ids"], memory["answer_ids"]))
    assert not different, "\n".join(map(str, different))


def test_the_weights_come_in_one_dtype_that_both_read(folders, read):
    for name in folders.memory:
        expected = ["torch.bfloat16"] if name == "bfloat16" else ["torch.float32"]
        assert [each.encoded["dtypes"] for each in read[name]] == [expected, expected], name


def test_no_file_names_this_machine(folders):
    words = ("is_local", "local_files_only", "name_or_path", "_commit_hash", str(folders.root), str(Path.home()))
    for name, wanted in folders.wanted.items():
        for path in wanted.folder.rglob("*.json"):
            if path.name != "adapter_config.json":  # which names its base, here a folder
                text = path.read_text(encoding="utf-8")
                assert not [word for word in words if word in text], (name, path.name)


# ---------------------------------------------------------------------- what must be caught


def without_rope(settings: dict) -> None:
    del settings["text_config"]["rope_scaling"]


def without_space_in_front(settings: dict) -> None:
    del settings["add_prefix_space"]


def with_the_class_of_transformers_5(settings: dict) -> None:
    settings["tokenizer_class"] = "TokenizersBackend"


def tied_inside(settings: dict) -> None:
    settings["text_config"]["tie_word_embeddings"] = True


@pytest.mark.parametrize(
    ("name", "file", "change"),
    [
        ("llama, linear", "config.json", without_rope),
        ("merged, untied", "config.json", tied_inside),
        ("tokenizer, byte-level, space in front", "tokenizer_config.json", without_space_in_front),
        ("tokenizer, tiny", "tokenizer_config.json", with_the_class_of_transformers_5),
    ],
)
def test_what_is_written_for_older_readers_is_needed(folders, read, tmp_path, name, file, change):
    shutil.copytree(folders.wanted[name].folder, tmp_path / "folder")
    path = tmp_path / "folder" / file
    settings = json.loads(path.read_text(encoding="utf-8"))
    change(settings)
    path.write_text(json.dumps(settings), encoding="utf-8")
    wanted = replace(folders.wanted[name], folder=tmp_path / "folder")
    [found] = read_by(older_python(), [wanted], tmp_path / "read")
    if "error" in found.encoded:
        assert change is with_the_class_of_transformers_5
    elif wanted.has_model:
        assert relative(found.tensors["logits"], folders.memory[name]["logits"]) > 1e-3
    else:
        assert found.encoded["ids"] != read[name][1].encoded["ids"]
