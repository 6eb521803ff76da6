"""The batches of a training run: which rows come together, in which order, and in which shape.

Streams, packs and rows in batches each have a loader of their own; evaluation has transformers'.
"""

from typing import Any, cast

from torch.utils.data import DataLoader

from hf_llava_ft.data.collator import FlatCollator, LlavaCollator
from hf_llava_ft.data.packing import PackSampler
from hf_llava_ft.data.streaming import LlavaStream
from hf_llava_ft.data.streaming.loader import stream_dataloader
from hf_llava_ft.processing.processing_llava import LlavaProcessor
from hf_llava_ft.settings.training_arguments import LlavaTrainingArguments
from hf_llava_ft.training.row_order import row_sampler, told_of_padding
from hf_llava_ft.training.speed.packed_loader import pack_collator, pack_loader, pack_sampler, told_of_packs
from hf_llava_ft.training.trainer_checkpoints import CheckpointingTrainer


class BatchingTrainer(CheckpointingTrainer):
    """
    The part of [`LlavaTrainer`] that makes batches.

    Attributes:
        is_compiled (`bool`): whether packs are filled up to one shape, for layers that are compiled.
        is_padding_free (`bool`): whether the rows of a batch stand one behind the other.
    """

    args: LlavaTrainingArguments
    _processor: Any
    is_compiled = False
    is_padding_free = False

    def get_train_dataloader(self) -> DataLoader:
        if isinstance(self.train_dataset, LlavaStream):
            return stream_dataloader(self.train_dataset, self.train_collator(), self.args, self._train_batch_size)
        if self.args.packing:
            loader = pack_loader(self.train_dataset, self.pack_sampler(), self.train_collator(), self.args)
            return self.accelerator.prepare(loader)
        given, self.data_collator = self.data_collator, self.train_collator()
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = given

    def train_collator(self) -> Any:
        """What makes batches of rows, or of packs, to train on."""
        if self.args.packing:
            return pack_collator(self.data_collator, self.args, self.is_compiled)
        return FlatCollator(cast(LlavaCollator, self.data_collator)) if self.is_padding_free else self.data_collator

    def pack_sampler(self) -> PackSampler:
        """The packs that a run with `packing` trains on."""
        return pack_sampler(self.train_dataset, self.args, cast(LlavaProcessor, self._processor), self._max_length)

    def num_examples(self, dataloader: DataLoader) -> int:
        dataset = dataloader.dataset
        return dataset.num_rows if isinstance(dataset, LlavaStream) else super().num_examples(dataloader)

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if dataset is None or not hasattr(dataset, "__len__"):
            return super()._get_train_sampler(train_dataset)
        own = row_sampler(dataset, self.args, self.processing_class, self._max_length)
        return super()._get_train_sampler(train_dataset) if own is None else own

    @property
    def _max_length(self) -> int | None:
        return getattr(self.data_collator, "max_length", None)

    def told_of_padding(self) -> str | None:
        """A sentence on the padding of the first epoch; None where it is not known."""
        dataset, processor = self.train_dataset, self.processing_class
        if self.args.packing:
            return told_of_packs(self.pack_sampler(), self.args, self.is_compiled)
        if self.is_padding_free:
            return "Padding: none, since each row of a batch is computed at its own length."
        sampler = row_sampler(dataset, self.args, processor, self._max_length) if hasattr(dataset, "__len__") else None
        return told_of_padding(sampler, dataset, self.args, processor, self._max_length)
