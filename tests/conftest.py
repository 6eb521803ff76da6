"""Tiny real models and processors, made in moments, and the reference outputs of the original.

What takes long to import is imported where it is used: xdist reads this file in a process that runs no test, before it
starts those that do.
"""

import gc
import os
import shutil
from pathlib import Path

# Before anything imports huggingface_hub: no test may need the network.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest

from tests import warm_python

GOLDEN = Path(__file__).parent / "golden"
CHECKOUT = Path(__file__).parent.parent
VERIFIED_TOKENS = 8
MANY_OBJECTS = 50_000


def pytest_addoption(parser):
    parser.addoption("--new-python", action="store_true", help="no fork of a warm process: a new Python each time")


def pytest_collection_finish():
    """What has been imported stays: without this, every collection of garbage goes through a million such objects."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """And what the tests of a file have imported, if it was much."""
    if (nextitem is None or nextitem.path != item.path) and len(gc.get_objects()) > MANY_OBJECTS:
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _warm_python(request):
    """What is written is verified in forks of a warm process too, by fewer tokens. Gives what starts a new Python."""
    from transformers import PreTrainedConfig

    from hf_llava_ft.checkpoints import reload, verify

    new_python = verify.fresh_python
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reload, "MAX_NEW_TOKENS", VERIFIED_TOKENS)  # two hundred times, by models that never stop
        # Each that is read is put in words for a log that nobody sees, which takes a tenth of loading a tiny model.
        patch.setattr(PreTrainedConfig, "__repr__", lambda config: type(config).__name__)
        if request.config.getoption("--new-python"):
            patch.setattr(warm_python, "ALWAYS_NEW", True)
        else:
            patch.setattr(verify, "fresh_python", warm_python.run)
        yield new_python


@pytest.fixture(autouse=True)
def _new_python(request, _warm_python):
    from hf_llava_ft.checkpoints import verify

    with pytest.MonkeyPatch.context() as patch:
        if request.node.get_closest_marker("new_python"):
            patch.setattr(warm_python, "ALWAYS_NEW", True)
            patch.setattr(verify, "fresh_python", _warm_python)
        yield


@pytest.fixture(scope="session")
def golden() -> Path:
    return GOLDEN


@pytest.fixture(scope="session")
def checkout() -> Path:
    return CHECKOUT


@pytest.fixture(scope="session")
def tiny():
    """`tiny.config`, `tiny.model`, `tiny.batch`: see `tests/tiny_models.py`."""
    from tests import tiny_models

    class Tiny:
        config = staticmethod(tiny_models.tiny_config)
        model = staticmethod(tiny_models.tiny_model)
        batch = staticmethod(tiny_models.tiny_batch)

    return Tiny


@pytest.fixture(scope="session")
def tiny_processor():
    from tests.tiny_models import build_tiny_processor

    return build_tiny_processor()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """A whole native `llava` folder: model and processor. It is of all tests: what one writes into it, others read."""
    from tests.tiny_models import save_tiny_checkpoint

    folder = save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")
    files = sorted(path.name for path in folder.iterdir())
    yield folder
    assert sorted(path.name for path in folder.iterdir()) == files, "a test wrote into tiny_checkpoint"


@pytest.fixture
def own_checkpoint(tiny_checkpoint, tmp_path) -> Path:
    """A copy of `tiny_checkpoint` to write into, as `llava-ft evaluate` does."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "own")


@pytest.fixture
def llava_json(tmp_path):
    """A function that writes a LLaVA JSON of `count` rows with pictures of different colours; returns file and
    folder."""
    import json

    from PIL import Image

    def write(count: int = 4, with_text_rows: bool = False) -> tuple[Path, Path]:
        folder = tmp_path / "images"
        folder.mkdir(exist_ok=True)
        rows = []
        for index in range(count):
            question, answer = f"What is number {index}?", f"It is the number {index * 7}."
            turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
            row = {"id": f"row{index}", "conversations": turns}
            if not (with_text_rows and index % 3 == 2):
                Image.new("RGB", (60 + index, 40), (40 * index % 256, 90, 200)).save(folder / f"{index}.png")
                row["image"] = f"{index}.png"
                turns[0]["value"] = f"<image>\n{question}"
            rows.append(row)
        path = tmp_path / "data.json"
        path.write_text(json.dumps(rows))
        return path, folder

    return write
