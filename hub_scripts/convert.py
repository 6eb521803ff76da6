"""Write a model, adapter or projector in the format of llava-hf or of haotian-liu/LLaVA: `llava-ft convert`.

python hub_scripts/convert.py --model liuhaotian/llava-v1.5-7b --format llava-hf --output_dir llava-1.5-7b-hf
"""

import sys

from hf_llava_ft.cli import app

if __name__ == "__main__":
    app(["convert", *sys.argv[1:]])
