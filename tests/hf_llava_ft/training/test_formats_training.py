"""A mixture of every format trains, from the cache and streamed."""

import base64
import json

import datasets
import pandas as pd
import pytest
from PIL import Image

from hf_llava_ft.train import parse_arguments, train


@pytest.fixture
def mixture(tmp_path):
    """`--data_path` and `--image_folder` of five sets of four rows each, all of one picture of another colour."""
    images = tmp_path / "images"
    images.mkdir()
    for index in range(4):
        Image.new("RGB", (60 + index, 40), (60 * index, 90, 200)).save(images / f"{index}.png")
    question, answers = "What number?", [f"It is {index}." for index in range(4)]
    turns = [[{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": it}] for it in answers]
    llava = [{"id": i, "image": f"{i}.png", "conversations": it} for i, it in enumerate(turns)]
    (tmp_path / "llava").write_text(json.dumps(llava))
    sharegpt = [{"images": [f"{i}.png"], "system": "Be brief.", "conversations": it} for i, it in enumerate(turns)]
    (tmp_path / "sharegpt").write_text("\n".join(map(json.dumps, sharegpt)))
    pictures = [(images / f"{index}.png").read_bytes() for index in range(4)]
    openai = []
    for picture, answer in zip(pictures, answers, strict=True):
        url = "data:image/png;base64," + base64.b64encode(picture).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
        openai.append({"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]})
    (tmp_path / "openai").write_text(json.dumps(openai))
    frame = pd.DataFrame({"prompt": [question] * 4, "completion": answers})
    frame["image"] = [{"bytes": picture, "path": None} for picture in pictures]
    frame.to_parquet(tmp_path / "prompts")
    captions = tmp_path / "captions"
    captions.mkdir()
    for index, picture in enumerate(pictures):
        (captions / f"{index}.png").write_bytes(picture)
    pd.DataFrame({"file_name": [f"{i}.png" for i in range(4)], "text": answers}).to_csv(captions / "metadata.csv")
    names = ("llava:0.5", "sharegpt", "openai", "prompts:2", "captions")
    return ",".join(str(tmp_path / name) for name in names), str(images)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_mixture_of_every_format_trains(tmp_path, mixture, tiny_checkpoint, streaming, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data_path, image_folder = mixture
    flags = ["--model_name_or_path", tiny_checkpoint, "--data_path", data_path, "--image_folder", image_folder]
    flags += ["--output_dir", tmp_path / "out", "--per_device_train_batch_size", "2", "--use_cpu", "True"]
    flags += ["--streaming", streaming, "--num_train_epochs", "1", "--save_strategy", "no", "--report_to", "none"]
    result = train(*parse_arguments([str(flag) for flag in flags]))
    assert len(result.losses) == (2 + 4 + 4 + 8 + 4) / 2
    assert all(0 < loss < 20 for loss in result.losses)
    assert (result.adapter_dir / "adapter_config.json").is_file()


@pytest.fixture(autouse=True, scope="module")
def quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()
