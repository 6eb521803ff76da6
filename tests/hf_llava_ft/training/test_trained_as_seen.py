"""A turned picture is trained with the pixels that whoever asks the merged model through transformers gets."""

import json
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import pipeline

from hf_llava_ft.checkpoints.opening import load_model, load_processor
from hf_llava_ft.data.collator import LlavaCollator
from hf_llava_ft.data.formats import load_data, open_source
from hf_llava_ft.data.streaming import LlavaStream
from hf_llava_ft.errors import UserError
from hf_llava_ft.training.resuming.resume import opening_to_resume

FLAGS = {
    "--use_cpu": "True",
    "--max_steps": "2",
    "--per_device_train_batch_size": "2",
    "--lora_r": "4",
    "--save_strategy": "steps",
    "--save_steps": "1",
    "--report_to": "none",
}
# Colour keys are white to newer releases of transformers, and none to older ones: left to the installed one.
NAMES = ("turned.jpg", "alpha.png", "palette.png")


@pytest.fixture
def rows(tmp_path):
    """A data file with one row for each of `NAMES`, and the folder of its pictures."""
    folder = tmp_path / "images"
    folder.mkdir()
    ramp = Image.linear_gradient("L").resize((60, 40))
    rings = Image.radial_gradient("L").resize((60, 40))
    picture, exif = Image.merge("RGB", (ramp, rings, ramp.transpose(Image.Transpose.ROTATE_180))), Image.Exif()
    exif[0x0112] = 6
    picture.save(folder / "turned.jpg", exif=exif)
    Image.merge("RGBA", (*picture.split(), rings)).save(folder / "alpha.png")
    picture.quantize(8).save(folder / "palette.png", transparency=1)
    said = [
        {"from": "human", "value": "<image>\nWhat is it?"},
        {"from": "gpt", "value": "It is a ramp."},
    ]
    written = [{"id": name, "image": name, "conversations": said} for name in NAMES]
    (tmp_path / "data.json").write_text(json.dumps(written))
    return tmp_path / "data.json", folder


def trained(llava_ft, checkpoint, rows, output_dir, *flags):
    data, folder = rows
    given = {"--model_name_or_path": checkpoint, "--data_path": data, "--image_folder": folder} | FLAGS
    words = [word for name, value in (given | {"--output_dir": output_dir}).items() for word in (name, value)]
    return llava_ft("train", *words, *flags)


def pixels_of_training(folder, rows, cache_dir):
    """`float32[3, 3, H, W]`: what the processor that training left makes of the rows."""
    data = load_data(*rows, cache_dir=cache_dir)
    return LlavaCollator(load_processor(str(folder)))([data[index] for index in range(len(data))])["pixel_values"]


def pixels_of_the_pipeline(folder, paths):
    """The same, of `transformers.pipeline`, which gets the paths."""
    ask, seen = pipeline("image-text-to-text", model=str(folder)), []
    ask.model.model.vision_tower.register_forward_pre_hook(
        lambda _, args, given: seen.append(args[0] if args else given["pixel_values"]), with_kwargs=True
    )
    for path in paths:
        content = [{"type": "image", "path": str(path)}, {"type": "text", "text": "What is it?"}]
        ask([{"role": "user", "content": content}], max_new_tokens=1)
    return torch.cat(seen)


def test_the_pipeline_gives_the_pixels_that_were_trained(llava_ft, tiny_checkpoint, rows, tmp_path):
    code, _, err = trained(llava_ft, tiny_checkpoint, rows, tmp_path / "adapter")
    assert code == 0, err
    code, _, err = llava_ft("merge", "--adapter", tmp_path / "adapter", "--output_dir", tmp_path / "merged")
    assert code == 0 and "Note:" not in err, err
    assert load_processor(str(tmp_path / "merged")).picture_opening == "upright"
    ours = pixels_of_training(tmp_path / "adapter", rows, tmp_path / "cache")
    theirs = pixels_of_the_pipeline(tmp_path / "merged", [rows[1] / name for name in NAMES])
    # One level of 255, by which the torchvision backend rounds otherwise.
    assert (ours - theirs).abs().max() <= 1 / 255 / 0.26 + 1e-6


def test_the_originals_way_is_kept_recorded_and_told(llava_ft, tiny_checkpoint, rows, tmp_path):
    code, _, err = trained(llava_ft, tiny_checkpoint, rows, tmp_path / "adapter", "--picture_opening", "original")
    assert code == 0, err
    code, _, err = llava_ft("merge", "--adapter", tmp_path / "adapter", "--output_dir", tmp_path / "merged")
    assert code == 0 and "picture_opening original" in err and "sees a picture that its EXIF data turn" in err
    assert load_processor(str(tmp_path / "merged")).picture_opening == "original"
    ours = pixels_of_training(tmp_path / "merged", rows, tmp_path / "cache")
    theirs = pixels_of_the_pipeline(tmp_path / "merged", [rows[1] / name for name in NAMES])
    assert (ours[0] - theirs[0]).abs().max() > 1
    # A run that goes on is as it began, or says so; what is trained on from the result is, too.
    resume = ("--resume_from_checkpoint", tmp_path / "adapter" / "checkpoint-1")
    code, _, err = trained(llava_ft, tiny_checkpoint, rows, tmp_path / "a", *resume, "--picture_opening", "upright")
    assert code == 2 and "opens pictures the way original" in err
    code, _, err = trained(llava_ft, tmp_path / "merged", rows, tmp_path / "again")
    assert code == 0 and load_processor(str(tmp_path / "again")).picture_opening == "original"
    # The format of the original has no file for it but config.json.
    model: Any = load_model(str(tmp_path / "merged"))
    model.model.vision_tower.save_pretrained(tmp_path / "tower")
    code, _, err = llava_ft(
        *("convert", "--model", tmp_path / "merged", "--output_dir", tmp_path / "llava", "--format", "llava"),
        *("--vision_tower", tmp_path / "tower"),
    )
    assert code == 0, err
    assert load_processor(str(tmp_path / "llava")).picture_opening == "original"


def test_a_run_goes_on_as_it_began(tmp_path, tiny_processor):
    assert opening_to_resume(None, None) is None and opening_to_resume("original", None) == "original"
    tiny_processor.save_pretrained(tmp_path)
    assert opening_to_resume(None, str(tmp_path)) == "upright"
    with pytest.raises(UserError, match="opens pictures the way upright"):
        opening_to_resume("original", str(tmp_path))
    path = tmp_path / "processor_config.json"  # as the first release left it, which knew one way
    settings = json.loads(path.read_text())
    del settings["picture_opening"]
    path.write_text(json.dumps(settings))
    assert opening_to_resume(None, str(tmp_path)) == "original"


@pytest.mark.parametrize("opening", ["upright", "original"])
def test_a_stream_opens_pictures_alike(rows, tmp_path, tiny_processor, opening):
    stream = LlavaStream(open_source(*rows), shuffle_buffer_size=0, picture_opening=opening, cache_dir=tmp_path / "c")
    streamed = {row["id"]: row["images"][0] for row in stream}
    assert streamed["turned.jpg"].size == ((40, 60) if opening == "upright" else (60, 40))
    for row in load_data(*rows, cache_dir=tmp_path / "cache"):
        collate = LlavaCollator(tiny_processor)
        collate.processor.picture_opening = opening
        try:
            streaming = collate([row | {"images": [streamed[row["id"]]]}])["pixel_values"]
            assert torch.equal(streaming, collate([row])["pixel_values"])
        finally:
            tiny_processor.picture_opening = "upright"
