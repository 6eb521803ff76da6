"""Pictures are opened as transformers opens them for whoever asks the model, pixel for pixel."""

import io
import json
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaImageProcessorPil
from transformers import LlavaProcessor as NativeLlavaProcessor
from transformers.image_utils import load_image

import hf_llava_ft
from hf_llava_ft.processing.picture_opening_llava import is_transparent, is_turned, rgb_picture, size_when_opened
from hf_llava_ft.processing.uint8_pixels_llava import normalize_pixels, uint8_images

ORIENTATION = 0x0112


def photograph():
    """Another picture in every orientation."""
    ramp = Image.linear_gradient("L").resize((60, 40))
    rings = Image.radial_gradient("L").resize((60, 40))
    return Image.merge("RGB", (ramp, ramp.transpose(Image.Transpose.ROTATE_90).resize((60, 40)), rings))


def alpha():
    return Image.linear_gradient("L").rotate(90).resize((60, 40))


def turned(orientation=6):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def png_with_exif_behind_its_pixels():
    buffer = io.BytesIO()
    photograph().save(buffer, "PNG")
    content, data = buffer.getvalue(), turned().tobytes()[6:]
    chunk = struct.pack(">I", len(data)) + b"eXIf" + data + struct.pack(">I", zlib.crc32(b"eXIf" + data))
    return content[:-12] + chunk + content[-12:]


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="8"/></x:xmpmeta>'
# name -> picture and how it is saved
KINDS = {
    "rgba.png": (Image.merge("RGBA", (*photograph().split(), alpha())), {}),
    "rgba.webp": (Image.merge("RGBA", (*photograph().split(), alpha())), {"lossless": True}),
    "turned_rgba.png": (Image.merge("RGBA", (*photograph().split(), alpha())), {"exif": turned(5)}),
    "la.png": (Image.merge("LA", (photograph().convert("L"), alpha())), {}),
    "palette_one_colour.png": (photograph().quantize(16), {"transparency": 3}),
    "palette_many_alphas.png": (photograph().quantize(16), {"transparency": bytes([0, 60, 120, 200, *[255] * 12])}),
    "palette_turned.png": (photograph().quantize(16), {"transparency": 3, "exif": turned(7)}),
    "rgb_one_colour.png": (photograph().quantize(16).convert("RGB"), {"transparency": (0, 0, 0)}),
    "gray_one_level.png": (photograph().convert("L"), {"transparency": 7}),
    "gray16.png": (Image.fromarray(np.arange(2400, dtype=np.uint16).reshape(40, 60) % 256), {}),
    "cmyk.jpg": (photograph().convert("CMYK"), {"exif": turned()}),
    "one_bit.png": (photograph().convert("1"), {}),
    "animated.gif": (photograph(), {"save_all": True, "append_images": [photograph().rotate(90)]}),
    "transparent.gif": (photograph().quantize(16), {"transparency": 3}),
    "xmp.jpg": (photograph(), {"xmp": XMP}),
    "turned.webp": (photograph(), {"exif": turned(), "lossless": True}),
    "turned.tiff": (photograph(), {"exif": turned()}),
}


def file_of(folder, name, picture, options):
    path = folder / name
    if picture.mode == "P" and isinstance(options.get("transparency"), int) and name.endswith("png"):
        assert options["transparency"] in np.asarray(picture)
    picture.save(path, **options)
    return path


def image_processor():
    size = {"height": 56, "width": 56}
    return LlavaImageProcessorPil(size=size, crop_size=size)


def by_transformers(path):
    """`float32[1, 3, 56, 56]` of transformers alone, from the file to the floats."""
    return torch.as_tensor(image_processor()(load_image(str(path)), return_tensors="pt")["pixel_values"])


def by_us(path, opening="upright", uint8=False):
    processor = image_processor()
    with Image.open(path) as opened:
        pictures = [rgb_picture(opened, opening)]
    if uint8:
        return normalize_pixels(processor, uint8_images(processor, pictures, return_tensors="pt")["pixel_values"])
    return processor(pictures, return_tensors="pt")["pixel_values"]


@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_turned_as_transformers_turns_it(tmp_path, orientation, extension):
    path = tmp_path / f"photo.{extension}"
    photograph().save(path, exif=turned(orientation))
    assert torch.equal(by_us(path), by_transformers(path))
    assert torch.equal(by_us(path, uint8=True), by_transformers(path))
    # The other way is another picture, but for a TIFF, which Pillow itself turns.
    differs = not torch.equal(by_us(path, "original"), by_transformers(path))
    with Image.open(path) as opened:
        assert differs == is_turned(opened) == (orientation > 1 and extension != "tiff")


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_picture_is_opened_as_by_transformers(tmp_path, name):
    path = file_of(tmp_path, name, *KINDS[name])
    assert torch.equal(by_us(path), by_transformers(path))
    assert torch.equal(by_us(path, uint8=True), by_transformers(path))
    with Image.open(path) as opened:
        assert is_transparent(opened) == ("transparency" in KINDS[name][1] or "A" in KINDS[name][0].getbands())


@pytest.mark.parametrize("opening", ["upright", "original"])
@pytest.mark.parametrize("name", KINDS)
def test_the_header_tells_the_size_that_it_will_have(tmp_path, name, opening):
    path = file_of(tmp_path, name, *KINDS[name])
    with Image.open(path) as opened:
        height, width = size_when_opened(opened, opening)
    with Image.open(path) as opened:
        once = rgb_picture(opened, opening)
    assert once.size == (width, height) and once.mode == "RGB"
    assert rgb_picture(once, opening) == once


def test_the_header_is_read_without_decoding_the_picture(tmp_path, monkeypatch):
    for name, (picture, options) in KINDS.items():
        file_of(tmp_path, name, picture, options)

    def refuse(image):
        raise AssertionError("decoded")

    for kind in {type(Image.open(tmp_path / name)) for name in KINDS}:
        monkeypatch.setattr(kind, "load", refuse)
    for name in KINDS:
        with Image.open(tmp_path / name) as opened:
            size_when_opened(opened)
            is_turned(opened)


def test_an_orientation_behind_the_pixels_of_a_png_is_found(tmp_path):
    path = tmp_path / "behind.png"
    path.write_bytes(png_with_exif_behind_its_pixels())
    with Image.open(path) as opened:
        assert size_when_opened(opened) == (60, 40) and is_turned(opened)
    assert load_image(str(path)).size == (40, 60)
    assert torch.equal(by_us(path), by_transformers(path))


def test_damaged_exif_data_turn_nothing(tmp_path):
    path = tmp_path / "damaged.jpg"
    photograph().save(path, exif=b"Exif\0\0no TIFF header")
    with Image.open(path) as opened:
        assert size_when_opened(opened) == (40, 60) and not is_turned(opened)
    with Image.open(path) as opened:
        assert rgb_picture(opened).size == (60, 40)


def test_what_datasets_has_decoded_is_opened_alike(tmp_path):
    import datasets

    paths = [file_of(tmp_path, name, *KINDS[name]) for name in KINDS]
    photograph().save(tmp_path / "turned.jpg", exif=turned())
    paths.append(tmp_path / "turned.jpg")
    column = datasets.Image()
    for path in paths:
        decoded = column.decode_example({"path": str(path), "bytes": None})
        with Image.open(path) as opened:
            assert rgb_picture(decoded) == rgb_picture(opened), path.name


@pytest.mark.parametrize("opening", ["upright", "original"])
def test_a_folder_remembers_how_its_pictures_were_opened(tiny_processor, tmp_path, opening):
    tiny_processor.picture_opening = opening
    try:
        tiny_processor.save_pretrained(tmp_path)
    finally:
        tiny_processor.picture_opening = "upright"
    assert json.loads((tmp_path / "processor_config.json").read_text())["picture_opening"] == opening
    assert hf_llava_ft.LlavaProcessor.from_pretrained(tmp_path).picture_opening == opening


def test_transformers_own_processor_passes_over_what_the_folder_remembers(tiny_processor, tmp_path):
    tiny_processor.save_pretrained(tmp_path)
    native = NativeLlavaProcessor.from_pretrained(tmp_path)
    assert not hasattr(native, "picture_opening")
    text, picture = "USER: <image>\nWhat? ASSISTANT:", photograph()
    ours, theirs = (each(text=text, images=picture, return_tensors="pt") for each in (tiny_processor, native))
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    assert torch.equal(ours["pixel_values"], theirs["pixel_values"])
    assert isinstance(AutoProcessor.from_pretrained(tmp_path), NativeLlavaProcessor)


def test_a_way_of_opening_that_there_is_not_is_refused(tiny_processor, tmp_path):
    tiny_processor.save_pretrained(tmp_path)
    path = tmp_path / "processor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"picture_opening": "sideways"}))
    with pytest.raises(ValueError, match="unknown picture_opening 'sideways': use upright or original"):
        hf_llava_ft.LlavaProcessor.from_pretrained(tmp_path)
