"""Every kind of dataset that can be trained on, opened as one.

    for source in open_source("a.json:0.3,user/name:train", "images"):
        print(source.format, source.where)            # LLaVA JSON  a.json
        for number, raw in source.iter_raw():         # memory bounded; numbers from 1
            row = source.parse(raw, number)           # Row of data/schema.py; UserError with row number and id
            stored = [source.locate(image, source.place(raw, number)) for image in row["images"]]

    dataset = load_data("a.json:0.3,user/name:train", "images")    # datasets.Dataset, memory-mapped, checked

`parse` looks at no image file; `locate` finds or decodes one and says what is wrong with it, so a check can count rows
and images apart. `Source` can be pickled, so that other processes can read it.

A format is a container (JSON, JSON Lines, CSV, Parquet, a folder of `save_to_disk`, an `imagefolder`, the Hub) and a
dialect (`dialects.py`: what a row looks like). Both are told from the contents; a name or an ending decides nothing.
"""

from hf_llava_ft.data.formats.dataset import load_data
from hf_llava_ft.data.formats.source import Source, open_source

__all__ = ["Source", "load_data", "open_source"]
