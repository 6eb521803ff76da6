"""Upload an adapter in one commit, checked before and after: `llava-ft push`, which takes models and data too.

python hub_scripts/push_adapter.py runs/quickstart/adapter --repo_id user/my-adapter --base user/my-base
"""

import sys

from hf_llava_ft.cli import app

if __name__ == "__main__":
    app(["push", "--kind", "adapter", "--kind", "original_lora", *sys.argv[1:]])
