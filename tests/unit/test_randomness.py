"""Randomness: Philox against its authors' vectors, distributions, and independence of how the work is split."""

import numpy as np
import pytest
import torch
from scipy import stats

from moe_dit.randomness import Stream, fill_weight, normal, permutation, philox, uniform


@pytest.mark.parametrize(
    ("counter", "key", "want"),
    [  # known answers of Random123 (Salmon et al.), kat_vectors, philox4x32 10
        ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_vectors(counter, key, want):
    got = philox([torch.tensor([word]) for word in counter], key)
    assert [int(word) for word in got] == want


def test_draws_follow_their_distributions():
    positions = torch.arange(1000)
    assert stats.kstest(uniform(0, Stream.TIME, positions, (100,)).flatten(), "uniform").pvalue > 1e-3
    values = normal(0, Stream.NOISE, positions, (100,))
    assert stats.kstest(values.flatten(), "norm").pvalue > 1e-3
    # neither along a sample, nor from one position to the next
    assert abs(np.corrcoef(values[:, :-1].flatten(), values[:, 1:].flatten())[0, 1]) < 0.01
    assert abs(np.corrcoef(values[:-1].flatten(), values[1:].flatten())[0, 1]) < 0.01


def test_a_draw_belongs_to_its_position_and_purpose():
    together = normal(7, Stream.NOISE, torch.arange(10), (3, 5))
    assert torch.equal(normal(7, Stream.NOISE, torch.tensor([8, 2]), (3, 5)), together[[8, 2]])
    assert not torch.equal(normal(8, Stream.NOISE, torch.arange(10), (3, 5)), together)
    assert not torch.equal(normal(7, Stream.LATENT, torch.arange(10), (3, 5)), together)
    far = torch.tensor([1, 1 + 2**32])  # positions beyond 32 bits are others
    assert len(uniform(0, Stream.TIME, far).unique()) == 2


def test_an_epoch_is_a_permutation_that_its_seed_and_number_decide():
    orders = [permutation(seed, epoch, 1000) for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        assert np.array_equal(np.sort(order), np.arange(1000))
    assert len({tuple(order) for order in orders}) == 4
    assert np.array_equal(permutation(1, 1, 1000), orders[3])


@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_a_slice_of_a_weight_gets_the_slice_of_its_draws(kind, monkeypatch):
    whole = torch.empty(1003)
    fill_weight(whole, 3, "blocks.1.mlp.experts.gate_proj", 0, kind, 0.5)
    monkeypatch.setattr("moe_dit.randomness._CHUNK", 32)  # so that several chunks are needed
    for start, end in ((0, 1003), (1, 400), (402, 1003), (7, 8)):
        part = torch.empty(end - start)
        fill_weight(part, 3, "blocks.1.mlp.experts.gate_proj", start, kind, 0.5)
        assert torch.equal(part, whole[start:end])
    other = torch.empty(1003)
    fill_weight(other, 3, "blocks.3.mlp.experts.gate_proj", 0, kind, 0.5)
    assert abs(np.corrcoef(whole, other)[0, 1]) < 0.15
