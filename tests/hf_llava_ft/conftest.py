"""The commands as a user types them, a Hub to push to, and processors of both kinds."""

import shutil
import signal
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from hf_llava_ft.checkpoints.opening import load_model
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


@pytest.fixture(scope="session")
def adapters_of_one_base(tiny_checkpoint, tiny_processor, tmp_path_factory):
    """Of other ranks and parts, with dropout; the last two change biases and embeddings of their base."""
    parent = tmp_path_factory.mktemp("adapters")
    for seed, (name, settings) in enumerate(
        {
            "one": {"r": 2, "modules_to_save": ["multi_modal_projector"], "lora_dropout": 0.5},
            "two": {"r": 3, "lora_dropout": 0.5},
            "biased": {"r": 2, "bias": "all"},
            "with_embeddings": {"r": 2},
        }.items()
    ):
        config = LoraConfig(target_modules=r".*language_model.*(q|v)_proj", **settings)
        model = get_peft_model(load_model(str(tiny_checkpoint)), config)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.5)
        model.save_pretrained(parent / name)
        if name == "with_embeddings":  # as other tools have PEFT write them, where they added rows
            embeddings = model.get_base_model().get_input_embeddings().weight.detach() * 2
            saved = load_file(parent / name / "adapter_model.safetensors")
            saved["base_model.model.model.language_model.embed_tokens.weight"] = embeddings.contiguous()
            save_file(saved, parent / name / "adapter_model.safetensors", {"format": "pt"})
        tiny_processor.save_pretrained(parent / name)
    return parent
