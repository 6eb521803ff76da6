"""What the Trainer needs to train on a stream: a DataLoader that reads this rank's own rows, and exact resuming.

transformers resumes in the middle of an epoch by drawing all batches that were trained before and throwing them away.
A stream that knows how many they are hands out empty ones there, so nothing is read or decoded for them. What the
order follows from is kept in the `trainer_state.json` of each checkpoint and compared on resume.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState

from hf_llava_ft.data.streaming import PASSED, LlavaStream
from hf_llava_ft.errors import UserError
from hf_llava_ft.settings.training_arguments import LlavaTrainingArguments


def stream_dataloader(
    stream: LlavaStream, collator: Callable[[list], Any], args: TrainingArguments, batch_size: int
) -> DataLoader:
    """
    The DataLoader of this rank, prepared as accelerate prepares one.

    Args:
        stream (`LlavaStream`): all rows.
        collator (`Callable`): rows to a batch.
        args (`TrainingArguments`): rank, number of ranks, workers and device.
        batch_size (`int`): rows of a micro-batch.
    """
    own = stream.for_rank(args.process_index, args.world_size, batch_size)
    loader: DataLoader = DataLoader(
        own,
        batch_size=batch_size,
        collate_fn=_CollatorOfPassed(collator),
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        drop_last=args.dataloader_drop_last,
        multiprocessing_context=args.dataloader_multiprocessing_context,
    )
    # One process: the stream has dealt the rows already, and rank 0 must not read for all.
    return prepare_data_loader(
        loader, device=args.device, num_processes=1, process_index=0, put_on_device=True, dispatch_batches=False
    )


def refuse_grouping(args: LlavaTrainingArguments) -> None:
    """
    What nobody asked for is left out in `args`.

    Raises:
        UserError: if the arguments ask for an order that only rows in memory can have.
    """
    if args.workers_unsaid:
        args.dataloader_num_workers, args.dataloader_persistent_workers = 0, False
    if args.order_unsaid:
        args.group_by_modality_length = False
    if args.packing:
        raise UserError(
            "--packing needs to know how long all rows are, and a stream does not: leave it out, or --streaming."
        )
    if args.group_by_modality_length:
        raise UserError(
            "--group_by_modality_length sorts all rows, and a stream does not know them all; leave it out, or "
            "--streaming."
        )
    if args.sampler_order != "default":
        raise UserError(f"--sampler_order {args.sampler_order} is no order of a stream; leave it or --streaming out.")
    if args.train_sampling_strategy != "random":
        raise UserError(
            f"--train_sampling_strategy {args.train_sampling_strategy} is of rows in memory; a stream is in the order "
            f"of its files with --shuffle_buffer_size 0."
        )


@dataclass
class _CollatorOfPassed:
    collator: Callable[[list], Any]

    def __call__(self, rows: list) -> Any:
        return {} if rows[0] is PASSED else self.collator(rows)


class StreamPosition(TrainerCallback, ExportableState):
    """
    Keeps with each checkpoint what the order of a stream followed from, and sets the stream to where a resumed run
    goes on. Where rows lie in memory it only sees to it that a stream's run is not resumed so, or the other way round.

    Raises:
        UserError: when a run begins that would go on in another order.
    """

    def __init__(self):
        self.order: dict[str, Any] | None = None

    def state(self) -> dict[str, Any]:
        """As transformers keeps a callback in `trainer_state.json`."""
        return {"args": {}, "attributes": {"order": self.order}}

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        stream = getattr(train_dataloader, "dataset", None)
        if isinstance(stream, LlavaStream):
            workers, accumulation = max(args.dataloader_num_workers, 1), args.gradient_accumulation_steps
            self.order = {
                **stream.order,
                "dataloader_num_workers": workers,
                "gradient_accumulation_steps": accumulation,
            }
        else:
            self.order = None
        name = type(self).__name__
        saved = state.stateful_callbacks.get(name, {}).get("attributes", {}).get("order")
        state.stateful_callbacks[name] = self.state()
        if not state.global_step or args.ignore_data_skip:
            return
        _refuse_other_order(saved, self.order)
        if isinstance(stream, LlavaStream):
            # transformers' own numbers, by which it throws away what was trained.
            steps_per_epoch = max(-(-len(train_dataloader) // accumulation), 1)
            epoch, steps = divmod(state.global_step, steps_per_epoch)
            stream.pass_over(epoch, steps * accumulation)


def _refuse_other_order(saved: dict[str, Any] | None, order: dict[str, Any] | None) -> None:
    if (saved is None) != (order is None):
        was, flag = ("out of memory", "without") if saved is None else ("as a stream", "with")
        raise UserError(
            f"the checkpoint's run read its data {was}, in another order; resume it {flag} --streaming True, or begin "
            "the epoch anew with --ignore_data_skip True."
        )
    for name, value in (order or {}).items():
        if (saved or {}).get(name) != value:
            shown = name if name in ("data", "processes") else f"--{name}"
            raise UserError(
                f"the order of a stream depends on {shown}, which was {(saved or {}).get(name)} in the checkpoint's "
                f"run and is {value} now; set it back, or begin the epoch anew with --ignore_data_skip True."
            )
