"""python -m benchmarks.learning on a few pictures: both stages run on all sides; what is made of their stops."""

import json
import os
import subprocess
import sys

import pytest
import transformers
from packaging.version import Version

# Its own processor names other tokens as answers in 5.17, so that rows would not be the same.
SIDES = ["ours", "plain"] if Version(transformers.__version__) >= Version("5.24") else ["ours"]


def test_sides_train_both_stages_on_the_same_rows_and_are_examined(checkout, tmp_path):
    output, picture = tmp_path / "learning.json", tmp_path / "curve.png"
    words = ["--pictures", "60", "--every", "3", "--questions", "8", "--enough", "0", "--sides", *SIDES]
    words += ["--folder", str(tmp_path / "made"), "--output", str(output), "--picture", str(picture)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.learning", *words],
        cwd=checkout,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Equal ids, labels and pixels on all sides." in done.stdout
    report = json.loads(output.read_text())
    assert set(report["curves"]) == set(SIDES) == set(report["captions_seconds"])
    for side, curve in report["curves"].items():
        assert curve[0] == [report["captions_seconds"][side], 0.0]  # stage one cannot be asked
        assert len(curve) == 2 and curve[1][0] > curve[0][0] > 0 and 0 <= curve[1][1] <= 1
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_where_a_curve_reaches_a_share():
    from benchmarks.learning.__main__ import seconds_to

    points = [(100.0, 0.0), (110.0, 0.5), (120.0, 0.4), (130.0, 0.9)]
    assert seconds_to(points, 0.5) == 110
    assert seconds_to(points, 0.25) == pytest.approx(105)
    assert seconds_to(points, 0.65) == pytest.approx(125)
    assert seconds_to(points, 0.95) is None
