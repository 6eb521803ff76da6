"""LoRA layers that give what PEFT's give, with less around their two matrices.

PEFT (0.20 to 0.22) draws a dropout mask for each adapted layer, multiplies A with the same input once for q, k and v
each, casts that input to A's dtype, and scales and adds outputs in passes of their own. Here

* layers that read the same input (q, k and v; gate and up) share one dropout mask and one product with their A's;
* the scaling is applied between A and B, at the width of the rank, and B's product is added in the matmul;
* a 16-bit input stays as it is: A and B are cast to it, while the weights that train stay float32.

Without dropout, results and gradients are PEFT's to rounding. With it each layer still sees its input with the
probability asked for; that q, k and v see the same mask, which a CPU draws by other random numbers
(`lora_dropout.py`), is the one difference, and `shared=False` takes it away.

Only the class of the layers changes. Their parameters, names, merging and saving are PEFT's own; where anything
but one plain adapter is asked for (DoRA and other variants, quantised layers, several adapters, `adapter_names`,
merged weights), PEFT's forward runs.
"""

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import nn
from torch.nn import functional

from hf_llava_ft.training.lora_dropout import LoraDropout

# Of the layers of one module, those that read the same tensor, in the names that Llama, Mistral and Qwen share. A
# layer that gets another tensor nevertheless computes its own product, so a wrong guess costs time and nothing else.
SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class FusedLoraLinear(Linear):
    """`peft.tuners.lora.Linear` with another forward; see above."""

    shared: "SharedInput | None" = None
    place = 0  # among the layers that share an input
    lora_B: Any

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        adapter = self._the_plain_adapter()
        if adapter is None or args or kwargs:
            return super().forward(x, *args, **kwargs)
        low = None if self.shared is None else self.shared.take(self, adapter, x)
        if low is None:
            low = _product_with_a([self], adapter, x)[0]
        flat = x.reshape(-1, x.shape[-1])
        base: Any = self.base_layer
        result = base(flat)  # (positions, out); nothing else holds it, so it is added to in place
        b = self.lora_B[adapter].weight
        result = result.addmm_(low.to(result.dtype), b.to(result.dtype).t())
        return result.reshape(*x.shape[:-1], result.shape[-1])

    def _the_plain_adapter(self) -> str | None:
        """The name of the one active adapter, if there is nothing about it that only PEFT's forward does."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if len(active) != 1 or self.disable_adapters or self.merged or self.lora_variant:
            return None
        a, b = self.lora_A[active[0]], self.lora_B[active[0]]
        # FSDP1 makes units of them, and PEFT's policy each its own, whose weight is whole only while they run.
        if type(a) is not nn.Linear or type(b) is not nn.Linear:
            return None
        return active[0] if b.bias is None else None


class SharedInput:
    """Layers of one module that read the same input, and what A of all of them makes of it, while that module runs."""

    def __init__(self, layers: list[FusedLoraLinear]):
        self.layers = layers
        self._open = False
        self._input: torch.Tensor | None = None
        self._products: dict[int, torch.Tensor] = {}

    def begin(self, *_: Any) -> None:
        self._open, self._input, self._products = True, None, {}

    def forget(self, *_: Any) -> None:
        self._open, self._input, self._products = False, None, {}

    def take(self, layer: FusedLoraLinear, adapter: str, x: torch.Tensor) -> torch.Tensor | None:
        """What A of `layer` makes of `x`, once; None where it has to be computed for this layer alone."""
        # A replica of DataParallel has its own weights, on its own device, and has this object in common with others.
        if not self._open or (not torch.compiler.is_compiling() and self.layers[layer.place] is not layer):
            return None
        if self._input is None:
            self._input = x
            together = [each for each in self.layers if each._the_plain_adapter() == adapter]
            products = _product_with_a(together, adapter, x)
            # By place: what is known by its identity is compiled for that layer alone.
            self._products = {each.place: product for each, product in zip(together, products, strict=True)}
        found = self._products.pop(layer.place, None) if self._input is x else None
        if not self._products:  # nothing is held on to, also where checkpointing ends a module in its middle
            self.forget()
        return found


def _product_with_a(layers: list[FusedLoraLinear], adapter: str, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """For each of `layers` its scaled A x, `[positions, rank]`, of one dropped-out `x` `[..., in]`."""
    matrices: list[Any] = [layer.lora_A[adapter].weight for layer in layers]
    x = layers[0].lora_dropout[adapter](x.reshape(-1, x.shape[-1]))
    a = matrices[0] if len(matrices) == 1 else torch.cat(matrices)
    # Under autocast the matmul casts both.
    low = functional.linear(x, a if torch.is_autocast_enabled(x.device.type) else a.to(x.dtype))
    parts = low.split([matrix.shape[0] for matrix in matrices], dim=-1)
    return tuple(part * layer.scaling[adapter] for part, layer in zip(parts, layers, strict=True))


def fuse_lora(model: nn.Module, *, shared: bool = True) -> int:
    """
    Makes the plain LoRA layers of `model` fused ones, in place, and returns how many.

    Args:
        shared (`bool`): share product and dropout mask among layers that read the same input, and draw the mask as a
            CPU does it soonest. Not where an engine hands each layer its weights only while that layer runs, as ZeRO-3
            does.
    """
    fused = 0
    for module in model.modules():
        if type(module) is Linear and type(module.base_layer) is nn.Linear and not module.lora_variant:
            module.__class__ = FusedLoraLinear
            fused += 1
    if not shared:
        return fused
    for module in model.modules():
        if isinstance(module, FusedLoraLinear):
            for dropout in module.lora_dropout.values():
                if type(dropout) is nn.Dropout:
                    dropout.__class__ = LoraDropout
    for module in model.modules():
        children: dict[str, Any] = dict(module.named_children())
        for names in SAME_INPUT:
            layers = [children[name] for name in names if isinstance(children.get(name), FusedLoraLinear)]
            same_dropout = len({_dropouts(layer) for layer in layers}) == 1
            if len(layers) > 1 and same_dropout and all(layer.shared is None for layer in layers):
                group = SharedInput(layers)
                for place, layer in enumerate(layers):
                    layer.shared, layer.place = group, place
                module.register_forward_pre_hook(group.begin)
                module.register_forward_hook(group.forget)  # always_call=True would be compiled for each layer anew
    return fused


def _dropouts(layer: FusedLoraLinear) -> tuple[tuple[str, str], ...]:
    return tuple((name, repr(dropout)) for name, dropout in layer.lora_dropout.items())
