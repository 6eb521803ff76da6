"""The heaviest batch is tried before the first step, leaves no trace, and too little memory is said in words."""

import json
import resource
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import hf_llava_ft
from hf_llava_ft.checkpoints.opening import load_model, load_processor
from hf_llava_ft.data.collator import LlavaCollator
from hf_llava_ft.errors import UserError
from hf_llava_ft.settings.parsing import resolve
from hf_llava_ft.settings.training_arguments import LlavaTrainingArguments
from hf_llava_ft.train import main as train_main
from hf_llava_ft.train import train
from hf_llava_ft.training.guards.longest_batch import LongestBatch, _room_for_states, heaviest_batches
from hf_llava_ft.training.guards.out_of_memory import is_out_of_memory


@pytest.fixture
def data(llava_json):
    """Twelve rows: the longest is of text alone, number 7 has most images."""
    path, folder = llava_json(12, with_text_rows=True)
    rows = json.loads(path.read_text())
    rows[5]["conversations"][1]["value"] *= 20
    rows[7] |= {"image": ["0.png", "1.png"]}
    rows[7]["conversations"][0]["value"] = "<image><image>\nWhich?"
    path.write_text(json.dumps(rows))
    return path, folder


@pytest.fixture
def flags(tiny_checkpoint, data, tmp_path):
    """`flags(name, **others)`: a command line of 3 steps with dropout and two micro-batches a step."""

    def words(name, **others):
        path, folder = data
        given = {"model_name_or_path": tiny_checkpoint, "data_path": path, "image_folder": folder, "use_cpu": True}
        given |= {"output_dir": tmp_path / name, "max_steps": 3, "lora_r": 4, "lora_dropout": 0.2}
        given |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "neftune_noise_alpha": 5}
        given |= {"save_strategy": "no", "learning_rate": 1e-3}
        return [str(word) for pair in (given | others).items() for word in (f"--{pair[0]}", pair[1])]

    return words


def tried(monkeypatch) -> list[list[str]]:
    """The ids of the rows of each batch that is tried."""
    batches, real = [], LongestBatch._try

    def remembered(self, rows, args):
        batches.append(list(rows["id"]))
        real(self, rows, args)

    monkeypatch.setattr(LongestBatch, "_try", remembered)
    return batches


def test_the_heaviest_batches_are_those_of_the_longest_rows_and_of_most_images(tiny_processor, data):
    dataset = hf_llava_ft.load_llava_json(*data)
    collate = LlavaCollator(tiny_processor)
    lengths = np.array([collate([row])["input_ids"].shape[1] for row in dataset])
    images = np.array([len(row["images"]) for row in dataset])
    (longest, num_tokens), (fullest, _) = heaviest_batches(dataset, tiny_processor, 3)
    assert sorted(lengths[longest]) == sorted(lengths)[-3:] and num_tokens == lengths.max() and longest[0] == 5
    assert images[fullest].sum() == sorted(images)[-3:][0] + sum(sorted(images)[-2:]) and fullest[0] == 7
    assert images[fullest].sum() > images[longest].sum()
    assert heaviest_batches(dataset, tiny_processor, 3, max_length=40)[0][1] == 40
    [(everything, _)] = heaviest_batches(dataset, tiny_processor, 99)
    assert sorted(everything) == list(range(12))


@pytest.mark.parametrize("train_type", ["lora", "full"])
def test_the_trial_leaves_no_trace(flags, monkeypatch, train_type):
    def run(name, wanted):
        result = train(*resolve(flags(name, try_longest_batch=wanted, train_type=train_type)).build())
        [weights] = result.adapter_dir.glob("*model.safetensors")
        return result.losses, load_file(weights), result.summary

    batches = tried(monkeypatch)
    losses, weights, summary = run("without", "auto")  # a CPU has its own way to run out
    assert not batches
    found_losses, found_weights, found_summary = run("tried", "true")
    assert batches[0][0] == "row5" and batches[1][0] == "row7"
    assert found_losses == losses and all(torch.equal(found_weights[name], weights[name]) for name in weights)
    for count in ("samples", "tokens", "supervised_tokens"):
        assert found_summary[count] == summary[count]
    if train_type == "full":
        return
    # The control: with random numbers that the trial has used, dropout is another one.
    monkeypatch.setattr(sys.modules["hf_llava_ft.training.guards.longest_batch"], "untouched_rng", torch.enable_grad)
    assert run("touched", "true")[0] != losses


class LittleMemory(TorchDispatchMode):
    """A machine on which no operation gives more than so many bytes, said in the words of PyTorch's allocator by
    asking it for more than there can be."""

    def __init__(self, num_bytes: int):
        super().__init__()
        self.num_bytes = num_bytes

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.nbytes > self.num_bytes:
            torch.empty(2**60)
        return result


def test_too_little_memory_for_the_longest_batch_is_advice(flags, capsys):
    words = flags("out", try_longest_batch="True", per_device_train_batch_size=4, attn_implementation="eager")
    with LittleMemory(800_000), pytest.raises(SystemExit) as ended:
        train_main(words)
    said = " ".join(capsys.readouterr().err.split())
    assert ended.value.code == 2 and "Traceback" not in said
    assert "error: there is not enough memory for the batch of the longest rows (rows: 4, up to " in said
    assert "tokens), tried before the first step. What helps" in said and "step 1/" not in said
    for change in (
        "(1) --per_device_train_batch_size 2 --gradient_accumulation_steps 4",
        "--gradient_checkpointing True",
        "--train_type qlora",
        "--model_max_length",
    ):
        assert change in said


def test_too_little_memory_in_the_middle_is_the_same_advice(tiny_checkpoint, data, tmp_path):
    """Raised by PyTorch itself, when the process may have no more memory than it has."""

    class Full(hf_llava_ft.LlavaTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            if self.state.global_step == 1:
                own = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
                limits = resource.getrlimit(resource.RLIMIT_AS)
                resource.setrlimit(resource.RLIMIT_AS, (own + 2**26, limits[1]))
                try:
                    torch.empty(2**30, dtype=torch.uint8)
                finally:
                    resource.setrlimit(resource.RLIMIT_AS, limits)
            return super().training_step(model, inputs, num_items_in_batch)

    processor = load_processor(str(tiny_checkpoint))
    args = LlavaTrainingArguments(output_dir=str(tmp_path), max_steps=3, use_cpu=True, save_strategy="no")
    trainer = Full(
        load_model(str(tiny_checkpoint), processor),
        args,
        train_dataset=hf_llava_ft.load_llava_json(*data),
        processing_class=processor,
    )
    with pytest.raises(UserError, match=r"not enough memory for step 2\. What helps.*--train_type lora") as told:
        trainer.train()
    assert is_out_of_memory(told.value.__cause__)


def test_too_little_memory_for_an_evaluation_is_other_advice(tiny_checkpoint, data, tmp_path):
    processor = load_processor(str(tiny_checkpoint))
    args = LlavaTrainingArguments(output_dir=str(tmp_path), use_cpu=True, per_device_eval_batch_size=12)
    dataset = hf_llava_ft.load_llava_json(*data)
    model = load_model(str(tiny_checkpoint), processor, attn_implementation="eager")
    trainer = hf_llava_ft.LlavaTrainer(model, args, eval_dataset=dataset, processing_class=processor)
    with LittleMemory(800_000), pytest.raises(UserError, match="--per_device_eval_batch_size 6 instead of 12") as told:
        trainer.evaluate()
    assert "not enough memory for the evaluation after step 0" in str(told.value)


def test_the_room_for_states_is_what_adam_takes():
    model = torch.nn.Linear(30, 20).requires_grad_()
    optimizer = torch.optim.AdamW(model.parameters())
    held = sum(each.nbytes for each in _room_for_states(optimizer, "adamw_torch"))
    model(torch.randn(2, 30)).sum().backward()
    optimizer.step()
    states = [each for state in optimizer.state.values() for each in state.values() if each.dim()]
    assert held == sum(each.nbytes for each in states)
    assert not _room_for_states(optimizer, "adamw_torch")  # as in a run that is resumed


def test_what_is_out_of_memory():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_the_flag_is_one_of_three(flags):
    with pytest.raises(UserError, match="try_longest_batch sometimes is none of auto, true and false"):
        resolve(flags("out", try_longest_batch="sometimes")).build()
