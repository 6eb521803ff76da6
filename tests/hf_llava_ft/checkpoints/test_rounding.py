"""What rounding takes of an adapter is measured: on weights whose rounding is computed by hand."""

import json
import math
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from hf_llava_ft.checkpoints import rewriting, rounding, verify
from hf_llava_ft.checkpoints.adapters import adapter_weights
from hf_llava_ft.checkpoints.merge import merge_adapter
from hf_llava_ft.checkpoints.opening import load_model, load_processor
from hf_llava_ft.checkpoints.rounding import Rounding, merged
from hf_llava_ft.modeling.part_names_llava import PROJECTOR
from hf_llava_ft.settings.arguments import TuningArguments
from hf_llava_ft.training.tuning import with_tuning

ONE = 2.0**-6
ULP = ONE * 2.0**-7  # between ONE and twice that, bfloat16 has nothing between two multiples of it
# What the adapter adds to each weight of a matrix, whose weights are all ONE, and what a multiple of ULP leaves of it.
LAYERS = (1.25 * ULP, 3.25 * ULP)
PROJECTOR_CHANGE = 2.25 * ULP


@pytest.fixture(scope="module")
def of_ones(tiny, tiny_processor, tmp_path_factory):
    """A bfloat16 LLaVA in which what the adapter beside it changes is ONE everywhere."""
    folder = tmp_path_factory.mktemp("rounding")
    model = tiny.model().to(torch.bfloat16)
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            layer.self_attn.q_proj.weight.fill_(ONE)
        for parameter in model.get_submodule(f"model.{PROJECTOR}").parameters():
            parameter.fill_(ONE)
    model.save_pretrained(folder / "base")
    tiny_processor.save_pretrained(folder / "base")

    processor = load_processor(str(folder / "base"))
    tuning = TuningArguments(lora_r=1, lora_alpha=1, lora_target_modules=["q_proj"])
    adapted = with_tuning(load_model(str(folder / "base"), processor), tuning, str(folder / "base"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_A." in name:
                parameter.fill_(1.0)
            elif ".lora_B." in name:
                parameter.fill_(LAYERS[int(name.split(".layers.")[1][0])])
            elif ".modules_to_save." in name:
                parameter.fill_(ONE + PROJECTOR_CHANGE)
    adapted.save_pretrained(folder / "adapter")
    processor.save_pretrained(folder / "adapter")
    return folder


def expected_share(of_ones) -> float:
    """Each weight loses a quarter of ULP, and rounding to the nearest keeps the rest."""
    weights = load_file(of_ones / "base" / "model.safetensors")
    in_matrix = next(
        tensor.numel() for name, tensor in weights.items() if name.endswith("q_proj.weight") and "language" in name
    )
    in_projector = sum(tensor.numel() for name, tensor in weights.items() if PROJECTOR in name)
    lost = (2 * in_matrix + in_projector) * (0.25 * ULP) ** 2
    learned = in_matrix * sum(change**2 for change in LAYERS) + in_projector * PROJECTOR_CHANGE**2
    return math.sqrt(lost / learned)


def test_the_share_that_rounding_takes_is_the_computed_one(of_ones):
    saved = adapter_weights(str(of_ones / "adapter"))
    whole, found = merged(load_model(str(of_ones / "adapter")), saved)
    assert found.dtype == torch.bfloat16
    assert found.lost_share == pytest.approx(expected_share(of_ones), rel=1e-6)
    weight = whole.model.language_model.layers[0].self_attn.q_proj.weight
    assert torch.equal(weight, torch.full_like(weight, ONE + ULP))
    # Without the file, the projector counts as it was rounded when it was loaded.
    _, unsaved = merged(load_model(str(of_ones / "adapter")))
    assert unsaved.lost_share != pytest.approx(found.lost_share, rel=1e-2)


@pytest.mark.slow  # two fresh processes
def test_merge_and_verify_tell_the_share_that_rounding_takes(of_ones, llava_ft, tmp_path):
    share = expected_share(of_ones)
    assert 0.1 < share < 0.13
    out, told = tmp_path / "merged", tmp_path / "told.json"
    code, _, err = llava_ft("merge", "--adapter", of_ones / "adapter", "--output_dir", out, "--json", told)
    assert code == 0, err
    assert f"rounding to bfloat16 loses {100 * share:.3g} %" in err and "--dtype float32" in err
    result = json.loads(told.read_text())
    assert result["dtype"] == "bfloat16" and result["lost_share"] == pytest.approx(share, rel=1e-6)
    written = load_file(out / "model.safetensors")
    [first] = [
        tensor
        for name, tensor in written.items()
        if name.endswith("layers.0.self_attn.q_proj.weight") and "language" in name
    ]
    assert torch.equal(first, torch.full_like(first, ONE + ULP))

    code, _, err = llava_ft("verify", "--model", out, "--adapter", of_ones / "adapter", "--json", told)
    against = json.loads(told.read_text())["against_adapter"]
    assert against["lost_share"] == pytest.approx(share, rel=1e-6)
    assert f"of what was learned, {100 * share:.3g} % is lost" in err and f"{against['logit_difference']:.1e}" in err
    assert code == (0 if against["logit_difference"] <= 5e-2 else 1)


def test_in_float32_next_to_nothing_is_lost(of_ones):
    model = load_model(str(of_ones / "adapter"), dtype=torch.float32)
    whole, found = merged(model)
    assert found.lost_share < 1e-7 and found.dtype == torch.float32
    assert "loses" not in found.sentence and "float32 keeps all but" in found.sentence
    weight = whole.model.language_model.layers[1].self_attn.q_proj.weight
    assert torch.equal(weight, torch.full_like(weight, ONE + LAYERS[1]))


@pytest.mark.parametrize("use_dora", [False, True])
def test_merged_weights_are_those_of_peft(tiny, use_dora):
    def adapted():
        torch.manual_seed(0)
        model = with_tuning(
            tiny.model(), TuningArguments(lora_r=2, use_dora=use_dora, lora_target_modules=["q_proj"]), ""
        )
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
        return model.eval()

    ours, _ = merged(adapted())
    theirs = adapted().merge_and_unload().state_dict()
    assert ours.state_dict().keys() == theirs.keys()
    for name, weight in ours.state_dict().items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("at_once", [5, 2**18])
def test_sums_are_written_into_the_memory_of_the_base_piece_by_piece_and_its_file_stays(of_ones, monkeypatch, at_once):
    monkeypatch.setattr(rounding, "_AT_ONCE", at_once)
    file = of_ones / "base" / "model.safetensors"
    before = file.read_bytes()
    model = load_model(str(of_ones / "adapter"))
    held = model.get_base_model().model.language_model.layers[0].self_attn.q_proj.base_layer.weight.data_ptr()
    whole, found = merged(model, adapter_weights(str(of_ones / "adapter")))
    weight = whole.model.language_model.layers[0].self_attn.q_proj.weight
    assert weight.data_ptr() == held and torch.equal(weight, torch.full_like(weight, ONE + ULP))
    assert found.lost_share == pytest.approx(expected_share(of_ones), rel=1e-6)
    assert file.read_bytes() == before


@pytest.mark.parametrize("whole", ["lm_head", "embed_tokens"])
def test_what_was_trained_whole_is_merged_into_a_base_whose_embeddings_are_tied(whole):
    def adapted():
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        base = LlamaForCausalLM(LlamaConfig(vocab_size=32, tie_word_embeddings=True, **sizes))
        model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=[whole]))
        model.get_submodule("base_model.model." + PLACES[whole]).modules_to_save["default"].weight.data += 0.25
        return model

    ours, found = merged(adapted())
    assert found.num_weights == 2 and found.learned == pytest.approx(0.25 * math.sqrt(32 * 16))
    theirs = adapted().merge_and_unload().state_dict()
    for name, weight in ours.state_dict().items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-6, atol=1e-7)


PLACES = {"lm_head": "lm_head", "embed_tokens": "model.embed_tokens"}


def test_nothing_learned_is_nothing_lost():
    assert Rounding(torch.bfloat16, 0.0, 0.0, 2).lost_share == 0.0


def test_a_model_that_is_not_that_of_the_adapter_is_refused(of_ones, llava_ft, tiny_checkpoint):
    code, _, err = llava_ft("verify", "--model", of_ones / "adapter", "--adapter", of_ones / "adapter")
    assert code == 2 and "is for a merged model" in err
    code, _, err = llava_ft("verify", "--model", of_ones / "base", "--adapter", of_ones / "base")
    assert code == 2 and "give the adapter that was merged" in err


def test_a_merge_has_let_its_model_go_when_the_check_loads_another(of_ones, tmp_path, monkeypatch):
    seen = []
    adapted = weakref.WeakSet()

    def with_model_seen(*arguments, **settings):
        model = load_model(*arguments, **settings)
        adapted.update([model, model.get_base_model()])
        return model

    def fresh_python(*arguments, **settings):
        seen.append(len(adapted))
        return in_fresh_python(*arguments, **settings)

    in_fresh_python = verify.fresh_python
    monkeypatch.setattr(verify, "fresh_python", fresh_python)
    monkeypatch.setattr(rewriting, "load_model", with_model_seen)
    merge_adapter(of_ones / "adapter", tmp_path / "merged")
    assert seen == [0]
