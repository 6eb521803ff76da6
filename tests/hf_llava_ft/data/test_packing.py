"""Packs: every row once, within the budget, the same from the same seed, as many for each process."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_llava_ft.data import packing
from hf_llava_ft.data.collator import LlavaCollator, PackCollator
from hf_llava_ft.data.packing import PackSampler, best_fit
from hf_llava_ft.errors import UserError
from tests.examples import examples


@examples(60)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=80),
    room=st.integers(0, 60),
    world=st.integers(1, 4),
    seed=st.integers(0, 2**40),
    window=st.sampled_from([8, 1024]),
)
def test_each_epoch_has_every_row_once_within_the_budget(lengths, room, world, seed, window):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_WINDOW_ROWS", window)
        sampler, again = (PackSampler(lengths, max(lengths) + room, world, seed) for _ in range(2))
        for epoch in (0, 1, 5):
            sampler.set_epoch(epoch)
            packs = list(sampler)
            assert len(packs) == len(sampler) and len(packs) % world == 0  # as many for each process, in each epoch
            assert max(sum(lengths[row] for row in pack) for pack in packs) <= sampler.budget
            found = sorted(sum(packs, []))
            assert sorted(set(found)) == list(range(len(lengths)))
            if len(packs) <= len(lengths):  # else some come twice, as there are more processes than rows left
                assert len(found) == len(lengths)
            assert again.packs(epoch) == packs  # whatever was asked for before


def test_packs_are_full_and_mix_anew():
    random = np.random.default_rng(0)
    lengths = np.minimum(random.gamma(2, 200, 3000).astype(int) + 20, 2048)
    sampler = PackSampler(lengths, 4096, 2)
    assert lengths.sum() / (len(sampler) * 4096) > 0.97
    at_random = np.add.reduceat(lengths, np.arange(0, 3000, 8)).max()  # of eight rows each, padded or not
    assert at_random > 4096
    with_row_0 = [next(set(pack) for pack in sampler.packs(epoch) if 0 in pack) for epoch in range(3)]
    assert with_row_0[0] != with_row_0[1] != with_row_0[2]
    assert PackSampler(lengths, 4096, 2, seed=1).packs(0) != sampler.packs(0)


def test_a_row_goes_where_the_least_room_is_left_over():
    assert best_fit(np.array([6, 5, 4, 3, 2]), 10) == [[0, 2], [1, 3, 4]]
    assert best_fit(np.array([6, 8, 2, 4]), 10, np.arange(4)) == [[0, 3], [1, 2]]


def test_a_row_longer_than_a_pack_is_named():
    with pytest.raises(UserError, match=r"row 2 has 11 tokens, more than --max_tokens_per_batch 10 takes: give 11"):
        PackSampler([3, -11, 4], 10)


def test_a_pack_is_its_rows_one_behind_the_other(tiny_processor):
    rows = [
        {"messages": [{"role": "user", "content": words}, {"role": "assistant", "content": "Yes."}], "images": []}
        for words in ("Is it?", "And this one, is it too?")
    ]
    collator = LlavaCollator(tiny_processor)
    singles = [collator.encoded(row) for row in rows]
    pack = PackCollator(collator)([rows])
    lengths = [len(single["input_ids"]) for single in singles]
    assert pack["document_lengths"] == lengths and pack["borders"].tolist() == [0, lengths[0], sum(lengths)]
    assert pack["borders"].dtype == torch.int32
    assert pack["input_ids"].tolist() == [singles[0]["input_ids"].tolist() + singles[1]["input_ids"].tolist()]
    assert pack["position_ids"].tolist() == [[*range(lengths[0]), *range(lengths[1])]]
    assert pack["labels"][0, lengths[0]] == -100

    class FromTheFirst(LlavaCollator):
        def encoded(self, row):
            found = super().encoded(row)
            return found | {"labels": found["input_ids"].clone()}

    labels = PackCollator(FromTheFirst(tiny_processor))([rows])["labels"][0]
    assert labels[0] == labels[lengths[0]] == -100 and (labels == -100).sum() == 2
