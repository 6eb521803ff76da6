"""Environments of sides that need another library or another build: layers over the one that runs the benchmark."""

import subprocess
import sys
import sysconfig
import tarfile
from io import BytesIO
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
EARLIER = "345f9fe"  # the build before this one's work on speed
TRL = "trl==1.16.0"
# 345f9fe names no upper bound but 6, and stops at its first forward under 5.24: the newest it runs with.
ITS_TRANSFORMERS = "transformers==5.23.0"


def layered(folder: Path, *packages: str) -> Path:
    """The Python of an environment that has `packages`, without what they ask for, and else what this one has."""
    python = folder / "bin" / "python"
    if (folder / "done").is_file():
        return python
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    shared = folder / "lib" / version / "site-packages" / "shared.pth"
    shared.write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", *packages]
    subprocess.run(install, check=True)
    (folder / "done").touch()
    return python


def earlier_build(folder: Path) -> Path:
    """The files of `EARLIER`, out of this checkout's history."""
    if not (folder / "pyproject.toml").is_file():
        files = subprocess.run(["git", "archive", EARLIER], cwd=CHECKOUT, check=True, capture_output=True).stdout
        with tarfile.open(fileobj=BytesIO(files)) as archive:
            archive.extractall(folder, filter="data")
    return folder


def environment_of(side: str, folder: Path) -> tuple[Path, Path]:
    """Python and code of a side."""
    if side.startswith("trl"):
        return layered(folder / "environments" / "trl", TRL), CHECKOUT
    if side == EARLIER:
        python = layered(folder / "environments" / EARLIER, ITS_TRANSFORMERS)
        return python, earlier_build(folder / "environments" / f"{EARLIER}-code")
    return Path(sys.executable), CHECKOUT
