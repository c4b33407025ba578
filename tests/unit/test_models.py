"""The network: the MoE layer against one token at a time, position encodings against their definition, saving."""

import math

import pytest
import torch
import torch.nn.functional as F

from moe_dit import build_model, load_model, load_recipe
from moe_dit.counting import _Counter
from moe_dit.kernels import places
from moe_dit.models.initialization import initialize
from moe_dit.models.jit import BottleneckPatchEmbed
from moe_dit.models.layers import PatchEmbed, rope_2d, sin_cos_table, unpatchify
from moe_dit.models.moe import Choices, Experts, MoE
from moe_dit.runtime.errors import InputError


@pytest.fixture
def layer():
    torch.manual_seed(0)
    moe = MoE(16, num_experts=8, top_k=3, expert_width=12, routed_scale=2.5, num_groups=4, num_groups_kept=2)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    moe.router.e_score_correction_bias.normal_(std=0.3)
    return moe


def one_token(moe: MoE, x: torch.Tensor) -> torch.Tensor:
    """DeepSeek-V3's layer for one token, as its paper words it."""
    router = moe.router
    scores = [torch.sigmoid(router.weight[e] @ x) for e in range(8)]
    choice = [(scores[e] + router.e_score_correction_bias[e]).item() for e in range(8)]
    groups = [[0, 1], [2, 3], [4, 5], [6, 7]]
    best_groups = sorted(groups, key=lambda g: -sum(sorted((choice[e] for e in g), reverse=True)[:2]))[:2]
    chosen = sorted((e for g in best_groups for e in g), key=lambda e: -choice[e])[:3]
    total = sum(scores[e] for e in chosen)
    routed = 0
    for e in chosen:
        hidden = F.silu(moe.experts.gate_proj[e] @ x) * (moe.experts.up_proj[e] @ x)
        routed = routed + 2.5 * scores[e] / total * (moe.experts.down_proj[e] @ hidden)
    shared = moe.shared_experts
    hidden = F.silu(shared.gate_proj.weight @ x) * (shared.up_proj.weight @ x)
    return routed + shared.down_proj.weight @ hidden


def test_moe_is_each_token_through_its_experts(layer):
    x = torch.randn(3, 5, 16, requires_grad=True)
    got = layer(x)
    want = torch.stack([one_token(layer, token) for token in x.flatten(0, 1)]).view_as(x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    inputs = [x, *layer.parameters()]
    weight = torch.randn_like(got)
    for a, b in zip(
        torch.autograd.grad((got * weight).sum(), inputs),
        torch.autograd.grad((want * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert layer.tokens_per_expert.sum() == 3 * 5 * 3


def test_without_a_shared_expert_the_input_is_added():
    moe = MoE(16, num_experts=4, top_k=1, expert_width=8, routed_scale=1.0, shared_expert=False)
    for parameter in moe.parameters():
        torch.nn.init.zeros_(parameter)
    x = torch.randn(2, 3, 16)
    assert torch.equal(moe(x), x)


@pytest.mark.parametrize("counts", [[5, 0, 7, 4], [16, 0, 0, 0], [0, 0, 0, 3]])
@pytest.mark.parametrize("form", [{}, {"bias": True}, {"bias": True, "gated": False}], ids=str)
def test_grouped_products_equal_a_product_per_expert(counts, form):
    torch.manual_seed(0)
    experts = Experts(4, 16, 32, **form)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(sum(counts), 16, requires_grad=True)
    results = []
    for experts.implementation in ("loop", "grouped", "cpu"):
        out = experts(x, torch.tensor(counts, dtype=torch.int32))
        results.append((out, *torch.autograd.grad(out.square().sum(), [x, *experts.parameters()])))
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", [{}, {"bias": True}, {"bias": True, "gated": False}], ids=str)
@pytest.mark.parametrize("top_k", [1, 3])
def test_summing_tokens_by_expert_equals_summing_their_rows(form, top_k):
    """What CPUs compute beside what GPUs do; the last expert gets no token."""
    torch.manual_seed(0)
    experts = Experts(5, 16, 32, **form)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(11, 16, requires_grad=True)
    weights = torch.rand(11, top_k, requires_grad=True)
    chosen = torch.stack([torch.randperm(4)[:top_k] for _ in range(11)])
    counts = torch.bincount(chosen.flatten(), minlength=5)
    results = []
    for experts.implementation in ("loop", "cpu"):
        out = experts(x, counts, choices=Choices(*places(chosen), weights))
        results.append((out, *torch.autograd.grad(out.square().sum(), [x, weights, *experts.parameters()])))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert results[1][3][4].count_nonzero() == 0


@pytest.mark.parametrize("implementation", ["loop", "grouped", "cpu"])
@pytest.mark.parametrize("bias", [False, True])
def test_padding_rows_get_no_say(implementation, bias):
    """AutoEP can hand over rows beyond the last expert's; what is in them must not reach a result or a gradient."""
    torch.manual_seed(0)
    experts = Experts(2, 8, 8, bias=bias, implementation=implementation)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    counts = torch.tensor([1, 3], dtype=torch.int32)
    x = torch.randn(6, 8)
    x[4:] = float("nan")
    results = []
    for rows in (x, x[:4]):
        out = experts(rows, counts)
        # The gradient of padding rows is as uninitialised as they are.
        weight = torch.full_like(out, float("nan"))
        weight[:4] = 1.0
        results.append((out[:4], *torch.autograd.grad(out, list(experts.parameters()), weight)))
    for with_padding, without in zip(*results, strict=True):
        torch.testing.assert_close(with_padding, without)


def test_biased_experts_are_swiglu_with_biases():
    torch.manual_seed(0)
    moe = MoE(16, num_experts=4, top_k=2, expert_width=12, routed_scale=2.5, bias=True)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(16)

    def swiglu(gate, gate_bias, up, up_bias, down, down_bias):
        return down @ (F.silu(gate @ x + gate_bias) * (up @ x + up_bias)) + down_bias

    e, s = moe.experts, moe.shared_experts
    scores = torch.sigmoid(moe.router.weight @ x)
    best = scores.topk(2).indices
    want = swiglu(*(p for m in (s.gate_proj, s.up_proj, s.down_proj) for p in (m.weight, m.bias)))
    for i in best:
        expert = (e.gate_proj, e.gate_bias, e.up_proj, e.up_bias, e.down_proj, e.down_bias)
        want = want + 2.5 * scores[i] / scores[best].sum() * swiglu(*(p[i] for p in expert))
    torch.testing.assert_close(moe(x[None])[0], want)


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    moe = MoE(16, num_experts=4, top_k=2, expert_width=64, routed_scale=1.0, bias=True, dropout=0.5)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(5, 16)
    assert not torch.equal(moe(x), moe(x))
    moe.eval()
    assert torch.equal(moe(x), moe(x))


def test_router_logits_stay_float32_under_autocast(layer):
    x = torch.randn(64, 16)
    with torch.autocast("cpu", torch.bfloat16):
        weights = layer.router(x)[0]
    assert torch.equal(weights, layer.router(x)[0])


def test_rope_makes_attention_depend_on_row_and_column_differences():
    """<R(p) q, R(p') k> depends on p - p' alone, which is what rotary encodings are for."""
    side, width = 4, 16
    sin, cos = sin_cos_table(rope_2d(width, side)).double().chunk(2, -1)
    q, k = torch.randn(2, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def turn(x):
        return x * cos + torch.stack([-x[1::2], x[::2]], -1).flatten() * sin  # [T, width]

    products = (turn(q) @ turn(k).T).view(side, side, side, side)
    assert products[0, 0, 1, 2] == pytest.approx(products[2, 1, 3, 3].item(), abs=1e-6)
    assert products[3, 2, 1, 1] == pytest.approx(products[2, 3, 0, 2].item(), abs=1e-6)
    assert abs(products[0, 0, 1, 2] - products[0, 0, 2, 1]) > 1e-3  # rows are not columns


def test_unpatchify_inverts_cutting_into_patches():
    image = torch.randn(2, 3, 8, 8)
    patches = F.unfold(image, 2, stride=2).view(2, 3, 4, 16).permute(0, 3, 2, 1).flatten(2)  # N, T, (patch, channel)
    assert torch.equal(unpatchify(patches, 3), image)


def test_a_fresh_network_predicts_zero_and_its_weights_have_the_right_spread():
    model = build_model("digits")
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([0.1, 0.9]), torch.tensor([3, 10])
    assert torch.equal(model(x, t, y), torch.zeros(2, 8, 8, 8))
    weights = dict(model.named_parameters())
    gate = weights["blocks.1.mlp.experts.gate_proj"]  # Xavier uniform: variance 2 / (fan in + fan out), each expert
    assert gate.var().item() == pytest.approx(2 / (128 + 128), rel=0.02)
    assert weights["blocks.1.mlp.router.weight"].std().item() == pytest.approx(math.sqrt(2 / 128), rel=0.1)
    assert weights["c_embedder.label.weight"].std().item() == pytest.approx(0.02, rel=0.1)


def test_fresh_pixel_and_expert_choice_networks_have_the_published_spread():
    for recipe, width in (("digits_pixels", 128), ("digits_diffmoe", 256)):
        model = build_model(recipe)
        side, channels = model.config["input_size"], model.config["in_channels"]
        x, t, y = torch.randn(2, channels, side, side), torch.tensor([0.1, 0.9]), torch.tensor([3, 10])
        assert not model(x, t, y).any()
        weights = dict(model.named_parameters())
        up = weights["blocks.1.mlp.experts.up_proj"]
        if recipe == "digits_pixels":
            assert up.var().item() == pytest.approx(2 / (2 * width + 128), rel=0.02)  # drawn with gate as one matrix
            assert weights["in_context_posemb"].std().item() == pytest.approx(0.02, rel=0.1)
            assert weights["x_embedder.proj1.weight"].var().item() == pytest.approx(2 / (64 + 192), rel=0.05)
            ones = [weight for name, weight in weights.items() if "norm" in name]
            assert len(ones) == 6 * 4 + 1 and all((weight == 1).all() for weight in ones)
        else:
            assert up.var().item() == pytest.approx(2 / (width + 128), rel=0.02)
            assert weights["blocks.1.mlp.gate_weight"].std().item() == pytest.approx(0.006, rel=0.1)
        assert not any(weight.any() for name, weight in weights.items() if name.endswith("bias"))


def test_initial_weights_follow_the_seed_alone():
    recipe = load_recipe("digits")
    a, b = build_model(recipe), initialize(build_model(recipe, device="meta"), recipe.seed)
    for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y)
    other = build_model(load_recipe("digits", ["seed=1"]))
    assert not torch.equal(a.x_embedder.proj.weight, other.x_embedder.proj.weight)


def test_saving_and_loading_keeps_the_function(tmp_path):
    model = build_model("digits").eval()
    for parameter in model.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    loaded = load_model(tmp_path)
    assert not loaded.training
    inputs = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([0, 10])
    assert torch.equal(loaded(*inputs), model(*inputs))


def test_loading_what_is_no_model_is_one_line(tmp_path):
    with pytest.raises(InputError, match="has no config"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "UNet"}')
    with pytest.raises(InputError, match="should be one of DSMoE"):
        load_model(tmp_path)


# --- patches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "channels", "patch", "bottleneck"), [(32, 4, 2, None), (256, 3, 16, 128)])
def test_patches_become_tokens_as_by_convolution(side, channels, patch, bottleneck):
    torch.manual_seed(0)
    if bottleneck is None:
        embed = PatchEmbed(side, patch, channels, 384).double()
        convolutions = [(embed.proj, patch)]
    else:
        embed = BottleneckPatchEmbed(channels, patch, bottleneck, 768).double()
        convolutions = [(embed.proj1, patch), (embed.proj2, 1)]
    want = x = torch.randn(2, channels, side, side, dtype=torch.float64)
    for layer, stride in convolutions:
        want = F.conv2d(want, layer.weight, layer.bias, stride=stride)
    want = want.flatten(2).transpose(1, 2)
    weight = torch.randn_like(want)
    with _Counter() as counter:
        got = embed(x)
        (got * weight).sum().backward()
    assert got.is_contiguous() and not [name for _, name in counter.operations if "convolution" in name]
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad((want * weight).sum(), list(embed.parameters()))
    for parameter, gradient in zip(embed.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["digits", "digits_diffmoe", "digits_pixels"])
def test_a_network_has_no_convolution(name):
    """On GPUs cuDNN computes float32 ones in TF32, by default."""
    size = 32 if name == "digits_pixels" else 8
    model = build_model(name)
    with _Counter() as counter:
        model(torch.zeros(1, model.in_channels, size, size), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    operations = {name for _, name in counter.operations}
    assert "addmm" in operations and not [name for name in operations if "conv" in name]
