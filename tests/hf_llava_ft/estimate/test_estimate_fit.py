"""What `llava-ft estimate --fit` proposes: never worse on a larger card, and what is known of 7B and 13B."""

import json
from functools import cache

import pytest
import torch

import hf_llava_ft
from benchmarks.llava_sizes import llava_1_5
from hf_llava_ft.errors import UserError
from hf_llava_ft.estimate.memory import Engine, divided, state_bytes
from hf_llava_ft.estimate.plan import GIB, SET_ASIDE, Estimate, Estimator, Plan
from hf_llava_ft.estimate.trace import Batch, Precision, build_model
from hf_llava_ft.settings.arguments import TuningArguments
from tests.hf_llava_ft.estimate.test_estimate import run

ENGINES: list[tuple[Engine, int]] = [
    ("single", 1),
    ("ddp", 8),
    ("zero2", 8),
    ("zero3", 8),
    ("zero2_offload", 1),
    ("zero3_offload", 1),
]
ROW = Batch(size=1, images=1, text_tokens=200, supervised=200)


def llava_13b() -> hf_llava_ft.LlavaConfig:
    """The sizes of LLaVA-1.5-13B: Vicuna-13B and CLIP ViT-L/14-336."""
    config = llava_1_5()
    sizes = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40}
    for name, size in (sizes | {"num_attention_heads": 40, "num_key_value_heads": 40}).items():
        setattr(config.text_config, name, size)
    return config


@cache
def estimator(size: str, train_type: str, dtype: torch.dtype = torch.bfloat16) -> Estimator:
    """One for each kind, which keeps what it has traced."""
    fields = {"bits": 4} if train_type == "qlora" else {}
    config = {"7b": llava_1_5, "13b": llava_13b}[size]()
    return Estimator(
        config, TuningArguments(train_type=train_type, **fields), dtype, True, "sdpa", "adamw_torch_fused"
    )


def proposal(found: Estimator, engine: Engine, devices: int, card: float, row: Batch, share: int) -> Estimate | None:
    try:
        return found.fit(Plan(engine, devices, 1, False, row), card, share * devices)
    except UserError:
        return None


def assert_never_worse(
    found: Estimator, engine: Engine, devices: int, cards: list[float], row: Batch, share: int
) -> list:
    """Of the proposals for rising `cards` and `share` rows a step on each device: each fits, and none is worse than
    the one before."""
    proposals = [proposal(found, engine, devices, card, row, share) for card in cards]
    ranks = []
    for card, estimate in zip(cards, proposals, strict=True):
        if estimate is None:
            ranks.append((False, False, 0))
            continue
        plan = estimate.plan
        assert estimate.total <= (card - SET_ASIDE) * GIB and plan.batch.size * plan.accumulation == share
        ranks.append((True, not plan.gradient_checkpointing, plan.batch.size))
    assert ranks == sorted(ranks)
    return ranks


def test_more_memory_is_never_worse(tiny):
    tuning = TuningArguments(train_type="lora", lora_r=4, lora_alpha=8)
    found = Estimator(tiny.config(), tuning, torch.float32, False, "sdpa", "adamw_torch_fused")
    needs = [
        found.estimate(Plan("ddp", 2, 1, on, Batch(size, 1, 24, 24))).total / GIB
        for on, size in ((True, 1), (True, 4), (False, 1), (False, 4))
    ]
    cards = sorted(SET_ASIDE + need * part for need in needs for part in (0.999, 1.001))
    ranks = assert_never_worse(found, "ddp", 2, cards, Batch(1, 1, 24, 24), share=4)
    assert ranks[0] == (False, False, 0) and ranks[-1] == (True, True, 4) and len(set(ranks)) >= 4


def test_states_of_full_training_of_7b_are_more_than_a_card_of_80_gb_holds():
    """16 bytes a weight: two for the weight and two for its gradient in bf16, three float32 for AdamW under DeepSpeed;
    or four float32 without it."""
    tuning = TuningArguments(train_type="full")
    mixed = build_model(llava_1_5(), tuning, Precision(torch.bfloat16, whole_model=torch.bfloat16))
    trained = sum(each.numel() for each in mixed.parameters() if each.requires_grad)
    assert 7.0e9 < trained < 7.1e9
    states = state_bytes(mixed, tuning)
    alone = {engine: divided(states, trained, engine, 1).total / GIB for engine in ("zero2", "zero3")}
    assert all(16 * trained / GIB < size and size > 80 for size in alone.values())
    whole = state_bytes(build_model(llava_1_5(), tuning, Precision(torch.float32, autocast=True)), tuning)
    assert whole.total / GIB == pytest.approx(16 * trained / GIB, rel=0.01) and whole.total / GIB > 80
    assert divided(states, trained, "zero2_offload", 1).total / GIB < 24
    assert divided(states, trained, "zero3", 8).total / GIB < 24


def fits(size: str, train_type: str, engine: Engine, devices: int, card: float, row: Batch, **kind) -> bool:
    estimate = estimator(size, train_type, **kind).estimate(Plan(engine, devices, 1, True, row))
    return estimate.fits(card)


# 2,048 tokens, with the batch sizes of the original's scripts and the cards its README says they run on.
LONG = {size: Batch(size, 1, 2048 - 576, 1000) for size in (1, 4, 16)}


KNOWN: list[tuple[str, str, Engine, int, Batch, float, bool]] = [
    ("7b", "lora", "single", 1, ROW, 24, True),
    ("7b", "lora", "single", 1, ROW, 16, False),
    ("13b", "lora", "single", 1, ROW, 24, False),
    ("13b", "lora", "single", 1, ROW, 40, True),
    ("7b", "qlora", "single", 1, ROW, 16, True),
    ("13b", "qlora", "single", 1, ROW, 24, True),
    ("7b", "full", "zero2", 1, ROW, 80, False),
    ("7b", "full", "zero2_offload", 1, ROW, 80, True),
    ("7b", "freeze_vision", "zero3", 8, LONG[16], 80, True),
    ("13b", "freeze_vision", "zero3", 8, LONG[16], 80, True),
    ("7b", "lora", "zero3", 8, LONG[1], 24, True),
    ("13b", "lora", "zero3", 8, LONG[4], 40, True),
]


@pytest.mark.slow
@pytest.mark.parametrize(("size", "train_type", "engine", "devices", "row", "card", "does"), KNOWN)
def test_what_is_known_of_7b_and_13b(size, train_type, engine, devices, row, card, does):
    assert fits(size, train_type, engine, devices, card, row) is does


@pytest.mark.slow
def test_full_training_of_7b_in_float32_takes_more_than_80_gb():
    whole = {"dtype": torch.float32}
    assert not fits("7b", "full", "single", 1, 80, ROW, **whole)
    assert fits("7b", "full", "single", 1, 141, ROW, **whole)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "train_type"), [("7b", "qlora"), ("7b", "lora"), ("7b", "full"), ("13b", "lora")])
def test_proposals_for_cards_are_never_worse_on_a_larger_one(size, train_type):
    for engine, devices in ENGINES:
        if train_type == "qlora" and engine.startswith("zero3"):
            continue
        ranks = assert_never_worse(estimator(size, train_type), engine, devices, [16, 24, 40, 80, 141], ROW, share=16)
        assert ranks[-1][0]


@pytest.mark.slow
def test_the_command_proposes_for_a_folder_with_a_configuration_only(tmp_path):
    llava_13b().save_pretrained(tmp_path / "llava-13b")
    out = tmp_path / "out.json"
    words = ["--model", str(tmp_path / "llava-13b"), "--bf16", "True", "--dtype", "bfloat16", "--json", str(out)]
    result = run(*words, "--train_type", "qlora", "--bits", "4", "--fit", "24")
    assert result.exit_code == 0, result.output
    content = json.loads(out.read_text())
    assert content["fits_on_gb"]["24"] and not content["fits_on_gb"]["16"]
    refused = run(*words, "--train_type", "full", "--fit", "80")
    assert refused.exit_code == 2 and "--train_type lora" in refused.output and "zero3_offload" in refused.output
