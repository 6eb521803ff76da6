"""What stands in examples/ works as it stands there."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file

from tests import ranks, warm_python


def test_training_from_python(tiny_checkpoint, llava_json, tmp_path, checkout):
    data, images = llava_json(6, with_text_rows=True)
    script, output = checkout / "examples" / "train_from_python.py", tmp_path / "my-adapter"
    done = warm_python.run(
        [str(script), str(tiny_checkpoint), str(data), str(images), str(output)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(checkout)},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    losses = [float(loss) for loss in re.findall(r"^epoch \d: loss ([\d.]+)$", done.stdout, re.MULTILINE)]
    assert len(losses) == 3 and losses[2] < losses[0]
    adapter = load_file(output / "adapter_model.safetensors")
    learned = [tensor for name, tensor in adapter.items() if "language_model" in name and "lora_B" in name]
    assert len(learned) == 14 and all(tensor.abs().max() > 0 for tensor in learned)
    before = load_file(tiny_checkpoint / "model.safetensors")
    name = next(name for name in before if name.endswith("multi_modal_projector.linear_1.weight"))
    [projector] = [tensor for key, tensor in adapter.items() if key.endswith("multi_modal_projector.linear_1.weight")]
    assert not projector.equal(before[name])
    assert (output / "chat_template.jinja").is_file()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is an extra: pip install 'hf-llava-ft[ray]'")
def test_workers_of_ray_train_as_those_of_a_launcher_do(tiny_checkpoint, llava_json, tmp_path, checkout):
    data, images = llava_json(12, with_text_rows=True)
    flags = ["--model_name_or_path", tiny_checkpoint, "--data_path", data, "--image_folder", images, "--use_cpu", True]
    flags += ["--max_steps", 3, "--logging_steps", 1, "--save_strategy", "no", "--num_eval_answers", 0]
    flags += ["--learning_rate", 1e-3, "--per_device_train_batch_size", 1]
    ranks.run("ddp", [*flags, "--output_dir", tmp_path / "ddp"], tmp_path / "logs")
    words = ["--num_workers", 2, "--storage_path", tmp_path / "ray", *flags, "--output_dir", tmp_path / "out"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(checkout / "examples" / "ray_train.py"), *map(str, words)],
        env={**environment, "RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    losses = ranks.logged(tmp_path / "ddp")
    assert len(losses) == 3 and ranks.logged(tmp_path / "out") == [pytest.approx(each, rel=1e-6) for each in losses]
    assert f"loss {losses[-1][0]:.4f}; the result is at {tmp_path / 'out'}" in done.stdout
    ours, theirs = (ranks.saved_weights(tmp_path / name) for name in ("out", "ddp"))
    assert all(torch.allclose(ours[name], tensor, atol=1e-6) for name, tensor in theirs.items())


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("nbclient") is None or find_spec("ipykernel") is None, reason="needs nbclient, ipykernel"
)
def test_the_notebook_runs_from_top_to_bottom(tmp_path, checkout, monkeypatch):
    from nbclient import NotebookClient
    from nbformat import NO_CONVERT, read

    monkeypatch.setenv("PYTHONPATH", str(checkout))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    notebook = read(checkout / "examples" / "first_steps.ipynb", NO_CONVERT)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs for cell in code)  # what is committed claims nothing
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    said = "".join(out.get("text", "") for cell in code for out in cell.outputs if out.get("name") == "stdout")
    first, last = map(float, re.search(r"^loss: ([\d.]+) to ([\d.]+)$", said, re.MULTILINE).groups())
    assert last < first / 2
    before, after = map(float, re.search(r"answers: ([\d.]+) before, ([\d.]+) after", said).groups())
    assert after < before
    answers = dict(re.findall(r"^(before|after|merged|transformers\.models\S+): (.*)$", said, re.MULTILINE))
    assert answers["before"] != answers["after"] == answers["merged"] and len(answers) == 4
    assert answers["transformers.models.llava.modeling_llava"] == answers["merged"]
    assert any("image/png" in out.get("data", {}) for cell in code for out in cell.outputs)
