"""Linear layers by oneDNN, against torch's own in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moe_dit.kernels.linear import linear, use_onednn


@pytest.mark.parametrize("shape", [(5, 24), (2, 7, 24), (1, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients(shape, bias):
    torch.manual_seed(0)
    given = [torch.randn(shape), torch.randn(40, 24), torch.randn(40) if bias else None]
    toward = torch.randn(*shape[:-1], 40)
    found = []
    for function, dtype in (linear, torch.float32), (F.linear, torch.float64):
        of = [None if x is None else x.to(dtype).requires_grad_() for x in given]
        out = function(*of)
        found.append([out, *torch.autograd.grad((out * toward.to(dtype)).sum(), [x for x in of if x is not None])])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


def test_what_is_frozen_gets_no_gradient():
    x, weight, bias = torch.randn(3, 8, requires_grad=True), torch.randn(4, 8), torch.randn(4)
    linear(x, weight, bias).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, 8))
    weight.requires_grad_()
    linear(x.detach(), weight, bias).sum().backward()
    torch.testing.assert_close(weight.grad, x.detach().sum(0).expand(4, 8))


def test_other_precisions_are_torch_s():
    x, weight = torch.randn(3, 8).bfloat16(), torch.randn(4, 8).bfloat16()
    assert torch.equal(linear(x, weight), F.linear(x, weight))


def test_a_network_s_layers(monkeypatch):
    model = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Sequential(nn.Linear(16, 4, bias=False)))
    x = torch.randn(5, 8)
    before, names = model(x), list(model.state_dict())
    assert use_onednn(model) == 2
    calls = []
    product = torch.ops.mkldnn._linear_pointwise
    monkeypatch.setattr("moe_dit.kernels.linear._product", lambda *of: calls.append(1) or product(*of, "none", [], ""))
    torch.testing.assert_close(model(x), before)
    assert len(calls) == 2 and list(model.state_dict()) == names
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert use_onednn(nn.Linear(8, 16)) == 0
