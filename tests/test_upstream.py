"""docs/upstream.md lists what our code stands on in other libraries: no more, no less, and it is there."""

import importlib.metadata

import pytest

from tests.upstream_document import DOCUMENT, KINDS, documented, missing_rows, stale_rows
from tests.upstream_names import LIBRARIES, Use, all_uses, class_uses, is_there, sources, written_uses

# Assigned, or private, and of none of these libraries.
NOT_THEIRS = {
    **dict.fromkeys(("_actions", "const", "nargs", "required"), "argparse"),
    **dict.fromkeys(("add_dummy_prefix", "byte_fallback", "remove_extra_whitespaces"), "sentencepiece"),
    **dict.fromkeys(("grad", "param_groups"), "torch, public"),
    "decoder": "tokenizers, public",
    "auto_map": "a key of config.json",
    "normalizer": "tokenizers, public",
    "support_avx512bf16_for_cpu": "bitsandbytes, public",
    "timeout": "httpx, public",
}
ROWS = documented(DOCUMENT.read_text(encoding="utf-8"))
NAMES = sorted({(use.name, row.tried) for row in ROWS for use in row.uses})


@pytest.fixture(scope="module")
def uses():
    found = all_uses(sources())
    assert set(NOT_THEIRS) <= {use.name.removeprefix("?.") for use in found}, "NOT_THEIRS names what nothing uses"
    return {use: files for use, files in found.items() if use.name.removeprefix("?.") not in NOT_THEIRS}


def test_every_name_has_a_row(uses):
    missing = missing_rows(uses, ROWS)
    assert not missing, "docs/upstream.md lacks rows for\n" + "\n".join(missing)


def test_every_row_has_a_use(uses):
    stale = stale_rows(uses, ROWS)
    assert not stale, "docs/upstream.md lists what the code does not use:\n" + "\n".join(stale)


@pytest.mark.parametrize("name, tried", NAMES, ids=[name for name, _ in NAMES])
def test_the_installed_release_has_the_name(name, tried):
    gone = _gone(name)
    assert gone is None or tried.startswith("only "), gone


def _gone(name: str) -> str | None:
    """What to say of a name that the installed release has no more."""
    library, _, rest = name.partition(".")
    if is_there(name):
        return None
    return f"{library} {importlib.metadata.version(library)} has no {rest}: docs/upstream.md tells what is lost"


def test_what_is_gone_is_named_with_the_release():
    version = importlib.metadata.version("transformers")
    assert _gone("transformers.Trainer._run_epoch_of_old") == (
        f"transformers {version} has no Trainer._run_epoch_of_old: docs/upstream.md tells what is lost"
    )
    for name in ("nowhere.at_all", "Trainer.save_model._no_such_word", "trainer_utils.no_such_function"):
        assert not is_there(f"transformers.{name}")
    # In the class, set on self, a field, a word of a method, in a module of its own name.
    for name in (
        *("transformers.Trainer.train", "transformers.Trainer._train_batch_size", "peft.LoraConfig.target_modules"),
        *("transformers.Trainer.save_model._internal_call", "datasets.utils.tqdm"),
    ):
        assert is_there(name)


SNIPPET = """
import datasets
import torch
from peft import _hidden
from transformers import Trainer, TrainerCallback
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled as zero3
from transformers.utils import logging

class Ours(Trainer):
    own: int

    def __init__(self):
        self._mine = self.own = 1

def use(trainer, model):
    model.loss_type = trainer._private + trainer._mine
    setattr(model, "by_name", 1)
    getattr(trainer, "_asked_for", None)
    trainer.save_model(_switch=True)
    Trainer._of_the_class(trainer)
    model.own = datasets.config.IN_A_MODULE
    datasets.utils._private.name
    torch._dynamo.reset()
    torch.nn.functional.relu(datasets.Split.TRAIN)
    logging.get_logger()
    import_module("peft.utils").Taken
    later = import_module("peft.functional")
    later.used()
"""


def test_the_scanner_finds_what_is_written_and_leaves_what_is_ours():
    found = written_uses({"a.py": SNIPPET})
    assert set(found) == {
        Use("peft._hidden", "private"),
        Use("transformers.integrations.deepspeed.is_deepspeed_zero3_enabled", "reached"),
        Use("transformers.utils.logging.get_logger", "reached"),
        Use("peft.utils.Taken", "reached"),
        Use("peft.functional.used", "reached"),
        Use("?.loss_type", "assigned"),
        Use("?._private", "private"),
        Use("?.by_name", "assigned"),
        Use("?._asked_for", "private"),
        Use("?._switch", "private"),
        Use("transformers.Trainer._of_the_class", "private"),
        Use("datasets.config.IN_A_MODULE", "reached"),
        Use("datasets.utils._private.name", "private"),
        Use("datasets.utils._private", "private"),
        Use("torch._dynamo.reset", "private"),
        Use("torch._dynamo", "private"),
    }


def test_the_scanner_finds_what_classes_take_over():
    from transformers import TrainerCallback

    class Mixin:
        def on_save(self, *args, **kwargs):
            pass

        def ours(self):
            pass

    class Callback(Mixin, TrainerCallback):
        def on_log(self, *args, **kwargs):
            pass

    found = class_uses([Callback], {__name__: "a.py"})
    assert set(found) == {
        Use("transformers.TrainerCallback", "subclassed"),
        Use("transformers.TrainerCallback.on_save", "overridden"),
        Use("transformers.TrainerCallback.on_log", "overridden"),
    }


TABLE = """
| name | files | kind | why | releases tried | lost without it |
| --- | --- | --- | --- | --- | --- |
| `transformers.Trainer.{_save, _load}` | `a.py`, `b.py` | private | why | 5.24 | all |
| `transformers.Trainer._no_such` | `a.py` | private | why | only 5.17 | all |
"""


def test_differences_are_refused_both_ways():
    rows = documented(TABLE)
    agrees = {Use("?._save", "private"): {"a.py"}, Use("transformers.Trainer._load", "private"): {"b.py"}}
    assert missing_rows(agrees, rows) == [] and stale_rows(agrees, rows) == []
    more = {**agrees, Use("?._new", "private"): {"a.py"}, Use("?._save", "private"): {"a.py", "c.py"}}
    assert missing_rows(more, rows) == ["`?._new` in a.py (private)", "`?._save` in c.py (private)"]
    assert missing_rows({Use("?._save", "assigned"): {"a.py"}}, rows) == ["`?._save` in a.py (assigned)"]
    fewer = {Use("?._save", "private"): {"a.py"}}
    assert stale_rows(fewer, rows) == [
        "line 4: `transformers.Trainer._load` (private)",
        "line 4: b.py, which uses none of its names",
    ]


def test_every_row_is_of_a_known_kind_and_library():
    assert len(ROWS) > 50
    for row in ROWS:
        for name, kind in row.uses:
            assert name.split(".")[0] in (*LIBRARIES, "torch"), (row.line, name)
            assert kind in KINDS, (row.line, kind)
