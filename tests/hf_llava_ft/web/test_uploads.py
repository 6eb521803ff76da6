"""Pictures that a visitor sends are opened as in training, and within limits."""

import pytest
from PIL import Image

from hf_llava_ft.answering.pictures import open_image
from hf_llava_ft.errors import UserError
from hf_llava_ft.web import uploads
from hf_llava_ft.web.uploads import opened_upload


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "uploads").mkdir()
    return tmp_path / "uploads"


@pytest.mark.parametrize("opening", ["upright", "original"])
def test_a_picture_is_opened_as_everywhere(folder, opening):
    image = Image.linear_gradient("L").resize((60, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # on its side
    image.save(folder / "turned.jpg", exif=exif)
    found = opened_upload(str(folder / "turned.jpg"), folder, opening)
    assert found.size == ((40, 60) if opening == "upright" else (60, 40)) and found.mode == "RGB"
    assert found.tobytes() == open_image(folder / "turned.jpg", opening).tobytes()


def test_what_is_no_upload_is_not_opened(folder):
    Image.new("RGB", (4, 4)).save(folder.parent / "private.png")
    (folder / "link.png").symlink_to(folder.parent / "private.png")
    for file in (
        folder.parent / "private.png",
        folder / "../private.png",
        folder / "link.png",
        folder / "nowhere.png",
    ):
        with pytest.raises(UserError, match="not among those that were sent to this page"):
            opened_upload(str(file), folder, "upright")


def test_limits_are_those_of_the_endpoint(folder, monkeypatch):
    file = folder / "large.png"
    Image.new("1", (8000, 7000)).save(file)  # 56 megapixels in a few bytes
    with pytest.raises(UserError, match="large.png is 8000 x 7000, and 50 megapixels are the most here"):
        opened_upload(str(file), folder, "upright")
    monkeypatch.setattr(uploads, "MAX_PICTURE_BYTES", 2**10)
    with pytest.raises(UserError, match="large.png has more than 0 MiB"):
        opened_upload(str(file), folder, "upright")


@pytest.mark.parametrize("content", [b"no picture", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"cut"])
def test_what_is_no_picture_is_one_sentence_without_a_path(folder, content):
    file = folder / "odd.png"
    if content == b"cut":
        Image.linear_gradient("L").save(file)
        content = file.read_bytes()[:-60]
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"^odd.png (is none of JPEG, PNG|cannot be read)") as refused:
        opened_upload(str(file), folder, "upright")
    assert str(folder) not in str(refused.value)
