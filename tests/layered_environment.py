"""An environment over this one, with what a slow test needs besides and the others must not have."""

import subprocess
import sys
import sysconfig
from pathlib import Path


def layered_python(folder: Path, *wanted: str) -> Path:
    """The Python of a new environment in `folder`, with the packages of this one and `wanted`, as pip names them."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    purelib = ["-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = subprocess.run([python, *purelib], check=True, capture_output=True, text=True).stdout.strip()
    # Only what lies there is added: not this package, where it is installed in editable form.
    with open(f"{site}/over.pth", "w", encoding="utf-8") as file:
        file.write(sysconfig.get_path("purelib"))
    quiet = ("--quiet", "--no-input", "--disable-pip-version-check")
    subprocess.run([python, "-m", "pip", "install", *quiet, *wanted], check=True)
    return python
