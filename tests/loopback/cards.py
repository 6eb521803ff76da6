"""What the Hub says about the metadata of a README.md."""

import re

import yaml

_REPO_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_LICENSES = (
    "apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m openrail++ gpl gpl-3.0 lgpl-3.0 bsd "
    "bsd-2-clause bsd-3-clause cc cc0-1.0 cc-by-4.0 cc-by-sa-4.0 cc-by-nc-4.0 cc-by-nc-sa-4.0 llama2 llama3 llama3.1 "
    "llama3.2 llama3.3 llama4 gemma unknown other"
).split()
_RELATIONS = ("adapter", "merge", "quantized", "finetune")
_TASKS = ("image-text-to-text", "text-generation", "visual-question-answering", "image-to-text")


def problems(content: str, repo_type: str) -> tuple[list[str], list[str]]:
    """Errors and warnings."""
    match = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", content, re.DOTALL)
    if match is None:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"YAML Metadata Error: {error}"], []
    if data is None:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(data, dict):
        return ["YAML Metadata Error: metadata must be a mapping"], []
    errors = [
        *_each(data, "license", lambda value: value in _LICENSES, f"must be one of {_LICENSES}"),
        *_each(data, "base_model", _is_repo_id, "is not valid. Use a model id from https://hf.co/models."),
        *_each(data, "datasets", _is_repo_id, "is not valid. Use a dataset id from https://hf.co/datasets."),
        *_each(data, "tags", lambda value: isinstance(value, str), "must be a string"),
        *_each(data, "language", _is_language, "must be an ISO 639-1, 639-2 or 639-3 code"),
        *_each(data, "library_name", lambda value: isinstance(value, str), "must be a string"),
    ]
    if repo_type == "model":
        errors += [
            *_each(data, "pipeline_tag", lambda value: value in _TASKS, f"must be one of {_TASKS}"),
            *_each(data, "base_model_relation", lambda value: value in _RELATIONS, f"must be one of {_RELATIONS}"),
            *_model_index(data.get("model-index")),
        ]
    return errors, []


def _each(data: dict, key: str, valid, complaint: str) -> list[str]:
    values = data.get(key)
    values = values if isinstance(values, list) else [] if values is None else [values]
    return [f'"{key}" with value {value!r} {complaint}' for value in values if not valid(value)]


def _is_repo_id(value) -> bool:
    return isinstance(value, str) and _REPO_ID.fullmatch(value) is not None


def _is_language(value) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[a-z]{2,3}(-\w+)*|code|multilingual", value) is not None


def _model_index(index) -> list[str]:
    if index is None:
        return []
    if not isinstance(index, list):
        return ['"model-index" must be an array']
    errors = []
    for place, model in enumerate(index):
        if not isinstance(model, dict) or not isinstance(model.get("name"), str):
            errors.append(f'"model-index[{place}].name" must be a string')
            continue
        for number, result in enumerate(model.get("results") or []):
            at = f"model-index[{place}].results[{number}]"
            if not isinstance((result.get("task") or {}).get("type"), str):
                errors.append(f'"{at}.task.type" is required')
            dataset = result.get("dataset") or {}
            errors += [
                f'"{at}.dataset.{key}" is required'
                for key in ("type", "name")
                if not isinstance(dataset.get(key), str)
            ]
            metrics = result.get("metrics")
            if not isinstance(metrics, list) or not metrics:
                errors.append(f'"{at}.metrics" is required')
            elif any(not isinstance(metric.get("type"), str) or metric.get("value") is None for metric in metrics):
                errors.append(f'"{at}.metrics" need type and value')
    return errors
