"""Objective and sampler, against closed forms."""

import math
from typing import ClassVar

import pytest
import torch
from torch import nn

from moe_dit.flow import Flow
from moe_dit.sampler import guided, integrate


class Gaussian(nn.Module):
    """The exact velocity field for data drawn from N(mean, deviation^2), per label; zeros as unused channels."""

    num_classes = 2
    means = torch.tensor([2.0, -1.0, 0.0])
    deviation = 0.5

    def forward(self, z, t, y):
        mean, t = self.means[y].view(-1, 1, 1, 1), t.view(-1, 1, 1, 1)
        variance = (t * self.deviation) ** 2 + (1 - t) ** 2
        x = mean + t * self.deviation**2 / variance * (z - t * mean)  # E[x | z]
        noise = (1 - t) / variance * (z - t * mean)  # E[noise | z]
        return torch.cat([x - noise, torch.zeros_like(x)], dim=1)


@pytest.mark.parametrize(
    ("method", "steps", "tolerance"), [("euler", 2000, 2e-3), ("heun", 100, 2e-4), ("unipc", 200, 1e-3)]
)
def test_sampling_transports_noise_to_the_data(method, steps, tolerance):
    """A Gaussian's probability flow is affine: x = mean + deviation * z."""
    z = torch.randn(8, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    y = torch.arange(8) % 2
    got = Flow().sample(Gaussian(), z, y, steps=steps, method=method)
    want = Gaussian.means[y].view(-1, 1, 1, 1) + Gaussian.deviation * z
    assert (got - want).abs().max() < tolerance


class GaussianData(Gaussian):
    """The same, predicting the data: E[x | z]."""

    def forward(self, z, t, y):
        mean, t = self.means[y].view(-1, 1, 1, 1), t.view(-1, 1, 1, 1)
        variance = (t * self.deviation) ** 2 + (1 - t) ** 2
        return mean + t * self.deviation**2 / variance * (z - t * mean)


def test_a_network_that_predicts_data_samples_the_same():
    z = torch.randn(8, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    y = torch.arange(8) % 2
    want = Flow().sample(Gaussian(), z, y, steps=50, method="euler")
    got = Flow(prediction="data", min_denominator=0.01).sample(GaussianData(), z, y, steps=50, method="euler")
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_data_prediction_is_weighted_by_the_clamped_time_left():
    """v-loss of a constant prediction, written out (arXiv:2511.13720)."""
    x, noise = torch.full((2, 1, 2, 2), 1.0), torch.full((2, 1, 2, 2), 0.5)
    t = torch.tensor([0.2, 0.99])
    flow = Flow(prediction="data", noise_scale=2.0, min_denominator=0.05)
    got = flow.loss(lambda z, t, y: torch.full_like(z, 3.0), x, torch.zeros(2), noise=noise, t=t)["loss"]
    assert got.item() == pytest.approx(((2 / 0.8) ** 2 + (2 / 0.05) ** 2) / 2)


def test_samples_that_depend_on_each_other_are_guided_apart():
    class Coupled(Gaussian):
        couples_samples = True
        batches: ClassVar = []

        def forward(self, z, t, y):
            self.batches.append(y.tolist())
            return super().forward(z, t, y)

    Flow().sample(Coupled(), torch.randn(2, 1, 2, 2), torch.tensor([0, 1]), steps=1, cfg_scale=2.0)
    assert Coupled.batches == [[0, 1], [2, 2]]


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
def test_the_methods_have_their_order(method, order):
    def error(steps):
        return abs(integrate(lambda z, t: z, torch.ones(1).double(), steps, method).item() - math.e)

    assert math.log2(error(64) / error(128)) == pytest.approx(order, abs=0.05)


def test_unipc_is_of_second_order_with_one_evaluation_a_step():
    """Of a Gaussian's flow; Euler's error halves where it falls to about a quarter, and is far larger."""
    z = torch.randn(8, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    y = torch.arange(8) % 2
    want = Gaussian.means[y].view(-1, 1, 1, 1) + Gaussian.deviation * z

    def error(method, steps):
        return (Flow().sample(Gaussian(), z, y, steps=steps, method=method) - want).abs().max().item()

    assert error("unipc", 20) / error("unipc", 40) > 3 and error("unipc", 20) < error("euler", 20) / 8
    calls = []
    integrate(lambda z, t: calls.append(t) or z, torch.ones(1, 1, 1, 1), 5, "unipc")
    assert len(calls) == 5 and calls[0] < 1e-5 and max(calls) < 0.81


def test_ending_with_euler_never_asks_for_the_velocity_of_data():
    times = []
    integrate(lambda z, t: times.append(t) or z, torch.ones(1), 4, "heun", end_with_euler=True)
    assert max(times) == 0.75
    assert len(times) == 7


def test_guidance_extrapolates_inside_its_interval_only():
    calls = []

    def velocity(z, t, y):
        calls.append(len(y))
        return y.float().view(-1, 1) + 0 * z

    field = guided(velocity, torch.tensor([1, 2]), null_label=5, cfg_scale=3.0, cfg_interval=(0.1, 0.9))
    z = torch.zeros(2, 1)
    assert field(z, 0.5).flatten().tolist() == [5 + 3 * (1 - 5), 5 + 3 * (2 - 5)]
    assert field(z, 0.1).flatten().tolist() == field(z, 0.9).flatten().tolist() == [1, 2]
    assert calls == [4, 2, 2]  # no second half where it is not needed


def test_loss_is_the_velocity_s_squared_error():
    class Constant(nn.Module):
        def forward(self, z, t, y):
            return torch.cat([torch.full_like(z, 3.0), torch.full_like(z, 99.0)], dim=1)

    x, noise = torch.full((2, 1, 2, 2), 1.0), torch.zeros(2, 1, 2, 2)
    loss = Flow().loss(Constant(), x, torch.zeros(2, dtype=torch.long), noise=noise, t=torch.tensor([0.0, 0.5]))["loss"]
    assert loss.item() == 4.0


def test_the_network_sees_noise_at_0_and_data_at_1():
    seen = []

    class Spy(nn.Module):
        def forward(self, z, t, y):
            seen.append(z)
            return z

    x, noise = torch.randn(2, 2, 1, 2, 2).unbind(0)
    Flow().loss(Spy(), x, torch.zeros(2, dtype=torch.long), noise=noise, t=torch.tensor([0.0, 1.0]))
    assert torch.equal(seen[0][0], noise[0]) and torch.equal(seen[0][1], x[1])
