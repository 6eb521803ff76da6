"""What stands in examples/ works as it stands there."""

import os
import re

from safetensors.torch import load_file

from tests import warm_python


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
