"""Installs PyTorch into the environment of the Python that runs this file; one that is there already is kept.

On Linux the package index serves PyTorch with several gigabytes of CUDA libraries. They are wanted where there is an
NVIDIA GPU. Elsewhere the CPU build serves: it is looked for where pip is configured to, then at PyTorch's own index.
The version is that of requirements/torch.txt.
"""

import importlib.metadata
import shutil
import subprocess
import sys
from pathlib import Path

REQUIREMENTS = Path(__file__).resolve().parent.parent / "requirements" / "torch.txt"
(TORCH,) = (line for line in REQUIREMENTS.read_text(encoding="utf-8").splitlines() if not line.startswith("#"))
# Only Linux has builds marked "+cpu"; plain torch is a CPU build on macOS.
CPU_BUILD = f"{TORCH}+cpu"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
NO_CPU_BUILD = f"""
No CPU build of PyTorch ({CPU_BUILD}) was found, neither where pip is configured to look nor at {CPU_INDEX}.
Install a PyTorch of your choice, then run make again, which keeps it:
    {sys.executable} -m pip install {TORCH}    (on Linux this brings several gigabytes of CUDA libraries)"""


def pip_install(*arguments: str, **options) -> bool:
    command = [sys.executable, "-m", "pip", "install", "--no-input", *arguments]
    return subprocess.run(command, **options).returncode == 0


def has_nvidia_gpu() -> bool:
    nvidia_smi = shutil.which("nvidia-smi")
    return nvidia_smi is not None and subprocess.run([nvidia_smi, "-L"], capture_output=True).returncode == 0


def main() -> int:
    try:
        print(f"torch {importlib.metadata.version('torch')} is installed: kept")
        return 0
    except importlib.metadata.PackageNotFoundError:
        pass
    if sys.platform != "linux" or has_nvidia_gpu():
        return 0 if pip_install(TORCH) else 1
    # Its error, where there is none, would only worry the reader: the next index has it.
    if pip_install("--quiet", CPU_BUILD, stderr=subprocess.DEVNULL):
        return 0
    # Few retries: an index that a firewall hides must not hold the user for minutes.
    if pip_install("--retries", "1", "--timeout", "30", "--index-url", CPU_INDEX, CPU_BUILD):
        return 0
    print(NO_CPU_BUILD, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
