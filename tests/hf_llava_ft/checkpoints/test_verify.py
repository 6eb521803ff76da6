"""The check that everything written goes through has to notice what goes wrong in the field."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_llava_ft.checkpoints.opening import load_model, load_processor
from hf_llava_ft.checkpoints.verify import Probe, compare_outputs, reference_outputs, verify
from hf_llava_ft.errors import UserError


@pytest.fixture
def written(tiny_checkpoint, tmp_path):
    """A copy of a checkpoint to damage, and what the undamaged model answers."""
    processor = load_processor(str(tiny_checkpoint))
    model = load_model(str(tiny_checkpoint), processor)
    folder = tmp_path / "written"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    probe = Probe()
    return folder, reference_outputs(model, processor, probe), processor, probe


@pytest.mark.new_python
def test_an_undamaged_folder_passes_in_a_new_python(written):
    verification = verify(*written)
    assert verification.ok and verification.loader == "transformers"


def test_an_undamaged_folder_passes(written):
    verification = verify(*written)
    assert verification.ok and verification.logit_difference < 1e-6 and verification.loader == "transformers"


def test_as_many_tokens_are_compared_as_the_probe_says(written):
    folder, _, processor, _ = written
    reference = reference_outputs(load_model(str(folder), processor), processor, Probe(max_new_tokens=3))
    assert reference["answer_ids"].shape == (1, 3)
    assert verify(folder, reference, processor, Probe(max_new_tokens=3)).ok
    assert "the answer is" in verify(folder, reference, processor, Probe(max_new_tokens=4)).differences[0]


def test_a_weight_that_differs_is_noticed(written):
    folder = written[0]
    weights = load_file(folder / "model.safetensors")
    weights["multi_modal_projector.linear_1.weight"] = weights["multi_modal_projector.linear_1.weight"] * 1.01
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    verification = verify(*written)
    assert not verification.ok and "the logits differ by" in verification.differences[0]


def test_another_way_to_make_a_picture_square_is_noticed(written):
    folder, _, _, _ = written
    processor = load_processor(str(folder))
    processor.image_processor.do_pad = False
    processor.save_pretrained(folder)
    assert "the same picture into other pixels" in verify(*written).differences[0]


def as_the_original_opens_pictures(written):
    folder, reference, processor, probe = written
    processor.picture_opening = "original"
    model = load_model(str(folder), processor)
    return model, processor, folder, probe


def test_pictures_that_readers_open_otherwise_than_training_are_noticed(written):
    """A folder that promises what transformers sees, of a processor that saw something else."""
    model, processor, folder, probe = as_the_original_opens_pictures(written)
    reference = reference_outputs(model, processor, probe)
    processor.picture_opening = "upright"
    found = verify(folder, reference, processor, probe)
    assert "a picture that its EXIF data turn" in found.differences[0] and "otherwise" in found.differences[0]
    assert verify(folder, reference_outputs(model, processor, probe), processor, probe).ok


def test_pictures_opened_as_the_original_does_are_no_fault_and_are_told(written):
    model, processor, folder, probe = as_the_original_opens_pictures(written)
    processor.save_pretrained(folder)
    found = verify(folder, reference_outputs(model, processor, probe), processor, probe)
    assert found.ok and "picture_opening original" in found.notes[0] and "EXIF" in found.notes[0]
    processor.picture_opening = "upright"
    assert verify(folder, reference_outputs(model, processor, probe), processor, probe).notes == []


def test_another_template_is_noticed(written):
    folder, _, _, _ = written
    processor = load_processor(str(folder))
    processor.use_chat_template("llava_llama_2")
    processor.save_pretrained(folder)
    assert "the same question into other tokens" in verify(*written).differences[0]


def test_nan_is_a_difference(written):
    folder = written[0]
    weights = load_file(folder / "model.safetensors")
    weights["language_model.model.norm.weight"].fill_(float("nan"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "the logits differ by nan" in verify(*written).differences[0]


@pytest.mark.new_python
def test_a_folder_that_does_not_load_is_an_error(written):
    folder = written[0]
    (folder / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(UserError, match="does not load in a fresh process"):
        verify(*written)


def test_bfloat16_may_round(tiny_checkpoint, tmp_path):
    processor = load_processor(str(tiny_checkpoint))
    model = load_model(str(tiny_checkpoint), processor)
    probe = Probe()
    reference = reference_outputs(model, processor, probe)
    folder = tmp_path / "half"
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)
    assert not [
        d for d in verify(folder, reference, processor, probe, dtype=torch.bfloat16).differences if "logits" in d
    ]
    assert not verify(folder, reference, processor, probe, dtype=torch.float32).ok


def outputs(ids: list[int], margins: list[float], logits: float = 10.0) -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.ones(1, 3, dtype=torch.int64),
        "logits": torch.tensor([[[logits, 1.0]]]),
        "answer_ids": torch.tensor([ids]),
        "answer_margins": torch.tensor([margins]),
    }


@pytest.mark.parametrize(
    ("ids", "margins", "says"),
    [
        ([5, 6, 7], [3.0, 3.0, 3.0], ""),
        ([5, 8, 9], [3.0, 0.9, 0.0], "compared up to their token 2"),  # each candidate may be off by 0.05 * 10
        ([5, 8, 7], [0.0, 1.1, 0.0], None),
        ([8, 6, 7], [3.0, 0.0, 0.0], None),
        ([5, 6], [0.0, 0.0, 0.0], None),  # it stops on another token
        ([5, 6, 7, 8], [0.0, 0.0, 0.0], None),
    ],
)
def test_answers_are_compared_where_rounding_does_not_decide(tiny_checkpoint, ids, margins, says):
    processor = load_processor(str(tiny_checkpoint))
    found = compare_outputs(outputs([5, 6, 7], margins), outputs(ids, []), processor, 0.05, "transformers")
    if says is None:
        assert not found.ok and "the answer is" in found.differences[0] and not found.notes
    else:
        assert found.ok and says in " ".join(found.notes) and bool(found.notes) == bool(says)


def test_a_margin_is_what_greedy_decoding_decided_by(tiny_checkpoint):
    processor = load_processor(str(tiny_checkpoint))
    model = load_model(str(tiny_checkpoint), processor)
    found = reference_outputs(model, processor, Probe())
    assert found["answer_margins"].shape == found["answer_ids"].shape
    first = found["logits"][0, -1].topk(2).values
    assert torch.allclose(found["answer_margins"][0, 0], first[0] - first[1], atol=1e-4)
