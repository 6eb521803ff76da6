"""Reading and writing a LLaVA in any of its dialects, with nothing left at random and nothing left out in silence."""

import copy
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModel, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.models.llava.modeling_llava import LlavaForConditionalGeneration
from transformers.models.llava_next.modeling_llava_next import LlavaNextForConditionalGeneration
from transformers.utils import logging

from .weight_names_llava import native_conversions, original_conversions

# What `trust_remote_code=True` loads from a folder in the format "nested", which holds the files of these classes.
AUTO_MAP = {
    "AutoConfig": "configuration_llava.LlavaConfig",
    "AutoModel": "modeling_llava.LlavaBaseModel",
    "AutoModelForCausalLM": "modeling_llava.LlavaForCausalLM",
    "AutoModelForImageTextToText": "modeling_llava.LlavaForCausalLM",
}
_NATIVE_CLASSES = {"llava": LlavaForConditionalGeneration, "llava_next": LlavaNextForConditionalGeneration}


class LlavaCheckpointMixin(PreTrainedModel):
    """`from_pretrained` and `save_pretrained` of [`LlavaForCausalLM`]."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *args,
        output_loading_info: bool = False,
        extra_weights: dict[str, torch.Tensor] | None = None,
        **kwargs,
    ) -> Any:
        """
        As in transformers, but nothing is left at random: a tower that the checkpoint only names is loaded from there.

        Args:
            extra_weights (`dict[str, torch.Tensor]`, *optional*): weights by their name in memory that are not in the
                checkpoint or replace those in it, such as a projector that was saved alone.

        Raises:
            ValueError: if weights are missing, or `extra_weights` holds some that the model does not have.
        """
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # its report comes before missing weights are filled in or refused
        try:
            loaded: Any = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        finally:
            logging.set_verbosity(verbosity)
        model, info = loaded
        missing = set(info["missing_keys"])
        tower = {name for name in missing if name.startswith("model.vision_tower.")}
        if tower and model.config.vision_tower_name:
            named = AutoModel.from_config(model.config.vision_config).from_pretrained(
                model.config.vision_tower_name, dtype=model.dtype
            )
            model.model.vision_tower.load_state_dict(named.state_dict())
            missing -= tower
        if extra_weights:
            unexpected = model.load_state_dict(extra_weights, strict=False).unexpected_keys
            if unexpected:
                raise ValueError(f"the model has no weight {min(unexpected)}, which was to be loaded into it.")
            missing -= set(extra_weights)
        # Buffers that older transformers saved and newer ones compute.
        unexpected = {name for name in info["unexpected_keys"] if not name.endswith(("inv_freq", "position_ids"))}
        if unexpected:
            raise ValueError(
                f"{pretrained_model_name_or_path} holds {len(unexpected)} weights that this LLaVA has no place for, "
                f"{min(unexpected)} among them: leaving them out would make it another model."
            )
        if missing:
            raise ValueError(
                f"{pretrained_model_name_or_path} holds no weights for {len(missing)} parameters of a LLaVA, "
                f"{min(missing)} among them: it is not a whole LLaVA checkpoint, or it is damaged."
            )
        return (model, info) if output_loading_info else model

    def save_pretrained(  # type: ignore[override]
        self, save_directory, is_main_process: bool = True, checkpoint_format: str | None = None, **kwargs
    ) -> None:
        """
        As in transformers, in the format that is asked for.

        Args:
            checkpoint_format (`str`, *optional*):
                `"llava-hf"`, which transformers and servers read without this package; `"llava"`, that of
                haotian-liu/LLaVA; `"nested"`, our own for what native LLaVA cannot express, with the code that reads
                it. By default the one the model came in, and for a new model `"llava-hf"` whenever the architecture
                allows it.

        Raises:
            ValueError: if the format cannot express the model.
        """
        checkpoint_format = checkpoint_format or self.config.default_checkpoint_format
        own_config, own_conversions = self.config, cast(Any, getattr(self, "_weight_conversions", None))
        if checkpoint_format == "llava-hf":
            self.config, self._weight_conversions = own_config.to_native(), native_conversions()
        elif checkpoint_format == "llava":
            self._weight_conversions = original_conversions(own_config.projector_type)
        else:
            self.config, self._weight_conversions = copy.deepcopy(own_config), []
            self.config.auto_map = dict(AUTO_MAP)
            # As in llava-hf: names of folders of this machine, and what would send it out as an original next time.
            self.config.original_config = self.config.vision_tower_name = None
        try:
            if is_main_process and checkpoint_format == "nested":
                Path(save_directory).mkdir(parents=True, exist_ok=True)
                custom_object_save(self, save_directory)  # the file of this class, and those that it imports
            super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
            if is_main_process and checkpoint_format == "llava-hf":
                # transformers names the class that saves; a reader without this package needs the native one.
                self.config.architectures = [_NATIVE_CLASSES[own_config.native_model_type].__name__]
                self.config.save_pretrained(save_directory)
            elif is_main_process and checkpoint_format == "llava":
                own_config.save_original(save_directory)
        finally:
            self.config, self._weight_conversions = own_config, own_conversions
