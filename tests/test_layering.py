"""Who may import whom, read from the source without running it.

    modeling/     processing/     torch, transformers, Pillow; not each other, nothing of ours
          \\         /
          hf_llava_ft/            knows both
               |
          hub_scripts/            knows hf_llava_ft

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
        ("hub_scripts/push_model.py", "import typer\nfrom hf_llava_ft.hub import push"),
        ("tests/hf_llava_ft/test_train.py", "from hf_llava_ft.modeling.modeling_llava import LlavaForCausalLM"),
    ],
)
def test_an_allowed_import_is_left_alone(path, source):
    assert complaints(source, path) == []


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
