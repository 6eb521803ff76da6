"""Of what other libraries say, that and only that is hidden which a user can do nothing about."""

import logging
import warnings

import pytest

from hf_llava_ft.noise import hide_noise


@pytest.fixture(autouse=True)
def restored():
    loggers = [logging.getLogger(name) for name in ("bitsandbytes.backends.cpu.ops", "DeepSpeed")]
    before = [list(logger.filters) for logger in loggers]
    with warnings.catch_warnings():
        yield
    for logger, filters in zip(loggers, before, strict=True):
        logger.filters[:] = filters


@pytest.mark.parametrize(
    ("name", "noise"),
    [
        ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward from kernels-community: no"),
        (
            "DeepSpeed",
            "Setting accelerator to CPU. If you have GPU or other, we were unable to detect it.",
        ),
    ],
)
def test_a_logger_loses_one_message(caplog, monkeypatch, name, noise):
    monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    hide_noise()
    logging.getLogger(name).warning("%s", noise)
    logging.getLogger(name).warning("This one matters.")
    assert [record.getMessage() for record in caplog.records] == ["This one matters."]


def test_one_warning_is_hidden():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hide_noise()
        warnings.warn("`is_gradient_checkpointing` is deprecated and will be removed in v6.", FutureWarning, 2)
        warnings.warn("`something_else` is deprecated.", FutureWarning, 2)
    assert [str(each.message) for each in caught] == ["`something_else` is deprecated."]
