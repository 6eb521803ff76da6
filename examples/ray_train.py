"""`llava-ft train` on the workers of a Ray cluster, by Ray Train.

    pip install 'hf-llava-ft[ray]'
    python examples/ray_train.py --num_workers 4 --use_gpu examples/recipes/lora.yaml \
        --data_path /shared/data.json --image_folder /shared/images --output_dir /shared/out

What this script does not know are flags of `llava-ft train`. Model, data and output have to be found under the same
paths on every node. With --max_failures 3, Ray starts the workers again when one is lost, and the run goes on from its
last checkpoint.
"""

import argparse
import os

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer


def train_on_worker(config: dict) -> dict:
    """One process of the run. Ray has joined it with the others, as torchrun would."""
    # Here and not above: the script itself needs no GPU, and the workers import this where they run.
    from hf_llava_ft.train import parse_arguments, train

    os.chdir(config["folder"])  # which relative paths begin at
    result = train(*parse_arguments(config["flags"]))
    return {"loss": result.losses[-1], "output_dir": str(result.adapter_dir)}


def main(num_workers: int, use_gpu: bool, max_failures: int, storage_path: str | None, flags: list[str]) -> None:
    if max_failures:
        flags = [*flags, "--resume_from_checkpoint", "auto"]
    trainer = TorchTrainer(
        train_on_worker,
        train_loop_config={"flags": flags, "folder": os.getcwd()},
        scaling_config=ScalingConfig(num_workers=num_workers, use_gpu=use_gpu),
        run_config=RunConfig(storage_path=storage_path, failure_config=FailureConfig(max_failures=max_failures)),
    )
    found = trainer.fit().return_value
    print(f"loss {found['loss']:.4f}; the result is at {found['output_dir']}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--num_workers", type=int, default=1, help="processes; with --use_gpu one for each GPU")
    parser.add_argument("--use_gpu", action="store_true")
    parser.add_argument("--max_failures", type=int, default=0, help="how often lost workers are started again")
    parser.add_argument("--storage_path", help="where Ray keeps its own records; default: ~/ray_results")
    known, flags = parser.parse_known_args()
    main(**vars(known), flags=flags)
