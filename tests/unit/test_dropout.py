"""Dropout by position: the same values are dropped whatever ranks share the work, and at the rate that is asked for."""

import numpy as np
import pytest
import torch

from helpers.draws import DROPOUT, philox
from moe_dit.models.dropout import Dropout, dropouts, set_dropout_draws
from moe_dit.models.moe import MoE, Rows
from moe_dit.parallel.expert_layers import _pack_rows, _unpack_rows
from moe_dit.randomness import keep_mask


def test_what_is_kept_is_16_bits_of_philox_a_value():
    seed, layer, position, row, channels, p = 5 + (3 << 32), 0xABCDEF01, 7 + (2 << 32), 9, 21, 0.3
    want = []
    for block in range(3):  # of eight values
        words = philox([row * 3 + block, layer, 7, 2], [5, 3 ^ DROPOUT])
        want += [half >= round(0.3 * 65536) for word in words for half in (word & 0xFFFF, word >> 16)]
    got = keep_mask(seed, torch.tensor(layer), torch.tensor([position]), torch.tensor([row]), channels, p)
    assert got[0].tolist() == want[:21]


def test_the_rate_and_the_scale():
    module = Dropout(0.2).train()
    set_dropout_draws({"a": module}, 0, torch.arange(64))
    dropped = module(torch.ones(64, 50, 40))
    assert set(np.unique(dropped.numpy().round(5))) == {0.0, 1.25}
    assert (dropped == 0).float().mean().item() == pytest.approx(0.2, abs=0.003)
    # Every sample, every token and every channel on its own.
    for dimension in range(3):
        assert (dropped == 0).float().mean([d for d in range(3) if d != dimension]).std() < 0.03
    assert torch.equal(module.eval()(torch.ones(2, 3, 4)), torch.ones(2, 3, 4))


def test_layers_seeds_and_positions_drop_otherwise():
    def dropped(name="a", seed=0, first=0):
        module = Dropout(0.5).train()
        set_dropout_draws({name: module}, seed, torch.arange(first, first + 4))
        return module(torch.ones(4, 8, 16)) == 0

    for other in (dropped(name="b"), dropped(seed=1), dropped(first=4)):
        assert (other == dropped()).float().mean().item() == pytest.approx(0.5, abs=0.1)
    assert torch.equal(dropped(first=2)[:2], dropped()[2:])


def test_a_mixture_drops_by_sample_whatever_batch_it_is_in():
    torch.manual_seed(0)
    moe = MoE(16, 4, 2, 8, 1.0, bias=True, dropout=0.4).train()
    for weight in moe.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    x, modules = torch.randn(6, 5, 16), dropouts(moe)
    assert sorted(modules) == ["experts.dropout", "shared_experts.dropout"]

    def run(part: slice, implementation: str) -> torch.Tensor:
        moe.experts.implementation = implementation
        set_dropout_draws(modules, 3, torch.arange(6)[part])
        return moe(x[part])

    whole = run(slice(0, 6), "loop")
    assert not torch.allclose(whole, moe.eval()(x), atol=1e-2)
    moe.train()
    for implementation in ("loop", "grouped"):
        for part in (slice(0, 6), slice(0, 2), slice(3, 6)):
            torch.testing.assert_close(run(part, implementation), whole[part], rtol=1e-5, atol=1e-6)


def test_a_token_s_name_travels_whole_in_bf16():
    """Between ranks, as further channels a byte each: positions up to 2^48 and tokens up to 2^16."""
    position = torch.tensor([0, 255, 256, 65_537, 2**40 + 3, 2**48 - 1])
    token = torch.tensor([0, 1, 255, 256, 4_000, 65_535])
    x = torch.randn(6, 16, dtype=torch.bfloat16)
    wide = _pack_rows(x, Rows(position, token))
    assert wide.shape == (6, 24) and wide.dtype == torch.bfloat16
    x_ND, rows = _unpack_rows(wide)
    assert torch.equal(x_ND, x)
    assert torch.equal(rows.position, position) and torch.equal(rows.token, token)
