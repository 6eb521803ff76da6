"""An environment with transformers 4.57, the last of transformers 4, and what it makes of folders.

`.venv-4.57` is made on first use, which takes a minute, and again when what it holds has changed here.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock
from safetensors.torch import load_file

CHECKOUT = Path(__file__).parent.parent
ENVIRONMENT = CHECKOUT / ".venv-4.57"
# peft 0.18: the last made for transformers 4. No torchvision: the image processors of the Pillow kind, as here.
PACKAGES = (
    *("transformers==4.57.6", "peft==0.18.0", "accelerate==1.12.0", "tokenizers==0.22.2", "huggingface_hub==0.36.2"),
    *("safetensors==0.8.0", "pillow", "jinja2>=3.1.6", "sentencepiece>=0.2.1", "protobuf>=4.25"),
)
_READER = Path(__file__).with_name("read_folders.py")


@dataclass(frozen=True)
class Wanted:
    """
    Args:
        folder (`Path`): what is read.
        texts (`list[str]`): what its tokenizer encodes.
        pictures (`list[Path]`): what its image processor turns into pixels; the first is asked about.
        chat (`list[dict]`, *optional*): what its processor turns into a prompt.
        has_model (`bool`): whether it holds a model, or an adapter, to answer it.
        base (`Path`, *optional*): of an adapter.
    """

    folder: Path
    texts: list[str]
    pictures: list[Path]
    chat: list[dict] | None = None
    has_model: bool = True
    base: Path | None = None


@dataclass(frozen=True)
class Read:
    """What `read_folders.py` wrote of one folder."""

    encoded: dict
    tensors: dict[str, torch.Tensor]


def older_python() -> Path:
    """The Python of the environment, which is made where it is missing."""
    python, made_of = ENVIRONMENT / "bin" / "python", ENVIRONMENT / "made_of.txt"
    with FileLock(f"{ENVIRONMENT}.lock"):
        if made_of.is_file() and made_of.read_text(encoding="utf-8") == "\n".join(PACKAGES):
            return python
        subprocess.run([sys.executable, "-m", "venv", "--clear", ENVIRONMENT], check=True)
        subprocess.run([python, CHECKOUT / ".ci" / "install_torch.py"], check=True)
        quiet = ("--quiet", "--no-input", "--disable-pip-version-check")
        subprocess.run([python, "-m", "pip", "install", *quiet, *PACKAGES], check=True)
        made_of.write_text("\n".join(PACKAGES), encoding="utf-8")
    return python


def read_by(python: str | Path, wanted: list[Wanted], scratch: Path) -> list[Read]:
    """What plain transformers of the environment of `python` makes of each folder; without this package."""
    scratch.mkdir(parents=True)
    described = [
        {
            "folder": str(each.folder),
            "base": each.base and str(each.base),
            "texts": each.texts,
            "chat": each.chat,
            "pictures": [str(path) for path in each.pictures],
            "has_model": each.has_model,
        }
        for each in wanted
    ]
    (scratch / "wanted.json").write_text(json.dumps(described), encoding="utf-8")
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    subprocess.run(
        [python, _READER, scratch / "wanted.json", scratch],
        cwd=scratch,
        env=clean | {"HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        check=True,
    )
    return [
        Read(
            json.loads((scratch / f"{index}.json").read_text(encoding="utf-8")),
            load_file(scratch / f"{index}.safetensors"),
        )
        for index in range(len(wanted))
    ]


if __name__ == "__main__":
    print(older_python())
