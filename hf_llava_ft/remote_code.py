"""Folders that carry the code of their model, for what transformers' own LLaVA cannot express.

`save_pretrained` writes the code (`checkpoint_mixin_llava.py`). Here is what may be done with it: this package runs no code
out of a folder, with one exception. When it verifies what it has written, a process without this package runs the code as
a stranger's would, provided that every file is the same, byte for byte, as ours.
"""

import json
from pathlib import Path

from hf_llava_ft.modeling import checkpoint_mixin_llava
from hf_llava_ft.modeling.checkpoint_mixin_llava import AUTO_MAP


def carries_our_code(folder: str | Path) -> bool:
    """Whether `trust_remote_code=True` runs files of this package from `folder`, and nothing else."""
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        # All of them, not only those that are named: transformers also runs custom_generate/generate.py.
        found = {path: path.read_bytes() for path in folder.rglob("*.py")}
    except (OSError, ValueError):
        return False
    ours = {path.name: path.read_bytes() for path in Path(checkpoint_mixin_llava.__file__).parent.glob("*.py")}
    needed = {folder / f"{reference.partition('.')[0]}.py" for reference in AUTO_MAP.values()}
    return (
        isinstance(config, dict)
        and config.get("auto_map") == AUTO_MAP
        and needed <= found.keys()
        and all(content == ours.get(path.name) for path, content in found.items())
    )


def note_on_code(folder: str | Path) -> str:
    """The sentence to print when `folder` was written with its code."""
    return (
        f"Note: transformers' own LLaVA cannot express this model, so {folder} carries the code of the model. "
        f"Without this package it loads with trust_remote_code=True."
    )
