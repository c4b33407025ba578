"""Dropout by position: the same values are dropped whatever ranks share the work, and at the rate that is asked for."""

import numpy as np
import pytest
import torch
from helpers import finish, losses, start_training

from moe_dit.models.dropout import Dropout, dropouts, set_dropout_draws
from moe_dit.models.moe import MoE
from moe_dit.randomness import keep_mask


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 as its paper writes it (Salmon et al., SC 2011), in Python's own integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def test_what_is_kept_is_16_bits_of_philox_a_value():
    seed, layer, position, row, channels, p = 5 + (3 << 32), 0xABCDEF01, 7 + (2 << 32), 9, 21, 0.3
    want = []
    for block in range(3):  # of eight values
        words = philox([row * 3 + block, layer, 7, 2], [5, 3 ^ 10])
        want += [half >= round(0.3 * 65536) for word in words for half in (word & 0xFFFF, word >> 16)]
    got = keep_mask(seed, layer, torch.tensor([position]), torch.tensor([row]), channels, p)
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


@pytest.mark.slow
def test_a_pixel_mixture_with_dropout_is_the_same_run_on_one_rank_and_on_two(pixels, tmp_path):
    flags = ["--recipe", "digits_pixels", "--steps", "4", "--set", "global_batch_size=16"]
    flags += ["--set", "model.moe.dropout=0.2", "--set", "model.proj_dropout=0.2", "--set", "model.attn_dropout=0.1"]
    one = start_training(1, "zero1_ep1", pixels, tmp_path / "one", *flags)
    finish(one, tmp_path / "one")
    finish(start_training(2, "zero2_ep2", pixels, tmp_path / "two", *flags), tmp_path / "two")
    recomputed = [*flags, "--set", "activation_checkpointing=blocks", "--set", "max_micro_batch_size=4"]
    finish(start_training(2, "zero2_ep2", pixels, tmp_path / "again", *recomputed), tmp_path / "again")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-6)
    assert losses(tmp_path / "again") == pytest.approx(losses(tmp_path / "one"), rel=1e-6)
    without = [*flags, *(f"--set=model.{key}=0.0" for key in ("moe.dropout", "proj_dropout", "attn_dropout"))]
    finish(start_training(1, "zero1_ep1", pixels, tmp_path / "without", *without), tmp_path / "without")
    assert losses(tmp_path / "without")[3] != pytest.approx(losses(tmp_path / "one")[3], rel=1e-4)
