"""What docs/extending.md says, done: each section's blocks in a copy of the project, and the numbers that come out."""

import csv
import importlib.util
import math
import shutil
import statistics
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from helpers import finish, losses, records, start_training
from helpers.autoencoders import dc, flux_like, kl, write_images
from helpers.extending import DIGITS, SMALL, STEPS, Copy, sections, sets
from helpers.small_runs import train_plainly
from moe_dit import build_model, load_recipe
from moe_dit.data import Latents, batches, training_inputs
from moe_dit.manifest import read_manifest
from moe_dit.models.diffmoe import ExpertChoiceMoE
from moe_dit.models.moe import Router
from moe_dit.randomness import Stream, normal, uniform
from moe_dit.runtime.ranks import World


@pytest.fixture
def project(tmp_path):
    return Copy(tmp_path / "project")


@pytest.fixture
def digits(project, latents):
    project.link(latents)
    return project


def first_inputs(recipe, shards):
    """What the network gets in a run's first step on one rank."""
    manifest = read_manifest(shards)
    batch = next(batches(recipe, manifest, recipe.global_batch_size, 0, World()))
    return training_inputs(recipe, batch, Latents.of(recipe, manifest))


def entropy_of(shares) -> float:
    return -sum(p * math.log(p) for p in shares)


# ----------------------------------------------------------------------------------------------------------------------
# The ten sections


def test_the_page_has_ten_sections_whose_code_is_clean(project):
    """All of them in one copy."""
    for number in sections():
        project.extend(number)
    assert list(sections()) == [str(n) for n in range(1, 11)]
    for check in ("check", "format --check"):
        done = subprocess.run(f"ruff {check} moe_dit", shell=True, cwd=project.folder, env=project.env)
        assert done.returncode == 0


def test_a_recipe_key(digits, latents, tmp_path):
    whole, begun = tmp_path / "whole", tmp_path / "begun"
    finish(start_training(1, "zero1_ep1", latents, whole, "--steps", str(STEPS), *sets(DIGITS)), whole)
    shutil.copytree(whole, begun)
    shutil.rmtree(begun / "checkpoints/step_00000004")
    (begun / "checkpoints/latest").unlink()

    [command] = digits.extend("1")
    default = command.replace("--set optimizer.eps=1e-4", "")
    assert default != command
    digits.train(default, DIGITS, "--out", str(begun))
    assert "continuing" in (digits.folder / "command.log").read_text()
    assert losses(begun) == pytest.approx(losses(whole), rel=1e-6)

    recipe = load_recipe("digits", DIGITS)
    want = train_plainly(
        recipe,
        latents,
        STEPS,
        make_optimizer=lambda weights: torch.optim.AdamW(weights, 1e-3, eps=1e-4, weight_decay=0),
    ).losses
    assert want[1:] != pytest.approx(losses(whole)[1:], rel=1e-5)
    assert losses(digits.train(command, DIGITS)) == pytest.approx(want, rel=1e-6)
    assert "optimizer.eps is 0" in digits.refusal(command, "--set", "optimizer.eps=0")


def test_a_network_family(digits, latents):
    train, export = digits.extend("2")
    run = digits.train(train, SMALL)
    inputs = first_inputs(load_recipe("digits", DIGITS), latents)
    # A fresh network's output is zero.
    assert losses(run)[0] == pytest.approx((inputs["x"] - inputs["noise"]).square().mean().item(), rel=1e-6)
    digits.run(export)
    weights = load_file(digits.folder / "models/dit/diffusion_pytorch_model.safetensors")
    registers = weights.pop("register_tokens")
    assert registers.shape == (1, 4, 32)

    # Without registers it is a DSMoE whose blocks are all dense, to the names of its weights.
    dense = load_recipe("digits", [*DIGITS, "model.dense_first=2", "model.learn_sigma=false"])
    want = train_plainly(dense, latents, STEPS).losses
    plain = digits.train(train, [*SMALL, "model.registers=0"], "--out", "runs/plain")
    assert losses(plain) == pytest.approx(want, rel=1e-6)

    # With them it is the same, when hooks put the tokens in before the blocks and take them out after.
    model, x, t, y = build_model(dense).eval(), inputs["x"], inputs["u"], inputs["y"]
    model.load_state_dict(weights)
    for block in model.blocks:
        block.attn.num_prefix_tokens = 4
    model.blocks[0].register_forward_pre_hook(
        lambda _, given: (torch.cat([registers.expand(len(x), -1, -1), given[0]], dim=1), *given[1:])
    )
    model.final_layer.register_forward_pre_hook(lambda _, given: (given[0][:, 4:], given[1]))
    torch.save((x, t, y), digits.folder / "inputs.pt")
    digits.python(
        "import torch; from moe_dit import load_model; x, t, y = torch.load('inputs.pt')\n"
        "with torch.no_grad(): torch.save(load_model('models/dit')(x, t, y), 'output.pt')"
    )
    with torch.no_grad():
        want = model(x, t, y)
    assert want.std() > 1e-3
    torch.testing.assert_close(torch.load(digits.folder / "output.pt"), want, rtol=0, atol=1e-6)

    line = digits.refusal(train, "--set", "model.registes=4", "--out", "runs/wrong")
    assert "unknown key model.registes; did you mean registers?" in line
    assert "model.registers is -1" in digits.refusal(train, "--set", "model.registers=-1", "--out", "runs/wrong")


def test_a_router_score(digits):
    [command] = digits.extend("3")
    two = losses(digits.train(command, DIGITS))
    alone = command.replace("deepspeed --num_gpus 2", "python").replace("zero2_ep2", "zero1_ep1")
    one = losses(digits.train(alone, DIGITS, "--out", "runs/alone"))
    assert two == pytest.approx(one, rel=1e-6)

    generator = np.random.default_rng(0)
    x, w = (generator.normal(size=size).astype(np.float32) for size in ((50, 16), (8, 16)))
    np.savez(digits.folder / "router.npz", x=x, w=w)
    digits.python(
        "import numpy, torch; from moe_dit.models.moe import Router; given = numpy.load('router.npz')\n"
        "router = Router(16, 8, 3, 2.5, score='sqrt_softplus'); router.weight.data = torch.from_numpy(given['w'])\n"
        "weights, experts, _ = router(torch.from_numpy(given['x']))\n"
        "numpy.savez('routed.npz', weights=weights.detach(), experts=experts)"
    )
    routed = np.load(digits.folder / "routed.npz")
    score = np.sqrt(np.log1p(np.exp(x.astype(float) @ w.astype(float).T)))
    for token in range(50):
        best = np.argsort(-score[token])[:3]
        assert set(routed["experts"][token]) == set(best)
        got = dict(zip(routed["experts"][token], routed["weights"][token], strict=True))
        want = {e: 2.5 * score[token, e] / score[token, best].sum() for e in best}
        assert got == pytest.approx(want, rel=1e-5)


def test_an_auxiliary_loss(digits, latents):
    command, diffmoe = digits.extend("4")
    recipe = load_recipe("digits", DIGITS)
    found = records(digits.train(command, DIGITS))
    assert [r["loss"] for r in found] == pytest.approx([r["mse"] + r["entropy_loss"] for r in found], rel=1e-6)
    # By hand: what the router of the only MoE layer gets in the first step.
    kept = keep_inputs(recipe, latents, Router)
    for router, tokens in kept:
        scores = 1 / (1 + np.exp(-(tokens @ router.weight.detach().numpy().astype(float).T)))
        mean = (scores / scores.sum(1, keepdims=True)).mean(0)
        assert found[0]["entropy_loss"] == pytest.approx(0.01 * (math.log(8) - entropy_of(mean)), rel=1e-3)
    assert len(kept) == 1

    recipe = load_recipe("digits_diffmoe", SMALL)
    found = records(digits.train(diffmoe, SMALL))
    assert [r["loss"] for r in found] == pytest.approx([r["mse"] + r["capacity_loss"] for r in found], rel=1e-6)
    [(layer, tokens)] = keep_inputs(recipe, latents, ExpertChoiceMoE)
    logits = tokens @ layer.gate_weight.detach().numpy().astype(float).T
    scores = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    taken = np.zeros_like(scores)
    for e in range(8):
        taken[np.argsort(-scores[:, e])[: len(tokens) // 8], e] = 1
    with torch.no_grad():
        guess = layer.capacity_predictor.double()(torch.from_numpy(tokens)).sigmoid().numpy()
    want = -(taken * np.log(guess) + (1 - taken) * np.log(1 - guess)).mean()
    assert found[0]["capacity_loss"] == pytest.approx(want, rel=1e-4)


def keep_inputs(recipe, shards, kind) -> list[tuple[torch.nn.Module, np.ndarray]]:
    """The modules of a kind, and the tokens [T, D] that they get in the first step."""
    model, inputs, kept = build_model(recipe), first_inputs(recipe, shards), []

    def keep(module, given):
        kept.append((module, given[0].detach().flatten(0, -2).double().numpy()))

    for module in model.modules():
        if isinstance(module, kind):
            module.register_forward_pre_hook(keep)
    t = inputs["u"][:, None, None, None]
    model(t * inputs["x"] + (1 - t) * inputs["noise"], inputs["u"], inputs["y"])
    return kept


def test_an_optimizer(digits, latents):
    [command] = digits.extend("5")
    recipe = load_recipe("digits", DIGITS)
    want = train_plainly(
        recipe, latents, STEPS, make_optimizer=lambda weights: torch.optim.Adamax(weights, 1e-3)
    ).losses
    two = digits.train(command, DIGITS)
    assert losses(two) == pytest.approx(want, rel=1e-6)
    # One rank goes on where two were after step 2.
    alone = command.replace("deepspeed --num_gpus 2", "python").replace("zero2_ep2", "zero1_ep1")
    half = str(two / "checkpoints/step_00000002")
    found = records(digits.train(alone, DIGITS, "--resume", half, "--out", "runs/alone"))
    assert [r["step"] for r in found] == [3, 4]
    assert [r["loss"] for r in found] == pytest.approx(want[2:], rel=1e-6)


def test_an_optimizer_that_cannot_be_had(digits):
    [command] = digits.extend("6")
    line = digits.refusal(command)
    assert "optimizer.name is 'muon': Muon works on whole matrices" in line and "choose one of adamw" in line
    line = digits.refusal(command, "--set", "optimizer.name=sophia")
    assert "optimizer.name is 'sophia': there is no such optimizer here; choose one of adamw" in line


def tiny_autoencoder(make, project: Copy, name: str) -> None:
    """Random weights in the folder that a hub name would be, if it were one."""
    torch.manual_seed(0)
    make().save_pretrained(project.folder / name)


SMALL_IMAGENET = [*DIGITS, "model.moe.num_experts=4", "model.moe.expert_width=8", "global_batch_size=4"]
SMALL_IMAGENET += ["model.num_classes=2"]


def check_first_loss(run: Path, shards: Path, prepare) -> None:
    """Hold a run's first loss against x = prepare(stored, position) and its noise: a fresh network's output is zero."""
    recipe = load_recipe(str(run / "config.yaml"))
    batch = next(batches(recipe, read_manifest(shards), 4, 0, World()))
    x = prepare(batch["x"].double(), batch["position"])
    noise = normal(0, Stream.NOISE, batch["position"], tuple(x.shape[1:]))
    assert losses(run)[0] == pytest.approx((x - noise).square().mean().item(), rel=1e-6)


def draw(stored: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """A latent from its posterior's mean and log variance."""
    mean, log_variance = stored.chunk(2, dim=1)
    return mean + (0.5 * log_variance).exp() * normal(0, Stream.LATENT, position, tuple(mean.shape[1:]))


def test_an_autoencoder_with_a_shift_and_16_channels(project):
    write_images(project.folder / "data/imagenet/train", 288, 256)
    tiny_autoencoder(flux_like, project, "black-forest-labs/FLUX.1-dev/vae")
    encode, train = project.extend("7")
    project.run(encode)
    run, shards = project.train(train, SMALL_IMAGENET), project.folder / "data/imagenet256_flux"
    check_first_loss(run, shards, lambda stored, position: (draw(stored, position) - 0.1159) * 0.3611)
    assert "scale 0.3611" in project.refusal(train.replace("--set data.latent_scale=null", ""), "--out", "runs/wrong")


def test_an_autoencoder_without_a_posterior(project):
    write_images(project.folder / "data/imagenet/train", 288, 256)
    tiny_autoencoder(dc, project, "mit-han-lab/dc-ae-f32c32-in-1.0-diffusers")
    encode, train = project.extend("8")
    project.run(encode)
    run, shards = project.train(train, SMALL_IMAGENET), project.folder / "data/imagenet256_dc"
    assert read_manifest(shards).sample_shape == [32, 8, 8]
    check_first_loss(run, shards, lambda stored, position: stored * 0.41)


def test_512_pixels(project):
    write_images(project.folder / "data/imagenet/train", 560, 512)
    tiny_autoencoder(lambda: kl(4, layers_per_block=1), project, "stabilityai/sd-vae-ft-mse")
    encode, train, pack, train_pixels = project.extend("9")
    project.run(encode)
    run = project.train(train, SMALL_IMAGENET)
    shards = project.folder / "data/imagenet512_latents"
    assert read_manifest(shards).sample_shape == [8, 64, 64]
    check_first_loss(run, shards, lambda stored, position: draw(stored, position) * 0.18215)

    project.run(pack)
    small = ["model.hidden_size=16", "model.in_context_start=1", "model.depth=2", "model.num_heads=2"]
    small += ["data.workers=0", "global_batch_size=4"]
    run = project.train(train_pixels, small)
    shards = project.folder / "data/imagenet512_pixels"
    assert read_manifest(shards).sample_shape == [3, 512, 512]
    # A network that answers zero for the image errs by x / (1 - t) in the velocity.
    recipe = load_recipe(str(run / "config.yaml"))
    batch = next(batches(recipe, read_manifest(shards), 4, 0, World()))
    deviates = [statistics.NormalDist().inv_cdf(u) for u in uniform(0, Stream.TIME, batch["position"]).tolist()]
    t = np.array([1 / (1 + math.exp(0.8 - 0.8 * z)) for z in deviates])
    squares = (batch["x"].double() / 127.5 - 1).square().mean(dim=(1, 2, 3)).numpy()
    assert losses(run)[0] == pytest.approx(np.mean(squares / np.maximum(1 - t, 0.05) ** 2), rel=1e-5)


def test_a_metrics_sink(digits):
    [command] = digits.extend("10")
    run = digits.train(command, DIGITS)
    # Taken back to step 2, and continued: each step once.
    shutil.rmtree(run / "checkpoints/step_00000004")
    (run / "checkpoints/latest").unlink()
    digits.train(command, DIGITS)
    assert "continuing" in (digits.folder / "command.log").read_text()
    with open(run / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for name in ("loss", "lr", "grad_norm"):
        assert [float(row["value"]) for row in rows if row["name"] == name] == losses(run, name)
    assert [int(row["step"]) for row in rows if row["name"] == "loss"] == [1, 2, 3, 4]
    assert (run / "tensorboard").is_dir()

    wrong = command.replace("runs/table", "runs/wrong")
    line = digits.refusal(wrong, "--set", "metrics.sinks=[cvs]")
    assert "metrics.sinks has 'cvs'; choose of tensorboard, wandb, trackio, csv" in line
    for library in ("wandb", "trackio"):
        if importlib.util.find_spec(library) is None:
            line = digits.refusal(wrong, "--set", f"metrics.sinks=[{library}]")
            assert f"metrics.sinks has {library}, which is not installed: pip install {library}" in line
