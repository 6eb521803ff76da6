"""What is pushed works for the next person, and what is refused is said in one sentence."""

import json
import os
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from hf_llava_ft.checkpoints.folder_lock import locked_folder
from hf_llava_ft.checkpoints.original_folders import write_projector
from tests.hub_client import MODEL_FILES, files, push


@pytest.fixture(scope="module")
def adapter(tiny_checkpoint, tiny, tiny_processor, tmp_path_factory):
    """An adapter with its projector, trained (as far as its numbers go) on the folder `tiny_checkpoint`."""
    from hf_llava_ft.checkpoints.opening import load_model

    config = LoraConfig(r=2, target_modules=r".*language_model.*q_proj", modules_to_save=["multi_modal_projector"])
    peft_model = get_peft_model(load_model(str(tiny_checkpoint)), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_(std=0.3)
    folder = tmp_path_factory.mktemp("adapter") / "out"
    peft_model.save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    return folder


def test_a_model_is_pushed_and_works(hub, client, trained, tiny_checkpoint):
    done = client.run("push", trained, "--repo_id", "user/model", "--private", "--license", "mit")
    assert done.code == 0, done.err
    assert "Uploaded: " in done.err and "largest logit difference 0.0e+00" in done.err
    pushed = files(hub, "models/user/model")
    assert set(pushed) == MODEL_FILES
    assert pushed["model.safetensors"] == (tiny_checkpoint / "model.safetensors").read_bytes()
    assert len(hub.commits["models/user/model"]) == 1 and hub.private["models/user/model"]
    everything = b"".join(pushed.values()) + done.err.encode()
    assert (
        b"private" not in everything and b"hf_loopback" not in everything and str(trained).encode() not in everything
    )


def test_a_folder_that_is_being_written_is_not_pushed(hub, client, trained):
    with locked_folder(trained):
        done = push(client, trained, "user/half")
    assert done.code == 2 and f"is being used by process {os.getpid()} on" in done.err, done.err
    assert "models/user/half" not in hub.repositories
    assert push(client, trained, "user/half", "--dry_run").code == 0


def test_the_same_once_more_is_no_commit(hub, client, trained):
    for says in ("Uploaded: ", "Nothing has changed: "):
        done = push(client, trained, "user/same")
        assert done.code == 0 and says in done.err, done.err
    assert len(hub.commits["models/user/same"]) == 1
    assert push(client, trained, "user/same", "--license", "mit").code == 0
    assert hub.commits["models/user/same"][1:] == [["README.md"]]


@pytest.mark.slow
def test_an_adapter_is_checked_on_the_base_that_others_get(hub, client, adapter, tiny_checkpoint):
    hub.upload("models/org/base", tiny_checkpoint)
    done = client.run("push", adapter, "--repo_id", "user/checked", "--base", "org/base")
    assert done.code == 0 and "Verified" in done.err, done.err


def test_an_adapter_names_its_base_on_the_hub(hub, client, adapter, tiny_checkpoint):
    refused = push(client, adapter, "user/adapter")
    assert refused.code == 2 and "--base user/base" in refused.err, refused.err
    assert "models/user/adapter" not in hub.repositories

    commit = hub.upload("models/org/base", tiny_checkpoint)
    assert push(client, adapter, "user/adapter", "--base", "org/base").code == 0
    pushed = files(hub, "models/user/adapter")
    settings = json.loads(pushed["adapter_config.json"])
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("org/base", commit)
    assert any(name.startswith("adapter_model") for name in pushed)
    assert "multi_modal_projector" in str(list(load_file(adapter / "adapter_model.safetensors")))
    assert str(tiny_checkpoint).encode() not in b"".join(pushed.values())


def named_on_the_hub(folder, **names):
    """Sets fields of config.json that are names of a folder in the golden files."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | names))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["code", "original", "original LoRA", "projector"])
def test_every_other_kind_is_checked_too(hub, client, tiny, tiny_processor, golden, tmp_path, kind):
    """In words of the verification: what loads it, and that it answers as it did."""
    for name in ("tiny-clip", "tiny-llama"):
        hub.upload(f"models/org/{name}", golden / name)
    folder, base, loader = tmp_path / "folder", [], "hf_llava_ft"
    if kind == "code":
        model = tiny.model(projector_type="mlp3x_gelu")
        model.save_pretrained(folder)
        tiny_processor.save_pretrained(folder)
        loader = "trust_remote_code"
    elif kind == "original":
        shutil.copytree(golden / "c_forward" / "mlp2x_patch" / "checkpoint", folder)
        named_on_the_hub(folder, mm_vision_tower="org/tiny-clip")
    else:
        shutil.copytree(golden / "f_lora" / "llava-tiny-lora", folder)
        named_on_the_hub(folder, mm_vision_tower="org/tiny-clip")
        base = ["--base", "org/tiny-llama"]
    if kind == "projector":
        weights = torch.load(folder / "non_lora_trainables.bin", weights_only=True)
        weights = {name.removeprefix("base_model.model."): tensor for name, tensor in weights.items()}
        weights = {name: tensor for name, tensor in weights.items() if "mm_projector" in name}
        torch.save(weights, folder / "mm_projector.bin")
        for name in ("adapter_config.json", "adapter_model.safetensors", "non_lora_trainables.bin"):
            (folder / name).unlink()
    done = client.run("push", folder, "--repo_id", f"user/{folder.name}", *base, "--json", tmp_path / "done.json")
    assert done.code == 0 and "Verified" in done.err, done.err
    result = json.loads((tmp_path / "done.json").read_text())
    assert (result["loader"], result["logit_difference"]) == (loader, 0.0)
    del hub.repositories[f"models/user/{folder.name}"]


@pytest.mark.slow
def test_a_base_on_the_hub_that_is_another_is_noticed(hub, client, adapter, tiny_checkpoint, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny_checkpoint, other)
    weights = load_file(other / "model.safetensors")
    name = next(name for name in weights if "embed_tokens" in name)
    save_file({**weights, name: weights[name] * 1.5}, other / "model.safetensors", metadata={"format": "pt"})
    hub.upload("models/org/other", other)
    done = client.run("push", adapter, "--repo_id", "user/wrong", "--base", "org/other")
    assert done.code == 2 and "does not answer like what was pushed" in done.err, done.err


def test_a_projector_of_the_original(hub, client, tiny, tmp_path):
    model = tiny.model()
    folder = tmp_path / "projector"
    folder.mkdir()
    model.config.vision_tower_name = "openai/clip-vit-large-patch14-336"
    write_projector(model, folder)
    arguments = ("push", folder, "--repo_id", "user/projector", "--base", "org/vicuna", "--no_verify")
    done = client.run(*arguments)
    assert done.code == 0 and "Not verified" in done.err, done.err
    assert {"mm_projector.bin", "config.json"} < set(files(hub, "models/user/projector"))
    model.config.vision_tower_name = str(tmp_path)
    write_projector(model, folder)
    done = client.run(*arguments)
    assert done.code == 2 and "names the vision tower by a folder of this machine" in done.err


def test_a_lora_folder_of_the_original(hub, client, golden, tmp_path):
    folder = tmp_path / "lora"
    shutil.copytree(golden / "f_lora" / "llava-tiny-lora", folder)
    done = push(client, folder, "user/lora", "--base", "org/vicuna")
    assert done.code == 0, done.err
    names = {"adapter_config.json", "adapter_model.safetensors", "non_lora_trainables.bin", "config.json"}
    pushed = files(hub, "models/user/lora")
    assert names < set(pushed)
    assert json.loads(pushed["adapter_config.json"])["base_model_name_or_path"] == "org/vicuna"


def test_a_run_that_has_not_ended(hub, client, tmp_path):
    (tmp_path / "checkpoint-2").mkdir()
    done = push(client, tmp_path, "user/run")
    assert done.code == 2 and f"push {tmp_path}/checkpoint-2" in done.err


def test_a_dry_run_asks_nobody(hub, client, trained):
    before = len(hub.requests)
    done = client.run("push", trained, "--repo_id", "user/dry", "--dry_run", "--no_verify", HF_TOKEN="")
    assert done.code == 0, done.err
    assert len(hub.requests) == before
    assert all(name in done.out for name in MODEL_FILES)
    assert "Not uploaded: .env, checkpoint-5/, data.json, my.py, notes.txt, optimizer.pt" in done.out
    assert "pipeline_tag: image-text-to-text" in done.out


def test_a_card_that_somebody_wrote_stays_if_asked_for(hub, client, trained):
    hub.upload("models/user/card", {"README.md": b"mine", "assets/me.png": b"mine"})
    assert push(client, trained, "user/card", "--keep_card").code == 0
    pushed = files(hub, "models/user/card")
    assert set(pushed) == {*MODEL_FILES, "assets/me.png"} and pushed["README.md"] == b"mine"
    assert push(client, trained, "user/card").code == 0
    pushed = files(hub, "models/user/card")
    assert set(pushed) == MODEL_FILES and pushed["README.md"] != b"mine"


def test_branch_and_pull_request(hub, client, trained):
    hub.upload("models/user/more", {"README.md": b"first"})
    assert push(client, trained, "user/more", "--revision", "dev").code == 0
    done = push(client, trained, "user/more", "--create_pr")
    assert done.code == 0 and "/discussions/1" in done.err, done.err
    assert files(hub, "models/user/more") == {"README.md": b"first"}
    assert (
        MODEL_FILES == set(files(hub, "models/user/more", "dev")) == set(files(hub, "models/user/more", "refs/pr/1"))
    )
    # To a repository of somebody else.
    hub.upload("models/stranger/theirs", {"README.md": b"first"})
    assert push(client, trained, "stranger/theirs", "--create_pr").code == 0
    refused = push(client, trained, "stranger/theirs")
    assert refused.code == 2 and "offer it with --create_pr" in refused.err
    refused = push(client, trained, "user/more", "--create_pr", "--revision", "dev")
    assert refused.code == 2 and "a pull request is made on main" in refused.err


@pytest.mark.parametrize(
    "arguments, environment, says",
    [
        (("user/no token",), {}, "is not a repository name"),
        (("justname",), {}, "write user/name"),
        (("user/x",), {"HF_TOKEN": ""}, "there is no token for the Hub"),
        (("user/x",), {"HF_TOKEN": "hf_expired"}, "the Hub does not take the token"),
        (("user/x",), {"HF_TOKEN": "hf_reading"}, "the token is read-only"),
        (("user/x",), {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        (("stranger/x",), {}, "the token may not write to stranger/x"),
        (("stranger/secret",), {}, "the token may not write to stranger/secret"),
        (("user/pulls", "--revision", "refs/pr/7"), {}, "has no revision refs/pr/7"),
        (("user/adapters",), {}, "holds an adapter, and a model in the same place"),
        (("user/open", "--private"), {}, "exists and is public"),
        (("user/x", "--license", "my own"), {}, "the Hub refuses the card"),
    ],
)
def test_refusals_are_one_sentence(hub, client, trained, arguments, environment, says):
    hub.upload("models/stranger/secret", {"README.md": b""})
    hub.repositories["models/stranger/secret"].private = True
    hub.upload("models/user/adapters", {"adapter_config.json": b"{}"})
    for name in ("pulls", "open"):
        hub.upload(f"models/user/{name}", {"README.md": b""})
    before = {name: repository.at("main").sha for name, repository in hub.repositories.items()}
    name, *rest = arguments
    done = push(client, trained, name, *rest, **environment)
    assert done.code == 2, done.err
    (error,) = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert says in error and "hf_" not in error.replace("hf auth", "")
    assert all(hub.repositories[key].at("main").sha == sha for key, sha in before.items())
    hub.repositories.pop("models/user/x", None)
