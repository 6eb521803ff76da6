"""The files of examples/kubernetes/ are what Kubeflow Trainer takes, and start a run."""

import copy
from pathlib import Path

import pytest
import yaml

from hf_llava_ft.settings.parsing import resolve

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples" / "kubernetes"
DEFINITIONS = yaml.safe_load((ROOT / "tests/kubernetes/kubeflow_trainer.yaml").read_text(encoding="utf-8"))


def example(name):
    return yaml.safe_load((EXAMPLES / name).read_text(encoding="utf-8"))


def strict(schema):
    """An API server drops what a definition does not name; here it is an error."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {"additionalProperties": False} if isinstance(schema.get("properties"), dict) else {}
    return {name: strict(value) for name, value in schema.items()} | closed


def complaints(resource):
    jsonschema = pytest.importorskip("jsonschema")
    definition = DEFINITIONS[resource["kind"]]
    schema = strict(definition["schema"])
    schema["properties"]["metadata"] = {
        "type": "object",
        "anyOf": [{"required": ["name"]}, {"required": ["generateName"]}],
    }
    found = [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(resource)]
    expected = f"{definition['group']}/{definition['version']}"
    return found if resource["apiVersion"] == expected else [*found, f"{resource['apiVersion']} is not {expected}"]


@pytest.mark.parametrize("name", ["runtime.yaml", "train.yaml"])
def test_an_example_is_what_its_definition_asks_for(name):
    assert complaints(example(name)) == []


def test_what_the_definition_does_not_take_is_noticed():
    job = example("train.yaml")
    for path, value in (
        (("spec", "runtimeRef"), {"kind": "ClusterTrainingRuntime"}),
        (("spec", "trainer", "numNodes"), "two"),
        (("spec", "trainer", "numProcsPerNode"), 4),
        (("spec", "trainer", "args"), "--lora_r 16"),
        (("apiVersion",), "kubeflow.org/v1"),
    ):
        wrong = copy.deepcopy(job)
        place = wrong
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        assert len(complaints(wrong)) == 1, path


def test_the_job_runs_in_the_runtime_and_its_flags_are_ours():
    runtime, job = example("runtime.yaml"), example("train.yaml")
    ref, trainer = job["spec"]["runtimeRef"], job["spec"]["trainer"]
    assert (ref["kind"], ref["name"]) == (runtime["kind"], runtime["metadata"]["name"])
    assert trainer["command"] == ["torchrun", "-m", "hf_llava_ft.train"]
    settings = resolve(trainer["args"])
    assert settings.by_name["resume_from_checkpoint"].value == "auto"
    assert settings.by_name["train_type"].value == "lora"
    assert trainer["numProcPerNode"] == trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"]
    [pods] = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    pod = pods["template"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    # Relative paths of the flags, and so all that is written, lie on the claim.
    assert mounted["workspace"] == container["workingDir"] and {each["name"] for each in pod["volumes"]} == set(
        mounted
    )
