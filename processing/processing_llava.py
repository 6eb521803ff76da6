"""`LlavaProcessor` and `LlavaNextProcessor`: transformers' own, plus labels for training.

They keep the native names and save native files, because what they compute from text and pictures is the same: without
this package a folder loads as transformers' class of that name. What they add is `encode_conversation`, which turns a
whole conversation into ids, labels and pixels in one call, `pad`, which makes a batch of several (both in
`conversation_llava.py`), and `from_pretrained` on folders of the original LLaVA, which hold no processor.

They alone decide how many placeholders an image takes (`conversation_pictures_llava.py`); the model checks.
"""

import json
from pathlib import Path

from transformers import AutoConfig
from transformers import LlavaProcessor as NativeLlavaProcessor

from .chat_templates_llava import chat_template_for, original_version
from .conversation_llava import ConversationEncoding
from .conversation_pictures_llava import ConversationCrops, PatchMergeType
from .image_processing_llava import build_image_processor
from .older_readers_processing_llava import write_for_older_readers
from .picture_opening_llava import PICTURE_OPENINGS, PictureOpening, recorded_opening
from .tokenizer_llava import IMAGE_START_TOKEN, IMAGE_TOKEN, file_if_there, load_tokenizer, prepare_tokenizer


class LlavaProcessor(ConversationEncoding, NativeLlavaProcessor):
    """
    See the module.

    Args (beyond those of transformers):
        picture_opening (`"upright"` or `"original"`): how whoever opens pictures for it has to do so, see
            `picture_opening_llava.py`. It is saved in processor_config.json, where transformers' own class passes it
            over.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        patch_size=None,
        vision_feature_select_strategy=None,
        chat_template=None,
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=0,
        picture_opening: PictureOpening = "upright",
        **kwargs,
    ):
        if picture_opening not in PICTURE_OPENINGS:
            raise ValueError(f"unknown picture_opening {picture_opening!r}: use {' or '.join(PICTURE_OPENINGS)}.")
        super().__init__(
            image_processor,
            tokenizer,
            patch_size=patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            image_token=image_token,
            num_additional_image_tokens=num_additional_image_tokens,
            **kwargs,
        )
        self.picture_opening: PictureOpening = picture_opening

    # ------------------------------------------------------------------ building

    @classmethod
    def build(
        cls,
        tokenizer,
        vision_config,
        *,
        version: str | None = None,
        image_aspect_ratio: str = "square",
        vision_feature_select_strategy: str | None = None,
        tower_name: str | None = None,
        image_start_end: bool = False,
        image_grid_pinpoints: list[list[int]] | None = None,
        patch_merge_type: PatchMergeType = "spatial_unpad",
        picture_opening: PictureOpening = "upright",
    ) -> "LlavaProcessor":
        """
        A processor from its parts; a [`LlavaNextProcessor`] for `anyres`.

        Args:
            tokenizer: a fast tokenizer; `<image>` and a padding token are added where missing.
            vision_config: configuration of the vision tower.
            version (`str`, *optional*): name of a chat template; by default the one that suits the tokenizer.
            image_aspect_ratio (`"square"`, `"pad"` or `"anyres"`): see `build_image_processor`.
            vision_feature_select_strategy (`"default"` or `"full"`, *optional*): as in the model; default: what drops
                the class token where there is one.
            tower_name (`str`, *optional*): folder or Hub id of the tower, for its preprocessor_config.json.
            image_start_end (`bool`): put `<im_start>` and `<im_end>` around each image; the original's
                `mm_use_im_start_end`.
            image_grid_pinpoints, patch_merge_type: for `anyres`, as in the model's configuration.
            picture_opening (`"upright"` or `"original"`): see the class.
        """
        tokenizer = prepare_tokenizer(tokenizer, image_start_end)
        template = chat_template_for(tokenizer, version, image_start_end)
        has_class_token = vision_config.model_type == "clip_vision_model"
        is_next = image_aspect_ratio == "anyres"
        kind = LlavaNextProcessor if is_next else LlavaProcessor
        return kind(
            image_processor=build_image_processor(
                vision_config, image_aspect_ratio, tower_name, image_grid_pinpoints=image_grid_pinpoints
            ),
            tokenizer=tokenizer,
            patch_size=vision_config.patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy
            or ("default" if has_class_token else "full"),
            chat_template=template.source,
            image_token=IMAGE_TOKEN,
            num_additional_image_tokens=1 if has_class_token else 0,
            picture_opening=picture_opening,
            **({"patch_merge_type": patch_merge_type} if is_next else {}),
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As in transformers; a folder of the original LLaVA, without processor files, gets one from its
        config.json."""
        location = {key: kwargs[key] for key in ("revision", "token", "cache_dir") if key in kwargs}
        names = ("processor_config.json", "preprocessor_config.json")
        files = [file_if_there(pretrained_model_name_or_path, name, **location) for name in names]
        if any(files):
            settings = [json.loads(Path(file).read_text(encoding="utf-8")) for file in files if file]
            kind = LlavaNextProcessor if any(_cuts_into_crops(setting) for setting in settings) else LlavaProcessor
            return super(LlavaProcessor, kind).from_pretrained(  # type: ignore[misc]
                pretrained_model_name_or_path, *args, **kwargs
            )
        config = AutoConfig.from_pretrained(pretrained_model_name_or_path, trust_remote_code=False, **location)
        tokenizer = load_tokenizer(pretrained_model_name_or_path, **location)
        is_original = getattr(config, "original_config", None) is not None
        return cls.build(
            tokenizer,
            config.vision_config,
            version=original_version(config.text_config.model_type, tokenizer) if is_original else None,
            image_aspect_ratio=getattr(config, "image_aspect_ratio", None) or "square",
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            tower_name=getattr(config, "vision_tower_name", None),
            image_start_end=getattr(config, "uses_image_start_end", False),
            image_grid_pinpoints=getattr(config, "image_grid_pinpoints", None),
            patch_merge_type=getattr(config, "patch_merge_type", "spatial_unpad"),
            picture_opening=recorded_opening(config),
        )

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """As in transformers, in files that transformers 4 reads too."""
        written = super().save_pretrained(save_directory)
        write_for_older_readers(save_directory)
        if push_to_hub:  # not in transformers' own, which would upload before the files are so
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)
        return written

    def use_chat_template(self, version: str) -> None:
        """Replaces the chat template by the one called `version`; it is saved with the processor."""
        image_start_end = IMAGE_START_TOKEN in str(self.chat_template)
        self.chat_template = chat_template_for(self.tokenizer, version, image_start_end).source
        for known in ("stop_token_id", "stop_string", "misplaced_mark", "_short_answer"):
            self.__dict__.pop(known, None)


def _cuts_into_crops(settings: dict) -> bool:
    return "image_grid_pinpoints" in (settings.get("image_processor") or settings)


class LlavaNextProcessor(ConversationCrops, LlavaProcessor):
    """
    The processor of LLaVA-1.6: a picture is cut into crops, and a large or a long one takes more placeholders.

    Args (beyond those of [`LlavaProcessor`]):
        patch_merge_type (`"spatial_unpad"`, `"spatial"` or `"flat"`): as in the model's configuration. transformers'
            own class knows the first alone, and then both are the same.

    Source: LLaVA-NeXT blog post (January 2024); haotian-liu/LLaVA, `prepare_inputs_labels_for_multimodal`.
    """

    # Of several pictures in one call, those with fewer crops are filled up with blank ones. The model drops them.
    images_kwargs = {"do_pad": True}

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        patch_size=None,
        vision_feature_select_strategy=None,
        chat_template=None,
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=0,
        patch_merge_type: PatchMergeType = "spatial_unpad",
        picture_opening: PictureOpening = "upright",
        **kwargs,
    ):
        super().__init__(
            image_processor,
            tokenizer,
            patch_size=patch_size,
            vision_feature_select_strategy=vision_feature_select_strategy,
            chat_template=chat_template,
            image_token=image_token,
            num_additional_image_tokens=num_additional_image_tokens,
            picture_opening=picture_opening,
            **kwargs,
        )
        self.patch_merge_type = patch_merge_type
        if patch_merge_type != "spatial_unpad":
            self._auto_class = "AutoProcessor"  # is saved with its code: transformers' own would count otherwise


__all__ = ["LlavaNextProcessor", "LlavaProcessor"]
