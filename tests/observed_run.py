"""What reaches the computation of a training step: `observe`, called in a rank before it trains, has the Trainer write
it down as `observed-RANK.json` in the output folder."""

import json
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from hf_llava_ft.training import run_trainer
from hf_llava_ft.training.trainer import LlavaTrainer


class ObservedTrainer(LlavaTrainer):
    def training_step(self, model, *args, **kwargs):
        if self.state.global_step > 0:
            return super().training_step(model, *args, **kwargs)
        unwrapped: Any = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        layer = unwrapped.model.language_model.layers[0]
        seen: dict[str, Any] = {"layer_runs": 0}

        def see(module: nn.Module, inputs, output) -> None:
            seen["layer_runs"] += 1
            seen["projected"] = str(output.dtype).removeprefix("torch.")

        handle = layer.self_attn.q_proj.register_forward_hook(see)
        loss = super().training_step(model, *args, **kwargs)
        handle.remove()
        seen["attention"] = [
            part.config._attn_implementation for part in (unwrapped.model.language_model, unwrapped.model.vision_tower)
        ]
        seen["wrapped"] = type(model).__name__
        seen["trained"] = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.requires_grad})
        path = Path(str(self.args.output_dir), f"observed-{self.args.process_index}.json")
        path.write_text(json.dumps(seen))
        return loss


def observe() -> None:
    run_trainer.LlavaTrainer = ObservedTrainer  # type: ignore[misc]
