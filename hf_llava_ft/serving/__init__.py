"""`llava-ft export`: a model, or an adapter merged into its base, as exactly the folder that a server needs.

Only what other projects' own converters read is written here, not their formats. Each folder is checked before it gets
its name: vLLM's, SGLang's and the endpoint's are loaded in a fresh process and compared with the model they come from,
every weight by name and shape; llama.cpp's parts are put together again and compared.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_llava_ft.checkpoints.inspection import Checkpoint, inspect_checkpoint
from hf_llava_ft.checkpoints.merge import refuse_base_in_few_bits, saved_weights
from hf_llava_ft.checkpoints.opening import fit_to_processor, load_config
from hf_llava_ft.checkpoints.remote_code import ENDPOINT_HANDLER
from hf_llava_ft.checkpoints.rewriting import rewriting, save_for_others
from hf_llava_ft.checkpoints.rounding import merged
from hf_llava_ft.checkpoints.verify import LOGIT_TOLERANCE, Probe
from hf_llava_ft.errors import UserError
from hf_llava_ft.serving.adapter_for_vllm import ADAPTER, BASE, split_adapter
from hf_llava_ft.serving.guide import commands, write_guide, write_modelfile
from hf_llava_ft.serving.limits import SERVERS, Server, differences, refuse_what_cannot_be_served
from hf_llava_ft.serving.names import check_names
from hf_llava_ft.serving.parts import check_parts, pictures_seen_otherwise, write_parts


@dataclass(frozen=True)
class Exported:
    """
    Args:
        output_dir (`Path`): the folder.
        commands (`list[str]`): what to run inside it, in that order.
        notes (`list[str]`): what was done to the model, and what the server does otherwise than training.
        logit_difference (`float`): largest difference of two logits between folder and model, relative to the largest.
    """

    output_dir: Path
    commands: list[str]
    notes: list[str]
    logit_difference: float


def export_for_serving(
    model: str,
    output_dir: str | Path,
    server: Server,
    *,
    base: str | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    keep_adapter: bool = False,
    probe: Probe | None = None,
) -> Exported:
    """
    Writes what is at `model`, a whole model, an adapter or a projector, to `output_dir` for `server`.

    Args:
        base (`str`, *optional*): instead of the base that an adapter or projector names.
        revision (`str`, *optional*): branch, tag or commit of `model` on the Hub.
        dtype (`str`): dtype of the weights; `auto` keeps it.
        keep_adapter (`bool`): for vLLM, which then gets a base and, beside it, the LoRA of the language model.

    Raises:
        UserError: if `server` can't serve that model, or the folder answers otherwise than the model did; then nothing
            stays at `output_dir`.
    """
    if server not in SERVERS:
        raise UserError(f"--for {server} is unknown: use {', '.join(SERVERS)}.")
    checkpoint = inspect_checkpoint(model, revision, base)
    refuse_what_cannot_be_served(_config_of(checkpoint, revision), server)
    if keep_adapter and not (server == "vllm" and checkpoint.is_adapter):
        raise UserError("--keep_adapter is for an adapter and --for vllm: no other server here takes one.")
    if checkpoint.is_adapter:
        refuse_base_in_few_bits(checkpoint)
    with rewriting(checkpoint, output_dir, revision=revision, dtype=dtype, probe=probe, keeps_facts=False) as draft:
        staged, processor = draft.folder, draft.processor
        fit_to_processor(draft.model.get_base_model() if checkpoint.is_adapter else draft.model, processor)
        draft.ask()
        kept_in = staged if keep_adapter else None
        draft.model, rank, notes = _without_adapter(draft.model, processor, checkpoint, revision, kept_in)
        config, model_dtype = draft.model.config, draft.model.dtype
        config.use_cache = config.text_config.use_cache = True
        in_parts = server in ("llama.cpp", "ollama")
        whole = staged / BASE if keep_adapter else staged
        if in_parts:
            write_parts(draft.model, processor, staged)
        else:
            _write_whole(draft.model, processor, whole, server)
        draft.model = None  # each check loads what was written, and two would be in memory
        if in_parts:
            tolerance = LOGIT_TOLERANCE[model_dtype]
            difference = check_parts(staged, config, draft.reference, len(processor.tokenizer), tolerance)
            if unlike := pictures_seen_otherwise(draft.reference, processor):
                notes.append(
                    f"llama.cpp, but in its own web page, opens {' and '.join(unlike)} otherwise than training did: "
                    "turn and flatten such pictures before they are sent."
                )
        else:
            part, on = (staged / ADAPTER, str(whole)) if keep_adapter else (None, None)
            verification = draft.verify("the exported model is not the same", model_dtype, part=part, base=on)
            difference = verification.logit_difference
            notes += verification.notes
        if server == "ollama" and not write_modelfile(staged, processor):
            notes.append("Ollama's templates can't express the prompt: write TEMPLATE into the Modelfile yourself.")
        notes += differences(config, processor, server)
        lines = commands(server, config, processor.image_processor, rank)
        write_guide(staged, f"This folder is for {server}", lines, notes)
    return Exported(Path(output_dir), lines, notes, difference)


def _without_adapter(
    model: Any, processor: Any, checkpoint: Checkpoint, revision: str | None, kept_in: Path | None
) -> tuple[Any, int, list[str]]:
    """
    The whole model with its adapter merged, or, with `kept_in`, the LoRA of the language model written there; the rank
    of what was kept, or 0; and what is to be said of it.
    """
    if not checkpoint.is_adapter:
        return model, 0, []
    if kept_in is None:
        note = f"The adapter is merged into {_shown(checkpoint.base)}: the folder is whole."
        whole, rounding = merged(model, saved_weights(checkpoint, revision))
        return whole, 0, [note, rounding.sentence]
    base, rank, parts = split_adapter(model, kept_in / ADAPTER)
    processor.save_pretrained(kept_in / ADAPTER)
    notes = [
        "vLLM takes LoRA of the language model only: what the adapter has in the "
        f"{' and the '.join(parts)} is merged into base/."
    ]
    return base, rank, notes if parts else []


def _config_of(checkpoint: Checkpoint, revision: str | None) -> Any:
    """The configuration of the whole model; that of a part, where the original wrote one with it."""
    if checkpoint.kind in ("original_lora", "projector"):
        return load_config(checkpoint.path, revision)
    adapter = checkpoint.path if checkpoint.is_adapter else None
    return load_config(checkpoint.base, checkpoint.revision, adapter=adapter)


def _shown(base: str) -> str:
    """A Hub id as it is; of a folder of this machine its last name only."""
    return Path(base).name if Path(base).exists() else base


def _write_whole(model: Any, processor: Any, folder: Path, server: Server) -> None:
    """Writes the folder that transformers loads."""
    save_for_others(model, processor, folder)
    if model.config.is_native:
        check_names(folder, model.config.to_native())
    if server == "endpoints":
        shutil.copyfile(ENDPOINT_HANDLER, folder / "handler.py")
