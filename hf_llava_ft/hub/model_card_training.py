"""How a model was trained, in words: settings, what trained, the loss, and what it took."""

from hf_llava_ft.checkpoints.training_facts import TrainingFacts
from hf_llava_ft.reports.markdown import escaped, table

_TRAINED_BY = {
    "lora": "LoRA on the language model",
    "qlora": "LoRA on the language model, whose own weights were quantised to {bits} bits meanwhile",
    "projector": "the projector alone",
    "freeze_vision": "the projector and the language model",
    "full": "all weights",
}


def training_section(facts: TrainingFacts | None, plot: str | None) -> str:
    """
    Settings in words, what trained, and the loss.

    Args:
        plot (`str`, *optional*): path of the loss curve inside the repository.
    """
    if facts is None or not (facts.settings or facts.trained or facts.losses):
        return ""
    parts = ["## Training", " ".join(filter(None, (_method(facts), _schedule(facts), _details(facts), _cost(facts))))]
    if facts.trained:
        rows = [
            [f"`{part['part']}`", f"{part.get('num_trainable', 0):,}", f"{part.get('num_total', 0):,}"]
            + [escaped(part.get("dtype", "")), part.get("learning_rate", "")]
            for part in facts.trained
        ]
        header = ["part", "parameters that trained", "all parameters", "dtype", "learning rate"]
        parts.append(table(header, rows, numeric=frozenset({1, 2, 4})))
    if facts.losses:
        told = f"Training loss, from {facts.losses[0][1]:.3g} to {facts.losses[-1][1]:.3g}."
        parts.append(f"![{told}]({plot})" if plot else told)
    return "\n\n".join(parts)


def _method(facts: TrainingFacts) -> str:
    said = facts.settings
    kind = said.get("train_type")
    if kind not in _TRAINED_BY:
        return ""
    what = _TRAINED_BY[kind].format(bits=said.get("bits", "few"))
    if kind in ("lora", "qlora"):
        names = {"use_dora": "DoRA", "use_rslora": "rank-stabilised"}
        extras = [word for name, word in names.items() if said.get(name)]
        known = [f"{word} {said[name]:g}" for name, word in _LORA_NUMBERS.items() if said.get(name) is not None]
        what += f" ({', '.join(known + extras)})" if known or extras else ""
        what += "" if said.get("freeze_mm_mlp_adapter") else ", and the whole projector"
    return f"Trained: {what}."


_LORA_NUMBERS = {"lora_r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout"}


def _schedule(facts: TrainingFacts) -> str:
    said, numbers = facts.settings, facts.numbers
    words = []
    if "steps" in numbers:
        of = f" in batches of {many(numbers['rows_per_step'], 'row')}" if "rows_per_step" in numbers else ""
        epochs = f" ({_counted(numbers['epochs'], 'epoch')})" if "epochs" in numbers else ""
        words.append(many(numbers["steps"], "step") + of + epochs)
    if said.get("learning_rate") is not None:
        others = {"mm_projector_lr": "projector", "mm_vision_tower_lr": "vision tower"}
        own = [f"{said[name]:g} for the {part}" for name, part in others.items() if said.get(name) is not None]
        words.append(f"learning rate {said['learning_rate']:g}{' (' + ', '.join(own) + ')' if own else ''}")
    if said.get("lr_scheduler_type"):
        words.append(f"schedule `{said['lr_scheduler_type']}`")
    warmup = said.get("warmup_steps")
    if warmup:
        words.append(f"warm-up over {f'{100 * warmup:g}% of the steps' if warmup < 1 else many(warmup, 'step')}")
    return f"{_sentence(words)}." if words else ""


def _details(facts: TrainingFacts) -> str:
    said = facts.settings
    words = [f"optimizer `{said['optim']}`"] if said.get("optim") else []
    words += [f"{name} {said[key]:g}" for key, name in _DETAILS.items() if said.get(key)]
    words += [name for name in ("bf16", "fp16") if said.get(name)]
    if said.get("version"):
        words.append(f"chat template `{said['version']}`")
    if "seed" in facts.numbers:
        words.append(f"seed {facts.numbers['seed']:.0f}")
    words += [_LOSSES[said["loss_normalization"]]] if said.get("loss_normalization") in _LOSSES else []
    return f"{_sentence(words)}." if words else ""


_DETAILS = {"weight_decay": "weight decay", "neftune_noise_alpha": "NEFTune alpha", "model_max_length": "longest row"}
_LOSSES = {
    "tokens": "loss: the mean over the answers' tokens of a step",
    "micro_batch": "loss: the mean of the micro-batches' means, as in the original LLaVA",
}


def _cost(facts: TrainingFacts) -> str:
    numbers = facts.numbers
    if "seconds" not in numbers:
        return ""
    count = int(numbers.get("num_processes") or 1)
    where = f" on {'' if count == 1 else f'{count} x '}{escaped(facts.device)}" if facts.device else ""
    speed = f", {numbers['tokens_per_second']:,.0f} tokens a second" if "tokens_per_second" in numbers else ""
    peak = numbers.get("peak_memory_bytes")
    memory = f", at most {peak / 2**30:.1f} GiB of memory" if peak else ""
    return f"It took {_duration(numbers['seconds'])}{where}{speed}{memory}."


def many(count: float, noun: str) -> str:
    return f"{count:,.0f} {noun}{'' if count == 1 else 's'}"


def _counted(count: float, noun: str) -> str:
    return f"{count:,.3g} {noun}{'' if count == 1 else 's'}"


def _sentence(words: list[str]) -> str:
    text = ", ".join(words)
    return text[:1].upper() + text[1:]


def _duration(seconds: float) -> str:
    for size, unit in ((86_400, "day"), (3600, "hour"), (60, "minute")):
        if seconds >= 2 * size:
            return _counted(seconds / size, unit)
    return _counted(seconds, "second")
