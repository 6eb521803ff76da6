"""The files of a checkpoint of the Trainer, tried before a run goes on from them: none is damaged, none holds code."""

import json
from pathlib import Path

import torch
from transformers.trainer_pt_utils import safe_globals

from hf_llava_ft.checkpoints.checked.folder import UNREADABLE, check_settings
from hf_llava_ft.checkpoints.files import read_json, refuse_what_is_no_file
from hf_llava_ft.checkpoints.run_files import TRAINER_STATE_NAME
from hf_llava_ft.errors import UserError

# What each holds: that of PyTorch and of the Trainer, as they write it.
_STATES = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_*.pth")
_WEIGHTS = ("adapter_model.bin", "pytorch_model.bin")
_INSTEAD = "name an earlier checkpoint with --resume_from_checkpoint"


def check_resume_state(checkpoint: str | Path) -> None:
    """
    Raises:
        UserError: if a file of the state of the run is damaged, or holds anything but numbers.
    """
    folder = Path(checkpoint)
    _check_trainer_state(folder)
    check_settings(str(folder))
    for pattern in (*_STATES, *_WEIGHTS):
        for file in sorted(folder.glob(pattern)):
            refuse_what_is_no_file(file)
            _check_pickle(file)


def _check_trainer_state(folder: Path) -> None:
    state = read_json(str(folder), TRAINER_STATE_NAME)
    step = (state or {}).get("global_step")
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise UserError(f"{folder / TRAINER_STATE_NAME} does not say at which step the run was: {_INSTEAD}.")
    history = (state or {}).get("log_history", [])
    if not isinstance(history, list) or not all(isinstance(entry, dict) for entry in history):
        raise UserError(f"{folder / TRAINER_STATE_NAME} holds no log: {_INSTEAD}.")
    epoch = (state or {}).get("epoch")
    if epoch is not None and not isinstance(epoch, (int, float)):
        raise UserError(f"{folder / TRAINER_STATE_NAME}: its epoch is {json.dumps(epoch)[:60]}: {_INSTEAD}.")


def _check_pickle(file: Path) -> None:
    """Reads what is in it but the numbers themselves, which are as large as the model."""
    try:
        with safe_globals():
            try:
                content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap can only be used" not in str(error):
                    raise
                content = torch.load(file, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        if "Unsupported" in str(error) or "GLOBAL" in str(error):
            raise UserError(f"{file} holds code, which is not run: {_INSTEAD}.") from error
        raise UserError(f"{file} is damaged: {_INSTEAD}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds a {type(content).__name__} in the place of a state: {_INSTEAD}.")
    if file.name == "optimizer.pt" and not {"state", "param_groups"} <= content.keys():
        raise UserError(f"{file} holds no state of an optimizer: {_INSTEAD}.")
