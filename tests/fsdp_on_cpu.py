"""accelerate runs FSDP on GPUs only; among CPU processes it runs DDP, and says nothing.

`allow` lifts that one check, so that all behind it, FSDP2 of PyTorch and what accelerate and the Trainer do with it,
runs over gloo. As a script, it does so for the training that its arguments describe.
"""

import functools
import sys
from pathlib import Path

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType


def allow() -> None:
    init = AcceleratorState.__init__

    @functools.wraps(init)
    def init_as_among_gpus(self, *args, **kwargs):
        shared = PartialState._shared_state
        if shared.get("distributed_type") == DistributedType.MULTI_CPU:
            shared["distributed_type"] = DistributedType.MULTI_GPU
        init(self, *args, **kwargs)

    AcceleratorState.__init__ = init_as_among_gpus


if __name__ == "__main__":
    # In the place of this folder, whose tests lie in one of the package's name.
    sys.path[0] = str(Path(__file__).parents[1])
    from hf_llava_ft.train import main

    allow()
    main()
