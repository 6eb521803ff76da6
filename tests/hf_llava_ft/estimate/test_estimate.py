"""Memory and operations from configurations, against real tensors and real operations."""

import gc
import json
import weakref
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import set_checkpoint_early_stop
from typer.testing import CliRunner

import hf_llava_ft
from benchmarks.llava_sizes import llava_1_5
from hf_llava_ft.cli import app
from hf_llava_ft.estimate.memory import StateBytes, divided, state_bytes
from hf_llava_ft.estimate.trace import Batch, Precision, build_model, trace_micro_batch
from hf_llava_ft.evaluation.token_losses import LossOverTokens
from hf_llava_ft.modeling import chunked_loss_llava
from hf_llava_ft.settings.arguments import TuningArguments
from hf_llava_ft.settings.training_arguments import LlavaTrainingArguments
from hf_llava_ft.training.precision.quantization import quantization_config
from hf_llava_ft.training.tuning import with_tuning

FLOAT32 = Precision(torch.float32)
ROWS = Batch(size=2, images=1, text_tokens=24, supervised=10)


def tuning(train_type: str, **fields) -> TuningArguments:
    return TuningArguments(train_type=train_type, lora_r=4, lora_alpha=8, **fields)


def real_inputs(image_tokens: int = 16) -> dict:
    ids = torch.randint(3, 1000, (ROWS.size, image_tokens + ROWS.text_tokens))
    ids[:, 1 : 1 + image_tokens] = 1024
    labels = torch.full_like(ids, -100)
    labels[:, -ROWS.supervised :] = ids[:, -ROWS.supervised :]
    pixels = torch.randn(ROWS.size, 3, 56, 56)
    return {"input_ids": ids, "labels": labels, "pixel_values": pixels, "supervised_logits_only": True}


def tensors_of(value) -> list[torch.Tensor]:
    """Of a weight that bitsandbytes has packed, what its scales are made of."""
    tensors = [value]
    for state in (getattr(value, "quant_state", None), getattr(getattr(value, "quant_state", None), "state2", None)):
        if state is not None:
            tensors += [
                getattr(state, name) for name in ("absmax", "code", "offset") if state.__dict__.get(name) is not None
            ]
    if getattr(value, "SCB", None) is not None:
        tensors.append(value.SCB)
    return tensors


def num_bytes(tensors) -> int:
    return sum({t.untyped_storage()._cdata: t.nbytes for t in tensors}.values())


KINDS = [
    ("lora", {}, torch.float32),
    ("lora", {}, torch.bfloat16),
    ("lora", {"use_dora": True, "lora_vision_tower": True}, torch.bfloat16),
    ("projector", {}, torch.bfloat16),
    ("freeze_vision", {}, torch.float32),
    ("freeze_vision", {"freeze_backbone": True}, torch.float32),
    ("full", {}, torch.bfloat16),
    ("qlora", {"bits": 4}, torch.float32),
    ("qlora", {"bits": 4, "double_quant": False}, torch.bfloat16),
    ("qlora", {"bits": 8}, torch.float32),
]


@pytest.mark.parametrize(("train_type", "fields", "dtype"), KINDS)
def test_states_are_those_of_a_real_model_after_a_step(tiny_checkpoint, train_type, fields, dtype):
    arguments = tuning(train_type, **fields)
    config = quantization_config(arguments, compute_dtype=dtype)
    quantised = {} if config is None else {"quantization_config": config}
    real = hf_llava_ft.load_model(str(tiny_checkpoint), dtype=dtype, **quantised)
    tiny_config = real.config
    real = with_tuning(real, arguments, str(tiny_checkpoint)).train()
    trained = [parameter for parameter in real.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    expected = build_model(tiny_config, arguments, Precision(dtype, autocast=dtype != torch.float32))
    states = state_bytes(expected, arguments)
    weights = [tensor for each in (*real.parameters(), *real.buffers()) for tensor in tensors_of(each)]
    assert states.gradients == num_bytes(parameter.grad for parameter in trained)
    assert states.optimizer == num_bytes(t for state in optimizer.state.values() for t in state.values())
    # The table of numbers that bits stand for is shared by some layers of bitsandbytes.
    assert states.weights == pytest.approx(num_bytes(weights), rel=0 if config is None else 0.02)
    # Of a checkpoint in float32 `full` is the same as of one in bfloat16, since what trains is float32.
    others = tuning("projector" if train_type == "full" else "full")
    other = state_bytes(build_model(tiny_config, others, Precision(torch.float32)), others)
    assert (other.weights, other.optimizer) != (states.weights, states.optimizer)


class Saved:
    """A tensor that autograd keeps, as long as it does."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor


def saved_bytes(model, inputs: dict) -> int:
    """What autograd keeps from the forward to the backward pass, without the weights."""
    known = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept: weakref.WeakSet[Saved] = weakref.WeakSet()

    def pack(tensor):
        saved = Saved(tensor)
        kept.add(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        output = model(**inputs)
    gc.collect()  # what checkpointing saves of layers without a gradient, it drops again
    storages = {each.tensor.untyped_storage()._cdata: each.tensor.untyped_storage() for each in kept}
    total = sum(storage.nbytes() for name, storage in storages.items() if name not in known)
    del output
    return total


@pytest.fixture(scope="module")
def config(tiny):
    """With more layers than are traced."""
    config = tiny.config()
    config.text_config.num_hidden_layers = 6
    return config


@pytest.fixture(scope="module")
def traced(config):
    """`traced(train_type, checkpointing)`, once each."""

    @cache
    def trace(train_type: str, checkpointing: bool):
        return trace_micro_batch(config, tuning(train_type), FLOAT32, ROWS, gradient_checkpointing=checkpointing)

    return trace


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("train_type", ["lora", "projector", "freeze_vision", "full"])
def test_what_is_held_is_what_autograd_saves(config, traced, train_type, checkpointing):
    real = hf_llava_ft.LlavaForCausalLM(config)
    real.loss_function = LossOverTokens(num_tokens=1088, image_token_id=1024)
    model = with_tuning(real, tuning(train_type), "").train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    measured = saved_bytes(model, real_inputs())
    estimates = {on: traced(train_type, on) for on in (False, True)}
    assert estimates[checkpointing].held == pytest.approx(measured, rel=0.15)
    assert estimates[not checkpointing].held != pytest.approx(measured, rel=0.15)
    assert estimates[checkpointing].peak >= estimates[checkpointing].held


@pytest.mark.parametrize("train_type", ["lora", "freeze_vision"])
def test_logits_that_are_computed_a_few_rows_at_a_time_are_counted_so(config, monkeypatch, train_type):
    monkeypatch.setattr(chunked_loss_llava, "CHUNK_BYTES", 4 * 1088 * 2)  # 20 rows, 2 at a time
    real = hf_llava_ft.LlavaForCausalLM(config)
    real.loss_function = LossOverTokens(num_tokens=1088, image_token_id=1024)
    model = with_tuning(real, tuning(train_type), "").train()
    pieces = []
    real.lm_head.register_forward_hook(lambda head, inputs, output: pieces.append(len(output)))
    measured = saved_bytes(model, real_inputs())
    assert pieces == [2] * 10
    arguments = (config, tuning(train_type), FLOAT32, ROWS)
    by_rows, at_once = (
        trace_micro_batch(*arguments, gradient_checkpointing=False, whole_logits=whole) for whole in (False, True)
    )
    kept = 4 * 20 * config.text_config.hidden_size  # the gradient of what the head reads
    kept += train_type == "freeze_vision" and 4 * 1088 * config.text_config.hidden_size  # and of what trains in it
    assert by_rows.logits == pytest.approx(kept, rel=0.05) and by_rows.held == pytest.approx(measured, rel=0.15)
    assert at_once.logits > 4 * 1088 * 20 and (train_type != "lora" or at_once.peak > by_rows.peak)
    assert by_rows.operations == pytest.approx(at_once.operations, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("train_type", ["lora", "freeze_vision"])
def test_what_a_middling_model_holds_is_what_autograd_saves(train_type, checkpointing):
    """A language model of 12 layers of width 512, the tower of LLaVA-1.5 at half its resolution, in 16 bits."""
    config = llava_1_5()
    sizes = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 12}
    for name, size in (sizes | {"num_attention_heads": 8, "num_key_value_heads": 8}).items():
        setattr(config.text_config, name, size)
    config.text_config.head_dim = 64
    config.vision_config.image_size = 168  # 144 tokens
    rows, arguments = Batch(2, 1, 120, 60), tuning(train_type)
    real = hf_llava_ft.LlavaForCausalLM(config).to(torch.bfloat16)
    real.loss_function = LossOverTokens(num_tokens=32000, image_token_id=32000)
    model = with_tuning(real, arguments, "").train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    ids = torch.randint(3, 1000, (2, 144 + 120))
    ids[:, :144] = 32000
    labels = torch.full_like(ids, -100)
    labels[:, -60:] = ids[:, -60:]
    inputs = {"input_ids": ids, "labels": labels, "pixel_values": torch.randn(2, 3, 168, 168)}
    with torch.autocast("cpu", torch.bfloat16):
        measured = saved_bytes(model, inputs | {"supervised_logits_only": True, "use_cache": False})
    precision = Precision(torch.bfloat16, autocast=True)
    traced = trace_micro_batch(config, arguments, precision, rows, gradient_checkpointing=checkpointing)
    assert traced.held == pytest.approx(measured, rel=0.15)


def operations_by_hand(train_type: str, checkpointing: bool) -> float:
    """Of LLaVA-1.5-7B for 576 + 200 tokens: a multiply-add is two, attention is causal, the head reads the text."""
    tokens, supervised, width, layers = 776, 200, 4096, 32
    weights = layers * (4 * width**2 + 3 * width * 11008)
    lora = 128 * layers * (4 * 2 * width + 3 * (width + 11008)) if train_type == "lora" else 0
    attention = layers * 2 * 2 * tokens**2 / 2 * width
    head = 2 * width * 32064 * supervised
    layers_once = 2 * (weights + lora) * tokens + attention
    tower = 24 * (2 * 577 * (4 * 1024**2 + 2 * 1024 * 4096) + 4 * 577**2 * 1024) + 2 * 576 * 3 * 14**2 * 1024
    projector = 2 * 576 * (1024 * width + width**2)
    trained = weights + lora if train_type == "freeze_vision" else lora
    # Backward: the gradient of what each layer reads, and that of the weights that train.
    backward = 2 * (weights + lora) * tokens + 2 * trained * tokens + 2 * attention
    head_backward = head * (2 if train_type == "freeze_vision" else 1)
    projector_backward = projector + 2 * 576 * width**2  # of the pictures' features nobody asks
    total = tower + projector + layers_once + head + backward + head_backward + projector_backward
    return total + layers_once * checkpointing


@pytest.mark.parametrize("train_type", ["freeze_vision", "lora", "projector"])
@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_operations_of_llava_7b_are_those_computed_by_hand(train_type, checkpointing):
    rows = Batch(size=1, images=1, text_tokens=200, supervised=200)
    precision = Precision(torch.bfloat16, autocast=True)
    with set_checkpoint_early_stop(False):  # computed by hand, every operation of a layer is repeated
        traced = trace_micro_batch(
            *(llava_1_5(), TuningArguments(train_type=train_type, lora_r=128), precision, rows),
            gradient_checkpointing=checkpointing,
        )
    assert traced.operations == pytest.approx(operations_by_hand(train_type, checkpointing), rel=0.001)
    assert traced.operations != pytest.approx(operations_by_hand(train_type, not checkpointing), rel=0.1)


def test_zero_divides_what_it_says():
    # 100 weights of 2 bytes, of which 40 train.
    states = StateBytes(weights=200, gradients=80, optimizer=160)
    assert divided(states, 40, "single", 1) == states
    assert divided(states, 40, "ddp", 4) == StateBytes(200, 80, 160, 80)
    assert divided(states, 40, "zero2", 4, bucket=10) == StateBytes(200, 20, 120, 40)
    assert divided(states, 40, "zero3", 4, bucket=10, live=30) == StateBytes(50, 20, 120, 40 + 60)
    assert divided(states, 40, "zero2_offload", 4, bucket=10) == StateBytes(200, 0, 0, 40, 120 + 40)
    assert divided(states, 40, "zero3_offload", 4, bucket=10, live=30) == StateBytes(0, 0, 0, 100, 120 + 40 + 50)


def run(*words: str):
    return CliRunner().invoke(app, ["estimate", *words])


def test_the_command_needs_no_weights_and_fits(tiny, tmp_path, checkout):
    folder = tmp_path / "bare"
    tiny.config().save_pretrained(folder)
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    out = tmp_path / "out.json"
    words = ["--model", str(folder), "--train_type", "full", "--lora_r", "4", "--json", str(out)]
    result = run(*words, "--devices", "4", "--deepspeed", str(checkout / "examples/deepspeed/zero3.json"))
    assert result.exit_code == 0, result.output
    assert "not been compared with a GPU" in result.output and "zero3, 4 devices" in result.output
    content = json.loads(out.read_text())
    memory = content["bytes_on_a_device"]
    assert memory["together"] == sum(size for name, size in memory.items() if name != "together")
    assert content["plan"]["engine"] == "zero3" and content["fits_on_gb"]["16"]
    assert content["plan"]["bucket"] == 64**2  # "auto" in the file, which transformers fills in

    assert not content["plan"]["gradient_checkpointing"]
    known = LlavaTrainingArguments.__dataclass_fields__
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    assert run(*words, f"--{name}", "True").exit_code == 0  # the newer name of it, where transformers has one
    assert json.loads(out.read_text())["plan"]["gradient_checkpointing"]

    fitted = run(*words, "--fit", "16", "--global_batch", "8", "--devices", "2")
    assert fitted.exit_code == 0, fitted.output
    plan = json.loads(out.read_text())["plan"]
    assert (plan["batch"]["size"], plan["accumulation"], plan["gradient_checkpointing"]) == (4, 1, False)
    assert run(*words, "--fit", "1.0001", "--global_batch", "1").exit_code == 2


def test_the_rows_say_rank_and_batch_as_in_training(tiny, tmp_path):
    tiny.config().save_pretrained(tmp_path)
    trained = {}
    for rows in ("50", "500"):
        result = run("--model", str(tmp_path), "--rows", rows, "--json", str(tmp_path / "out.json"))
        assert result.exit_code == 0, result.output
        content = json.loads((tmp_path / "out.json").read_text())
        plan = content["plan"]
        language_model = next(part for part in content["parameters"] if part["part"] == "language_model")
        trained[rows] = (plan["batch"]["size"], plan["accumulation"], language_model["num_trainable"])
    assert trained["50"][:2] == (4, 1) and trained["500"][:2] == (8, 1)
    assert trained["500"][2] == 2 * trained["50"][2] > 0  # r 16 and r 8


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--model", "/nowhere/at/all"),
        ("--model", "MODEL", "--no_such_flag", "1"),
        ("--model", "MODEL", "--bits", "4", "--train_type", "full"),
        ("--model", "MODEL", "--optim", "adafactor"),
        ("--model", "MODEL", "--model_max_length", "10"),
        ("--model", "MODEL", "--deepspeed", "no.json"),
        ("--model", "MODEL", "--devices", "0"),
        ("--model", "MODEL", "--dtype", "int8"),
        ("--model", "MODEL", "--gradient_checkpointing_kwargs", '{"every_n_layers": 2}'),
        ("--model", "MODEL", "--fit", "16", "--global_batch", "3", "--devices", "2"),
    ],
)
def test_bad_input_is_said_in_a_sentence(tiny, tmp_path, words):
    tiny.config().save_pretrained(Path(tmp_path, "model"))
    result = run(*(str(tmp_path / "model") if word == "MODEL" else word for word in words))
    assert result.exit_code == 2 and "Traceback" not in result.output
