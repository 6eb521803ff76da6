r"""Make a new LLaVA from a vision tower and a language model: `llava-ft compose`.

    python hub_scripts/compose.py --vision openai/clip-vit-large-patch14-336 --language Qwen/Qwen1.5-4B-Chat \
        --output_dir llava-qwen
"""

import sys

from hf_llava_ft.cli import app

if __name__ == "__main__":
    app(["compose", *sys.argv[1:]])
