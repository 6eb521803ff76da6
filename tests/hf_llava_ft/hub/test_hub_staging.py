"""What belongs to an artefact goes to the Hub, and nothing that tells of this machine."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_llava_ft.hub.staging import hub_name, id_of_cached, stage
from tests.hub_client import MODEL_FILES, files, push


def damage(folder, how):
    config = json.loads((folder / "config.json").read_text())
    if how == "home path":
        (folder / "chat_template.jinja").write_text("{# /home/alice/work/template.jinja #}")
    elif how == "own folder":
        (folder / "generation_config.json").write_text(json.dumps({"from": f"{folder.resolve()}/x"}))
    elif how == "token":
        (folder / "tokenizer_config.json").write_text(json.dumps({"token": "hf_" + "a" * 34}))
    elif how == "token in use":
        (folder / "tokenizer_config.json").write_text(json.dumps({"token": "hf_loopback"}))
    elif how == "header":
        weights = load_file(folder / "model.safetensors")
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt", "from": "/home/alice/run/1"})
    elif how == "link":
        (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
        (folder / "model.safetensors").symlink_to(folder.parent / "elsewhere.safetensors")
    elif how == "pickle":
        (folder / "model.safetensors").unlink()
        torch.save({}, folder / "pytorch_model.bin")
    elif how == "half":
        content = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    elif how == "foreign code":
        (folder / "modeling_llava.py").write_text("print('mine')")
    elif how == "shard":
        index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder / "model.safetensors").rename(folder / "model-00002-of-00002.safetensors")
    elif how == "name_or_path":
        (folder / "config.json").write_text(json.dumps(config | {"_name_or_path": str(folder)}))


@pytest.mark.parametrize(
    "how, says",
    [
        ("home path", "chat_template.jinja names '/home/alice/'"),
        ("own folder", "generation_config.json names"),
        ("token", "tokenizer_config.json holds an access token"),
        ("token in use", "tokenizer_config.json holds an access token"),
        ("header", "model.safetensors names '/home/alice/'"),
        ("link", "model.safetensors is a link that leaves the folder"),
        ("pickle", "pickles are not uploaded"),
        ("half", "is not a readable weights file"),
        ("foreign code", "holds code that is not of this version"),
        ("shard", "lacks model-00001-of-00002.safetensors"),
    ],
)
def test_what_must_not_leave_is_named(hub, client, trained, how, says):
    damage(trained, how)
    done = push(client, trained, "user/never")
    assert done.code == 2 and says in done.err, done.err
    assert "models/user/never" not in hub.repositories


def test_a_folder_of_this_machine_is_taken_out_of_the_configuration(hub, client, trained):
    damage(trained, "name_or_path")
    assert push(client, trained, "user/clean").code == 0
    assert b"_name_or_path" not in files(hub, "models/user/clean")["config.json"]


def test_a_base_in_the_cache_is_known_by_its_id(tmp_path):
    sha = "0123456789" * 4
    folder = tmp_path / "models--llava-hf--llava-1.5-7b-hf" / "snapshots" / sha
    folder.mkdir(parents=True)
    assert id_of_cached(str(folder)) == ("llava-hf/llava-1.5-7b-hf", sha)
    assert id_of_cached(str(tmp_path)) is None
    assert hub_name("org/base") == "org/base"
    assert hub_name(str(folder)) is None and hub_name("../base") is None


def test_what_an_older_version_left_is_deleted(hub, client, trained):
    hub.upload(
        "models/user/old",
        {
            "model-00001-of-00002.safetensors": b"1",
            "model-00002-of-00002.safetensors": b"2",
            "model.safetensors.index.json": b"{}",
            "config.json": b"{}",
            "pytorch_model.bin": b"3",
            "mine/eval.md": b"stays",
            "LICENSE": b"stays",
        },
    )
    done = push(client, trained, "user/old")
    assert done.code == 0 and "model-00001-of-00002.safetensors, " in done.err, done.err
    assert set(files(hub, "models/user/old")) == {*MODEL_FILES, "mine/eval.md", "LICENSE"}
    assert len(hub.commits["models/user/old"]) == 2


def test_what_transformers_5_wrote_alone_is_sent_for_older_readers_too(trained, tmp_path):
    source, staged = tmp_path / "source", tmp_path / "staged"
    shutil.copytree(trained, source)
    staged.mkdir()
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "TokenizersBackend", "is_local": True, "local_files_only": False}
    settings["extra_special_tokens"] = settings.pop("additional_special_tokens")
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    (source / "preprocessor_config.json").unlink()
    config = json.loads((source / "config.json").read_text())
    del config["text_config"]["rope_theta"], config["torch_dtype"]
    (source / "config.json").write_text(json.dumps(config))
    stage(source, "model", staged)
    for name in ("tokenizer_config.json", "preprocessor_config.json", "config.json"):
        assert json.loads((staged / name).read_text()) == json.loads((trained / name).read_text()), name
    assert json.loads((source / "config.json").read_text()) == config  # the folder here stays as it is
