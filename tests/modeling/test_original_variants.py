"""Checkpoints of the original of every make, against the original's computation written out with plain modules.

Its own figures, of two makes, are compared in test_original_forward.py. Here the checkpoints are written by hand, in
its layout, and what is expected is put together from transformers' tower and language model, an `nn.Sequential` and
`torch.cat`: no class of ours takes part in it.
"""

import json
from dataclasses import dataclass, field, replace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import hf_llava_ft  # registers the original's model types

IMAGE_INDEX, IGNORE_INDEX = -200, -100
VOCABULARY = 1024
LANGUAGE_MODELS = {
    "llava_llama": (LlamaConfig, LlamaForCausalLM),
    "llava_mistral": (MistralConfig, MistralForCausalLM),
    "llava_qwen": (Qwen2Config, Qwen2ForCausalLM),
    "llava_qwen2": (Qwen2Config, Qwen2ForCausalLM),
}


@dataclass(frozen=True)
class Variant:
    """What config.json of the original says; `language` is for the language model alone."""

    model_type: str = "llava_llama"
    projector: str = "mlp2x_gelu"
    select_layer: int = -2
    select_feature: str = "patch"
    tower_inside: bool = True
    hidden_size: int = 64
    language: dict = field(default_factory=dict)


VARIANTS = {
    "linear, class token, grouped queries": Variant(
        projector="linear", select_feature="cls_patch", language={"num_key_value_heads": 2}
    ),
    "mlp3x, last layer": Variant(projector="mlp3x_gelu", select_layer=-1),
    "mlp3x, class token, tower by name": Variant(
        projector="mlp3x_gelu", select_feature="cls_patch", tower_inside=False
    ),
    "mlp1x": Variant(projector="mlp1x_gelu"),
    "first layer, one key head": Variant(select_layer=1, language={"num_key_value_heads": 1}),
    "identity": Variant(projector="identity", hidden_size=32),
    "identity, class token, last layer": Variant(
        projector="identity", hidden_size=32, select_layer=-1, select_feature="cls_patch"
    ),
    "mistral": Variant("llava_mistral", language={"num_key_value_heads": 2, "sliding_window": None}),
    "mistral, window": Variant("llava_mistral", language={"num_key_value_heads": 2, "sliding_window": 8}),
    "mistral, tower by name": Variant("llava_mistral", tower_inside=False, language={"sliding_window": 4096}),
    "qwen": Variant("llava_qwen", language={"num_key_value_heads": 2}),
    "qwen2, tied head, linear": Variant("llava_qwen2", projector="linear", language={"tie_word_embeddings": True}),
    "another base of rotation": Variant(language={"rope_theta": 500.0, "rms_norm_eps": 1e-3}),
}


class Plain(nn.Module):
    """The original's model, put together."""

    def __init__(self, variant: Variant, tower: CLIPVisionModel):
        super().__init__()
        config_class, model_class = LANGUAGE_MODELS[variant.model_type]
        language = dict(variant.language)
        rope = {"rope_type": "default", "rope_theta": language.pop("rope_theta", 10000.0)}
        config = config_class(
            **{
                "hidden_size": variant.hidden_size,
                "intermediate_size": 96,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "vocab_size": VOCABULARY,
                "max_position_embeddings": 512,
                "pad_token_id": 0,
                "rope_parameters": rope,
                "tie_word_embeddings": False,
                **language,
            }
        )
        self.variant, self.tower, self.language_model = variant, tower, model_class(config)
        widths = [tower.config.hidden_size, *[variant.hidden_size] * num_layers(variant.projector)]
        layers: list[nn.Module] = []
        for width_in, width_out in zip(widths, widths[1:], strict=False):
            layers += [nn.GELU()] * bool(layers) + [nn.Linear(width_in, width_out)]
        self.projector = nn.Sequential(*layers)

    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            states = self.tower(pixel_values, output_hidden_states=True).hidden_states
        chosen = states[self.variant.select_layer]
        return self.projector(chosen if self.variant.select_feature == "cls_patch" else chosen[:, 1:])

    def forward(self, rows: list[tuple[list[int], list[int]]], pixel_values: torch.Tensor):
        """`rows` are ids and labels with -200 for an image; padded on the right."""
        features = iter(self.features(pixel_values))
        embed = self.language_model.get_input_embeddings()
        spliced = []
        for ids, labels in rows:
            embeddings, kept = [], []
            for token, label in zip(ids, labels, strict=True):
                part = next(features) if token == IMAGE_INDEX else embed(torch.tensor([token]))
                embeddings.append(part)
                kept += [IGNORE_INDEX] * len(part) if token == IMAGE_INDEX else [label]
            spliced.append((torch.cat(embeddings), torch.tensor(kept)))
        lengths = [len(labels) for _, labels in spliced]
        pad = nn.utils.rnn.pad_sequence
        return self.language_model(
            inputs_embeds=pad([embeddings for embeddings, _ in spliced], batch_first=True),
            labels=pad([labels for _, labels in spliced], batch_first=True, padding_value=IGNORE_INDEX),
            attention_mask=pad([torch.ones(length, dtype=torch.int64) for length in lengths], batch_first=True),
        )

    def original_state_dict(self) -> dict[str, torch.Tensor]:
        """Under the names of the original's files; a tied head is not in them."""
        weights = dict(self.language_model.state_dict())
        if self.variant.language.get("tie_word_embeddings"):
            del weights["lm_head.weight"]
        for name, tensor in self.projector.state_dict().items():
            place = "" if self.variant.projector == "linear" else f"{name.split('.')[0]}."
            weights[f"model.mm_projector.{place}{name.split('.')[1]}"] = tensor
        if self.variant.tower_inside:
            for name, tensor in self.tower.state_dict().items():
                if "position_ids" not in name:
                    bare = name.removeprefix("vision_model.")
                    weights[f"model.vision_tower.vision_tower.vision_model.{bare}"] = tensor
        return {name: tensor.clone() for name, tensor in weights.items()}

    def original_config(self) -> dict:
        """As the original writes it under transformers 4.37: flat, with the tower named."""
        variant, config = self.variant, self.language_model.config
        flat = {name: value for name, value in config.to_dict().items() if not name.startswith("_")}
        for name in ("rope_parameters", "layer_types", "dtype"):
            flat.pop(name, None)
        return flat | {
            "model_type": variant.model_type,
            "rope_theta": config.rope_parameters["rope_theta"],
            "torch_dtype": "float32",
            "mm_hidden_size": self.tower.config.hidden_size,
            "mm_projector_type": variant.projector,
            "mm_vision_select_layer": variant.select_layer,
            "mm_vision_select_feature": variant.select_feature,
            "mm_vision_tower": "tiny-clip",
            "mm_use_im_start_end": False,
            "mm_use_im_patch_token": False,
            "use_mm_proj": True,
        }


def num_layers(projector: str) -> int:
    return {"linear": 1, "identity": 0}.get(projector) if not projector.startswith("mlp") else int(projector[3])


ROWS = [
    [1, 7, 8, IMAGE_INDEX, 9, 10, 11, 12, 2],
    [1, 20, 21, 22, 23, 2],
    [1, IMAGE_INDEX, 30, 31, IMAGE_INDEX, 32, 33, 34, 2],
]
NUM_PROMPT = 5  # ids at the front of a row that are not supervised


@pytest.fixture
def case(golden, tmp_path, monkeypatch):
    """`case(variant)`: the original's model, and ours opened from the files that it would have written."""
    monkeypatch.chdir(golden)

    def make(variant: Variant) -> tuple[Plain, hf_llava_ft.LlavaForCausalLM]:
        torch.manual_seed(0)
        tower = CLIPVisionModel.from_pretrained("tiny-clip")
        if variant.tower_inside:  # other weights than those in the folder that config.json names
            for parameter in tower.parameters():
                nn.init.normal_(parameter, std=0.1)
        plain = Plain(variant, tower).eval()
        for part in (plain.projector, plain.language_model):
            for parameter in part.parameters():
                nn.init.normal_(parameter, mean=float(parameter.dim() == 1) / 2, std=0.1)
        save_file(plain.original_state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / "config.json").write_text(json.dumps(plain.original_config()))
        ours = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert type(ours) is hf_llava_ft.LlavaForCausalLM
        return plain, ours.eval()

    return make


def inputs() -> tuple[list[tuple[list[int], list[int]]], torch.Tensor]:
    rows = [(ids, [IGNORE_INDEX] * NUM_PROMPT + ids[NUM_PROMPT:]) for ids in ROWS]
    pixels = torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    return rows, pixels


def our_batch(model, rows, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
    count, image = model.config.image_seq_length, model.config.image_token_id
    expanded = []
    for ids, labels in rows:
        pairs = [
            pair
            for token, label in zip(ids, labels, strict=True)
            for pair in ([(image, IGNORE_INDEX)] * count if token == IMAGE_INDEX else [(token, label)])
        ]
        expanded.append(torch.tensor(pairs))
    padded = nn.utils.rnn.pad_sequence(expanded, batch_first=True, padding_value=0)
    mask = nn.utils.rnn.pad_sequence([torch.ones(len(row), dtype=torch.int64) for row in expanded], batch_first=True)
    labels = padded[..., 1].masked_fill(mask == 0, IGNORE_INDEX)
    return {"input_ids": padded[..., 0], "labels": labels, "attention_mask": mask, "pixel_values": pixel_values}


@pytest.mark.parametrize("name", VARIANTS)
def test_loss_logits_and_gradients_are_those_of_the_parts_put_together(case, name):
    plain, ours = case(VARIANTS[name])
    rows, pixels = inputs()
    batch = our_batch(ours, rows, pixels)
    expected, found = plain(rows, pixels), ours(**batch)
    attended = batch["attention_mask"] == 1
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.logits[attended][:, :VOCABULARY], expected.logits[attended], rtol=1e-5, atol=1e-5)
    expected.loss.backward()
    found.loss.backward()
    language_model, projector = plain.language_model, plain.projector
    pairs = {
        "embedding": (ours.get_input_embeddings().weight, language_model.get_input_embeddings().weight),
        "head": (ours.lm_head.weight, language_model.lm_head.weight),
        "norm": (ours.model.language_model.norm.weight, language_model.model.norm.weight),
    }
    for index, layer in enumerate(language_model.model.layers):
        for part, weight in layer.named_parameters():
            pairs[f"{index}.{part}"] = (ours.get_parameter(f"model.language_model.layers.{index}.{part}"), weight)
    linears = [layer for layer in projector if isinstance(layer, nn.Linear)]
    for index, layer in enumerate(linears, 1):
        for part, weight in layer.named_parameters():
            pairs[f"projector {index} {part}"] = (
                ours.get_parameter(f"model.multi_modal_projector.linear_{index}.{part}"),
                weight,
            )
    for part, (mine, theirs) in pairs.items():
        scale = theirs.grad.abs().max()
        assert scale > 0, part
        torch.testing.assert_close(
            mine.grad[: len(theirs)], theirs.grad, rtol=1e-4, atol=1e-5 * float(scale), msg=part
        )


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("linear, class token, grouped queries", {"select_feature": "patch"}),
        ("mlp3x, last layer", {"select_layer": -2}),
        ("identity", {"select_layer": -1}),
        ("mistral, window", {"language": {"num_key_value_heads": 2, "sliding_window": None}}),
        ("another base of rotation", {"language": {"rope_theta": 10000.0, "rms_norm_eps": 1e-3}}),
        ("another base of rotation", {"language": {"rope_theta": 500.0, "rms_norm_eps": 1e-5}}),
    ],
)
def test_a_setting_that_is_not_followed_shows_in_the_loss(case, name, wrong):
    plain, ours = case(VARIANTS[name])
    rows, pixels = inputs()
    loss = ours(**our_batch(ours, rows, pixels)).loss
    other = Plain(replace(VARIANTS[name], **wrong), plain.tower).eval()
    other.load_state_dict(plain.state_dict())
    torch.testing.assert_close(loss, plain(rows, pixels).loss, rtol=1e-5, atol=0)
    assert abs(loss - other(rows, pixels).loss) > 1e-4 * loss


@pytest.mark.parametrize("name", VARIANTS)
def test_it_is_saved_as_it_came(case, tmp_path, name):
    plain, ours = case(VARIANTS[name])
    ours.save_pretrained(tmp_path / "again")
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, tmp_path / "again"))
    assert {key: value for key, value in before.items() if after.get(key) != value} == {}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    for parameter, weight in again.named_parameters():
        assert torch.equal(weight, ours.get_parameter(parameter)), parameter
    rows, pixels = inputs()
    torch.testing.assert_close(again(**our_batch(again, rows, pixels)).loss, plain(rows, pixels).loss)
