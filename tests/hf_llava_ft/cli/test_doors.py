"""Other ways to the commands: as a module, and by the shell's Tab key."""

import os
import subprocess
import sys

import pytest

import hf_llava_ft

# As the console script does it; what is heavy must not be waited for at each Tab.
COMPLETE = """
import sys
sys.argv = ["llava-ft"]
from hf_llava_ft.cli import main
try:
    main()
finally:
    print("imported:", sorted({"torch", "transformers"} & sys.modules.keys()))
"""


def test_the_package_is_a_command_that_does_not_wait_for_torch(checkout):
    command = [sys.executable, "-X", "importtime", "-m", "hf_llava_ft", "--version"]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, hf_llava_ft.__version__)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "typer" in imported and not imported & {"torch", "transformers"}


@pytest.mark.parametrize(
    "words, wanted", [("gen", "generate"), ("generate --temp", "--temperature"), ("chat --dev", "--device")]
)
def test_the_shell_completes_commands_and_flags(checkout, words, wanted):
    line = f"llava-ft {words}"
    asked = {"_LLAVA_FT_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}
    done = subprocess.run(
        [sys.executable, "-c", COMPLETE], cwd=checkout, env={**os.environ, **asked}, capture_output=True, text=True
    )
    *found, imported = done.stdout.splitlines()
    assert [word for word in found if word] == [wanted] and imported == "imported: []"
