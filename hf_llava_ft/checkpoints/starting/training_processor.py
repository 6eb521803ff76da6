"""The processor that a model is trained with: chat template and shape of the pictures as the settings say."""

from hf_llava_ft.checkpoints.opening import load_processor
from hf_llava_ft.errors import UserError
from hf_llava_ft.processing.picture_opening_llava import PictureOpening
from hf_llava_ft.processing.processing_llava import LlavaProcessor


def processor_for_training(
    model: str,
    revision: str | None = None,
    version: str | None = None,
    image_aspect_ratio: str | None = None,
    picture_opening: PictureOpening | None = None,
) -> LlavaProcessor:
    """
    The processor of a model, with the chat template that it is trained under.

    Args:
        model (`str`): folder or Hub id.
        revision (`str`, *optional*): on the Hub.
        version (`str`, *optional*): name of a chat template, instead of the model's.
        image_aspect_ratio (`str`, *optional*): `square`, `pad` or `anyres`, instead of the model's.
        picture_opening (`str`, *optional*): `upright` or `original`, instead of what the model was trained with.

    Raises:
        UserError: if there is none, its template does not mark what ends an answer, or marks something else, or the
            model does not see pictures that way.
    """
    processor = load_processor(model, revision, with_template=version is None)
    if version is not None:
        try:
            processor.use_chat_template(version)
        except ValueError as error:
            raise UserError(f"--version: {error}") from error
    if processor.stop_token_id is None and processor.stop_string is None:
        raise UserError(
            f"{model}: its chat template does not mark what ends an answer, so the model would never learn to stop: "
            f"choose one of ours, --version v1 for LLaVA-1.5."
        )
    if processor.misplaced_mark is not None:
        raise UserError(
            f"{model}: its chat template marks {processor.misplaced_mark!r} as an answer, which is none: choose "
            f"one of ours with --version, or move its {{% generation %}} out of the macro or block it stands in."
        )
    if picture_opening is not None:
        processor.picture_opening = picture_opening
    if image_aspect_ratio is not None:
        _use_aspect_ratio(processor, model, image_aspect_ratio)
    return processor


def _use_aspect_ratio(processor: LlavaProcessor, model: str, wanted: str) -> None:
    cuts_into_crops = processor.depends_on_image_size
    if cuts_into_crops != (wanted == "anyres"):
        kind = "LLaVA-1.6, which sees several crops of a picture" if cuts_into_crops else "LLaVA-1.5, which sees one"
        raise UserError(
            f"--image_aspect_ratio {wanted}: {model} is a {kind}; leave the flag out, or use "
            f"{'anyres' if cuts_into_crops else 'pad or square'}."
        )
    if not cuts_into_crops:
        processor.image_processor.do_pad = wanted == "pad"
