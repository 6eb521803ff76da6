"""PEFT adapters on the model itself, as `from_pretrained` of an adapter's folder gives it, by PEFT's own functions.

transformers has methods of the same names. They change what they ask for with its releases: those of 5.24 refuse every
PEFT that there is (they want 0.22, the newest is 0.21), those of 5.17 leave out modules that were saved whole, such as
the projector, those before 5.24 and after leave magnitudes of DoRA at their start, and `enable_adapters` brings back
LoRA without the projector that `disable_adapters` took away. PEFT is imported where it is used, and by no import
statement: a model without an adapter needs none, and transformers refuses code from the Hub in which anything is
imported, within a function too, that is not installed.
"""

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from .weight_names_llava import name_in_memory

# In the file of an adapter, before the names that the weights have in the model.
PEFT_PREFIX = "base_model.model."
ADAPTER_FILE = "adapter_model.safetensors"


class LlavaAdapterMixin(PreTrainedModel):
    """Methods of transformers' `PeftAdapterMixin`, with every release of transformers and PEFT that we allow."""

    def add_adapter(self, adapter_config, adapter_name: str | None = None) -> None:
        """Adds a new adapter of a `PeftConfig`, and makes it the active one."""
        name = adapter_name or "default"
        if name in self._adapters_by_name():
            raise ValueError(f"there is an adapter {name!r} already: choose another name.")
        adapter_config.base_model_name_or_path = adapter_config.base_model_name_or_path or self.name_or_path
        import_module("peft.functional").inject_adapter_in_model(adapter_config, self, name)
        self._hf_peft_config_loaded = True  # by which transformers knows a model with an adapter
        self.set_adapter(name)

    def set_adapter(self, adapter_name: list[str] | str) -> None:
        """Makes one adapter active, or several together."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self._refuse_unknown(names)
        for module in self._adapted_modules():
            module.set_adapter(names if len(names) > 1 else names[0])

    def disable_adapters(self) -> None:
        """The model computes as without its adapters, whole modules of theirs included."""
        self._refuse_unknown([])
        for module in self._adapted_modules():
            module.enable_adapters(enabled=False)

    def enable_adapters(self) -> None:
        """Takes `disable_adapters` back."""
        self._refuse_unknown([])
        for module in self._adapted_modules():
            module.enable_adapters(enabled=True)

    def active_adapters(self) -> list[str]:
        """Names of the adapters that the model computes with."""
        self._refuse_unknown([])
        active = next(iter(self._adapted_modules())).active_adapters
        return [active] if isinstance(active, str) else list(active)

    def delete_adapter(self, adapter_names: list[str] | str) -> None:
        """Takes adapters out of the model."""
        functional = import_module("peft.functional")
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._refuse_unknown(names)
        for name in names:
            prefix = f"{self.peft_config[name].peft_type.value.lower()}_"
            functional.delete_adapter(self, adapter_name=name, prefix=prefix)
            self.peft_config.pop(name, None)
        if not self.peft_config:
            del self.peft_config
            self._hf_peft_config_loaded = False

    def get_adapter_state_dict(
        self, adapter_name: str | None = None, state_dict: dict | None = None
    ) -> dict[str, torch.Tensor]:
        """The weights of an adapter, by default the active one, by their names in the model."""
        name = self._only_active_adapter() if adapter_name is None else adapter_name
        self._refuse_unknown([name])
        # Not "auto", with which PEFT asks the Hub for the base's vocabulary: embeddings that train are named as such.
        return import_module("peft.functional").get_peft_model_state_dict(
            self, state_dict=state_dict, adapter_name=name, save_embedding_layers=False
        )

    def save_adapter(self, save_directory, state_dict: dict | None = None) -> None:
        """Writes the active adapter as PEFT does: its configuration and its weights."""
        name = self._only_active_adapter()
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        weights = self.get_adapter_state_dict(name, state_dict)
        config = self.peft_config[name]
        was_for_inference, config.inference_mode = config.inference_mode, True  # as PEFT writes it
        try:
            config.save_pretrained(str(save_directory))
        finally:
            config.inference_mode = was_for_inference
        # Copies: safetensors refuses weights that share memory.
        save_file(
            {f"{PEFT_PREFIX}{key}": weight.detach().clone().contiguous() for key, weight in weights.items()},
            Path(save_directory, ADAPTER_FILE),
            metadata={"format": "pt"},
        )

    def put_adapter_on(self, adapter: str, adapter_name: str | None = None, **hub_kwargs) -> None:
        """
        Puts a saved adapter on the model, for inference.

        Args:
            adapter (`str`): its folder or Hub id.
            hub_kwargs: where it is on the Hub, such as `revision`, `subfolder` and `token`.

        Raises:
            ValueError: if its file lacks weights that its configuration makes, holds others, or of other shapes.
        """
        peft = import_module("peft")
        name = adapter_name or "default"
        config = peft.PeftConfig.from_pretrained(adapter, **hub_kwargs)
        config.inference_mode = True
        saved = peft.load_peft_weights(adapter, device="cpu", **hub_kwargs)
        weights = {name_in_memory(key.removeprefix(PEFT_PREFIX)): weight for key, weight in saved.items()}
        self.add_adapter(config, name)
        expected = self.get_adapter_state_dict(name)
        refuse_difference(adapter, weights, expected)
        import_module("peft.functional").set_peft_model_state_dict(self, weights, adapter_name=name)
        self.eval()

    def _adapters_by_name(self) -> dict[str, Any]:
        return getattr(self, "peft_config", None) or {}

    def _refuse_unknown(self, names: list[str]) -> None:
        known = self._adapters_by_name()
        if not known:
            raise ValueError("the model has no adapter: open one with from_pretrained, or add one with add_adapter.")
        for name in names:
            if name not in known:
                raise ValueError(f"the model has no adapter {name!r}; it has {', '.join(map(repr, known))}.")

    def _only_active_adapter(self) -> str:
        names = self.active_adapters()
        if len(names) != 1:
            raise ValueError(f"{len(names)} adapters are active: choose one of them with set_adapter.")
        return names[0]

    def _adapted_modules(self) -> Iterator[Any]:
        """Layers with an adapter, and PEFT's wrappers around modules that are trained whole."""
        kinds = (
            import_module("peft.tuners.tuners_utils").BaseTunerLayer,
            import_module("peft.utils").AuxiliaryTrainingWrapper,
        )
        return (module for module in self.modules() if isinstance(module, kinds))


def refuse_difference(adapter: str, weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """
    Compares the `weights` in the file of an adapter with those that its configuration makes, by name in the model.

    Raises:
        ValueError: if some are missing, surplus, of another shape, NaN or infinite.
    """
    surplus, missing = weights.keys() - expected.keys(), expected.keys() - weights.keys()
    if surplus:
        raise ValueError(f"{adapter} holds weights that this LLaVA has no place for, {min(surplus)} among them.")
    if missing:
        raise ValueError(
            f"{adapter} lacks {len(missing)} of the {len(expected)} weights that its adapter_config.json makes, "
            f"{min(missing)} among them: it is damaged or was not saved whole."
        )
    for key, weight in weights.items():
        if weight.shape != expected[key].shape:
            raise ValueError(
                f"{adapter} holds {key} of shape {list(weight.shape)}, and on this base it has "
                f"{list(expected[key].shape)}: it was made for another model."
            )
        if not torch.isfinite(weight).all():
            raise ValueError(
                f"{adapter} holds NaN or infinite numbers in {key}: it is damaged, or its training went wrong; use an "
                f"earlier checkpoint."
            )
