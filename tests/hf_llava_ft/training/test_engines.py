"""Two processes give what one gives: losses, weights and files, under DDP, DeepSpeed and FSDP2.

A real run each, on the CPU. The batches of two processes with two rows each are those of one with two rows and two
accumulation steps. Rows with and without a picture take turns.
"""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from tests import warm_python
from tests.ranks import ENGINES, OFFLOADS, Run, logged, num_processes, run, saved_weights, write_rows

pytestmark = pytest.mark.slow

STEPS = 4
TEXT_AND_PICTURES_APART = ("--train_sampling_strategy", "sequential")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def command(tiny_checkpoint, data):
    """`command(engine, output_dir, *flags)`: the command line of four steps over two rows each."""

    def words(engine: str, output_dir: Path, *flags) -> list:
        return [
            *("--model_name_or_path", tiny_checkpoint, "--data_path", data, "--image_folder", data.parent),
            *("--output_dir", output_dir, "--use_cpu", "True", "--max_steps", STEPS, "--save_strategy", "no"),
            *("--logging_steps", "1", "--learning_rate", "1e-3", "--lora_dropout", "0", "--mm_projector_lr", "1e-4"),
            *("--per_device_train_batch_size", "1", "--gradient_accumulation_steps", 2 // num_processes(engine)),
            *flags,
        ]

    return words


@pytest.fixture(scope="module")
def trained(command, tmp_path_factory):
    """`trained(engine, *flags)`: the folder of such a run, made once."""
    folders: dict[tuple, Path] = {}

    def folder(engine: str, *flags) -> Path:
        if (engine, *flags) not in folders:
            place = tmp_path_factory.mktemp(engine)
            printed = run(engine, command(engine, place / "out", *flags), place / "logs")
            assert printed.count("The result is at") == 1
            folders[(engine, *flags)] = place / "out"
        return folders[(engine, *flags)]

    return folder


def assert_same_run(found: Path, expected: Path, tolerance: float = 1e-5) -> None:
    assert len(logged(found)) == STEPS
    torch.testing.assert_close(torch.tensor(logged(found)), torch.tensor(logged(expected)), rtol=tolerance, atol=0)
    ours, theirs = saved_weights(found), saved_weights(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if name.endswith(".k_proj.bias"):
            continue  # one sum more in all scores of a query: its gradient is rounding, which Adam makes a step of
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=tolerance, msg=name)
    names = {path.name for path in found.iterdir()} - {"README.md"}
    assert names == {path.name for path in expected.iterdir()} - {"README.md"}


@pytest.mark.parametrize("train_type", ["lora", "qlora", "projector", "full"])
@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_give_the_run_of_one(trained, engine, train_type):
    assert_same_run(trained(engine, "--train_type", train_type), trained("single", "--train_type", train_type))


@pytest.mark.parametrize("engine", OFFLOADS)
def test_offload_gives_the_run_of_one_process(trained, engine):
    assert_same_run(trained(engine, "--train_type", "full"), trained("single", "--train_type", "full"))


# Of "frozen" nothing in front of the language model trains: its batches of text need no tower, but for what has to be
# gathered by all processes at once.
@pytest.mark.parametrize(
    "flags", [("full",), ("freeze_vision", "--freeze_mm_mlp_adapter", "True")], ids=["full", "frozen"]
)
@pytest.mark.parametrize("engine", ENGINES)
def test_one_rank_has_text_alone_for_the_whole_run(trained, engine, flags):
    flags = ("--train_type", *flags, *TEXT_AND_PICTURES_APART)
    assert_same_run(trained(engine, *flags), trained("single", *flags))


@pytest.mark.parametrize("engine", ENGINES)
def test_rows_that_do_not_divide_among_the_ranks(command, data, tmp_path, engine):
    """15 rows are 8 steps of an epoch, in the last of which one rank repeats a row."""
    rows = json.loads(data.read_text())[:15]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    flags = ("--data_path", tmp_path / "data.json", "--max_steps", "-1", "--num_train_epochs", "2")
    for name in ("single", engine):
        run(name, command(name, tmp_path / name, *flags, *TEXT_AND_PICTURES_APART), tmp_path / "logs")
    losses = {name: [loss for loss, _ in logged(tmp_path / name)] for name in ("single", engine)}
    assert len(losses[engine]) == len(losses["single"]) == 16
    assert losses[engine][:7] == pytest.approx(losses["single"][:7], rel=1e-5)


def test_another_learning_rate_is_another_run(trained):
    """Negative control of the comparisons above."""
    with pytest.raises(AssertionError):
        assert_same_run(
            trained("single", "--train_type", "lora", "--learning_rate", "1.01e-3"),
            trained("single", "--train_type", "lora"),
        )


@pytest.mark.parametrize("engine", ENGINES[2:])
def test_peft_alone_loads_an_adapter_of_a_model_that_was_shared_out(trained, tiny_checkpoint, engine):
    program = (
        "import sys; sys.modules['hf_llava_ft'] = None\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForImageTextToText\n"
        "model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(sys.argv[1]), sys.argv[2])\n"
        "print(sum(p.abs().sum().item() for n, p in model.named_parameters() if 'lora_B' in n))"
    )
    output_dir = trained(engine, "--train_type", "lora")
    done = warm_python.run(["-c", program, str(tiny_checkpoint), str(output_dir)])
    assert done.returncode == 0, done.stderr
    sums = [tensor.abs().sum().item() for name, tensor in saved_weights(output_dir).items() if "lora_B" in name]
    assert sum(sums) > 0 and float(done.stdout.split()[-1]) == pytest.approx(sum(sums))


@pytest.mark.parametrize("engine", ENGINES[2:])
def test_a_model_that_was_shared_out_is_saved_whole(trained, tiny_checkpoint, engine):
    before = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint)
    after = AutoModelForImageTextToText.from_pretrained(trained(engine, "--train_type", "full"))
    shapes = [{name: tensor.shape for name, tensor in model.state_dict().items()} for model in (before, after)]
    assert shapes[0] == shapes[1]
    assert type(after) is type(before) and after.config.architectures == before.config.architectures


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_evaluate_as_one(command, data, tmp_path, engine):
    """Loss of rows that do not divide among the processes, answers to prompts, and the counts of the summary; nothing
    in front of the language model trains, and one rank evaluates text alone."""
    rows = json.loads(data.read_text())[:7]
    for index, row in enumerate(rows):
        row["conversations"][1]["value"] *= 1 + index % 4
    (tmp_path / "eval.json").write_text(json.dumps(rows))
    prompts = [{"image": "1.png", "prompt": "What is it?"}, {"prompt": "Who?"}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    flags = ["--eval_data_path", tmp_path / "eval.json", "--eval_strategy", "steps", "--eval_steps", "2"]
    flags += ["--eval_prompts", tmp_path / "prompts.jsonl", "--eval_max_new_tokens", "6"]
    flags += ["--freeze_mm_mlp_adapter", "True"]
    found = {}
    for name in ("single", engine):
        batch_size = ("--per_device_eval_batch_size", 2 // num_processes(name))
        run(name, command(name, tmp_path / name, *flags, *batch_size), tmp_path / "logs")
        log = json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        summary = json.loads((tmp_path / name / "train_summary.json").read_text())
        answers = (tmp_path / name / "eval_answers.jsonl").read_text()
        counts = [summary[key] for key in ("samples", "tokens", "supervised_tokens")]
        found[name] = ([entry["eval_loss"] for entry in log if "eval_loss" in entry], answers, counts)
    assert found[engine][0] == pytest.approx(found["single"][0], rel=1e-5) and len(found[engine][0]) == 2
    assert found[engine][1:] == found["single"][1:]
    assert found["single"][2][0] == 2 * STEPS


def test_fsdp_is_refused_where_ddp_would_run_in_its_place(command, tmp_path):
    argv = command("ddp", tmp_path / "out", "--fsdp", "True")
    refused = Run("ddp", argv, tmp_path / "logs")
    assert refused.wait() == 2
    # Either process may be the first to say it; a launcher then ends the other.
    assert "--fsdp" in refused.all_printed() and "Traceback" not in refused.all_printed()
