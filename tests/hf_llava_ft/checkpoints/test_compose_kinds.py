"""Every kind of language model becomes a LLaVA that people without this package can use, and that trains.

Tiny real models with tokenizers and chat templates of each kind. One fresh process, in which this package cannot be
imported, loads all the folders and asks them.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    set_seed,
)

import hf_llava_ft
from hf_llava_ft.checkpoints.opening import load_model, load_processor
from hf_llava_ft.checkpoints.verify import default_image
from hf_llava_ft.modeling.part_names_llava import PROJECTOR, part_of
from hf_llava_ft.processing.tokenizer_llava import load_tokenizer
from hf_llava_ft.settings.arguments import TuningArguments
from hf_llava_ft.settings.training_arguments import LlavaTrainingArguments
from hf_llava_ft.training.tuning import with_lora
from tests import warm_python

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
}
CHATML_MARKUP = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# A turn as these models were tuned on it, in short.
TURN = "{% for message in messages %}"
CHATML = (
    TURN + "{% if loop.first and message['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant."
    "<|im_end|>\n' }}{% endif %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THINKING = (
    TURN + "{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' and loop.last %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INSTRUCT = (
    "{{ bos_token }}" + TURN + "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
PHI_3 = (
    TURN + "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}" + TURN + "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Kind:
    """A language model's configuration, its tokenizer, what ends an answer under its template, and what LoRA finds."""

    config: type
    tokenizer: str
    template: str | None
    stop: str
    spare_rows: int = 0
    lora: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


_PHI_3_LAYERS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
KINDS = {
    "llama": Kind(LlamaConfig, "sentencepiece", None, "</s>"),
    "mistral": Kind(MistralConfig, "sentencepiece", INSTRUCT, "</s>"),
    # No <s>, and more rows than words, as Qwen has it.
    "qwen2": Kind(Qwen2Config, "chatml", CHATML, "<|im_end|>", spare_rows=100),
    "qwen3": Kind(Qwen3Config, "chatml", THINKING, "<|im_end|>", spare_rows=100),
    "phi3": Kind(Phi3Config, "phi3", PHI_3, "<|end|>", spare_rows=30, lora=_PHI_3_LAYERS),
    "gemma": Kind(GemmaConfig, "gemma", GEMMA, "<end_of_turn>"),
    "gemma2": Kind(Gemma2Config, "gemma", GEMMA, "<end_of_turn>"),
    "gemma3": Kind(Gemma3TextConfig, "gemma", GEMMA, "<end_of_turn>"),
}
CASES = [(name, tie) for name in KINDS for tie in (False, True)]
WORDS = [
    "What is in the picture? It is number 7.",
    "A lighthouse by the sea, and a boat.",
    "USER ASSISTANT model user",
]


def tokenizer_of(kind: str, golden: Path) -> PreTrainedTokenizerFast:
    if kind in ("sentencepiece", "phi3"):
        tokenizer = load_tokenizer(golden / "tokenizer_tiny")
        if kind == "phi3":
            markup = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
            tokenizer.add_tokens([AddedToken(word, rstrip=True, special=True) for word in markup], special_tokens=True)
            tokenizer.eos_token = tokenizer.pad_token = "<|endoftext|>"
        return tokenizer
    if kind == "chatml":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        special, alphabet = CHATML_MARKUP, pre_tokenizers.ByteLevel.alphabet()
        names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    else:
        backend = Tokenizer(models.BPE(unk_token="<unk>"))
        backend.normalizer = normalizers.Replace(" ", "▁")
        backend.pre_tokenizer = pre_tokenizers.Split(Regex("▁"), "merged_with_next")
        backend.decoder = decoders.Replace("▁", " ")
        special, alphabet = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"), ["\n"]
        names = {name: f"<{name.removesuffix('_token')}>" for name in ("pad_token", "eos_token", "bos_token")}
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(special), initial_alphabet=list(alphabet), show_progress=False
    )
    backend.train_from_iterator(WORDS, trainer)
    if kind == "gemma":
        backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **names)


def write_language_model(folder: Path, name: str, tie: bool, golden: Path) -> None:
    kind = KINDS[name]
    tokenizer = tokenizer_of(kind.tokenizer, golden)
    tokenizer.chat_template = kind.template
    config = kind.config(
        **SIZES,
        vocab_size=len(tokenizer) + kind.spare_rows,
        tie_word_embeddings=tie,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    set_seed(1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():  # large enough that every part of the input shows in the logits
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


MESSAGES = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is in the picture?"}]}]

STRANGER = """
import json, sys
sys.modules["hf_llava_ft"] = None
from pathlib import Path
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor
root = Path(sys.argv[1])
messages = json.loads(sys.argv[2])
for folder in sorted(root.glob("llava-*")):
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], (folder, info)
    assert type(model).__module__.startswith("transformers."), type(model)
    processor = AutoProcessor.from_pretrained(folder)
    conversation = [
        {"role": "user", "content": [{"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A boat."}]},
    ]
    marked = processor.apply_chat_template(
        conversation, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
    )
    mask = torch.as_tensor(marked["assistant_masks"]).bool()
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    bos = processor.tokenizer.bos_token
    inputs = processor(
        text=prompt, images=Image.open(root / "image.png"), return_tensors="pt",
        add_special_tokens=not (bos and prompt.startswith(bos)),
    )
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
        answer = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    learned = marked["input_ids"][mask]
    text = torch.frombuffer(bytearray(prompt.encode()), dtype=torch.uint8)
    found = {"input_ids": inputs["input_ids"], "logits": logits, "answer": answer, "learned": learned, "text": text}
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, folder.with_suffix(".out"))
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory, golden) -> Path:
    """Folders `language-KIND-TIE`, `llava-KIND-TIE`, and what the fresh process found out about the latter."""
    root = tmp_path_factory.mktemp("kinds")
    set_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=56, patch_size=14)).save_pretrained(root / "tower")
    default_image().save(root / "image.png")
    for name, tie in CASES:
        write_language_model(root / f"language-{name}-{tie}", name, tie, golden)
        hf_llava_ft.compose_llava(
            str(root / "tower"), str(root / f"language-{name}-{tie}"), root / f"llava-{name}-{tie}"
        )
    done = warm_python.run(["-c", STRANGER, str(root), json.dumps(MESSAGES)], cwd=root)
    assert done.returncode == 0, done.stderr[-4000:]
    return root


@pytest.fixture(scope="module")
def loaded_kind(root):
    """`loaded_kind(name, tie)`: model and processor, loaded once; nobody changes them."""

    @functools.cache
    def load(name: str, tie: bool):
        processor = load_processor(str(root / f"llava-{name}-{tie}"))
        return load_model(str(root / f"llava-{name}-{tie}"), processor), processor

    return load


@pytest.mark.parametrize(("name", "tie"), CASES)
def test_a_stranger_gets_the_same_logits_and_the_marks(root, loaded_kind, name, tie):
    found = load_file((root / f"llava-{name}-{tie}").with_suffix(".out"))
    model, processor = loaded_kind(name, tie)
    prompt = processor.apply_chat_template(MESSAGES, add_generation_prompt=True)
    assert bytes(found["text"].tolist()).decode() == prompt
    inputs = processor(
        text=[prompt],
        images=[default_image()],
        add_special_tokens=not processor.begins_with_bos(prompt),
        return_tensors="pt",
    )
    assert torch.equal(inputs["input_ids"], found["input_ids"])
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 16
    with torch.no_grad():
        logits = model(**inputs).logits
        blank = model(**{**inputs, "pixel_values": inputs["pixel_values"] * 0}).logits
    torch.testing.assert_close(found["logits"], logits, rtol=0, atol=1e-5)
    assert (blank - logits).abs().max() > 1e-2  # the comparison would notice another picture
    # The answer is marked, and ends in the token on which generation stops.
    stop = processor.tokenizer.convert_tokens_to_ids(KINDS[name].stop)
    assert processor.stop_token_id == stop == found["learned"][-1]
    assert processor.tokenizer.decode(found["learned"]).strip() == f"A boat.{KINDS[name].stop}"
    assert stop in model.generation_config.eos_token_id
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tie


@pytest.mark.parametrize(("name", "tie"), CASES)
def test_the_language_model_is_the_one_it_was(root, loaded_kind, name, tie):
    source = AutoModelForCausalLM.from_pretrained(root / f"language-{name}-{tie}")
    model, processor = loaded_kind(name, tie)
    num_words = min(processor.image_token_id, source.config.vocab_size)
    ids = torch.tensor([[5, 9, 17, 21, 30, 31]])
    with torch.no_grad():
        expected, found = (part(ids).logits[..., :num_words] for part in (source, model))
    cap = getattr(source.config, "final_logit_softcapping", None)
    if cap is not None:  # native LLaVA does not squash the logits; their order is the same
        found = torch.tanh(found / cap) * cap
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight = embedding.weight.detach()
        middle = weight[:num_words].mean(dim=0)
        torch.testing.assert_close(weight[processor.image_token_id], middle, rtol=0, atol=1e-6)
        assert len(weight) % 64 == 0 or KINDS[name].spare_rows


@pytest.mark.parametrize("name", [name for name in KINDS if KINDS[name].template])
def test_prompts_are_those_of_the_language_model(root, loaded_kind, name):
    """Byte for byte what its own template writes; but Qwen3's, which drops what it wrote into earlier answers."""
    _, processor = loaded_kind(name, False)
    chat = [
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": "A boat."},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "It is."},
    ]
    for messages, generates in ((chat, False), (chat[:2], False), (chat[:3], True)):
        own = processor.tokenizer.apply_chat_template(
            messages, chat_template=KINDS[name].template, tokenize=False, add_generation_prompt=generates
        )
        ours = processor.apply_chat_template(messages, add_generation_prompt=generates)
        if name == "qwen3":
            own = own.replace("<think>\n\n</think>\n\n", "")
        assert ours == own
    text, spans = processor.render(chat)
    answers = [text[start:end].strip() for start, end in spans]
    assert answers == [f"A boat.{KINDS[name].stop}", f"It is.{KINDS[name].stop}"]


@pytest.mark.parametrize("name", KINDS)
def test_lora_moves_projector_and_adapters_of_every_layer(root, name, llava_json, tmp_path):
    folder = str(root / f"llava-{name}-{name in ('qwen2', 'gemma')}")
    processor = load_processor(folder)
    set_seed(0)
    model = with_lora(load_model(folder, processor), TuningArguments(lora_r=2, lora_dropout=0.0), folder)
    adapted = {key.split(".lora_A")[0].rsplit(".", 1)[-1] for key in model.state_dict() if ".lora_A" in key}
    assert adapted == set(KINDS[name].lora)
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    args = LlavaTrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        warmup_steps=0,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    data = hf_llava_ft.load_llava_json(*llava_json(4))
    trainer = hf_llava_ft.LlavaTrainer(model, args, train_dataset=data, processing_class=processor)
    trainer.train()
    moved = {key for key, parameter in model.named_parameters() if not torch.equal(parameter, before[key])}
    assert moved == {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert any(part_of(key) == PROJECTOR for key in moved)
