"""Load a model or an adapter as others would, and compare it with what this package reads: `llava-ft verify`.

python hub_scripts/verify.py --model merged
"""

import sys

from hf_llava_ft.cli import app

if __name__ == "__main__":
    app(["verify", *sys.argv[1:]])
