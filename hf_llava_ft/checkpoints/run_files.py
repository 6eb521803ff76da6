"""The names of the files that a run writes."""

# Ours, in the output folder: the whole summary, what others may know of it, and answers with their pictures.
SUMMARY_FILE, TRAINING_FILE = "train_summary.json", "training.json"
RUN_FILE = "run.json"  # which run the folder is of
EVALUATION_FILE = "evaluation.json"  # what `llava-ft evaluate` found, of all its data sets
RETENTION_FILE = "retention.json"  # answers of `--retention_probe`, before the first step and after the last
ANSWERS_FILE, PICTURES_FOLDER = "eval_answers.jsonl", "eval_pictures"

# Of transformers' Trainer, in every checkpoint there is.
PREFIX_CHECKPOINT_DIR = "checkpoint"
TRAINER_STATE_NAME = "trainer_state.json"
TRAINING_ARGS_NAME = "training_args.bin"
SAFE_WEIGHTS_NAME = "model.safetensors"
