"""What transformers' Trainer calls the files and folders of a run: part of every checkpoint there is, so it stays."""

PREFIX_CHECKPOINT_DIR = "checkpoint"
TRAINER_STATE_NAME = "trainer_state.json"
TRAINING_ARGS_NAME = "training_args.bin"
SAFE_WEIGHTS_NAME = "model.safetensors"
