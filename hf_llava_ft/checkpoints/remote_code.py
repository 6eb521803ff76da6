"""Folders that carry the code of their model, for what transformers' own LLaVA cannot express.

`save_pretrained` writes the code: that of the model (`checkpoint_mixin_llava.py`), and of the processor where that is
not a native one either (`LlavaNextProcessor`). Here is what may be done with it: this package runs no code out of a
folder, with one exception. When it verifies what it has written, a process without this package runs the code as a
stranger's would, provided that every file is the same, byte for byte, as ours.
"""

import json
import re
from pathlib import Path

from hf_llava_ft.modeling import checkpoint_mixin_llava
from hf_llava_ft.modeling.checkpoint_mixin_llava import AUTO_MAP
from hf_llava_ft.processing import processing_llava

# What `llava-ft export --for endpoints` puts beside a model.
ENDPOINT_HANDLER = Path(__file__).parents[1] / "serving" / "endpoint_handler.py"
# The files whose `auto_map` transformers follows.
_SETTINGS = ("config.json", "processor_config.json", "preprocessor_config.json", "tokenizer_config.json")


def carries_our_code(folder: str | Path) -> bool:
    """Whether `trust_remote_code=True` loads the model in `folder` by files of this package, and runs nothing else."""
    try:
        config = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    needed = {f"{reference.partition('.')[0]}.py" for reference in AUTO_MAP.values()}
    return (
        isinstance(config, dict)
        and config.get("auto_map") == AUTO_MAP
        and all(Path(folder, name).is_file() for name in needed)
        and runs_only_our_code(folder)
    )


def runs_only_our_code(folder: str | Path) -> bool:
    """Whether all that `trust_remote_code=True` runs from `folder` is files of this package; true if that is none."""
    folder, ours = Path(folder), own_code()
    try:
        # Not only the files that are named: transformers also runs custom_generate/generate.py.
        found = [*folder.glob("*.py"), *folder.glob("custom_generate/*.py")]
        if any(path.read_bytes() != ours.get(path.name) for path in found):
            return False
        named = [
            _auto_maps((folder / name).read_text(encoding="utf-8")) for name in _SETTINGS if (folder / name).exists()
        ]
    except (OSError, ValueError, RecursionError):
        return False
    # "repository--module.Class" is code in another repository, and a path is code in another folder.
    return not re.search(r"--|/|\\", json.dumps(named))


def own_code() -> dict[str, bytes]:
    """The files of this package that travel with a model, by their name in its folder."""
    sources = [Path(file).parent for file in (checkpoint_mixin_llava.__file__, processing_llava.__file__)]
    code = {path.name: path.read_bytes() for source in sources for path in source.glob("*.py")}
    return code | {"handler.py": ENDPOINT_HANDLER.read_bytes()}


def _auto_maps(text: str) -> list:
    """Every `auto_map` in a JSON text, at any depth."""
    found = []

    def look(settings: dict) -> dict:
        if "auto_map" in settings:
            found.append(settings["auto_map"])
        return settings

    json.loads(text, object_hook=look)
    return found


def note_on_code(folder: str | Path) -> str:
    """The sentence to print when `folder` was written with its code."""
    return (
        f"Note: transformers' own LLaVA cannot express this model, so {folder} carries the code of the model. "
        f"Without this package it loads with trust_remote_code=True."
    )
