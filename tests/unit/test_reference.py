"""The published networks: recorded outputs of the published code, its variants, its parameter counts, its files."""

import argparse
import copy
import json
import pathlib

import pytest
import torch
import yaml
from golden import check
from safetensors.torch import load_file

from helpers import call, published, refused
from moe_dit import build_model, load_model, load_recipe
from moe_dit.data import Latents, training_inputs
from moe_dit.export import load_export
from moe_dit.flow import build_flow
from moe_dit.models import FAMILIES
from moe_dit.models.dropout import Dropout
from moe_dit.models.initialization import initialize
from moe_dit.reference import from_reference, model_section
from moe_dit.reference.files import import_checkpoint
from moe_dit.reference.loop import TokenChoice, published_form, stacked_gradients
from moe_dit.reference.weights import conversions
from moe_dit.runtime.errors import InputError

GOLDEN = pathlib.Path(check.__file__).parent
CASES = sorted(path.parent for path in GOLDEN.glob("*/meta.json"))


def read(case: str) -> tuple[dict, dict, dict]:
    folder = GOLDEN / case
    meta = json.loads((folder / "meta.json").read_text())
    return meta, load_file(folder / "reference_state.safetensors"), load_file(folder / "io.safetensors")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_published_code_s_recorded_quantities_are_matched(case):
    rows = []
    check.compare(case, rows)
    assert len(rows) >= 5
    assert not [row for row in rows if not row[2] <= row[3]]


# --- variants that the recorded cases do not cover --------------------------------------------------------------------

DSMOE_VARIANTS = [
    {},
    {"norm_type": "rmsnorm"},
    {"rope_type": "none"},
    {"rope_type": "1d", "num_heads": 2, "depth": 3},
    {"MoE_config.use_shared_expert": False},
    {"MoE_config.interleave": False, "MoE_config.skip_first2": True},
    {"MoE_config.interleave": False, "MoE_config.skip_first2": 1, "patch_size": 4},
    {"MoE_config.num_experts_per_tok": 1},
    {"MoE_config.n_group": 4, "MoE_config.topk_group": 2},
]
DIFFMOE_VARIANTS = [
    {},
    {"use_swiglu": True},
    {"MoE_config.n_shared_experts": 1, "MoE_config.capacity": 2},
    {"MoE_config.interleave": False, "depth": 2, "hidden_size": 48},
]


def variant(case: str, changes: dict) -> dict:
    meta = copy.deepcopy(read(case)[0])
    for key, value in changes.items():
        *sections, key = key.split(".")
        section = meta["params"]
        for name in sections:
            section = section[name]
        section[key] = value
    if "MoE_config" in meta["params"] and "hidden_size" in meta["params"]["MoE_config"]:
        meta["params"]["MoE_config"]["hidden_size"] = meta["params"]["hidden_size"]
    return meta


def random_state(meta: dict) -> dict[str, torch.Tensor]:
    """A state dict in the published names, with values of a trained network's spread."""
    section = model_section(meta)
    with torch.device("meta"):
        model = FAMILIES[section.pop("family")].network(**section)
    generator = torch.Generator().manual_seed(0)
    state = {}
    for conversion in conversions(model).values():
        for name in conversion.names:
            scale = 0.3 if len(conversion.shape) < 2 else conversion.shape[1:].numel() ** -0.5
            state[name] = scale * torch.randn(conversion.shape, generator=generator)
            if "threshold" in name:
                state[name] = 0.5 + 0.1 * state[name]
            if name.endswith("ema_decay"):
                state[name] = torch.tensor([0.9])
    return state


@pytest.mark.parametrize(
    ("case", "changes"),
    [("dsmoe_e8", changes) for changes in DSMOE_VARIANTS] + [("diffmoe_e8", changes) for changes in DIFFMOE_VARIANTS],
    ids=str,
)
def test_variants_compute_what_their_definition_says(case, changes):
    meta = variant(case, changes)
    state, io = random_state(meta), read(case)[2]
    model, _ = from_reference(meta, state)
    for training in (False, True):
        with torch.no_grad():
            got = model.train(training)(io["x"], io["t"], io["y"])
        want = published.network(meta, state, io["x"], io["t"], io["y"], training)
        assert check.relative_error(got, want) < check.OUTPUT_TOLERANCE


def test_jitmoe_without_interleaving_is_dense_as_published():
    meta, state, io = read("jit_dense")
    meta["net"]["moe_config"] = read("jitmoe_e8")[0]["net"]["moe_config"] | {"interleave": False}
    model, _ = from_reference(meta, state)
    with torch.no_grad():
        assert check.relative_error(model(io["x"], io["t"], io["y"]), io["output"]) < check.OUTPUT_TOLERANCE


def test_jit_without_class_tokens_loads():
    meta, state, io = read("jit_dense")
    meta["net"]["in_context_len"] = 0
    del state["net.in_context_posemb"]
    model, _ = from_reference(meta, state)
    assert model(io["x"], io["t"], io["y"]).shape == io["x"].shape


@pytest.mark.parametrize(
    ("case", "path", "value"),
    [
        ("dsmoe_e8", ("params", "use_sinks"), True),
        ("dsmoe_e8", ("params", "enable_gqa"), True),
        ("dsmoe_e8", ("params", "rope_type"), "3d"),
        ("dsmoe_e8", ("params", "norm_type"), "batchnorm"),
        ("dsmoe_e8", ("params", "head_dim"), 5),
        ("dsmoe_e8", ("params", "novelty"), 1),
        ("dsmoe_e8", ("params", "MoE_config", "capacity_schedule"), {}),
        ("jit_dense", ("net", "in_context_start"), 9),
        ("jit_dense", ("denoiser", "novelty"), 1),
        ("diffmoe_e8", ("family",), "DiT"),
    ],
)
def test_what_is_not_supported_is_named(case, path, value):
    meta, state, _ = read(case)
    section = meta
    for key in path[:-1]:
        section = section[key]
    section[path[-1]] = value
    with pytest.raises(InputError, match=path[-1]):
        from_reference(meta, state)


# --- recipes ----------------------------------------------------------------------------------------------------------

# Total and activated parameters in units of 1e6, and of 2^20 ("Mi"), counted on the published code. DiffMoE's count
# there includes the fixed table of position encodings, which is a parameter in its file.
DIFFMOE = {"diffmoe_s_e16": (140.27, 33.92), "diffmoe_b_e16": (559.22, 134.20), "diffmoe_l_e16": (1981.96, 471.09)}
JIT = {"jit_b_16": 131.12, "jit_l_16": 458.88, "jit_h_16": 952.51}
JITMOE_MI = {
    "jitmoe_b_16_e16": (369.49, 132.99),
    "jitmoe_l_16_e16": (1306.50, 465.82),
    "jitmoe_h_16_e16": (2407.21, 936.20),
}


def count(recipe) -> tuple[float, float]:
    model, moe = build_model(recipe, device="meta"), recipe.model.moe
    total = sum(p.numel() for p in model.parameters())
    if recipe.model.family == "diffmoe":
        total += model.pos_embed.numel()
    if moe is None:
        return total, total
    routed = sum(p.numel() for key, p in model.named_parameters() if ".experts." in key)
    used = moe.capacity if recipe.model.family == "diffmoe" else moe.top_k
    return total, total - routed + routed * used / moe.num_experts


@pytest.mark.parametrize("name", DIFFMOE)
def test_diffmoe_counts(name):
    assert tuple(round(n / 1e6, 2) for n in count(load_recipe(name))) == DIFFMOE[name]


def test_diffmoe_l_with_the_published_file_s_eight_experts_has_its_published_count():
    recipe = load_recipe("diffmoe_l_e16", ["model.moe.num_experts=8"])
    assert tuple(round(n / 1e6, 2) for n in count(recipe)) == (1175.97, 470.89)


@pytest.mark.parametrize("name", JIT)
def test_jit_counts(name):
    assert tuple(round(n / 1e6, 2) for n in count(load_recipe(name))) == (JIT[name], JIT[name])


@pytest.mark.parametrize("name", JITMOE_MI)
def test_jitmoe_counts(name):
    assert tuple(round(n / 2**20, 2) for n in count(load_recipe(name))) == JITMOE_MI[name]


@pytest.mark.parametrize("name", [*DIFFMOE, *JIT, *JITMOE_MI])
def test_published_training_settings(name):
    recipe = load_recipe(name)
    pixels = name.startswith("jit")
    assert recipe.flow.label_dropout == 0.1 and recipe.data.horizontal_flip == 0.5
    assert recipe.optimizer.weight_decay == 0 and recipe.ema.decay == 0.9999
    if pixels:
        assert (recipe.global_batch_size, recipe.optimizer.lr, recipe.optimizer.betas) == (1024, 2e-4, [0.9, 0.95])
        assert recipe.ema.second_decay == 0.9996
        steps = 1281167 // recipe.global_batch_size  # whole batches an epoch
        assert (recipe.steps, recipe.optimizer.warmup_steps) == (200 * steps, 5 * steps)
        sampling = recipe.sampling
        assert (sampling.method, sampling.steps, sampling.cfg_scale) == ("heun", 50, 2.9)
        assert (sampling.cfg_interval, sampling.labels) == ([0.1, 1.0], "balanced")
    else:
        assert (recipe.global_batch_size, recipe.steps, recipe.optimizer.lr) == (512, 700_000, 1e-4)
        assert (recipe.optimizer.betas, recipe.ema.second_decay) == ([0.9, 0.999], None)
        assert (recipe.sampling.method, recipe.sampling.steps, recipe.sampling.labels) == ("euler", 250, "random")


def dropouts(model) -> dict[int, float]:
    """Largest dropout probability of each block that has any."""
    found: dict[int, float] = {}
    for i, block in enumerate(model.blocks):
        for module in block.modules():
            if isinstance(module, Dropout | torch.nn.Dropout) and module.p > 0:
                found[i] = max(found.get(i, 0.0), module.p)
    return found


def test_dropout_acts_in_the_middle_half_of_jitmoe_h_only():
    assert dropouts(build_model("jitmoe_h_16_e16", device="meta")) == dict.fromkeys(range(7, 21), 0.2)
    for name in ("jit_b_16", "jit_h_16", "jitmoe_l_16_e16"):
        assert not dropouts(build_model(name, device="meta"))


@pytest.mark.parametrize("name", ["dsmoe_s_e16", "diffmoe_s_e16", "jit_b_16", "jitmoe_b_16_e16"])
def test_training_times_have_the_published_distribution(name):
    u = torch.rand(100_000, generator=torch.Generator().manual_seed(0))
    t = build_flow(load_recipe(name)).times(u)
    if name.startswith("jit"):
        logits = torch.logit(t.double())
        assert logits.mean().item() == pytest.approx(-0.8, abs=0.01)
        assert logits.std().item() == pytest.approx(0.8, abs=0.01)
        assert (t < torch.sigmoid(torch.tensor(-0.8))).float().mean().item() == pytest.approx(0.5, abs=0.005)
    else:
        assert t.mean().item() == pytest.approx(0.5, abs=0.005)
        assert t.std().item() == pytest.approx(12**-0.5, abs=0.005)


@pytest.mark.parametrize("name", ["dsmoe_s_e16", "diffmoe_s_e16", "jitmoe_b_16_e16"])
def test_a_tenth_of_the_labels_is_dropped(name):
    recipe, n = load_recipe(name), 100_000
    latents = recipe.data.kind == "latents"
    x = torch.zeros(n, 8, 1, 1, dtype=torch.float16) if latents else torch.zeros(n, 3, 1, 1, dtype=torch.uint8)
    batch = {"x": x, "y": torch.full((n,), 7), "position": torch.arange(n)}
    y = training_inputs(recipe, batch, Latents())["y"]
    assert set(y.tolist()) == {7, 1000}
    assert (y == 1000).float().mean().item() == pytest.approx(0.1, abs=0.004)


def test_a_time_draw_of_zero_is_finite():
    flow = build_flow(load_recipe("jit_b_16"))
    assert flow.times(torch.zeros(1)).item() == 0.0


# --- the form of it that a bench times beside ours --------------------------------------------------------------------


def moved_network(recipe) -> torch.nn.Module:
    model = build_model(recipe, device="meta").train()
    initialize(model, 0, torch.device("cpu"))
    with torch.no_grad():  # a fresh network predicts zero whatever its blocks do
        for i, weight in enumerate(model.parameters()):
            weight += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(i))
    return model


@pytest.mark.parametrize(
    ("name", "more"), [("digits", []), ("digits_pixels", ["model.in_context_start=1"]), ("digits_diffmoe", [])]
)
def test_the_published_form_has_our_outputs_and_gradients(name, more):
    recipe = load_recipe(name, ["model.depth=2", "model.hidden_size=32", "model.num_heads=2", *more])
    ours = moved_network(recipe)
    theirs = published_form(ours)
    side = recipe.model.input_size
    x = torch.randn(6, recipe.model.in_channels, side, side, generator=torch.Generator().manual_seed(0))
    y = torch.arange(6) % recipe.model.num_classes
    losses = []
    for model in (ours, theirs):
        terms = [model(x, torch.linspace(0, 1, 6), y).square().mean()]
        terms += [loss for module in model.modules() for loss in getattr(module, "layer_losses", {}).values()]
        losses.append(torch.stack(terms).sum())
        losses[-1].backward()
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-6)
    found = stacked_gradients(theirs)
    assert not any(isinstance(module, TokenChoice) for module in ours.modules())
    for key, weight in ours.named_parameters():
        if weight.grad is not None:
            torch.testing.assert_close(found[key], weight.grad, rtol=1e-4, atol=1e-6, msg=key)


# --- files ------------------------------------------------------------------------------------------------------------


def write_checkpoint(tmp_path: pathlib.Path, case: str) -> tuple[pathlib.Path, pathlib.Path, str]:
    """A golden case as a published checkpoint file and a recipe file; also the name of its averaged weights."""
    meta, state, _ = read(case)
    jit = "net" in meta
    other = {name: torch.zeros_like(value) for name, value in state.items()}
    names = ("model_ema1", "model_ema2", "model") if jit else ("ema", "model")
    checkpoint = {name: other for name in names} | {names[0]: state}
    checkpoint |= {"args": argparse.Namespace(config="x.yaml", wandb=False), "epoch": 3}
    torch.save(checkpoint, tmp_path / "published.pt")
    values = load_recipe("digits_pixels" if jit else "digits").to_dict()
    values |= {"model": model_section(meta), "name": case}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "published.pt", tmp_path / "recipe.yaml", names[0]


@pytest.mark.parametrize("case", [case.name for case in CASES])
@pytest.mark.parametrize("shard", [10**9, 100_000])
def test_an_imported_checkpoint_gives_the_recorded_output(tmp_path, case, shard):
    file, recipe, weights = write_checkpoint(tmp_path, case)
    import_checkpoint(file, load_recipe(str(recipe)), weights, tmp_path / "model", shard)
    assert (len(list((tmp_path / "model").glob("*.safetensors"))) > 1) == (shard < 10**9)
    model, stored = load_export(tmp_path / "model")
    assert stored.name == case and not model.training
    io = read(case)[2]
    with torch.no_grad():
        got = model(io["x"], io["t"], io["y"])
    assert check.relative_error(got, io.get("output", io.get("output_eval"))) < check.OUTPUT_TOLERANCE


def test_the_command_imports(tmp_path):
    file, recipe, weights = write_checkpoint(tmp_path, "jitmoe_e8")
    flags = ["--recipe", recipe, file, "--weights", weights, "--out", tmp_path / "model"]
    assert call("jobs/import_reference.py", *flags) == 0
    assert load_model(tmp_path / "model").config["hidden_size"] == 32


class Foreign:
    """Something a file of weights should not hold."""


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        ("none", "no file"),
        ("truncated", "is damaged"),
        ("foreign", "holds objects of"),
        ("list", "should hold a dict"),
        ("weights", "has no weights named model_ema2; it has ema, model"),
        ("missing", "missing (blocks.1.mlp.gate.weight)"),
        ("surplus", "not part of it (blocks.9.norm)"),
        ("no tensor", "is not a tensor"),
        ("another size", "1 of another size (y_embedder.embedding_table.weight is [5, 32], not [11, 32])"),
        ("another recipe", "of another size"),
    ],
)
def test_a_bad_checkpoint_is_one_line_and_nothing_is_written(tmp_path, damage, line, capsys):
    file, recipe, weights = write_checkpoint(tmp_path, "dsmoe_e8")
    checkpoint = torch.load(file, weights_only=False)
    state = checkpoint[weights]
    if damage == "none":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:300_000])
    elif damage == "foreign":
        torch.save(checkpoint | {"extra": Foreign()}, file)
    elif damage == "list":
        torch.save([state], file)
    elif damage == "weights":
        weights = "model_ema2"
    elif damage == "another recipe":
        recipe = "dsmoe_s_e16"
    else:
        if damage == "missing":
            del state["blocks.1.mlp.gate.weight"]
        elif damage == "surplus":
            state["blocks.9.norm"] = torch.zeros(1)
        elif damage == "no tensor":
            state["y_embedder.embedding_table.weight"] = 3
        else:
            state["y_embedder.embedding_table.weight"] = torch.zeros(5, 32)
        torch.save(checkpoint, file)
    flags = ["--recipe", recipe, file, "--weights", weights, "--out", tmp_path / "out" / "model"]
    assert line in refused(capsys, "jobs/import_reference.py", *flags, harmless=tmp_path)


def test_a_checkpoint_that_is_no_file_is_told_plainly(tmp_path):
    with pytest.raises(InputError) as refusal:
        import_checkpoint(tmp_path, load_recipe("digits"), "ema", tmp_path / "model")
    assert str(refusal.value) == f"{tmp_path} is damaged or not from torch.save: It is a folder, not a file"
