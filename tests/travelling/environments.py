"""One small environment for each minor release of transformers, without this package, under `.venv-travelling/`.

They share one PyTorch, which lies in an environment of its own and is seen by the others through a .pth file. Made on
first use, with plain pip; delete the folder to make them again.
"""

import subprocess
import venv
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
ENVIRONMENTS = CHECKOUT / ".venv-travelling"
# The last patch of each minor release since the oldest that pyproject.toml allows.
RELEASES = ("5.17.0", "5.18.0", "5.19.0", "5.20.2", "5.21.1", "5.22.2", "5.23.0", "5.24.0")
# For pictures and chat templates. Not sentencepiece: what reads a tokenizer.model is asked of nobody who only loads.
_BESIDES_TORCH = ("numpy", "pillow", "jinja2")


def python_with(release: str) -> Path:
    """
    The interpreter of the environment with transformers `release`, which is made if it is not there.

    Raises:
        RuntimeError: with pip's last complaint, if it cannot be made.
    """
    torch_python = _python_of("torch")
    if not _is_made("torch"):
        _make("torch", with_pip=True)
        _run(torch_python, str(CHECKOUT / ".ci" / "install_torch.py"))
        _run(torch_python, *_PIP, "install", "--quiet", *_BESIDES_TORCH)
        _stamp("torch").touch()
    if not _is_made(release):
        _make(release, with_pip=False)
        [shared] = ENVIRONMENTS.glob("torch/lib/python*/site-packages")
        [own] = ENVIRONMENTS.glob(f"{release}/lib/python*/site-packages")
        (own / "torch.pth").write_text(f"{shared}\n", encoding="utf-8")
        to_release = ("--python", str(_python_of(release)))
        _run(torch_python, *_PIP, *to_release, "install", "--quiet", f"transformers=={release}")
        _stamp(release).touch()
    return _python_of(release)


_PIP = ("-m", "pip", "--no-input", "--disable-pip-version-check")


def _python_of(name: str) -> Path:
    return ENVIRONMENTS / name / "bin" / "python"


def _stamp(name: str) -> Path:
    return ENVIRONMENTS / name / ".installed"


def _is_made(name: str) -> bool:
    return _stamp(name).is_file()


def _make(name: str, with_pip: bool) -> None:
    print(f"Making {ENVIRONMENTS / name}", flush=True)
    venv.EnvBuilder(clear=True, symlinks=True, with_pip=with_pip).create(ENVIRONMENTS / name)


def _run(*command) -> None:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        complaints = [line for line in lines if line.startswith("ERROR")] or lines
        raise RuntimeError(complaints[-1])
