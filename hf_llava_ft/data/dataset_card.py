"""README.md of a data set: what the Hub and `datasets` read from it, and what a person does."""

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from datasets import DatasetInfo, SplitDict, SplitInfo
from datasets.info import DatasetInfosDict
from huggingface_hub import DatasetCardData

from hf_llava_ft.data.builder import FEATURES
from hf_llava_ft.hub.markdown import code_block, escaped

if TYPE_CHECKING:
    from hf_llava_ft.data.export import ExportedDataset

_LOAD = """
import datasets

rows = datasets.load_dataset({name}, split="train")
print(rows[0]["messages"], rows[0]["images"])
"""

_TEXT = """
# {title}

Conversations about images, to fine-tune LLaVA on: {rows} with {images} embedded.

| column | what it holds |
| --- | --- |
| `id` | the row's id |
| `messages` | turns of `role` (system, user, assistant) and `content`, a list of parts: text or an image's place |
| `images` | one image for each place, in reading order |
| `num_words` | words of all turns, `<image>` included: the length that LLaVA groups rows by |
| `num_images` | number of images |

{load}

Train on it:

{train}

It was written, and read back, with hf_llava_ft. Its license is that of the images and texts it was made of: state it
here, and where they come from.
"""


def write_card(path: Path, exported: "ExportedDataset", name: str) -> None:
    """
    Args:
        path (`Path`): the README.md to write.
        exported (`ExportedDataset`): the numbers.
        name (`str`): what users load it by, `user/name` or the folder's name.
    """
    splits = SplitDict()
    splits.add(SplitInfo("train", num_bytes=exported.num_bytes, num_examples=exported.num_rows))
    info = DatasetInfo(
        features=FEATURES, splits=splits, download_size=exported.download_bytes, dataset_size=exported.num_bytes
    )
    data = DatasetCardData(task_categories=["image-text-to-text"], tags=["llava"])
    DatasetInfosDict({"default": info}).to_dataset_card_data(data)
    data["configs"] = [{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*"}]}]
    text = _TEXT.format(
        title=escaped(name.rpartition("/")[2]),
        load=code_block("python", _LOAD.format(name=json.dumps(name))),
        train=code_block("sh", f"llava-ft train --data_path {shlex.quote(name)} ..."),
        rows=f"{exported.num_rows:,} row{'' if exported.num_rows == 1 else 's'}",
        images=f"{exported.num_images:,} image{'' if exported.num_images == 1 else 's'}",
    )
    path.write_text(f"---\n{data}\n---\n{text}", encoding="utf-8")
