"""The page in a browser, where Gradio is not installed: in an environment of its own."""

import os
import subprocess

import pytest

from hf_llava_ft.web.server import OLDEST
from tests.hf_llava_ft.web.test_page import CHROMIUM, LACKING
from tests.layered_environment import layered_python

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not LACKING, reason="test_page.py runs here as it is"),
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium or Chrome on the PATH: apt-get install chromium"),
]


def test_the_page_in_an_environment_that_has_gradio(checkout, tmp_path):
    python = layered_python(tmp_path / "venv", f"gradio>={OLDEST},<7", "playwright")
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "slow", "-rs"]
    result = subprocess.run(
        [*command, checkout / "tests" / "hf_llava_ft" / "web" / "test_page.py"],
        cwd=checkout,
        env=own | {"PYTHONPATH": str(checkout)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout and " skipped" not in result.stdout, result.stdout
