"""The order of rows: the original's to the last index where asked for; ours complete, of one kind and repeatable."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from hf_llava_ft.data.sampler import (
    ModalityLengthSampler,
    length_grouped_indices,
    modality_length_grouped_indices,
    padding_share,
    split_to_even_chunks,
)
from hf_llava_ft.errors import UserError
from tests.examples import examples

# Computed by the original LLaVA (c121f043) with torch 2.13; see `note` in the file.
GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "sampler.json").read_text())


def generator(seed):
    return torch.Generator().manual_seed(seed)


def test_original_order_in_all_189_records():
    for record in GOLDEN["results"]:
        lengths, step = GOLDEN["lengths"][record["lengths"]], (record["batch_size"], record["world_size"])

        def original(passed, lengths=lengths, step=step, record=record):
            torch.manual_seed(record["global_seed"])
            return modality_length_grouped_indices(lengths, *step, passed, original_rng=True)

        assert original(generator(record["seed"])) == record["modality_grouped"]
        assert original(None) == record["sampler_generator_none"]
        sizes = [abs(length) for length in lengths]
        assert length_grouped_indices(sizes, *step, generator(record["seed"])) == record["length_grouped_abs"]


def test_original_split_to_even_chunks():
    for case in GOLDEN["split_to_even_chunks"]:
        assert split_to_even_chunks(case["indices"], case["lengths"], case["num_chunks"]) == case["out"]


def test_no_rows_and_a_row_without_length():
    assert GOLDEN["errors"]["empty"] == []
    assert GOLDEN["errors"]["zero_length"]["type"] == "AssertionError"  # a sentence here
    for original_rng in (False, True):
        assert modality_length_grouped_indices([], 2, 2, generator(0), original_rng=original_rng) == []
        with pytest.raises(UserError, match="row 2 has length 0"):
            modality_length_grouped_indices([3, 0, -2], 2, 2, generator(0), original_rng=original_rng)


nonzero = st.integers(-40, 40).filter(bool)


@examples(100)
@given(
    st.lists(nonzero, max_size=120),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(0, 9),
    st.booleans(),
    st.sampled_from([0, 1, 3]),
    st.sampled_from([0.0, 0.2]),
)
def test_each_row_once_and_kinds_apart(lengths, batch_size, world_size, seed, longest_first, pool_steps, mixing):
    original_rng = pool_steps == 0
    order = modality_length_grouped_indices(
        lengths,
        batch_size,
        world_size,
        generator(seed),
        original_rng=original_rng,
        pool_steps=pool_steps or 1,
        mixing=0.0 if original_rng else mixing,
        longest_first=longest_first and not original_rng,
    )
    assert sorted(order) == list(range(len(lengths)))
    if original_rng:
        return
    image = np.array(lengths, dtype=np.int64)[order] > 0

    def mixed(size):
        return [start // size for start in range(0, len(order), size) if 0 < image[start : start + size].mean() < 1]

    num_batches = -(-len(order) // batch_size)
    assert len(mixed(batch_size)) <= 1
    assert all(batch >= num_batches - 2 for batch in mixed(batch_size))
    step_size = batch_size * world_size
    num_whole_steps = image.sum() // step_size + (~image).sum() // step_size
    assert all(step >= num_whole_steps for step in mixed(step_size))
    if longest_first and num_whole_steps:
        in_steps = np.abs(lengths)[order[: num_whole_steps * step_size]]
        assert in_steps.max() == in_steps[:step_size].max()


def test_a_step_is_dealt_evenly_from_long_to_short():
    lengths = np.random.default_rng(0).integers(1, 500, size=4 * 8 * 20)
    order = modality_length_grouped_indices(lengths, 8, 4, generator(0))
    steps = lengths[order].reshape(20, 4, 8)  # step, process, row
    assert (np.diff(steps, axis=2) <= 0).all()
    shuffled = np.random.default_rng(1).permutation(lengths).reshape(20, 4, 8)

    def spread(steps):
        return np.ptp(steps.sum(axis=2), axis=1).mean()

    assert spread(steps) < spread(shuffled) / 5


def test_pools_save_the_padding_that_steps_composed_at_random_do_not():
    lengths = np.random.default_rng(0).integers(1, 500, size=16 * 200)

    def padding(order):
        batches = lengths[order].reshape(-1, 16)
        return 1 - batches.sum() / (16 * batches.max(axis=1)).sum()

    at_random = padding(np.random.default_rng(1).permutation(len(lengths)))
    assert padding(modality_length_grouped_indices(lengths, 16, 1, generator(0))) > 0.9 * at_random
    pooled = ModalityLengthSampler(lengths, 16, pool_steps=50)
    assert padding(list(pooled)) < at_random / 10
    first = lengths[list(pooled)].reshape(-1, 16).max(axis=1)
    assert (np.diff(first) > 0).any() and (np.diff(first) < 0).any()  # long and short steps alternate


def test_a_small_set_is_sorted_as_a_whole_and_rows_meet_others_each_time():
    random = np.random.default_rng(0)
    lengths = np.where(np.arange(67) % 5 < 3, 60, -20) * (1 + random.lognormal(0, 0.8, 67))
    lengths = lengths.astype(np.int64)

    def padding_and_batches(mixing, epoch):
        order = modality_length_grouped_indices(lengths, 4, 1, generator(epoch), mixing=mixing, accumulation_steps=1)
        assert sorted(order) == list(range(67))
        return padding_share(abs(lengths[order]), 4), {
            frozenset(order[start : start + 4]) for start in range(0, 67, 4)
        }

    (mixed, first), (_, second) = (padding_and_batches(0.1, epoch) for epoch in range(2))
    assert len(first & second) < 10  # of 17
    assert mixed < 0.5 * padding_and_batches(0.0, 0)[0]
    # The batch of both kinds, the last, holds the shortest with images and the longest without.
    order = modality_length_grouped_indices(lengths, 4, 1, generator(0), mixing=1e-9, accumulation_steps=1)
    images, texts = (sorted(abs(lengths[np.sign(lengths) == sign])) for sign in (1, -1))
    assert (len(images) % 4, len(texts) % 4) == (1, 2)
    assert sorted(lengths[order[64:]]) == [-texts[-1], -texts[-2], images[0]]


def test_order_depends_on_seed_and_epoch_only():
    lengths = [(-1) ** (i % 3 == 0) * (i % 17 + 1) for i in range(200)]

    def order(seed, epoch):
        sampler = ModalityLengthSampler(lengths, batch_size=4, world_size=3, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    torch.manual_seed(0)
    first = order(42, 1)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assert order(42, 1) == first
    assert order(42, 2) != first != order(43, 1)
    torch.manual_seed(0)
    order(42, 1)
    assert torch.equal(torch.get_rng_state(), state)  # global randomness is neither used nor moved

    sampler = ModalityLengthSampler(lengths, batch_size=4, world_size=3, seed=42)
    assert len(sampler) == 200
    assert list(sampler) == list(sampler)  # until the epoch changes


def test_batches_of_a_data_loader_are_of_one_kind():
    lengths = np.array([9] * 22 + [-9] * 18)  # a remainder of each: 22 = 2 * 8 + 4 + 2, 18 = 2 * 8 + 2
    sampler = ModalityLengthSampler(torch.tensor(lengths), batch_size=4, world_size=2)
    batches = list(DataLoader(range(40), batch_size=4, sampler=sampler))
    kinds = [set((lengths[batch] > 0).tolist()) for batch in batches]
    assert [len(kind) for kind in kinds] == [1] * 9 + [2]  # the documented rest, last


def test_impossible_arguments_are_named():
    with pytest.raises(ValueError, match="batch_size and world_size must be at least 1, not 0 and 2"):
        ModalityLengthSampler([1], 0, 2)
    with pytest.raises(ValueError, match="longest_first"):
        modality_length_grouped_indices([1], 1, 1, original_rng=True, longest_first=True)
    with pytest.raises(ValueError, match="no mixing"):
        modality_length_grouped_indices([1], 1, 1, original_rng=True, mixing=0.1)
    with pytest.raises(ValueError, match="pool_steps must be at least 1, not 0"):
        modality_length_grouped_indices([1], 1, 1, pool_steps=0)
