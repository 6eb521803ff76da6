"""Seconds of things that are compared: taken in turn, A B A B, and told as median, least and greatest."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def finished(device: torch.device) -> float:
    """The time when everything is done that `device` was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds_in_turn(
    ways: Mapping[str, Callable[[], object]], device: torch.device, rounds: int, warm_up: int = 1
) -> dict[str, dict[str, float]]:
    """Seconds of a call of each way, over `rounds` that take every way once."""
    for _ in range(warm_up):
        for way in ways.values():
            way()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = finished(device)
            way()
            seconds[name].append(finished(device) - start)
    return {name: spread(values) for name, values in seconds.items()}
