"""Loads exported folders as somebody without this package does, and says what of them is as it was.

Runs in an environment of its own: standard library, torch, transformers and what they bring.
`python loading.py FOLDER ...` prints for each folder one line of JSON that begins with `RESULT`: the name of each of
`CHECKS`, and null or the first line of its error.
"""

import json
import shutil
import sys
import tempfile
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HUB_CACHE
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    LogitsProcessor,
    LogitsProcessorList,
    pipeline,
)

RESULT = "result: "  # other lines are those of transformers
TOLERANCE = 1e-5
INPUTS = ("input_ids", "attention_mask", "pixel_values", "image_sizes")


class ForcedToken(LogitsProcessor):
    """Makes every row generate `token_id` at position `length`: a model that says `<image>` by itself."""

    def __init__(self, token_id: int, length: int):
        self.token_id, self.length = token_id, length

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] == self.length:
            scores = torch.full_like(scores, -float("inf"))
            scores[:, self.token_id] = 0
        return scores


class Folder:
    """An exported folder and what was expected of it, see `exporting.expected_outputs`."""

    def __init__(self, path: Path):
        self.path = path
        self.expected = load_file(path / "expected.safetensors")
        self.inputs = {name: self.expected[name] for name in INPUTS if name in self.expected}

    @cached_property
    def model(self):
        return AutoModelForImageTextToText.from_pretrained(self.path, trust_remote_code=True)

    @cached_property
    def processor(self):
        return AutoProcessor.from_pretrained(self.path, trust_remote_code=self.processor_has_code)

    @property
    def processor_has_code(self) -> bool:
        """Whether the processor has to be trusted, too; else it is transformers' own."""
        return "auto_map" in json.loads((self.path / "processor_config.json").read_text(encoding="utf-8"))

    def prepared(self, processor) -> dict[str, torch.Tensor]:
        """What `processor` makes of the questions and pictures."""
        count = sum(name.startswith("picture.") for name in self.expected)
        images = [Image.fromarray(self.expected[f"picture.{index}"].numpy()) for index in range(count)]
        rows = range(len(self.expected["input_ids"]))
        texts = [bytes(self.expected[f"text.{row}"].tolist()).decode() for row in rows]
        processor.tokenizer.padding_side = "left"
        return dict(processor(images=images, text=texts, padding=True, return_tensors="pt"))

    def compare_logits(self, logits: torch.Tensor) -> None:
        expected = self.expected["logits"]
        every = -(-logits.shape[-1] // expected.shape[-1])
        seen = self.expected["attention_mask"].bool()  # what stands at padding is nobody's
        off = (logits[..., ::every].float() - expected)[seen].abs().max().item()
        assert off <= TOLERANCE, f"logits differ by {off:.3g}"

    def compare_inputs(self, inputs: dict[str, torch.Tensor]) -> None:
        for name, expected in self.inputs.items():
            same = inputs[name].shape == expected.shape and torch.allclose(
                inputs[name].double(), expected.double(), rtol=0, atol=1e-5
            )
            assert same, f"{name} are others"

    def generated(self, model=None, **settings) -> torch.Tensor:
        expected = self.expected["generated"]
        length = {"min_new_tokens": expected.shape[1], "max_new_tokens": expected.shape[1]}
        ids = (model or self.model).generate(**self.inputs, do_sample=False, **length, **settings)
        return ids[:, self.inputs["input_ids"].shape[1] :]


def loads(folder: Folder) -> None:
    assert type(folder.model).__module__.startswith("transformers_modules."), "the code of the folder was not run"
    assert not folder.model.training


def logits(folder: Folder) -> None:
    folder.compare_logits(folder.model(**folder.inputs).logits)


def logits_of_a_row(folder: Folder) -> None:
    """The row without a picture by itself, without its padding."""
    row = 1
    seen = folder.inputs["attention_mask"][row].bool()
    got = folder.model(input_ids=folder.inputs["input_ids"][row, seen][None]).logits[0]
    expected = folder.expected["logits"][row, seen]
    off = (got[:, :: -(-got.shape[-1] // expected.shape[-1])] - expected).abs().max().item()
    assert off <= TOLERANCE, f"logits differ by {off:.3g}"


def other_auto_classes(folder: Folder) -> None:
    causal = AutoModelForCausalLM.from_pretrained(folder.path, trust_remote_code=True)
    folder.compare_logits(causal(**folder.inputs).logits)
    body = AutoModel.from_pretrained(folder.path, trust_remote_code=True)
    folder.compare_logits(causal.lm_head(body(**folder.inputs).last_hidden_state))


def tuples(folder: Folder) -> None:
    first, *_ = folder.model(**folder.inputs, return_dict=False)
    folder.compare_logits(first)


def loss(folder: Folder) -> None:
    """Training: a loss, and a gradient in each part."""
    model = folder.model.train()
    try:
        with torch.enable_grad():
            loss = model(**folder.inputs, labels=folder.inputs["input_ids"]).loss
            loss.backward()
        parts = ("vision_tower", "multi_modal_projector", "language_model")
        for part in parts:
            gradients = [p.grad for p in getattr(model.model, part).parameters() if p.grad is not None]
            assert any(gradient.abs().sum() > 0 for gradient in gradients), f"no gradient in {part}"
    finally:
        model.zero_grad()
        model.eval()


def processor(folder: Folder) -> None:
    folder.compare_inputs(folder.prepared(folder.processor))


def generate(folder: Folder) -> None:
    assert torch.equal(folder.generated(), folder.expected["generated"]), "the answer is another"


def generate_without_cache(folder: Folder) -> None:
    assert torch.equal(folder.generated(use_cache=False), folder.expected["generated"]), "the answer is another"


def generate_image_token(folder: Folder) -> None:
    """A model that says `<image>`: what comes after it is text, and no picture is missed."""
    forced = ForcedToken(folder.model.config.image_token_id, folder.inputs["input_ids"].shape[1] + 1)
    got = folder.generated(logits_processor=LogitsProcessorList([forced]))
    assert torch.equal(got, folder.expected["generated_with_image_token"]), "the answer is another"


def tower_runs_once(folder: Folder) -> None:
    runs = []
    hook = folder.model.model.vision_tower.register_forward_hook(lambda *_: runs.append(1))
    try:
        folder.generated()
    finally:
        hook.remove()
    assert len(runs) == 1, f"the tower ran {len(runs)} times"


def save_and_reload(folder: Folder) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        again = Path(scratch, "again")
        folder.model.save_pretrained(again)
        folder.processor.save_pretrained(again)
        before = {path.name: path.read_bytes() for path in folder.path.glob("*.py")}
        after = {path.name: path.read_bytes() for path in again.glob("*.py")}
        # Perhaps fewer files: what no class imports was never brought here. That none is missed, loading it shows.
        assert after and after.items() <= before.items(), f"the code written is another: {sorted(after)}"
        reloaded = AutoModelForImageTextToText.from_pretrained(again, trust_remote_code=True)
        folder.compare_logits(reloaded(**folder.inputs).logits)
        assert torch.equal(folder.generated(reloaded), folder.expected["generated"]), "the answer is another"
        processor = AutoProcessor.from_pretrained(again, trust_remote_code=folder.processor_has_code)
        folder.compare_inputs(folder.prepared(processor))


def by_name(folder: Folder) -> None:
    """As a repository of the Hub, out of its cache: there transformers asks for what each file of code imports, and
    not only for what the first one does."""
    repository, commit = f"travelling/{folder.path.name}", "0" * 40
    cached = Path(HF_HUB_CACHE, f"models--{repository.replace('/', '--')}")
    shutil.copytree(folder.path, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit, encoding="utf-8")
    model = AutoModelForImageTextToText.from_pretrained(repository, trust_remote_code=True)
    folder.compare_logits(model(**folder.inputs).logits)
    processor = AutoProcessor.from_pretrained(repository, trust_remote_code=folder.processor_has_code)
    folder.compare_inputs(folder.prepared(processor))


def answer_by_pipeline(folder: Folder) -> None:
    settings = json.loads((folder.path / "processor_config.json").read_text(encoding="utf-8"))
    ask = pipeline("image-text-to-text", model=str(folder.path), trust_remote_code=True)
    assert type(ask.processor).__name__ == settings["processor_class"], "the pipeline has another processor"
    image = Image.fromarray(folder.expected["picture.0"].numpy())
    content = [{"type": "image", "image": image}, {"type": "text", "text": "What is in the picture?"}]
    settings_of_answer = {"max_new_tokens": 4, "do_sample": False}
    [answer] = ask(text=[{"role": "user", "content": content}], generate_kwargs=settings_of_answer)
    assert answer["generated_text"], "no answer"


# In this order; the names are those of the printed table.
CHECKS = {
    "loading": loads,
    "logits": logits,
    "logits of a text row": logits_of_a_row,
    "AutoModel and AutoModelForCausalLM": other_auto_classes,
    "return_dict=False": tuples,
    "loss": loss,
    "processor": processor,
    "generation": generate,
    "generation without a cache": generate_without_cache,
    "generation of an image token": generate_image_token,
    "one run of the tower": tower_runs_once,
    "saving": save_and_reload,
    "by name from the Hub's cache": by_name,
    "pipeline": answer_by_pipeline,
}


def checked(folder: Folder) -> dict[str, str | None]:
    results: dict[str, str | None] = {}
    for name, check in CHECKS.items():
        try:
            with torch.no_grad():
                check(folder)
            results[name] = None
        except Exception as error:  # whatever a release does to a folder is what we want to know
            first = (str(error).strip().splitlines() or [""])[0]
            results[name] = f"{type(error).__name__}: {first}"
            if name == "loading":
                break
    return results


def main(*paths: str) -> int:
    for name in ("hf_llava_ft", "modeling", "processing"):
        if find_spec(name) is not None:
            sys.exit(f"{name} can be imported here: this environment is no stranger's.")
    for path in paths:
        print(f"\n{RESULT}{json.dumps(checked(Folder(Path(path))))}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
