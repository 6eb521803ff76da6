"""What we have instead of names of the libraries is equal to what these have, as long as they have it."""

import pytest
import torch
import transformers.trainer
import transformers.utils
from datasets.utils.py_utils import convert_file_size_to_int
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils.sha import git_hash
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, LlavaConfig, LlavaNextConfig, TrainingArguments
from transformers.loss.loss_utils import ForCausalLMLoss

from hf_llava_ft.checkpoints import run_files as trainer_files
from hf_llava_ft.data.export import _shard_bytes
from hf_llava_ft.evaluation.token_losses import LossOverTokens
from hf_llava_ft.hub.upload import _git_hash
from hf_llava_ft.library_differences import HTTPError, checkpointing_flags
from hf_llava_ft.modeling.modeling_llava import LlavaForCausalLM


@pytest.mark.parametrize(
    "name", ["PREFIX_CHECKPOINT_DIR", "TRAINER_STATE_NAME", "TRAINING_ARGS_NAME", "SAFE_WEIGHTS_NAME"]
)
def test_files_are_called_what_the_trainer_calls_them(name):
    assert getattr(trainer_files, name) == getattr(transformers.trainer, name, None) or (
        getattr(trainer_files, name) == getattr(transformers.utils, name)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(7)])
@pytest.mark.parametrize("are_shifted", [False, True])
def test_the_loss_is_that_of_transformers(dtype, num_items, are_shifted):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 9, 16, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, 10, (2, 9), generator=generator)
    labels[:, :3] = -100
    given = {"labels": None, "shift_labels": labels} if are_shifted else {"labels": labels}
    over_all = LossOverTokens(num_tokens=17, image_token_id=16)  # no row is left out
    loss = over_all(logits, vocab_size=16, num_items_in_batch=num_items, **given)
    theirs = ForCausalLMLoss(logits, vocab_size=16, num_items_in_batch=num_items, **given)
    assert torch.equal(loss, theirs)
    assert torch.equal(*(torch.autograd.grad(each, logits, retain_graph=True)[0] for each in (loss, theirs)))
    fewer = LossOverTokens(num_tokens=12, image_token_id=11)(
        logits, vocab_size=16, num_items_in_batch=num_items, **given
    )
    assert not torch.equal(fewer, theirs)


@pytest.mark.parametrize("content", [b"", b"Hello, World!", bytes(range(256))])
def test_a_file_has_the_id_that_git_gives_it(content):
    assert _git_hash(content) == git_hash(content) != _git_hash(content + b"\n")


@pytest.mark.parametrize("size", [1, "1KB", "500MB", "1gb", "2GiB", "3TIB", "1PB"])
def test_sizes_are_read_as_datasets_reads_them(size):
    assert _shard_bytes(size) == convert_file_size_to_int(size)


def test_the_flags_of_checkpointing_are_those_there_are():
    flags = checkpointing_flags()
    assert flags and set(flags) <= set(TrainingArguments.__dataclass_fields__)
    assert {name for name in TrainingArguments.__dataclass_fields__ if name.endswith("_checkpointing")} == set(flags)


@pytest.mark.parametrize("native", [LlavaConfig, LlavaNextConfig])
def test_native_configurations_open_as_our_causal_model(native):
    assert MODEL_FOR_CAUSAL_LM_MAPPING[native] is LlavaForCausalLM


def test_an_error_of_the_connection_is_one_of_http():
    assert issubclass(HfHubHTTPError, HTTPError) and HTTPError.__name__ == "HTTPError"
    assert HTTPError is not Exception and not issubclass(OSError, HTTPError)
