"""What the collator hands over, and that training on uint8 pictures is training on the floats."""

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import set_seed
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

import hf_llava_ft
from hf_llava_ft.checkpoints.opening import load_model, load_processor
from hf_llava_ft.data.collator import LlavaCollator
from hf_llava_ft.errors import UserError
from hf_llava_ft.processing.uint8_pixels_llava import normalize_pixels
from hf_llava_ft.settings.training_arguments import LlavaTrainingArguments


class Unknown(LlavaImageProcessorPil):
    """Of a kind that nothing is known of."""


def trained(checkpoint, data, output_dir, *, uint8: bool = True, image_processor=None, **arguments):
    """A trainer after two steps and an evaluation, with what its model was called with."""
    set_seed(0)
    processor = load_processor(str(checkpoint))
    if image_processor is not None:
        processor.image_processor = image_processor
    model = load_model(str(checkpoint), processor)
    settings = {"max_steps": 2, "per_device_train_batch_size": 2, "use_cpu": True, "disable_tqdm": True}
    dataset = hf_llava_ft.load_llava_json(*data)
    trainer = hf_llava_ft.LlavaTrainer(
        model=model,
        args=LlavaTrainingArguments(output_dir=str(output_dir), save_strategy="no", **settings, **arguments),
        train_dataset=dataset,
        eval_dataset=dataset,
        processing_class=processor,
        # None: the trainer's own.
        data_collator=None if uint8 else LlavaCollator(processor),
    )
    seen = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("pixel_values")), with_kwargs=True
    )
    trainer.train()
    return trainer, trainer.evaluate()["eval_loss"], seen


def test_floats_unless_asked(tiny_processor, llava_json):
    rows = list(hf_llava_ft.load_llava_json(*llava_json(3, with_text_rows=True)))
    batch = LlavaCollator(tiny_processor)(rows)
    levels = LlavaCollator(tiny_processor, uint8_pixels=True)(rows)
    assert batch["pixel_values"].dtype == torch.float32 and levels["pixel_values"].dtype == torch.uint8
    assert torch.equal(normalize_pixels(tiny_processor.image_processor, levels["pixel_values"]), batch["pixel_values"])
    for name in ("input_ids", "attention_mask", "labels"):
        assert torch.equal(batch[name], levels[name])


def test_a_batch_without_pictures(tiny_processor, llava_json):
    rows = list(hf_llava_ft.load_llava_json(*llava_json(3, with_text_rows=True)))[2:]
    assert rows[0]["images"] == []
    assert "pixel_values" not in LlavaCollator(tiny_processor, uint8_pixels=True)(rows)


def test_uint8_comes_out_of_workers_as_it_went_in(tiny_processor, llava_json):
    data = hf_llava_ft.load_llava_json(*llava_json(6))
    collator = LlavaCollator(tiny_processor, uint8_pixels=True)
    batches = list(DataLoader(data, batch_size=3, num_workers=2, collate_fn=collator))
    for batch, first in zip(batches, (0, 3), strict=True):
        expected = collator([data[index] for index in range(first, first + 3)])["pixel_values"]
        assert batch["pixel_values"].dtype == torch.uint8 and torch.equal(batch["pixel_values"], expected)


def test_what_is_wrong_with_a_row_is_said_with_its_id(tiny_processor, llava_json):
    row = dict(hf_llava_ft.load_llava_json(*llava_json(1))[0])
    for uint8 in (False, True):
        with pytest.raises(UserError, match="row with id 'row0': .*2 images"):
            LlavaCollator(tiny_processor, uint8_pixels=uint8)([row | {"images": row["images"] * 2}])


@pytest.mark.parametrize("workers", [0, 2])
def test_training_on_uint8_is_training_on_floats(tiny_checkpoint, llava_json, tmp_path, workers):
    data = llava_json(6, with_text_rows=True)
    arguments = {"dataloader_num_workers": workers, "logging_steps": 1}
    ours, our_loss, our_pixels = trained(tiny_checkpoint, data, tmp_path / "a", **arguments)
    plain, loss, pixels = trained(tiny_checkpoint, data, tmp_path / "b", uint8=False, **arguments)
    for trainer, dtype in ((ours, torch.uint8), (plain, torch.float32)):
        with_pictures = (batch for batch in trainer.get_train_dataloader() if "pixel_values" in batch)
        assert next(with_pictures)["pixel_values"].dtype == dtype
    assert our_loss == loss
    assert len(pixels) == len(our_pixels) > 2 and any(pixel is not None for pixel in pixels)
    for one, other in zip(our_pixels, pixels, strict=True):
        assert (one is None) == (other is None)
        assert one is None or one.dtype == torch.float32 and torch.equal(one, other)
    expected = dict(plain.model.named_parameters())
    assert all(torch.equal(parameter, expected[name]) for name, parameter in ours.model.named_parameters())


def test_an_image_processor_of_an_unknown_kind_trains_on_its_floats(
    tiny_checkpoint, tiny_processor, llava_json, tmp_path
):
    known = tiny_processor.image_processor
    unknown = Unknown(**{key: value for key, value in known.to_dict().items() if key in vars(known)})
    data = llava_json(4)
    trainer, loss, _ = trained(tiny_checkpoint, data, tmp_path / "a", image_processor=unknown)
    assert next(iter(trainer.get_train_dataloader()))["pixel_values"].dtype == torch.float32
    assert loss == trained(tiny_checkpoint, data, tmp_path / "b", uint8=False)[1]


def test_a_model_refuses_levels_that_nothing_has_normalised(tiny, tiny_processor, llava_json):
    rows = list(hf_llava_ft.load_llava_json(*llava_json(1)))
    with pytest.raises(ValueError, match="torch.uint8, levels that nothing has normalised"):
        tiny.model()(**LlavaCollator(tiny_processor, uint8_pixels=True)(rows))
