"""`llava-ft estimate`: what a run of `llava-ft train` needs in memory and time, from the configuration alone."""

import argparse
import dataclasses
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console
from rich.table import Table

from hf_llava_ft.checkpoints.artifact import check_writable_file
from hf_llava_ft.checkpoints.inspection import inspect_checkpoint
from hf_llava_ft.checkpoints.opening import load_config
from hf_llava_ft.errors import UserError, exit_on_user_error
from hf_llava_ft.estimate.memory import DEFAULT_BUCKET, DEFAULT_LIVE, Engine
from hf_llava_ft.estimate.pictures import parsed_size, picture_of, worst_picture
from hf_llava_ft.estimate.plan import GIB, SET_ASIDE, Estimate, Estimator, Plan
from hf_llava_ft.estimate.trace import Batch
from hf_llava_ft.library_differences import checkpointing_flags
from hf_llava_ft.settings.arguments import TuningArguments
from hf_llava_ft.settings.defaults import OF_BATCH, UNTIL_KNOWN, batch_of, packs_of, tuning_with_defaults
from hf_llava_ft.settings.parsing import resolve
from hf_llava_ft.training.speed.feature_cache import disk_size

CARDS = (16, 24, 40, 80, 141)
STATEMENT = (
    "Computed, not measured: weights, gradients and optimiser states are exact sums of tensor sizes; activations and "
    "buffers are estimates that have not been compared with a GPU. Time is operations divided by an assumed speed."
)


def main(argv: Sequence[str]) -> None:
    """Parses `argv`, prints the estimate; exits with 2 on bad input."""
    with exit_on_user_error(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        own, words = _parser().parse_known_args(list(argv))
        if own.json is not None:
            check_writable_file(own.json)
        words = [f"--model_name_or_path{w[7:]}" if w == "--model" or w.startswith("--model=") else w for w in words]
        resolved = resolve(words).with_chosen_precision(has_bf16=True)  # as on the cards that are asked about
        settings = {name: setting.value for name, setting in resolved.by_name.items()}
        result = _estimate(own, settings)
        _print(result, own, Console(soft_wrap=True), keeps_features=settings["cache_vision_features"] is not None)
        if own.json is not None:
            _write(own.json, result, own)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llava-ft estimate",
        description="Estimate memory and time of a training run from the model's configuration. Takes the flags of "
        "llava-ft train (--model_name_or_path or --model, --train_type, --lora_r, --bits, "
        "--per_device_train_batch_size, --gradient_checkpointing, --bf16, --deepspeed FILE, ...), and:",
        allow_abbrev=False,
    )
    parser.add_argument("--engine", choices=get_args(Engine), help="Default: that of --deepspeed, else single or ddp.")
    parser.add_argument("--devices", type=_positive, default=1, help="Devices that train together.")
    parser.add_argument("--images", type=int, choices=range(65), default=1, metavar="N", help="Pictures in a row.")
    parser.add_argument(
        "--picture_size", default="640x480", metavar="WxH", help="LLaVA-1.6: width and height of a picture, or worst."
    )
    parser.add_argument("--text_tokens", type=_positive, default=200, help="Tokens of a row besides its pictures.")
    parser.add_argument("--supervised_tokens", type=_positive, help="How many of these are learned; default: all.")
    parser.add_argument(
        "--tflops", type=float, default=989.0, help="Peak of a device in TFLOP/s; default: that of an H100 or H200."
    )
    parser.add_argument("--utilization", type=float, default=0.4, help="Share of the peak that is reached.")
    parser.add_argument("--fit", type=float, metavar="GB", help="Propose what fits on a card of this size.")
    parser.add_argument(
        "--rows", type=_positive, help="Rows of the data, by which rank and batch are chosen where they are not given."
    )
    parser.add_argument(
        "--global_batch", type=_positive, help="With --fit: rows per optimiser step; default: as train has it."
    )
    parser.add_argument("--json", type=Path, help="Also write the result to this file.")
    return parser


def _positive(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return int(text)


def _estimate(own: argparse.Namespace, settings: dict[str, Any]) -> Estimate:
    name = settings["model_name_or_path"]
    if name is dataclasses.MISSING:
        raise UserError("--model_name_or_path is missing: name a LLaVA, a folder with config.json or a Hub id.")
    if own.tflops <= 0 or own.utilization <= 0 or (own.fit is not None and own.fit <= 0):
        raise UserError("--tflops, --utilization and --fit have to be above 0.")
    checkpoint = inspect_checkpoint(name, settings["revision"])
    is_adapter = checkpoint.kind == "adapter"
    place = (checkpoint.base, checkpoint.revision) if is_adapter else (name, settings["revision"])
    config = load_config(*place, adapter=name if is_adapter else None)
    try:
        size = worst_picture(config).size if own.picture_size == "worst" else parsed_size(own.picture_size)
        tuning = tuning_with_defaults(
            TuningArguments(
                **{field.name: settings[field.name] for field in dataclasses.fields(TuningArguments) if field.init}
            ),
            own.rows,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    engine, bucket, live = _engine(own, settings["deepspeed"], config.text_config.hidden_size)
    if tuning.bits < 16 and engine.startswith("zero3"):
        raise UserError("ZeRO-3 does not divide weights of few bits: use --engine ddp or zero2 with qlora.")
    text = own.text_tokens
    if settings["model_max_length"] is not None:
        text = settings["model_max_length"] - own.images * picture_of(config, size).tokens
        if text < 1:
            raise UserError(f"--model_max_length {settings['model_max_length']} has no room for the picture's tokens.")
    supervised = min(own.supervised_tokens or text, text)
    batch = {name: settings[name] for name in OF_BATCH}
    if engine.startswith("zero"):  # DeepSpeed reads them before the rows are counted
        batch = {name: UNTIL_KNOWN[name] if number is None else number for name, number in batch.items()}
    if settings["packing"]:
        row = text + own.images * picture_of(config, size).tokens
        said = {"max_tokens_per_batch": settings["max_tokens_per_batch"], **batch}
        batch |= packs_of(tuning.train_type, [row] * (own.rows or 10**6), own.devices, said)[0]
        budget = batch.pop("max_tokens_per_batch", settings["max_tokens_per_batch"])
        batch["per_device_train_batch_size"] = max(1, budget // row)  # of the same positions
    else:
        batch |= batch_of(tuning.train_type, own.rows, own.devices, batch)
    rows, accumulation = (batch[name] for name in OF_BATCH)
    step = own.global_batch or rows * accumulation * own.devices
    plan = Plan(
        engine,
        own.devices,
        int(accumulation),
        _checkpointing(settings),
        Batch(int(rows), own.images, text, supervised, size),
        bucket,
        live,
    )
    dtype = _dtype(settings["dtype"], config)
    estimator = Estimator(
        config,
        tuning,
        dtype,
        bool(settings["bf16"] or settings["fp16"]),
        "eager" if settings["attn_implementation"] == "eager" else "sdpa",
        str(getattr(settings["optim"], "value", settings["optim"])),
    )
    try:
        return estimator.estimate(plan) if own.fit is None else estimator.fit(plan, own.fit, step)
    except ValueError as error:
        raise UserError(str(error)) from error


def _dtype(named: str, config: Any) -> torch.dtype:
    if named == "auto":
        # A configuration without one is read as float32 by transformers too.
        found = config.dtype or config.text_config.dtype or torch.float32
        return found if isinstance(found, torch.dtype) else getattr(torch, str(found))
    dtype = getattr(torch, named, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UserError(f"--dtype {named} is no dtype of weights: use auto, float32, bfloat16 or float16.")
    return dtype


def _checkpointing(settings: dict[str, Any]) -> bool:
    """Whether layers are computed again in the backward pass; both of transformers' names ask for it."""
    names = checkpointing_flags()
    for name in names:
        options = settings.get(f"{name}_kwargs") or {}
        try:
            options = json.loads(options) if isinstance(options, str) else options
        except ValueError as error:
            raise UserError(f"--{name}_kwargs {options} is no JSON.") from error
        if options.get("every_n_layers", 1) != 1 or options.get("offload"):
            raise UserError(f"--{name}_kwargs: every_n_layers and offload are not known here; leave them out.")
    return any(settings.get(name) is True for name in names)  # auto asks for a device, which is not here


def _engine(own: argparse.Namespace, deepspeed: Any, width: int) -> tuple[Engine, int, int]:
    """Engine, elements of a bucket, elements of ZeRO-3 that may be whole; `width` is the language model's."""
    if deepspeed is None:
        return own.engine or ("single" if own.devices == 1 else "ddp"), DEFAULT_BUCKET, DEFAULT_LIVE
    try:
        content = deepspeed if isinstance(deepspeed, dict) else json.loads(Path(deepspeed).read_text("utf-8"))
        zero = content["zero_optimization"]
        stage, optimizer, param = (zero.get(key) for key in ("stage", "offload_optimizer", "offload_param"))
        bucket = zero.get("reduce_bucket_size", DEFAULT_BUCKET)
        bucket = width**2 if bucket == "auto" else int(bucket)  # as transformers fills it in
        live = int(zero.get("stage3_max_live_parameters", DEFAULT_LIVE))
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"--deepspeed {deepspeed} is no readable file with zero_optimization.") from error
    offloads = any(each and each.get("device") not in (None, "none") for each in (optimizer, param))
    name = f"zero{stage}{'_offload' if offloads else ''}"
    if name not in get_args(Engine):
        raise UserError(f"--deepspeed {deepspeed}: stage {stage} is unknown here; use 2 or 3.")
    return own.engine or name, bucket, live  # type: ignore[return-value]


def _print(result: Estimate, own: argparse.Namespace, console: Console, keeps_features: bool) -> None:
    plan, batch = result.plan, result.plan.batch
    parts = Table(title="Parameters")
    for column in ("part", "trainable", "of", "dtype"):
        parts.add_column(column, justify="right" if column in ("trainable", "of") else "left")
    for part in result.parts:
        parts.add_row(part.part, f"{part.num_trainable:,}", f"{part.num_total:,}", part.dtype)
    console.print(parts)
    memory = Table(title=f"Memory of one device, {plan.engine}, {plan.devices} device{'s' * (plan.devices > 1)}")
    memory.add_column("part")
    memory.add_column("GiB", justify="right")
    for name, size in result.memory.items():
        memory.add_row(name, f"{size / GIB:.2f}")
    memory.add_section()
    memory.add_row("together", f"{result.total / GIB:.2f}")
    if result.states.host:
        memory.add_row("in the host's memory", f"{result.states.host / GIB:.2f}")
    console.print(memory)
    seconds = result.seconds_a_step(own.tflops, own.utilization)
    rows = batch.size * plan.accumulation * plan.devices
    lines = {
        "micro-batch": f"{batch.size} row(s) of {batch.images} image(s) and {batch.text_tokens} text tokens, "
        f"{batch.supervised} of them learned",
        "image": _picture(result),
        "accumulation": f"{plan.accumulation}; {rows} rows a step on {plan.devices} device(s)",
        "gradient checkpointing": "on" if plan.gradient_checkpointing else "off",
        "fits on": ", ".join(f"{card} GB: {'yes' if result.fits(card) else 'no'}" for card in CARDS)
        + f" ({SET_ASIDE:g} GiB set aside)",
        "operations": f"{result.micro_batch.operations / batch.size / 1e12:.1f} TFLOP a row",
        "time": f"{seconds:.3g} s a step, {rows / seconds:.3g} rows/s, at {own.utilization:.0%} of {own.tflops:g} "
        f"TFLOP/s",
    }
    if keeps_features:
        lines["vision features"] = f"{disk_size(result.kept)} on disk for a picture"
        if own.rows is not None:
            all_of_them = disk_size(result.kept * own.images * own.rows)
            lines["vision features"] += f", {all_of_them} for {own.images * own.rows:,}, if each is another"
    for name, line in lines.items():
        console.print(f"{name:<24}{line}", highlight=False)
    console.print(STATEMENT, highlight=False)


def _picture(result: Estimate) -> str:
    picture, worst = result.picture, result.worst
    if worst.crops == 1:
        return f"{picture.tokens} tokens, whatever its size"
    return (
        f"{picture.size[1]}x{picture.size[0]}: {picture.crops} crops, {picture.tokens} tokens; at worst "
        f"{worst.size[1]}x{worst.size[0]}: {worst.crops} crops, {worst.tokens} tokens"
    )


def _write(path: Path, result: Estimate, own: argparse.Namespace) -> None:
    seconds = result.seconds_a_step(own.tflops, own.utilization)
    content = {
        "plan": dataclasses.asdict(result.plan),
        "picture": dataclasses.asdict(result.picture),
        "worst_picture": dataclasses.asdict(result.worst),
        "parameters": [dataclasses.asdict(part) for part in result.parts],
        "bytes_on_a_device": {**result.memory, "together": result.total},
        "bytes_on_the_host": result.states.host,
        "bytes_on_disk_of_the_features_of_a_picture": result.kept,
        "fits_on_gb": {str(card): result.fits(card) for card in CARDS},
        "operations_a_micro_batch": result.micro_batch.operations,
        "seconds_a_step": seconds,
        "tflops": own.tflops,
        "utilization": own.utilization,
        "note": STATEMENT,
    }
    try:
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from error
