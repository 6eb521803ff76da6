"""Reading and writing a LLaVA in any of its dialects, with nothing left at random and nothing left out in silence."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import ModelCard, ModelCardData, create_repo, upload_folder
from huggingface_hub.errors import EntryNotFoundError
from transformers import AutoModel, PreTrainedConfig
from transformers.utils import cached_file, find_adapter_config_file, logging

from .adapters_llava import LlavaAdapterMixin
from .configuration_llava import LlavaConfig
from .older_readers_llava import write_config_for_older_readers
from .weight_names_llava import native_conversions, original_conversions

# What `trust_remote_code=True` loads from a folder in the format "nested", which holds the files of these classes.
AUTO_MAP = {
    "AutoConfig": "configuration_llava.LlavaConfig",
    "AutoModel": "modeling_llava.LlavaBaseModel",
    "AutoModelForCausalLM": "modeling_llava.LlavaForCausalLM",
    "AutoModelForImageTextToText": "modeling_llava.LlavaForCausalLM",
}
_NATIVE_CLASSES = {"llava": "LlavaForConditionalGeneration", "llava_next": "LlavaNextForConditionalGeneration"}
# A file that is not there is an answer.
_QUIETLY: dict[str, Any] = {
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_connection_errors": False,
}


class LlavaCheckpointMixin(LlavaAdapterMixin):
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
        An adapter of PEFT is put on the revision of its base that it names.

        Args:
            extra_weights (`dict[str, torch.Tensor]`, *optional*): weights by their name in memory that are not in the
                checkpoint or replace those in it, such as a projector that was saved alone.

        Raises:
            ValueError: if weights are missing, or `extra_weights` holds some that the model does not have.
        """
        if kwargs.get("config") is not None:
            kwargs["config"] = _as_ours(kwargs["config"])
        adapter_kwargs = dict(kwargs.pop("adapter_kwargs", None) or {})
        pretrained_model_name_or_path, adapter = _base_and_adapter(
            pretrained_model_name_or_path, adapter_kwargs, kwargs
        )
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
            kind = AutoModel.from_config(model.config.vision_config, trust_remote_code=False)
            named = kind.from_pretrained(model.config.vision_tower_name, dtype=model.dtype, trust_remote_code=False)
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
        if adapter is not None:
            model.put_adapter_on(str(adapter), kwargs.get("adapter_name"), **adapter_kwargs)
        return (model, info) if output_loading_info else model

    @classmethod
    def _from_config(cls, config, **kwargs):
        return super()._from_config(_as_ours(config), **kwargs)

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory,
        is_main_process: bool = True,
        checkpoint_format: str | None = None,
        push_to_hub: bool = False,
        **kwargs,
    ) -> None:
        """
        As in transformers, in the format that is asked for.

        Args:
            checkpoint_format (`str`, *optional*):
                `"llava-hf"`, which transformers and servers read without this package; `"llava"`, that of
                haotian-liu/LLaVA; `"nested"`, our own for what native LLaVA cannot express, with the code that reads
                it. By default the one the model came in, and for a new model `"llava-hf"` whenever the architecture
                allows it.
            push_to_hub (`bool`): upload what was written, in one commit, to `repo_id`, by default the name of the
                folder; `revision`, `private`, `token`, `commit_message` and `create_pr` are as in `push_to_hub`.

        Raises:
            ValueError: if the format cannot express the model, or a push would name a folder of this machine.
        """
        checkpoint_format = checkpoint_format or self.config.default_checkpoint_format
        if push_to_hub:
            self._check_others_can_load(checkpoint_format)
        if push_to_hub and is_main_process:
            # Here and not in transformers, which would upload before the files are as a stranger needs them.
            repo_id = kwargs.pop("repo_id", Path(save_directory).name)
            names = ("revision", "token", "commit_message", "create_pr")
            hub = {name: kwargs.pop(name) for name in names if name in kwargs}
            repo_id = create_repo(
                repo_id, private=kwargs.pop("private", None), token=hub.get("token"), exist_ok=True
            ).repo_id
            before = _times_of_files(save_directory)
            self.save_pretrained(save_directory, checkpoint_format=checkpoint_format, **kwargs)
            _tagged_card(repo_id, self.model_tags, hub.get("token")).save(Path(save_directory, "README.md"))
            after = _times_of_files(save_directory)
            written = [name for name, time in after.items() if before.get(name) != time]
            upload_folder(repo_id=repo_id, folder_path=str(save_directory), allow_patterns=written, **hub)
            return
        is_adapter = getattr(self, "_hf_peft_config_loaded", False)  # which is written without the model
        if is_adapter:
            if is_main_process:
                self.save_adapter(save_directory, kwargs.get("state_dict"))
            return
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
                for file in Path(__file__).parent.glob("*_llava.py"):  # this one, and those that go with it
                    shutil.copy(file, save_directory)
            super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
            if is_main_process and checkpoint_format == "llava-hf":
                # transformers names the class that saves; a reader without this package needs the native one.
                self.config.architectures = [_NATIVE_CLASSES[own_config.native_model_type]]
                self.config.save_pretrained(save_directory)
                write_config_for_older_readers(save_directory)
            elif is_main_process and checkpoint_format == "llava":
                own_config.save_original(save_directory)
        finally:
            self.config, self._weight_conversions = own_config, own_conversions

    def push_to_hub(self, *args, **kwargs):  # type: ignore[override]
        """As in transformers, in the format of `save_pretrained`, which also takes another."""
        self._check_others_can_load(self.config.default_checkpoint_format)
        return super().push_to_hub(*args, **kwargs)

    def _check_others_can_load(self, checkpoint_format: str) -> None:
        tower = self.config.vision_tower_name
        if checkpoint_format == "llava" and tower and Path(tower).exists():
            raise ValueError(
                f"the format llava names the vision tower, and {tower} is a folder that nobody else has: set "
                f"config.vision_tower_name to its Hub id, or save_pretrained(..., push_to_hub=True, "
                f"checkpoint_format='llava-hf')."
            )


def _times_of_files(folder) -> dict[str, int]:
    """When each file of a folder, or of none, was last written, in nanoseconds."""
    return {file.name: file.stat().st_mtime_ns for file in Path(folder).glob("*") if file.is_file()}


def _tagged_card(repo_id: str, tags: list[str] | None, token: str | None) -> ModelCard:
    """The card that the repository has, or a new one, with `tags`."""
    try:
        card = ModelCard.load(repo_id, token=token)
    except EntryNotFoundError:
        card = ModelCard.from_template(ModelCardData(tags=[], library_name="transformers"))
    known = list(card.data.tags or [])
    card.data.tags = known + [tag for tag in tags or [] if tag not in known]
    return card


def _as_ours(config):
    """`config` with the fields of ours, if it is transformers' own, which an Auto class hands over."""
    if isinstance(config, PreTrainedConfig) and not isinstance(config, LlavaConfig):
        return LlavaConfig.from_dict(config.to_dict())
    return config


def _base_and_adapter(path, adapter_kwargs: dict[str, Any], kwargs: dict[str, Any]) -> tuple[Any, str | None]:
    """
    Where the whole model is, and the adapter that comes on top of it, if any.

    Loading an adapter by itself, behind the model, keeps what transformers tells of the model apart from what it tells
    of the adapter.

    Args:
        adapter_kwargs: where the adapter is on the Hub; what an Auto class has found out is taken out.
        kwargs: of `from_pretrained`; `revision` becomes that of the base.
    """
    adapter = adapter_kwargs.pop("_adapter_model_path", None)  # an Auto class has gone on to the base
    from_auto_class = adapter is not None
    if not from_auto_class:
        names = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
        adapter_kwargs |= {name: kwargs[name] for name in names if name in kwargs and name not in adapter_kwargs}
        adapter = path
    file = find_adapter_config_file(str(adapter), **adapter_kwargs)
    if file is None or Path(str(adapter), "config.json").is_file():  # no adapter, or a whole model beside one
        return path, None
    if cached_file(str(adapter), "non_lora_trainables.bin", **_QUIETLY, **adapter_kwargs) is not None:
        raise ValueError(
            f"{adapter} is a LoRA folder of haotian-liu/LLaVA, whose projector is not in the adapter: open it with "
            f"load_model of hf_llava_ft."
        )
    settings = json.loads(Path(file).read_text(encoding="utf-8"))
    base, revision = settings["base_model_name_or_path"], settings.get("revision")
    if not from_auto_class:
        kwargs.pop("revision", None)
    if revision is not None and kwargs.get("revision") in (None, "main"):
        kwargs["revision"] = revision
        if from_auto_class:  # which has read the settings of main
            kwargs["config"] = LlavaConfig.from_pretrained(base, revision=revision, token=kwargs.get("token"))
    return base, adapter
