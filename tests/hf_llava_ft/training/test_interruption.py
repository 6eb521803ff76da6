"""Signals belong to training while it goes on, and not a moment longer."""

import json
import signal

from hf_llava_ft.termination import exit_on_sigterm
from hf_llava_ft.training.resuming.interruption import SIGNALS


def test_training_that_fails_gives_the_signals_back(llava_ft, tiny_checkpoint, llava_json, tmp_path):
    data, images = llava_json(4)
    rows = json.loads(data.read_text())
    rows[3]["conversations"] = []
    data.write_text(json.dumps(rows))
    exit_on_sigterm()  # as every command begins
    before = [signal.getsignal(number) for number in SIGNALS]
    flags = {"model_name_or_path": tiny_checkpoint, "data_path": data, "image_folder": images, "use_cpu": True}
    flags |= {"output_dir": tmp_path / "out", "streaming": True, "shuffle_buffer_size": 0, "max_steps": 4}
    code, _, err = llava_ft("train", *(word for name, value in flags.items() for word in (f"--{name}", value)))
    assert code == 2 and "row 4" in err  # which is met when training is under way
    assert [signal.getsignal(number) for number in SIGNALS] == before
