"""A loss that is NaN in the second process alone, in its second step; its gradients are as ever."""

import os

import torch

from hf_llava_ft.training.guards.finite import FiniteTraining


def spoil() -> None:
    see_loss = FiniteTraining.see_loss

    def see_spoiled(self, loss: torch.Tensor) -> None:
        is_here = os.environ.get("RANK") == "1" and self.trainer.state.global_step == 1
        see_loss(self, loss * float("nan") if is_here else loss)

    FiniteTraining.see_loss = see_spoiled
