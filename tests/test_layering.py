"""Who may import whom, read from the source without running it.

    modeling/     processing/     torch, transformers, Pillow; not each other, nothing of ours
          \\         /
          hf_llava_ft/            knows both
               |
          hub_scripts/            knows hf_llava_ft

Inside hf_llava_ft/, a wing imports those above it in `WINGS`, never those below.

modeling/ and processing/ travel to the Hub with a checkpoint. transformers copies them flat, by file name, and follows
only imports of the form `from .sibling import Name`. It finds them by regular expression, in docstrings too.
"""

import ast
import re
import sys
from collections import Counter
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).resolve().parent.parent
TRAVELLING = ("modeling", "processing")
LAYERS = (*TRAVELLING, "hf_llava_ft", "hub_scripts")
BELOW_OR_BESIDE_SCRIPTS = ("hf_llava_ft.modeling", "hf_llava_ft.processing", "hf_llava_ft.hub_scripts")
# What a stranger has who loads our code from the Hub: transformers, what it brings, and what it needs for images. Also
# within a function: transformers refuses code from the Hub, unlike that in a folder, if an import statement of it
# names what is not installed.
TRAVELS_WITH = {"torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "numpy", "PIL"}
# From the ground up. `registration` stands apart: it ties modeling and processing to the Auto classes on import.
WINGS = (
    *("releases", "errors", "library_differences", "noise", "whole_files", "termination", "start_up"),
    *("modeling", "processing"),
    *("settings", "reports", "checkpoints", "data", "checking", "answering", "evaluation", "hub", "training"),
    *("estimate", "serving", "web", "train", "from_python", "quickstart", "cli", "evaluate"),
)
# Files that import within a function, and why not at their top.
IMPORTS_LATE = {
    "hf_llava_ft/registration.py": "start-up: `import hf_llava_ft` of the command line registers nothing",
    "hf_llava_ft/library_differences.py": "start-up: transformers is imported by who needs it",
    "hf_llava_ft/start_up.py": "start-up: `llava-ft --help` looks into no cache of the Hub",
    "hf_llava_ft/cli/application.py": "start-up: `llava-ft --help` must not wait for torch",
    "hf_llava_ft/cli/answering.py": "start-up, as above",
    "hf_llava_ft/cli/evaluation.py": "start-up, as above",
    "hf_llava_ft/cli/hub.py": "start-up, as above",
    "hf_llava_ft/cli/models.py": "start-up, as above",
    "hf_llava_ft/cli/training.py": "start-up, as above",
    "hf_llava_ft/hub/push_dataset.py": "start-up, as above: the script of the same name shows its help",
    "modeling/weight_names_llava.py": "loading a folder with our code needs no conversions of names",
    "hf_llava_ft/checkpoints/checked/template_probe.py": "optional module: Windows has no `resource`",
    "hf_llava_ft/checkpoints/reload.py": "runs by itself in a fresh process, without us where the folder needs none",
    "hf_llava_ft/checkpoints/original_folders.py": "optional package: deepspeed",
    "hf_llava_ft/settings/training_arguments.py": "optional package: deepspeed",
    "hf_llava_ft/evaluation/benchmarks.py": "optional package: lmms-eval",
    "hf_llava_ft/web/page.py": "optional package: gradio",
    "hf_llava_ft/web/server.py": "optional package: gradio",
    "hf_llava_ft/training/fsdp.py": "optional part of torch, which not every build has",
    "hf_llava_ft/training/speed/packed_attention.py": "optional part of torch, from 2.10 on",
    "hf_llava_ft/training/summary.py": "optional module: Windows has no `resource`",
    "hf_llava_ft/data/json/parts.py": "start-up: worker processes read JSON without `datasets`",
    "hf_llava_ft/data/lengths.py": "start-up, as above",
    "hf_llava_ft/data/pictures.py": "start-up, as above",
    "hf_llava_ft/quickstart/report.py": "start-up: matplotlib and Pillow where a picture is drawn",
    "hf_llava_ft/reports/page.py": "start-up, as above",
    "hf_llava_ft/reports/plots.py": "start-up, as above",
}
# As in transformers.dynamic_module_utils.get_relative_imports.
RELATIVE_IMPORT = re.compile(r"^\s*(?:import\s+\.\S+\s*$|from\s+\.\S+\s+import)", re.MULTILINE)


def sources(*folders):
    for folder in folders:
        yield from (path for path in sorted((ROOT / folder).rglob("*.py")) if "__pycache__" not in path.parts)


def imports(source, path):
    """Yields the imports of a file in `path`: (node, absolute names of the modules that it may reach)."""
    package = list(PurePosixPath(path).parent.parts)
    if package and package[0] in LAYERS and package[0] != "hf_llava_ft":
        package = ["hf_llava_ft", *package]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield node, [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            # `from package import name` may name a module.
            yield node, [module, *(f"{module}.{alias.name}" for alias in node.names)]


def reaches(names, *packages):
    return any(name == package or name.startswith(f"{package}.") for name in names for package in packages)


def wing_of(module):
    """Place of a module in `WINGS`; `None` for what is in none, such as the package itself."""
    name = [*module.split("."), ""][1]
    return WINGS.index(name) if module.startswith("hf_llava_ft.") and name in WINGS else None


def goes_down(path, names):
    """Whether a file of the plugin reaches a wing that stands on its own."""
    own = wing_of(PurePosixPath(path).with_suffix("").as_posix().replace("/", "."))
    return own is not None and any((wing_of(name) or 0) > own for name in names)


def complaints(source, path):
    """Says what a file at `path` (relative to the root, with slashes) imports and must not."""
    layer = PurePosixPath(path).parts[0]
    found = []
    for node, names in imports(source, path):
        relative = isinstance(node, ast.ImportFrom) and node.level > 0
        if not relative and reaches(names, *TRAVELLING, "hub_scripts"):
            found.append((node, "a second copy of every class: import it as part of hf_llava_ft"))
        elif layer in TRAVELLING and relative:
            if node.level != 1 or node.module is None or "." in node.module:
                found.append((node, "only `from .sibling import Name` travels"))
        elif layer in TRAVELLING and names[0].partition(".")[0] not in TRAVELS_WITH | sys.stdlib_module_names:
            found.append((node, f"{layer}/ travels, and may ask for {', '.join(sorted(TRAVELS_WITH))} only"))
        elif layer == "hf_llava_ft" and reaches(names, "hf_llava_ft.hub_scripts"):
            found.append((node, "nothing imports hub_scripts"))
        elif layer == "hf_llava_ft" and goes_down(path, names):
            found.append((node, "a wing imports those above it in WINGS, never those below"))
        elif layer == "hub_scripts" and reaches(names, *BELOW_OR_BESIDE_SCRIPTS):
            found.append((node, "hub_scripts/ knows hf_llava_ft, not what is below it nor a script beside it"))
    return [f"{path}:{node.lineno}: {ast.unparse(node)}: {reason}" for node, reason in found]


def test_imports_follow_the_diagram():
    found = []
    for path in sources(*LAYERS, "tests", "examples", "benchmarks"):
        found += complaints(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "path, source",
    [
        ("modeling/modeling_llava.py", "from hf_llava_ft.errors import UserError"),
        ("modeling/modeling_llava.py", "import hf_llava_ft"),
        ("modeling/modeling_llava.py", "from ..processing.processing_llava import LlavaProcessor"),
        ("modeling/modeling_llava.py", "from . import configuration_llava"),
        ("modeling/modeling_llava.py", "def lazily():\n    from .parts.projector import Projector"),
        ("modeling/modeling_llava.py", "import peft"),
        ("modeling/modeling_llava.py", "def lazily():\n    import peft"),
        ("processing/processing_llava.py", "from modeling.configuration_llava import LlavaConfig"),
        ("processing/processing_llava.py", "from hf_llava_ft.modeling.configuration_llava import LlavaConfig"),
        ("hf_llava_ft/train.py", "import modeling"),
        ("hf_llava_ft/train.py", "from hf_llava_ft import hub_scripts"),
        ("hf_llava_ft/data/schema.py", "from ..hub_scripts.push_model import main"),
        ("hf_llava_ft/settings/resolved.py", "from hf_llava_ft.checkpoints.opening import load_model"),
        ("hf_llava_ft/data/export.py", "def late():\n    from hf_llava_ft.hub.dataset_card import dataset_card"),
        ("hf_llava_ft/data/streaming/stream.py", "from hf_llava_ft import checking"),
        ("hf_llava_ft/errors.py", "import hf_llava_ft.settings.arguments"),
        ("hub_scripts/push_model.py", "from hf_llava_ft.modeling.modeling_llava import LlavaForCausalLM"),
        ("hub_scripts/push_model.py", "from .merge import main"),
        ("tests/modeling/test_modeling_llava.py", "from modeling.modeling_llava import LlavaForCausalLM"),
    ],
)
def test_a_forbidden_import_is_named(path, source):
    (complaint,) = complaints(source, path)
    assert complaint.startswith(f"{path}:{source.count(chr(10)) + 1}: ")


@pytest.mark.parametrize(
    "path, source",
    [
        ("modeling/modeling_llava.py", "import torch\nfrom .configuration_llava import LlavaConfig"),
        ("hf_llava_ft/train.py", "from hf_llava_ft.modeling.modeling_llava import LlavaForCausalLM"),
        ("hf_llava_ft/data/collate.py", "from .schema import Row\nfrom hf_llava_ft.errors import UserError"),
        ("hf_llava_ft/hub/push_dataset.py", "from hf_llava_ft.data.export import export_dataset"),
        ("hf_llava_ft/errors.py", "from hf_llava_ft.releases import sentence_for"),
        ("hub_scripts/push_model.py", "import typer\nfrom hf_llava_ft.hub import push"),
        ("tests/hf_llava_ft/test_train.py", "from hf_llava_ft.modeling.modeling_llava import LlavaForCausalLM"),
    ],
)
def test_an_allowed_import_is_left_alone(path, source):
    assert complaints(source, path) == []


def test_every_module_of_the_plugin_is_in_a_wing():
    apart = {"__init__", "__main__", "registration"}
    names = {path.name.removesuffix(".py") for path in (ROOT / "hf_llava_ft").iterdir() if path.name != "__pycache__"}
    assert names - apart == set(WINGS) - set(TRAVELLING)


def imports_within_functions(source):
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    return any(isinstance(node, ast.Import | ast.ImportFrom) for each in functions for node in ast.walk(each))


def test_imports_within_functions_are_listed_with_their_reason():
    files = sources("hf_llava_ft", *TRAVELLING)
    late = {path.relative_to(ROOT).as_posix() for path in files if imports_within_functions(path.read_text("utf-8"))}
    assert late == set(IMPORTS_LATE)
    assert imports_within_functions("def f():\n    if True:\n        import json")
    assert not imports_within_functions("import json\ndef f():\n    pass")


def test_travelling_files_are_flat_and_their_names_are_unique():
    paths = [path for path in sources(*TRAVELLING) if path.name != "__init__.py"]
    assert [path for path in paths if path.parent.name not in TRAVELLING] == []
    assert [name for name, count in Counter(path.name for path in paths).items() if count > 1] == []


def test_relative_imports_of_travelling_files_name_a_file_beside_them():
    for path in sources(*TRAVELLING):
        for node, _ in imports(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert path.with_name(f"{node.module}.py").is_file(), f"{path.name}:{node.lineno}: {ast.unparse(node)}"


def imports_transformers_invents(source):
    relative = [node for node, _ in imports(source, "") if isinstance(node, ast.ImportFrom) and node.level]
    seen = RELATIVE_IMPORT.findall(source)
    return seen if len(seen) != len(relative) else []


def test_travelling_files_hold_no_import_that_only_a_regular_expression_sees():
    for path in sources(*TRAVELLING):
        assert imports_transformers_invents(path.read_text(encoding="utf-8")) == [], path.name


def test_an_import_in_a_docstring_is_noticed():
    assert imports_transformers_invents('"""Use it like this:\n\n    from .sibling import Name\n"""')
    assert imports_transformers_invents("from .sibling import Name") == []
