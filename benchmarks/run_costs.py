"""What a run costs beside its steps: until the first of them, over a thousand of them, and to merge its adapter.

    OMP_NUM_THREADS=1 python -m benchmarks.run_costs first_step [--rounds 3]
    OMP_NUM_THREADS=1 python -m benchmarks.run_costs steps [--steps 1000]
    OMP_NUM_THREADS=1 python -m benchmarks.run_costs merge [--rounds 3]

`first_step`: CPU seconds of `llava-ft train`, its children among them, from the start of the process to
the end of its first step, on a tiny model, of this build and of 345f9fe in turn; and of a flag that does not exist.
`steps`: resident memory and CPU seconds a step over a long run on a tiny model, the last fifth over the second.
`merge`: `llava-ft merge`, which checks its result in a process of its own, over PEFT's merge and save, in turn, for a
language model of 0.4 billion parameters; and its largest memory. Linux only.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.bench.environments import CHECKOUT, EARLIER, environment_of
from benchmarks.bench.process import ONE_THREAD

# Nothing is imported here that the command does not import by itself, and when it does.
FIRST_STEP = """
import importlib.machinery, os, sys

class Trainer:
    def find_spec(self, name, path, target=None):
        if name != "transformers.trainer":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            step = module.Trainer.training_step

            def training_step(*args, **kwargs):
                step(*args, **kwargs)
                used = os.times()
                os.write(3, str(used.user + used.system + used.children_user + used.children_system).encode())
                os._exit(0)

            module.Trainer.training_step = training_step

        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Trainer())
sys.argv = ["llava-ft", "train", *sys.argv[1:]]
from hf_llava_ft.cli import main
main()
"""
MERGE_BY_PEFT = """
import sys
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor
import hf_llava_ft
base, adapter, output = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base, dtype="auto"), adapter)
model.merge_and_unload().save_pretrained(output)
AutoProcessor.from_pretrained(base).save_pretrained(output)
"""


def environment(code: Path) -> dict[str, str]:
    return os.environ | ONE_THREAD | {"PYTHONPATH": str(code)}


def spent_by(command: list[str], code: Path, log: Path) -> tuple[float, int]:
    """CPU seconds of a command and of its children, and the largest memory of one of them in bytes."""
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment(code))
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)}: {log.read_text()[-1500:]}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def told(name: str, values: list[float], unit: str = "") -> None:
    print(f"{name}: {statistics.median(values):.2f}{unit} ({min(values):.2f} to {max(values):.2f})", flush=True)


def first_step(folder: Path, rounds: int) -> None:
    from benchmarks.learning.__main__ import write_start

    start = folder / "start"
    write_start(start, 20)
    flags = ["--model_name_or_path", start / "questions", "--data_path", start / "shapes" / "train.json"]
    flags += ["--image_folder", start / "shapes" / "images", "--use_cpu", "True", "--save_strategy", "no"]
    flags += ["--per_device_train_batch_size", "4"]
    found: dict[str, list[float]] = {"ours": [], EARLIER: []}
    for number in range(rounds):
        for side in list(found)[:: -1 if number % 2 else 1]:
            python, code = environment_of(side, CHECKOUT / "build" / "bench")
            output = folder / f"{side}-{number}"  # a new one each time, and a new cache of rows
            reader, writer = os.pipe()
            command = [str(python), "-c", f"import os; os.dup2({writer}, 3)\n{FIRST_STEP}", *map(str, flags)]
            known = environment(code) | {"HF_DATASETS_CACHE": str(output) + "-cache"}
            process = subprocess.Popen(
                [*command, "--output_dir", str(output)],
                pass_fds=[writer],
                env=known,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
            os.close(writer)
            _, errors = process.communicate()
            seconds = os.read(reader, 100)
            os.close(reader)
            if not seconds:
                raise SystemExit(f"{side}: {errors.decode()[-1500:]}")
            found[side].append(float(seconds))
    for side, values in found.items():
        told(f"to the first step, {side}", values, " CPU s")
    told(f"{EARLIER} over ours", [b / a for a, b in zip(*found.values(), strict=True)])
    wrong = [sys.executable, "-m", "hf_llava_ft", "train", "--learning_rat", "1"]
    before = os.times()
    subprocess.run(wrong, env=environment(CHECKOUT), capture_output=True, check=False)
    after = os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    print(f"a flag that does not exist: told after {spent:.2f} CPU s")


def steps(folder: Path, number: int) -> None:
    import resource

    import torch
    from transformers import TrainerCallback

    import hf_llava_ft
    from benchmarks.bench.workload import write_workload
    from hf_llava_ft import TuningArguments, with_tuning

    torch.set_num_threads(1)
    write_workload(folder, 64, tiny=True)
    processor = hf_llava_ft.load_processor(str(folder / "model"))
    rows = hf_llava_ft.load_data(str(folder / "rows.json"), str(folder / "images"), cache_dir=str(folder / "cache"))
    seen: list[tuple[float, int]] = []

    class Watch(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
            seen.append((time.process_time(), resident))

    model = with_tuning(
        hf_llava_ft.load_model(str(folder / "model"), processor), TuningArguments(train_type="lora", lora_r=8), ""
    )
    args = hf_llava_ft.LlavaTrainingArguments(
        output_dir=str(folder / "run"),
        max_steps=number,
        per_device_train_batch_size=4,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=number,
        report_to="none",
    )
    hf_llava_ft.LlavaTrainer(model, args, train_dataset=rows, processing_class=processor, callbacks=[Watch()]).train()
    fifth = number // 5
    times = [after[0] - before[0] for before, after in zip(seen, seen[1:], strict=False)]
    early, late = statistics.mean(times[fifth : 2 * fifth]), statistics.mean(times[-fifth:])
    print(f"CPU seconds a step, the last fifth of {number} over the second: {late / early:.3f}")
    at = [seen[fifth][1], seen[-1][1]]
    print(f"resident memory after {fifth} and {number} steps: {at[0] / 1e6:.0f} and {at[1] / 1e6:.0f} MB")


def write_adapter(folder: Path) -> None:
    """`base` and `adapter` in `folder`, and the bytes of the model's weights in `size`."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

    from benchmarks.bench.workload import tokenizer_of
    from hf_llava_ft.checkpoints.compose import compose_from_parts, save_composed
    from hf_llava_ft.settings.composition import Composition

    tokenizer = tokenizer_of(["the quick brown fox"])
    torch.manual_seed(0)
    tower = CLIPVisionModel(CLIPVisionConfig(hidden_size=48, num_hidden_layers=2, image_size=56, patch_size=14))
    text = LlamaConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=20,
        num_attention_heads=16,
        vocab_size=len(tokenizer),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model, processor = compose_from_parts(tower, LlamaForCausalLM(text), tokenizer, Composition(version="chatml"))
    base, adapter = folder / "base", folder / "adapter"
    size = sum(each.numel() * each.element_size() for each in model.parameters())
    (folder / "size").write_text(str(size))
    save_composed(model, processor, base)
    layers = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
    model = get_peft_model(model, LoraConfig(r=64, lora_alpha=128, target_modules=layers))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(adapter)
    processor.save_pretrained(adapter)


def merge(folder: Path, rounds: int) -> None:
    base, adapter, output = folder / "base", folder / "adapter", folder / "merged"
    # In a process of its own: what is measured would begin with the memory of this one.
    preparing = (
        "import pathlib, sys; from benchmarks import run_costs as it; it.write_adapter(pathlib.Path(sys.argv[1]))"
    )
    spent_by([sys.executable, "-c", preparing, str(folder)], CHECKOUT, folder / "log")
    size = int((folder / "size").read_text())
    commands = {
        "ours": [sys.executable, "-m", "hf_llava_ft", "merge", "--adapter", adapter, "--output_dir", output],
        "peft": [sys.executable, "-c", MERGE_BY_PEFT, base, adapter, output],
    }
    # What the libraries take before anything is loaded.
    nothing = [sys.executable, "-c", "import torch, transformers.modeling_utils, peft, hf_llava_ft.checkpoints.merge"]
    baseline = spent_by(nothing, CHECKOUT, folder / "log")[1]
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in commands}
    for number in range(rounds):
        for name in list(commands)[:: -1 if number % 2 else 1]:
            shutil.rmtree(output, ignore_errors=True)
            found[name].append(spent_by([str(word) for word in commands[name]], CHECKOUT, folder / "log"))
    for name, values in found.items():
        told(f"{name}", [seconds for seconds, _ in values], " CPU s")
        told(f"{name}, memory above its libraries over the model's size", [(m - baseline) / size for _, m in values])
    told("ours over peft", [a[0] / b[0] for a, b in zip(*found.values(), strict=True)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("first_step", "steps", "merge"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--folder", type=Path, default=CHECKOUT / "build" / "run_costs")
    args = parser.parse_args()
    shutil.rmtree(args.folder, ignore_errors=True)
    args.folder.mkdir(parents=True)
    if args.what == "steps":
        steps(args.folder, args.steps)
    else:
        {"first_step": first_step, "merge": merge}[args.what](args.folder, args.rounds)


if __name__ == "__main__":
    main()
