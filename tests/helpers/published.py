"""The published latent networks once more, written straight from their state dicts, a token and an expert at a time.

An independent truth for the variants that the recorded cases do not cover.
"""

import math

import torch
import torch.nn.functional as F


def turn(x_HTC: torch.Tensor, positions_T: torch.Tensor) -> torch.Tensor:
    """Rotate channels i and i + C/2 by position * 10000^(-2i/C)."""
    half = x_HTC.shape[-1] // 2
    out = x_HTC.clone()
    for i in range(half):
        angle = positions_T * 10000 ** (-i / half)
        a, b = x_HTC[..., i], x_HTC[..., i + half]
        out[..., i] = a * angle.cos() - b * angle.sin()
        out[..., i + half] = b * angle.cos() + a * angle.sin()
    return out


def linear(state, name, x):
    return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def norm(state, name, x):
    if f"{name}.weight" in state:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * state[f"{name}.weight"]
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()


def mlp(state, name, x):
    if f"{name}.gate_proj.weight" in state:
        return linear(
            state,
            f"{name}.down_proj",
            F.silu(linear(state, f"{name}.gate_proj", x)) * linear(state, f"{name}.up_proj", x),
        )
    act = F.silu if state["silu"] else lambda h: F.gelu(h, approximate="tanh")
    return linear(state, f"{name}.fc2", act(linear(state, f"{name}.fc1", x)))


def attention(state, name, x_TD, heads, rope):
    q, k, v = linear(state, f"{name}.qkv", x_TD).view(len(x_TD), 3, heads, -1).permute(1, 2, 0, 3)
    tokens, side, half = torch.arange(len(x_TD)), math.isqrt(len(x_TD)), q.shape[-1] // 2
    if rope == "1d":
        q, k = turn(q, tokens), turn(k, tokens)
    elif rope == "2d":
        q, k = (
            torch.cat([turn(z[..., :half], tokens // side), turn(z[..., half:], tokens % side)], -1) for z in (q, k)
        )
    weights = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1)
    return linear(state, f"{name}.proj", (weights @ v).transpose(0, 1).flatten(1))


def token_choice(state, name, moe, x_NTD):
    out = torch.zeros_like(x_NTD)
    for n, t in torch.cartesian_prod(*map(torch.arange, x_NTD.shape[:2])):
        x = x_NTD[n, t]
        scores = torch.sigmoid(state[f"{name}.gate.weight"] @ x)
        choice = scores + state[f"{name}.gate.e_score_correction_bias"]
        groups = torch.arange(len(scores)).view(moe["n_group"], -1)
        best = sorted(groups, key=lambda g: -choice[g].sort(descending=True).values[:2].sum())[: moe["topk_group"]]
        chosen = sorted(torch.cat(best).tolist(), key=lambda e: -choice[e])[: moe["num_experts_per_tok"]]
        total = sum(scores[e] for e in chosen) if len(chosen) > 1 else 1.0
        routed = sum(scores[e] / total * mlp(state, f"{name}.experts.blocks.{e}", x) for e in chosen)
        other = mlp(state, f"{name}.shared_experts", x) if moe["use_shared_expert"] else x
        out[n, t] = moe["routed_scaling_factor"] * routed + other
    return out


def expert_choice(state, name, moe, x_NTD, training):
    x = x_NTD.flatten(0, 1)
    scores = (x @ state[f"{name}.gate_weight"].T).softmax(-1)
    hidden = F.silu(linear(state, f"{name}.capacity_predictor.0", x))
    predicted = torch.sigmoid(linear(state, f"{name}.capacity_predictor.2", hidden))
    out = torch.zeros_like(x)
    for e in range(moe["num_experts"]):
        if training:
            take = int(len(x) / moe["num_experts"] * moe["capacity"])
        else:
            take = int((predicted[:, e] > state[f"{name}.expert_threshold"][e]).sum())
        for t in scores[:, e].argsort(descending=True)[:take]:
            out[t] += scores[t, e] * mlp(state, f"{name}.experts.{e}", x[t])
    if moe["n_shared_experts"]:
        hidden = F.gelu(linear(state, f"{name}.shared_experts.fc1", x), approximate="tanh")
        out = out + linear(state, f"{name}.shared_experts.fc2", hidden)
    return out.view_as(x_NTD)


def network(meta, state, x, t, y, training=False):
    """Output of a published DSMoE or DiffMoE with this state, [N, 8, side, side]."""
    state = {name: value.double() for name, value in state.items()} | {"silu": meta["family"] == "DSMoE"}
    params, moe = meta["params"], meta["params"]["MoE_config"]
    side, patch = x.shape[-1] // params["patch_size"], params["patch_size"]
    h = F.conv2d(x.double(), state["x_embedder.proj.weight"], state["x_embedder.proj.bias"], stride=patch)
    h = h.flatten(2).transpose(1, 2) + state.get("pos_embed", 0)
    angles = t.double()[:, None] * 10000 ** (-torch.arange(128) / 128)
    c = linear(state, "t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], -1))
    c = linear(state, "t_embedder.mlp.2", F.silu(c)) + state["y_embedder.embedding_table.weight"][y]
    for i in range(params["depth"]):
        b = f"blocks.{i}"
        m = linear(state, f"{b}.adaLN_modulation.1", F.silu(c))[:, None].chunk(6, -1)
        z = norm(state, f"{b}.norm1", h) * (1 + m[1]) + m[0]
        rope = params.get("rope_type", "none")
        h = h + m[2] * torch.stack([attention(state, f"{b}.attn", one, params["num_heads"], rope) for one in z])
        z = norm(state, f"{b}.norm2", h) * (1 + m[4]) + m[3]
        if f"{b}.mlp.gate.weight" in state:
            z = token_choice(state, f"{b}.mlp", moe, z)
        elif f"{b}.mlp.gate_weight" in state:
            z = expert_choice(state, f"{b}.mlp", moe, z, training)
        else:
            z = mlp(state, f"{b}.mlp", z)
        h = h + m[5] * z
    m = linear(state, "final_layer.adaLN_modulation.1", F.silu(c))[:, None].chunk(2, -1)
    h = linear(state, "final_layer.linear", norm(state, "final_layer.norm_final", h) * (1 + m[1]) + m[0])
    return torch.einsum("nhwpqc->nchpwq", h.view(len(x), side, side, patch, patch, -1)).reshape(
        len(x), -1, *x.shape[2:]
    )
