"""Merge a LoRA adapter into its base, and check the result in a fresh process: `llava-ft merge`.

python hub_scripts/merge_lora.py --adapter runs/quickstart/adapter --output_dir merged
"""

import sys

from hf_llava_ft.cli import app

if __name__ == "__main__":
    app(["merge", *sys.argv[1:]])
