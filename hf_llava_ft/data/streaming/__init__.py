"""Rows for training straight from their files, in an order that a position alone restores.

    stream = LlavaStream(open_source("a.json:0.3,b.parquet", "images"), shuffle_buffer_size=1000, seed=42)
    trainer = LlavaTrainer(model, args, train_dataset=stream, processing_class=processor)

Nothing is prepared but the count of rows: each is translated and checked, and its pictures are decoded, when its turn
comes.
"""

from hf_llava_ft.data.streaming.stream import PASSED, LlavaStream

__all__ = ["PASSED", "LlavaStream"]
