"""Upload a model in one commit, checked before and after: `llava-ft push`, which takes adapters and data too.

python hub_scripts/push_model.py merged --repo_id user/my-llava --private
"""

import sys

from hf_llava_ft.cli import app

if __name__ == "__main__":
    app(["push", "--kind", "model", *sys.argv[1:]])
