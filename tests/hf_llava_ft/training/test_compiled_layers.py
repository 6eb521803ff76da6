"""Compiled layers of the language model: the same training, the same names, one compilation for all packs."""

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import set_seed

import hf_llava_ft
from hf_llava_ft.errors import UserError
from hf_llava_ft.settings.arguments import TuningArguments
from hf_llava_ft.settings.training_arguments import LlavaTrainingArguments
from hf_llava_ft.training.speed import compiled
from hf_llava_ft.training.tuning import with_tuning


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.fixture
def prepared(loaded, llava_json, tmp_path):
    """A function that makes a Trainer with packing."""
    data = hf_llava_ft.load_llava_json(*llava_json(12, with_text_rows=True))

    def make(train_type="lora", **settings):
        model, processor = loaded()
        set_seed(1)
        tuning = TuningArguments(train_type=train_type, lora_r=4, lora_alpha=8, lora_dropout=0.0)
        model = with_tuning(model, tuning, "")
        given = {"max_steps": 4, "learning_rate": 1e-3, "save_strategy": "no", "packing": True, "logging_steps": 1}
        given |= {"max_tokens_per_batch": 150, "per_device_eval_batch_size": 3}
        args = LlavaTrainingArguments(
            output_dir=str(tmp_path / "out"), disable_tqdm=True, use_cpu=True, **(given | settings)
        )
        return hf_llava_ft.LlavaTrainer(
            model=model, args=args, train_dataset=data, eval_dataset=data, processing_class=processor
        )

    return make


def trained(trainer):
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {name: weight.clone() for name, weight in trainer.model.state_dict().items()}


@pytest.mark.parametrize(
    ("backend", "train_type"),
    [
        ("aot_eager", "lora"),
        pytest.param("aot_eager", "full", marks=pytest.mark.slow),
        pytest.param("inductor", "lora", marks=pytest.mark.slow),
        pytest.param("inductor", "full", marks=pytest.mark.slow),
    ],
)
def test_training_is_the_same_under_the_same_names(prepared, monkeypatch, backend, train_type):
    monkeypatch.setattr(compiled, "BACKEND", backend)
    losses, weights = trained(prepared(train_type))
    trainer = prepared(train_type, compile="true")
    assert trainer.is_compiled and "padding, since layers are compiled" in trainer.told_of_padding()
    found, of_compiled = trained(trainer)
    assert found == pytest.approx(losses, rel=1e-4)
    assert of_compiled.keys() == weights.keys()  # no `_orig_mod`
    for name, weight in of_compiled.items():
        torch.testing.assert_close(weight, weights[name], rtol=1e-3, atol=1e-4, msg=name)
    # Packs of other documents and other layers take the graphs of the first.
    num_graphs = counters["stats"]["unique_graphs"]
    assert 0 < num_graphs <= 4, num_graphs
    trainer.evaluate()
    assert counters["stats"]["unique_graphs"] == num_graphs  # which has other shapes, and is not compiled


def test_what_is_in_the_way_is_said_and_auto_is_off_on_a_cpu(prepared):
    assert not prepared().is_compiled
    with pytest.raises(UserError, match="--compile true: this run cannot be compiled, since its batches have another"):
        prepared(packing=False, max_tokens_per_batch=None, compile="true")
    with pytest.raises(UserError, match="--torch_compile compiles the whole model"):
        prepared(compile="true", torch_compile=True, torch_compile_backend="aot_eager")
    with pytest.raises(ValueError, match="compile often is none of auto, true and false"):
        prepared(compile="often")
