"""How much faster questions are answered in batches than one by one, and whether the answers are the same.

    OMP_NUM_THREADS=1 python benchmarks/answering.py [--rows 16] [--model FOLDER]

Without `--model` the small LLaVA of the quickstart is composed, untrained: half of the rows have a picture, their
questions are of many lengths. Both ways are taken in turn, and compared by the process's own CPU time; on a GPU, where
that says nothing, by the clock.
"""

import argparse
import statistics
import time

import torch
from PIL import Image
from repeats import finished

from hf_llava_ft.answering.batches import Question, answer_all
from hf_llava_ft.answering.loading import answering_device, load_for_answering
from hf_llava_ft.quickstart.small_llava import compose_small_llava

WORDS = "Tell me please what can be seen there in the picture and what it may be good for , word by word".split()


def questions(count: int) -> list[Question]:
    """Of 5 to 5 + 3 * `count` words; every other one about a picture."""
    found = []
    for number in range(count):
        text = " ".join((WORDS * (1 + number // 4))[: 5 + 3 * number]) + "?"
        pictures = []
        if number % 2 == 0:
            picture = Image.radial_gradient("L").resize((320 + 16 * number, 240)).convert("RGB")
            picture.paste((16 * number % 256, 90, 200), (0, 0, 100, 100))
            pictures.append(picture)
        content = [{"type": "image"} for _ in pictures] + [{"type": "text", "text": text}]
        found.append(Question([{"role": "user", "content": content}], pictures))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or Hub id instead of the quickstart's model")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--max_new_tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    device = answering_device()
    if args.model:
        model, processor = load_for_answering(args.model)
    else:
        model, processor = compose_small_llava()
        model = model.to(device).eval()
    asked = questions(args.rows)
    clock = time.process_time if device.type == "cpu" else lambda: finished(device)
    seconds: dict[int, list[float]] = {1: [], args.batch_size: []}
    answers = {}
    for _ in range(args.rounds):
        for batch_size, times in seconds.items():
            start = clock()
            with torch.inference_mode():
                said = answer_all(model, processor, asked, batch_size=batch_size, max_new_tokens=args.max_new_tokens)
                answers[batch_size] = {place: answer.text for place, answer in said}
            times.append(clock() - start)
    alone, together = (statistics.median(times) for times in seconds.values())
    ratios = sorted(one / all_ for one, all_ in zip(*seconds.values(), strict=True))
    same = sum(answers[1][place] == answers[args.batch_size][place] for place in answers[1])
    print(f"{args.rows} rows, up to {args.max_new_tokens} new tokens, {device}, {torch.get_num_threads()} threads")
    print(f"one by one: {alone:.1f} s; {args.batch_size} at a time: {together:.1f} s (medians of {args.rounds})")
    print(f"times as fast, by pairs: {', '.join(f'{ratio:.2f}' for ratio in ratios)}")
    print(f"answers that are the same: {same} of {args.rows}")


if __name__ == "__main__":
    main()
