"""Fused LoRA layers against PEFT's own, which is the plain computation."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_llava_ft.training.fused_lora import FusedLoraLinear, SharedInput, fuse_lora
from hf_llava_ft.training.lora_dropout import LoraDropout

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def with_peft(dropout: float = 0.0, dtype: torch.dtype = torch.float32, **settings):
    """A tiny Llama whose LoRA weights are no longer what they start as; the same each time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation="eager",
    )
    base = LlamaForCausalLM(config).to(dtype)
    lora = LoraConfig(r=4, lora_alpha=12, lora_dropout=dropout, target_modules=TARGETS, **settings)
    model = get_peft_model(base, lora, autocast_adapter_dtype=True)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.train()


def loss_and_gradients(model, autocast: bool = False) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ids = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def relative_difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in theirs)


class DropoutOfThisWidth(nn.Module):
    """Drops the same positions of every input of one width, whoever asks and how often."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        kept = torch.rand(flat.shape, generator=torch.Generator().manual_seed(flat.shape[-1])) >= self.p
        return (flat * kept / (1 - self.p)).reshape(x.shape)

    def __repr__(self):
        return f"DropoutOfThisWidth({self.p})"


def with_known_dropout(model):
    for module in model.modules():
        if isinstance(module, Linear):
            module.lora_dropout["default"] = DropoutOfThisWidth(0.3)
    return model


@pytest.fixture(params=[False, True], ids=["kept", "recomputed"])
def checkpointing(request):
    return request.param


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"rank_pattern": {"k_proj": 2}}], ids=str)
def test_loss_and_all_gradients_are_those_of_peft(settings, shared, checkpointing):
    theirs = with_peft(**settings)
    ours = copy.deepcopy(theirs)
    assert fuse_lora(ours, shared=shared) == 14
    if checkpointing:
        for model in (theirs, ours):
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable()
    loss, gradients = loss_and_gradients(theirs)
    our_loss, our_gradients = loss_and_gradients(ours)
    assert our_loss.item() == pytest.approx(loss.item(), rel=1e-6)
    assert relative_difference(our_gradients, gradients) < 1e-5
    groups = {module.shared for module in ours.modules() if getattr(module, "shared", None) is not None}
    assert len(groups) == 4 * shared and all(group._input is None for group in groups)


def test_a_mask_that_is_known_gives_the_gradients_of_peft_under_the_same_mask():
    theirs = with_known_dropout(with_peft(0.3))
    ours = copy.deepcopy(theirs)
    fuse_lora(ours)
    loss, gradients = loss_and_gradients(theirs)
    our_loss, our_gradients = loss_and_gradients(ours)
    assert our_loss.item() == pytest.approx(loss.item(), rel=1e-6)
    assert relative_difference(our_gradients, gradients) < 1e-5


def test_a_mask_applied_twice_would_be_seen():
    class Twice(DropoutOfThisWidth):
        def forward(self, x):
            return super().forward(super().forward(x))

    theirs = with_known_dropout(with_peft(0.3))
    ours = copy.deepcopy(theirs)
    fuse_lora(ours)
    for module in ours.modules():
        if isinstance(module, FusedLoraLinear):
            module.lora_dropout["default"] = Twice(0.3)
    assert relative_difference(loss_and_gradients(ours)[1], loss_and_gradients(theirs)[1]) > 0.01


def test_a_product_of_another_input_would_be_seen(monkeypatch):
    theirs = with_peft()
    ours = copy.deepcopy(theirs)
    fuse_lora(ours)
    take = SharedInput.take
    monkeypatch.setattr(SharedInput, "take", lambda self, layer, name, x: take(self, layer, name, x.roll(1, 1)))
    assert relative_difference(loss_and_gradients(ours)[1], loss_and_gradients(theirs)[1]) > 0.01


def test_layers_of_one_input_see_one_mask_and_others_their_own():
    model = with_peft(0.5)
    fuse_lora(model)
    draws = []
    for module in model.modules():
        for dropout in getattr(module, "lora_dropout", {}).values():
            dropout.register_forward_hook(lambda _, inputs, output: draws.append(output))
    loss_and_gradients(model)
    assert len(draws) == 2 * 4  # in each of two layers: q, k and v; o; gate and up; down


def test_masks_are_drawn_soonest_only_where_they_may_differ_from_those_of_peft():
    def dropouts(model) -> set[type]:
        return {type(each) for module in model.modules() for each in getattr(module, "lora_dropout", {}).values()}

    for shared, expected in ((True, LoraDropout), (False, nn.Dropout)):
        model = with_peft(0.5)
        fuse_lora(model, shared=shared)
        assert dropouts(model) == {expected}
    # DoRA is PEFT's own computation, its random numbers too.
    dora = with_peft(0.5, use_dora=True)
    fuse_lora(dora)
    assert dropouts(dora) == {nn.Dropout}


def test_without_shared_dropout_masks_are_drawn_as_peft_draws_them():
    theirs = with_peft(0.3)
    ours = copy.deepcopy(theirs)
    fuse_lora(ours, shared=False)
    torch.manual_seed(3)
    loss, gradients = loss_and_gradients(theirs)
    torch.manual_seed(3)
    our_loss, our_gradients = loss_and_gradients(ours)
    assert our_loss.item() == pytest.approx(loss.item(), rel=1e-6)
    assert relative_difference(our_gradients, gradients) < 1e-5


@pytest.mark.parametrize("autocast", [True, False])
def test_16_bits_are_as_near_to_float32_as_those_of_peft(autocast):
    exact = loss_and_gradients(with_peft())[1]
    theirs = with_peft(dtype=torch.float32 if autocast else torch.bfloat16)
    ours = copy.deepcopy(theirs)
    fuse_lora(ours)
    assert all(p.dtype == torch.float32 for p in ours.parameters() if p.requires_grad)
    their_error = relative_difference(loss_and_gradients(theirs, autocast)[1], exact)
    our_error = relative_difference(loss_and_gradients(ours, autocast)[1], exact)
    assert our_error < 1.5 * their_error


def test_what_only_peft_knows_is_left_to_peft():
    dora = with_peft(use_dora=True)
    assert fuse_lora(dora) == 0
    theirs = with_peft()
    theirs.add_adapter("second", LoraConfig(r=2, target_modules=TARGETS))
    ours = copy.deepcopy(theirs)
    fuse_lora(ours)
    ids = torch.arange(10)[None]
    for change in (
        lambda model: model.base_model.set_adapter(["default", "second"]),
        lambda model: model.merge_adapter(),
        lambda model: model.unmerge_adapter(),
        lambda model: model.set_adapter("second"),
        lambda model: model.base_model.disable_adapter_layers(),
    ):
        change(theirs), change(ours)
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)


def test_the_saved_adapter_is_that_of_peft(tmp_path):
    theirs = with_peft()
    ours = copy.deepcopy(theirs)
    fuse_lora(ours)
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    weights, settings = (
        [(tmp_path / who / name).read_bytes() for who in ("ours", "theirs")]
        for name in ("adapter_model.safetensors", "adapter_config.json")
    )
    assert weights[0] == weights[1]
    ours_said, theirs_said = ({**json.loads(each), "target_modules": None} for each in settings)  # a set, in any order
    assert ours_said == theirs_said


def test_a_copy_of_a_fused_model_shares_nothing_with_it():
    model = with_peft()
    fuse_lora(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in copied.named_parameters():
            if "lora_A" in name:
                parameter.zero_()
    plain = with_peft()
    assert relative_difference(loss_and_gradients(model)[1], loss_and_gradients(plain)[1]) < 1e-5


def replica_of(module: nn.Module) -> nn.Module:
    """As `torch.nn.DataParallel` makes one for each of several GPUs, here on the CPU."""
    replica = module._replicate_for_data_parallel()
    for name, child in module.named_children():
        setattr(replica, name, replica_of(child))
    for name, parameter in module._parameters.items():
        setattr(replica, name, None if parameter is None else parameter.detach().clone())
    return replica


def test_a_replica_of_data_parallel_computes_with_its_own_weights():
    ids = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(1))
    expected = with_peft()(ids).logits
    model = with_peft()
    fuse_lora(model)
    replica = replica_of(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.zero_()
    torch.testing.assert_close(replica(ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert (model(ids).logits - expected).abs().max() > 1e-3


class Unit(nn.Module):
    """As FSDP1 wraps a layer, by PEFT's policy each A and B: its weight is whole only while it runs."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.layer, self.weight, self.bias = layer, layer.weight[:0], None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


@pytest.mark.parametrize("shared", [True, False])
def test_a_and_b_that_are_units_of_their_own_run_as_such(shared):
    model = with_peft()
    ids = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(1))
    expected = model(ids).logits
    assert fuse_lora(model, shared=shared) == 14
    for module in model.modules():
        if isinstance(module, FusedLoraLinear):
            for matrices in (module.lora_A, module.lora_B):
                matrices["default"] = Unit(matrices["default"])
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)
