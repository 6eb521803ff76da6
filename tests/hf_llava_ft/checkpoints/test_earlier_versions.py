"""Folders that carry the code of an earlier version, which nobody can mend: `convert` writes them with today's."""

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_llava_ft.checkpoints.opening import load_model, load_processor
from hf_llava_ft.checkpoints.remote_code import carries_our_code, own_code
from hf_llava_ft.cli import main
from hf_llava_ft.modeling.modeling_llava import LlavaForCausalLM

# As `tests/travelling/exporting.py` writes them.
NAMES = ("mlp3x", "flat", "siglip-linear")
INPUTS = ("input_ids", "attention_mask", "pixel_values", "image_sizes")


@pytest.fixture(scope="module", params=NAMES)
def earlier(request, checkout):
    return checkout / "tests" / "travelling" / "exported_0.1.0" / request.param


@pytest.fixture(scope="module")
def converted(earlier, tmp_path_factory):
    """What `llava-ft convert` made of it, and what it reported."""
    output, report = tmp_path_factory.mktemp("converted") / earlier.name, tmp_path_factory.mktemp("report") / "r.json"
    arguments = ("--model", earlier, "--format", "llava-hf", "--output_dir", output, "--json", report)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["llava-ft", "convert", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_info:
            main()
    assert not exit_info.value.code
    return output, json.loads(report.read_text())


def assert_as_before(model, expected):
    """Logits and greedy answers are those that the earlier version gave."""
    inputs = {name: expected[name] for name in INPUTS if name in expected}
    kept = expected["logits"]
    with torch.no_grad():
        logits = model(**inputs).logits
        count = expected["generated"].shape[1]
        ids = model.generate(**inputs, do_sample=False, min_new_tokens=count, max_new_tokens=count)
    logits = logits[..., :: -(-logits.shape[-1] // kept.shape[-1])]  # of which only some were kept
    seen = inputs["attention_mask"].bool()
    torch.testing.assert_close(logits[seen], kept[seen], rtol=0, atol=1e-5)
    assert torch.equal(ids[:, -count:], expected["generated"])


def test_this_version_reads_a_folder_without_its_code(earlier, tmp_path):
    shutil.copytree(earlier, tmp_path / "trap")
    for path in (tmp_path / "trap").glob("*.py"):
        path.write_text("raise SystemExit('this code was run')\n")
    assert_as_before(load_model(str(tmp_path / "trap")).eval(), load_file(earlier / "expected.safetensors"))
    with_plugin = AutoModelForCausalLM.from_pretrained(tmp_path / "trap", trust_remote_code=True)
    assert type(with_plugin) is LlavaForCausalLM


def test_convert_writes_a_model_that_answers_as_before(earlier, converted):
    output, report = converted
    assert report["verified"] and report["loader"] == "trust_remote_code"
    assert_as_before(LlavaForCausalLM.from_pretrained(output), load_file(earlier / "expected.safetensors"))


def test_convert_writes_the_code_of_this_version(earlier, converted):
    output, _ = converted
    assert not carries_our_code(earlier) and carries_our_code(output)
    code = {path.name: path.read_bytes() for path in output.glob("*.py")}
    assert code.items() <= own_code().items()
    assert ("processing_llava.py" in code) == ("auto_map" in (earlier / "processor_config.json").read_text())


def test_convert_keeps_the_processor(earlier, converted):
    output, _ = converted
    question = {"text": "<image>What is in the picture?", "return_tensors": "pt"}
    picture = load_file(earlier / "expected.safetensors")["picture.0"].numpy()
    before, after = (load_processor(str(path))(images=picture, **question) for path in (earlier, output))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
