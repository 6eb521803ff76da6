"""A model that is written anew gets its folder only if it is the same model."""

import weakref

import pytest
import torch

from hf_llava_ft.checkpoints.inspection import inspect_checkpoint
from hf_llava_ft.checkpoints.rewriting import rewriting, save_for_others
from hf_llava_ft.errors import UserError

DEFAULTS = {"revision": None, "dtype": "auto", "probe": None}


@pytest.mark.parametrize("is_damaged", [False, True])
def test_a_folder_appears_only_if_it_answers_as_the_model_did(tiny_checkpoint, tmp_path, is_damaged):
    def write():
        with rewriting(inspect_checkpoint(str(tiny_checkpoint)), tmp_path / "new", **DEFAULTS) as draft:
            draft.ask()
            if is_damaged:
                with torch.no_grad():
                    draft.model.lm_head.weight.mul_(-1)
            save_for_others(draft.model, draft.processor, draft.folder)
            return draft.verify("the new model is not the same", draft.model.dtype)

    if is_damaged:
        with pytest.raises(UserError, match="^the new model is not the same: the logits differ by"):
            write()
    else:
        assert write().ok
    assert [path.name for path in tmp_path.iterdir()] == ([] if is_damaged else ["new"])


def test_a_model_that_is_let_go_leaves_the_memory(tiny_checkpoint, tmp_path):
    """The check in a fresh process needs as much again."""
    with rewriting(inspect_checkpoint(str(tiny_checkpoint)), tmp_path / "new", **DEFAULTS) as draft:
        weight = weakref.ref(draft.model.lm_head.weight)
        draft.ask()
        draft.model = None
        assert weight() is None
