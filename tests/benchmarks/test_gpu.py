"""benchmarks/gpu.py on small models and a CPU: that every section runs, and says what it is to say."""

import json
import os
from pathlib import Path

import pytest
import torch

from tests import warm_python

# As on a machine that has only what the script says it needs.
WITHOUT_DATASETS = """
import runpy, sys
sys.modules["datasets"] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def gpu_report(checkout: Path, output: Path, *words: str) -> tuple[int, dict]:
    script = checkout / "benchmarks" / "gpu.py"
    command = ["-c", WITHOUT_DATASETS, str(script), "--output", str(output), "--device", "cpu", *words]
    environment = {**os.environ, "PYTHONPATH": f"{script.parent}:{checkout}"}
    done = warm_python.run(command, cwd=output.parent, env=environment)
    assert "Traceback" not in done.stderr, done.stderr[-2000:]
    return done.returncode, json.loads(output.read_text()) if output.is_file() else {}


def test_sections_without_a_model(checkout, tmp_path):
    code, report = gpu_report(checkout, tmp_path / "out.json", "--tiny", "--sections", "attention", "uint8")
    assert code == 0 and list(report["sections"]) == ["attention", "uint8"]
    ways = report["sections"]["attention"]["ways"]
    assert set(ways) == {"padded", "masked", "varlen_attn", "flash_attn"}
    for name in ("padded", "masked"):
        assert ways[name]["largest_difference"] < 1e-5 and ways[name]["seconds"]["median"] > 0
    assert all("missing" in way or way["largest_difference"] < 1e-5 for way in ways.values())
    assert report["sections"]["uint8"]["equal_bits"] is True
    assert report["machine"]["torch"] == torch.__version__


def test_a_mask_that_lets_documents_see_each_other_would_show(checkout, monkeypatch):
    monkeypatch.syspath_prepend(str(checkout / "benchmarks"))
    import attention

    one_document = attention.masked([73], torch.device("cpu"))
    monkeypatch.setattr(attention, "masked", lambda lengths, device: one_document)
    found = attention.compare([24, 40, 9], 2, 16, torch.device("cpu"), torch.float32, rounds=1)
    assert found["ways"]["masked"]["largest_difference"] > 0.1 > found["ways"]["padded"]["largest_difference"]


@pytest.mark.slow
def test_every_section_runs(checkout, tmp_path):
    code, report = gpu_report(checkout, tmp_path / "out.json", "--tiny")
    sections = report["sections"]
    assert code == 0 and not [name for name, found in sections.items() if "error" in found]
    assert list(sections) == ["ceilings", "memory", "implementations", "attention", "compile", "four_bits", "uint8"]
    assert {found["train_type"] for found in sections["memory"]} == {"lora", "projector", "freeze_vision", "full"}
    for found in sections["memory"]:
        assert found["losses"][-1] < found["losses"][0]
        assert found["measured_bytes"] is None  # nobody counts them on a CPU
        assert (found["hfu"] > found["mfu"]) == found["gradient_checkpointing"]
    losses = sections["compile"]["losses"]
    assert losses["compiled"] == pytest.approx(losses["plain"], rel=1e-3)
    implementations = sections["implementations"]
    assert implementations["eager"]["loss"] == pytest.approx(implementations["sdpa"]["loss"], rel=1e-2)

    code, report = gpu_report(checkout, tmp_path / "large.json")  # the real sizes are for a GPU
    assert code == 2 and not report
