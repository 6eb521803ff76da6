"""Warnings of other libraries that a user can do nothing about, hidden so that the lines that matter are seen."""

import logging
import warnings

# (logger, beginning of the message)
_SAID_BY_LOGGERS = (
    # bitsandbytes 0.50, when it is imported: of a kernel for 4 bits on a CPU, which it does without.
    ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward"),
    # DeepSpeed, when it is imported on a machine without a GPU.
    ("DeepSpeed", "Setting accelerator to CPU"),
)
# PEFT asks transformers 5 by the old name whether gradients are checkpointed.
_OLD_NAME = r"`is_gradient_checkpointing` is deprecated"


def hide_noise() -> None:
    """Hides these warnings in this process, and nothing else. For programs of ours, not for whoever imports us."""
    warnings.filterwarnings("ignore", message=_OLD_NAME, category=FutureWarning)
    for name, beginning in _SAID_BY_LOGGERS:
        logger = logging.getLogger(name)
        if not any(isinstance(each, _Hidden) for each in logger.filters):
            logger.addFilter(_Hidden(beginning))


class _Hidden(logging.Filter):
    def __init__(self, beginning: str):
        super().__init__()
        self.beginning = beginning

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.beginning)
