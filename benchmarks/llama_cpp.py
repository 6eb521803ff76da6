"""What llama.cpp makes of an exported folder, next to what this package makes of the model it comes from.

    python -m venv serve && serve/bin/pip install -r llama.cpp/tools/mtmd/requirements.txt xllamacpp
    llava-ft export --model MODEL --for llama.cpp --output_dir served
    python benchmarks/llama_cpp.py --model MODEL --served served --llama_cpp llama.cpp --python serve/bin/python

runs llama.cpp's own two converters in that environment, then the server in xllamacpp, which is llama.cpp in a wheel,
with one picture of the tower's size, so that nobody resizes it. It prints how many of the ten best first tokens of the
answer are the same, and how far apart their log-probabilities are, over the tokens that there are.
"""

import argparse
import base64
import io
import json
import subprocess
import sys
from pathlib import Path

import torch

from hf_llava_ft.checkpoints.opening import load_model, load_processor
from hf_llava_ft.checkpoints.verify import Probe, default_image, reference_outputs
from hf_llava_ft.serving.guide import commands

QUESTION = "What is in the picture?"
SERVE = """
import json, sys, xllamacpp
request, params = json.load(sys.stdin), xllamacpp.CommonParams()
params.model.path, params.mmproj.path = sys.argv[1:]
params.n_ctx, params.n_parallel, params.warmup, params.use_jinja = 4096, 1, False, True
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
answer = xllamacpp.Server(params).handle_chat_completions(request)
print("ANSWER" + json.dumps(answer))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, what in (
        ("model", "the model that was exported"),
        ("served", "the folder for llama.cpp that was made of it"),
        ("llama_cpp", "a checkout of llama.cpp"),
        ("python", "a Python with its requirements and xllamacpp"),
    ):
        parser.add_argument(f"--{name}", required=True, help=what)
    arguments = parser.parse_args()

    processor = load_processor(arguments.model)
    model = load_model(arguments.model, processor)
    image = default_image().resize((model.config.vision_config.image_size,) * 2)
    logits = reference_outputs(model, processor, Probe(images=[image]))["logits"]
    ours = logits[0, -1, : len(processor.tokenizer)].log_softmax(-1)

    _, language_model, encoder, _ = commands("llama.cpp", model.config, processor.image_processor)
    for command in (language_model.replace("f16", "f32"), f"{encoder} --use-f32"):
        program, *rest = command.removeprefix("python ").split()
        script = str(Path(program.replace("llama.cpp", arguments.llama_cpp, 1)).resolve())
        done = subprocess.run(
            [arguments.python, script, *rest], cwd=arguments.served, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            sys.exit(f"{program} failed:\n{done.stderr}")

    stream = io.BytesIO()
    image.save(stream, format="PNG")
    url = "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    request = {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 1}
    files = [str(Path(arguments.served, name)) for name in ("language_model.gguf", "mmproj-model-f32.gguf")]
    done = subprocess.run(
        [arguments.python, "-c", SERVE, *files],
        input=json.dumps(request | {"logprobs": True, "top_logprobs": 10}),
        capture_output=True,
        text=True,
        check=True,
    )
    answer = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("ANSWER"))[len("ANSWER") :])
    theirs = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]

    print(f"tokens of the prompt: {logits.shape[1]} here, {answer['usage']['prompt_tokens']} in llama.cpp")
    best = torch.topk(ours, len(theirs)).indices.tolist()
    print(f"the {len(best)} best tokens: {len(set(best) & {each['id'] for each in theirs})} are the same")
    apart = max(abs(each["logprob"] - ours[each["id"]].item()) for each in theirs)
    print(f"largest difference of their log-probabilities: {apart:.4f}")


if __name__ == "__main__":
    main()
