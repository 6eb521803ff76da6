"""The commands as a user types them, a Hub to push to, and processors of both kinds."""

import copy
import shutil
import signal
import sys

import pytest

from hf_llava_ft.checkpoints.opening import load_model, load_processor
from hf_llava_ft.cli import main
from hf_llava_ft.processing.processing_llava import LlavaProcessor
from hf_llava_ft.processing.tokenizer_llava import load_tokenizer
from hf_llava_ft.termination import TERMINATION_SIGNALS
from tests.hub_client import HubClient
from tests.loopback_hub import LoopbackHub


@pytest.fixture
def llava_ft(monkeypatch, capfd):
    """A function that runs `llava-ft ARGS`; returns exit code, stdout and stderr, which holds no traceback."""

    def run(*args) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["llava-ft", *map(str, args)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            main()
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return int(exit_info.value.code or 0), out, err

    before = {number: signal.getsignal(number) for number in TERMINATION_SIGNALS}
    yield run
    for number, handler in before.items():
        signal.signal(number, handler)  # a command sets its own


@pytest.fixture(scope="session")
def loaded(tiny_checkpoint):
    """A function that gives model and processor of `tiny_checkpoint`: copies, each time, of what is loaded once."""
    processor = load_processor(str(tiny_checkpoint))
    model = load_model(str(tiny_checkpoint), processor)
    return lambda: copy.deepcopy((model, processor))


@pytest.fixture(params=["pad", "anyres"])
def processor(request, tiny, golden) -> LlavaProcessor:
    """Of LLaVA-1.5, whose pictures all take the same number of tokens, and of LLaVA-1.6."""
    pinpoints = {"image_grid_pinpoints": [[56, 112], [112, 56]]} if request.param == "anyres" else {}
    return LlavaProcessor.build(
        load_tokenizer(golden / "tokenizer_tiny"),
        tiny.config().vision_config,
        version="v1",
        image_aspect_ratio=request.param,
        **pinpoints,
    )


@pytest.fixture(scope="session")
def _running_hub():
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture
def hub(_running_hub):
    """A Hub, the same for all tests; nothing is asked of it that it does not know."""
    yield _running_hub
    _running_hub.heal()
    assert _running_hub.unknown == []


@pytest.fixture(scope="session")
def client(_running_hub, tmp_path_factory):
    """A process that runs `llava-ft` commands against `hub`."""
    with HubClient(_running_hub.environment(tmp_path_factory.mktemp("home"))) as client:
        yield client


@pytest.fixture
def trained(tiny_checkpoint, tmp_path):
    """A folder with a model, and with what lies beside it after training."""
    folder = tmp_path / "trained"
    shutil.copytree(tiny_checkpoint, folder)
    for name in (".env", "training_args.bin", "trainer_state.json", "data.json", "optimizer.pt", "notes.txt", "my.py"):
        (folder / name).write_text("private")
    for name in ("checkpoint-5", "runs"):
        (folder / name).mkdir()
    (folder / "checkpoint-5" / "config.json").write_text("{}")
    return folder
