"""From a JPEG file to what a vision tower takes: pictures per second and core, beside what other trainers do.

    python benchmarks/decode.py [--sizes 640x480 480x640 1024x768] [--rounds 9] [--json decode.json]

Makes JPEGs of each size from the quickstart's photographs and takes them, decoding included, through

* `peer`: Pillow pads to a square, transformers' CLIP image processor does the rest;
* `native`: transformers' LLaVA image processor with `do_pad`, as this package uses it where it gives floats;
* `float`: this package's shortcuts, normalised in the worker;
* `uint8`: this package's shortcuts, normalised where the model is: what `LlavaTrainer` does.

All four give the same floats bit for bit, which is checked first. Time is that of one process and thread on its
processor, in rounds that take every way once in turn; shown are the median, least and greatest of the rounds. What
normalising costs at the other end is shown apart: here on the same core, in training on the model's device. Then a
DataLoader with workers hands batches over as floats and as uint8.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image
from repeats import spread
from torch.utils.data import DataLoader
from transformers import CLIPVisionConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import hf_llava_ft.quickstart.photographs
from hf_llava_ft.data.collator import open_picture
from hf_llava_ft.processing.image_processing_llava import build_image_processor
from hf_llava_ft.processing.uint8_pixels_llava import normalize_pixels, uint8_images


class Ways:
    """Each way as a function from the path of a picture to `pixel_values` `[1, 3, H, W]`."""

    def __init__(self, resolution: int):
        self.padding = build_image_processor(CLIPVisionConfig(image_size=resolution, patch_size=14), "pad")
        edge = {"height": resolution, "width": resolution}
        self.clip = CLIPImageProcessorPil(size={"shortest_edge": resolution}, crop_size=edge)
        self.colour = tuple(int(value * 255) for value in self.clip.image_mean)

    def peer(self, path: str) -> torch.Tensor:
        image = Image.open(path).convert("RGB")
        edge = max(image.size)
        square = Image.new("RGB", (edge, edge), self.colour)
        square.paste(image, ((edge - image.width) // 2, (edge - image.height) // 2))
        return self.clip(square, return_tensors="pt")["pixel_values"]

    def native(self, path: str) -> torch.Tensor:
        return self.padding(Image.open(path).convert("RGB"), return_tensors="pt")["pixel_values"]

    def float(self, path: str) -> torch.Tensor:
        return normalize_pixels(self.padding, self.uint8(path))

    def uint8(self, path: str) -> torch.Tensor:
        images = [open_picture({"path": path, "bytes": None})]
        return uint8_images(self.padding, images, return_tensors="pt")["pixel_values"]


def write_jpegs(folder: Path, width: int, height: int, quality: int) -> list[str]:
    """The photographs, cut to the shape and resized to `width` x `height`."""
    paths = []
    for photo in sorted(Path(hf_llava_ft.quickstart.photographs.__path__[0]).glob("*.jpg")):
        with Image.open(photo) as image:
            scale = min(image.width / width, image.height / height)
            left, top = (image.width - width * scale) / 2, (image.height - height * scale) / 2
            box = (left, top, left + width * scale, top + height * scale)
            made = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC, box=box)
        paths.append(str(folder / f"{width}x{height}_{photo.name}"))
        made.save(paths[-1], quality=quality)
    return paths


def shown(values: dict[str, float], digits: int = 0) -> str:
    return "{median:.{0}f} ({min:.{0}f} to {max:.{0}f})".format(digits, **values)


def compare(ways: Ways, paths: list[str], rounds: int) -> dict:
    """Pictures per second and core of each way, and the ratio to the peer within each round."""
    for path in paths:
        expected = ways.peer(path)
        for other in (ways.native(path), ways.float(path), normalize_pixels(ways.padding, ways.uint8(path))):
            assert torch.equal(other, expected), f"{path} does not become the same pixels"
    functions = {"peer": ways.peer, "native": ways.native, "float": ways.float, "uint8": ways.uint8}
    batch = torch.cat([ways.uint8(path) for path in paths])
    seconds: dict[str, list[float]] = {name: [] for name in (*functions, "normalise")}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.process_time()
            for path in paths:
                function(path)
            seconds[name].append((time.process_time() - start) / len(paths))
        start = time.process_time()
        normalize_pixels(ways.padding, batch)
        seconds["normalise"].append((time.process_time() - start) / len(paths))
    return {
        "jpeg_bytes": spread([float(Path(path).stat().st_size) for path in paths]),
        "images_per_second_and_core": {name: spread([1 / value for value in seconds[name]]) for name in functions},
        "ratio_to_peer": {
            name: spread([theirs / ours for theirs, ours in zip(seconds["peer"], seconds[name], strict=True)])
            for name in functions
        },
        "normalise_milliseconds_per_image": spread([value * 1e3 for value in seconds["normalise"]]),
    }


class Collate:
    """Runs in the workers; a class at the top of the module so that it can be sent there."""

    def __init__(self, ways: Ways, name: str):
        self.ways, self.name = ways, name

    def __call__(self, paths: list[str]) -> torch.Tensor:
        return torch.cat([getattr(self.ways, self.name)(path) for path in paths])


def processor_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def through_workers(ways: Ways, paths: list[str], workers: int, batch_size: int, batches: int, rounds: int) -> dict:
    """
    What a DataLoader brings to its process as floats; as uint8, normalised there; or, as the peer, in its way. Seconds
    on the wall from the first batch's arrival to the last's, and of all processes on their processors.
    """
    rows = [paths[index % len(paths)] for index in range(batch_size * batches)]
    found: dict[str, dict[str, list[float]]] = {
        name: {"images_per_second": [], "core_milliseconds_per_image": []} for name in ("peer", "float", "uint8")
    }
    sizes = {}
    for _ in range(rounds):
        for name, figures in found.items():
            used = processor_seconds()
            loader = DataLoader(rows, batch_size=batch_size, num_workers=workers, collate_fn=Collate(ways, name))
            arrived = iter(loader)
            sizes[name] = next(arrived).nbytes / batch_size
            start = time.perf_counter()
            for batch in arrived:
                if name == "uint8":
                    normalize_pixels(ways.padding, batch)
            wall = time.perf_counter() - start
            del arrived  # ends the workers, whose time counts from then on
            figures["images_per_second"].append(batch_size * (batches - 1) / wall)
            figures["core_milliseconds_per_image"].append((processor_seconds() - used) * 1e3 / len(rows))
    return {
        "workers": workers,
        "batch_size": batch_size,
        "batches": batches,
        "bytes_per_image": sizes,
        **{name: {what: spread(values) for what, values in figures.items()} for name, figures in found.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["640x480", "480x640", "500x375", "1024x768"])
    parser.add_argument("--resolution", type=int, default=336, help="edge of what the tower takes")
    parser.add_argument("--quality", type=int, default=95, help="of the JPEGs")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--workers", type=int, default=2, help="0 leaves the DataLoader out")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    ways = Ways(args.resolution)
    report: dict = {"settings": {key: value for key, value in vars(args).items() if key != "json"}, "sizes": {}}
    with tempfile.TemporaryDirectory() as folder:
        print(f"{'size':>10}  {'way':8} {'images / s and core':>22}  times the peer")
        for index, size in enumerate(args.sizes):
            paths = write_jpegs(Path(folder), *map(int, size.split("x")), args.quality)
            result = report["sizes"][size] = compare(ways, paths, args.rounds)
            for name, rate in result["images_per_second_and_core"].items():
                print(f"{size:>10}  {name:8} {shown(rate):>22}  {shown(result['ratio_to_peer'][name], 2)}")
            cost = result["normalise_milliseconds_per_image"]
            print(f"{'':10}  normalising uint8 afterwards: {shown(cost, 2)} ms an image")
            if index == 0 and args.workers:
                report["data_loader"] = {
                    "size": size,
                    **through_workers(ways, paths, args.workers, args.batch_size, args.batches, min(args.rounds, 5)),
                }
    if args.workers:
        loaded = report["data_loader"]
        print(f"\nDataLoader, {loaded['workers']} workers, batches of {loaded['batch_size']}, {loaded['size']}:")
        for name in ("peer", "float", "uint8"):
            print(
                f"  {name:6} {shown(loaded[name]['images_per_second'])} images / s, "
                f"{shown(loaded[name]['core_milliseconds_per_image'], 2)} ms of all cores an image, "
                f"{loaded['bytes_per_image'][name] / 1e3:.0f} kB handed over"
            )
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
