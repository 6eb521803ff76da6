"""A new LLaVA from a vision tower and a language model: what stage 1 of LLaVA starts from (arXiv 2304.08485, section
4.2)."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel, set_seed

from hf_llava_ft.checkpoints.artifact import staged_folder
from hf_llava_ft.checkpoints.checked.folder import UNREADABLE, check_settings, reason_of
from hf_llava_ft.checkpoints.checked.read_as_written import check_generation_config
from hf_llava_ft.checkpoints.checked.template import check_templates
from hf_llava_ft.checkpoints.checked.weights import check_part_weights, refuse_no_numbers
from hf_llava_ft.checkpoints.embeddings import fill_rows, grow_embeddings
from hf_llava_ft.checkpoints.files import hub_refusal
from hf_llava_ft.checkpoints.opening import fit_to_processor
from hf_llava_ft.checkpoints.original_folders import load_projector
from hf_llava_ft.checkpoints.training_facts import TrainingFacts, base_facts
from hf_llava_ft.errors import UserError
from hf_llava_ft.modeling.configuration_llava import LlavaConfig
from hf_llava_ft.modeling.modeling_llava import LlavaForCausalLM
from hf_llava_ft.processing.processing_llava import LlavaProcessor
from hf_llava_ft.processing.tokenizer_llava import load_tokenizer
from hf_llava_ft.settings.composition import Composition

logger = logging.getLogger(__name__)

VISION_KINDS = ("clip_vision_model", "siglip_vision_model")


def compose_llava(
    vision: str,
    language: str,
    output_dir: str | Path,
    *,
    projector: dict[str, torch.Tensor] | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    **composition: Any,
) -> Path:
    """
    Writes a LLaVA made of the tower at `vision`, the language model at `language` and a projector, fresh or given.

    Args:
        vision (`str`): folder or Hub id of a CLIP or SigLIP model.
        language (`str`): folder or Hub id of a decoder language model.
        projector (`dict[str, torch.Tensor]`, *optional*): its weights, by their names in memory.
        revision (`str`, *optional*): of the language model.
        dtype (`str`): of the weights; `auto` is that of each part.
        composition: the fields of [`Composition`].

    Returns:
        `output_dir`.

    Raises:
        UserError: if there is no model at `vision` or `language`, or one of another kind.
        TypeError: if `Composition` has no such field.
    """
    settings = Composition(**composition)
    for place, its_revision in ((vision, None), (language, revision)):
        check_settings(place, its_revision)
        check_templates(place, its_revision)
    tower_config = _config_of("--vision", vision)
    language_config = _config_of("--language", language, revision)
    if hasattr(language_config, "vision_config"):
        raise UserError(f"--language {language} sees pictures already: give a language model that takes text alone.")
    vision_config = getattr(tower_config, "vision_config", tower_config)
    if vision_config.model_type not in VISION_KINDS:
        raise UserError(f"{vision} is a {vision_config.model_type}, not a vision tower of the CLIP or SigLIP kind.")
    check_generation_config(language, revision)
    check_part_weights(vision, vision_config, AutoModel)
    check_part_weights(language, language_config, AutoModelForCausalLM, revision)
    kind: Any = MODEL_MAPPING[type(vision_config)]
    tower = _loaded("--vision", vision, lambda: kind.from_pretrained(vision, dtype=dtype, trust_remote_code=False))
    language_model = _loaded(
        "--language",
        language,
        lambda: AutoModelForCausalLM.from_pretrained(
            language, revision=revision, dtype=dtype, trust_remote_code=False
        ),
    )
    for part, place in ((tower, vision), (language_model, language)):
        refuse_no_numbers(part, place)
    tokenizer = _loaded("--language", language, lambda: load_tokenizer(language, revision=revision))
    model, processor = compose_from_parts(tower, language_model, tokenizer, settings, tower_name=vision)
    if projector is not None:
        load_projector(model, projector)
    made_of = base_facts([language, vision], revision)
    return save_composed(model, processor, output_dir, TrainingFacts(base=made_of) if made_of else None)


def _config_of(flag: str, name: str, revision: str | None = None) -> Any:
    try:
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    except UNREADABLE as error:
        reason = hub_refusal(error, name, revision) or reason_of(error)
        raise UserError(
            f"{flag} {name} is not a model that can be loaded, from this machine or from the Hub: {reason}"
        ) from error


def _loaded(flag: str, name: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except UserError:
        raise
    except Exception as error:
        if not isinstance(error, UNREADABLE) and type(error) is not Exception:  # the second: tokenizers
            raise
        raise UserError(f"{flag} {name} cannot be loaded: {hub_refusal(error, name) or reason_of(error)}") from error


def compose_from_parts(
    tower: PreTrainedModel,
    language_model: PreTrainedModel,
    tokenizer,
    composition: Composition,
    tower_name: str | None = None,
) -> tuple[LlavaForCausalLM, LlavaProcessor]:
    """As [`compose_llava`], from loaded parts, whose weights are taken over without a copy; the tower in the language
    model's dtype, since a folder of two is loaded in that of its first weight."""
    words = set(tokenizer.get_vocab().values())
    processor = LlavaProcessor.build(
        tokenizer,
        tower.config,
        version=composition.version,
        image_aspect_ratio=composition.image_aspect_ratio,
        vision_feature_select_strategy=composition.vision_feature_select_strategy,
        tower_name=tower_name,
        image_start_end=composition.image_start_end,
    )
    is_marked = "endgeneration" in str(processor.chat_template)
    if composition.version is None and not is_marked and "<|im_end|>" in processor.tokenizer.get_vocab():
        # Qwen3's own puts an empty <think> into the last answer and takes it out of the earlier ones.
        processor.use_chat_template("chatml")
        logger.warning("The tokenizer's own chat template cannot be used for training: chatml is used instead.")
    set_seed(composition.seed)
    grow_embeddings(language_model, max(len(processor.tokenizer), processor.image_token_id + 1))
    fill_rows(language_model, set(processor.tokenizer.get_vocab().values()) - words)
    tower.to(language_model.dtype)  # type: ignore[arg-type]
    text_config, vision_config = language_model.config, tower.config
    vision_config.dtype = language_model.dtype
    for part in (text_config, vision_config):
        part.name_or_path = ""  # a local path of this machine has no place in a saved file
    text_config.pad_token_id = processor.tokenizer.pad_token_id
    config = LlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        projector_type=composition.projector_type,
        vision_feature_layer=composition.vision_feature_layer,
        vision_feature_select_strategy=processor.vision_feature_select_strategy,
        image_aspect_ratio=cast(Any, composition.image_aspect_ratio),  # checked by the configuration itself
        image_token_index=processor.image_token_id,
        image_seq_length=processor.num_image_tokens,
        tie_word_embeddings=text_config.tie_word_embeddings,
    )
    with torch.device("meta"):
        model = LlavaForCausalLM(config)
    projector = model.model.multi_modal_projector.to_empty(device="cpu").to(language_model.dtype)
    for module in projector.modules():
        if isinstance(module, torch.nn.Linear):
            module.reset_parameters()  # PyTorch's own, as in the original's builder
    model.model.vision_tower = tower
    model.model.language_model = language_model.get_decoder()
    model.lm_head = language_model.get_output_embeddings()
    model.generation_config = language_model.generation_config
    fit_to_processor(model, processor)
    return model.eval(), processor


def save_composed(
    model: LlavaForCausalLM, processor: LlavaProcessor, output_dir: str | Path, facts: TrainingFacts | None = None
) -> Path:
    """Writes model and processor, and `facts` about them; the folder appears under its name when it is complete."""
    with staged_folder(output_dir) as staged:
        model.save_pretrained(staged)
        processor.save_pretrained(staged)
        if facts is not None:
            facts.save(staged)
    return Path(output_dir)
