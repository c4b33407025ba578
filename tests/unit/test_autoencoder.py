"""Autoencoders of every kind, held against direct calls of diffusers; and 512 pixels, by recipe and --size alone."""

import json
import math
import re
import shutil
import socket
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLFlux2,
    UNet2DModel,
)
from PIL import Image
from safetensors.torch import load_file, save_file

from data_prep import encode_latents, pack_pixels
from data_prep.autoencoder import LatentSpace, decode, encode, latent_space, load_vae
from data_prep.images import center_crop, list_images
from eval import sample
from eval.features import Extractor
from eval.generate import generate, image_size, load_decoder, resolve
from helpers import free_port, refused
from helpers.autoencoders import dc, flux_like, kl, tiny, vq, write_images
from moe_dit import build_model, load_recipe
from moe_dit.data import Latents, ShardReader, batches, check_manifest, training_inputs
from moe_dit.flow import build_flow
from moe_dit.manifest import read_manifest
from moe_dit.randomness import Stream, normal
from moe_dit.runtime.errors import InputError
from moe_dit.runtime.ranks import World

SIZE = 64
FLUX2 = {"block_out_channels": (8, 8), "norm_num_groups": 4} | {
    f"{part}_block_types": (f"{name}Block2D",) * 2 for part, name in (("down", "DownEncoder"), ("up", "UpDecoder"))
}


# What makes one, what diffusers' encode gives that shards should keep, and what its latents are.
KINDS = {
    "kl": (lambda: kl(3), lambda output: output.latent_dist.parameters, LatentSpace(4, 4, True, 0.18215, 0.0)),
    "flux": (flux_like, lambda output: output.latent_dist.parameters, LatentSpace(16, 8, True, 0.3611, 0.1159)),
    "dc": (dc, lambda output: output.latent, LatentSpace(32, 32, False, 0.41, 0.0)),
    "tiny": (tiny, lambda output: output.latents, LatentSpace(4, 4, False, 0.7, -0.2)),
    "vq": (vq, lambda output: output.latents, LatentSpace(5, 2, False, 0.18215, 0.0)),
}


def call(module, monkeypatch, *flags):
    """Run a command in this process; raises InputError on bad input."""
    monkeypatch.setattr(sys, "argv", ["command", *map(str, flags)])
    module.main()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), 96, 80)


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def vae(kind, tmp_path_factory):
    """An autoencoder of random weights, as a folder."""
    folder = tmp_path_factory.mktemp(kind) / "vae"
    torch.manual_seed(0)
    KINDS[kind][0]().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def shards(vae, images, tmp_path_factory):
    out = tmp_path_factory.mktemp("shards") / "shards"
    with pytest.MonkeyPatch.context() as patch:
        flags = ("--images", images, "--vae", vae, "--size", SIZE, "--out", out)
        call(encode_latents, patch, *flags, "--batch", 2)
    return out


def recipe_for(space: LatentSpace, size: int, *more: str):
    """The digits' recipe, made small, for the latents of this size of images."""
    small = ["model.depth=2", "model.hidden_size=16", "model.num_heads=2", "model.moe.num_experts=4"]
    small += ["model.moe.expert_width=8", f"model.in_channels={space.channels}", "data.vae=null"]
    return load_recipe("digits", [*small, f"model.input_size={size // space.factor}", *more])


def arguments(*flags):
    parser = sample.Parser("", "")
    sample.add_sampling_arguments(parser)
    return parser.parse_args(["--model", "none", "--num", "4", *map(str, flags)])


# ----------------------------------------------------------------------------------------------------------------------
# Every kind


def test_what_is_known_of_an_autoencoder(kind, vae):
    model = load_vae(str(vae))
    assert latent_space(model) == KINDS[kind][2]
    assert not model.training and not any(weight.requires_grad for weight in model.parameters())
    assert latent_space(KINDS[kind][0]()) == KINDS[kind][2]  # without load_vae


def test_shards_hold_what_diffusers_encodes(kind, vae, images, shards):
    build, stored, space = KINDS[kind]
    model = type(build()).from_pretrained(vae).eval()
    manifest = json.loads((shards / "manifest.json").read_text())
    side = SIZE // space.factor
    assert manifest["sample_shape"] == [2 * space.channels if space.posterior else space.channels, side, side]
    assert (manifest["scale"], manifest["shift"]) == (space.scale, space.shift)
    assert manifest["posterior"] is space.posterior and manifest["vae"] == str(vae)
    paths, labels, _ = list_images(images)
    reader, seen = ShardReader(read_manifest(shards)), []
    for index in range(4):
        members = reader.members(index)
        image = next(
            i
            for i in range(4)
            if i not in seen and labels[i] == members.label() and _is(model, stored, paths[i], members)
        )
        seen.append(image)
    assert sorted(seen) == [0, 1, 2, 3]


def _is(model, stored, path, members) -> bool:
    """Whether the sample is the image's latent, and its mirror's."""
    crop = np.asarray(center_crop(Image.open(path), SIZE)).copy()
    x = torch.from_numpy(crop).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        want = [stored(model.encode(image))[0].half().numpy() for image in (x, x.flip(3))]
    got = [members.array(name) for name in ("latent.npy", "latent_flip.npy")]
    assert all(array.dtype == np.float16 for array in got)
    return all(np.allclose(a, b, rtol=2e-3, atol=1e-3) for a, b in zip(got, want, strict=True))


def test_inputs_are_shifted_and_scaled(kind, shards):
    space = KINDS[kind][2]
    manifest, recipe = read_manifest(shards), recipe_for(space, SIZE)
    check_manifest(manifest, recipe)
    batch = next(batches(recipe, manifest, 4, 0, World()))
    x = training_inputs(recipe, batch, Latents.of(recipe, manifest))["x"]
    z = batch["x"].float()
    if space.posterior:
        mean, log_variance = z[:, : space.channels], z[:, space.channels :]
        z = mean + (0.5 * log_variance).exp() * normal(0, Stream.LATENT, batch["position"], tuple(mean.shape[1:]))
    assert torch.equal(x, (z - space.shift) * space.scale)
    if space.shift == 0:  # to the bit what it was before there was a shift
        assert torch.equal(x, z * space.scale)
    # The recipe's own numbers come first.
    given = replace(recipe, data=replace(recipe.data, latent_scale=2.0, latent_shift=0.5))
    assert Latents.of(given, manifest) == Latents(2.0, 0.5, space.posterior)


def test_samples_are_decoded_as_diffusers_does(kind, vae):
    """A new network's velocity is 0, so its samples are their noise, whatever the steps."""
    space = KINDS[kind][2]
    shift = f"data.latent_shift={space.shift or 'null'}"  # absent means 0
    recipe = recipe_for(space, SIZE, f"data.latent_scale={space.scale}", shift)
    sampling = resolve(arguments("--vae", vae, "--steps", 1), recipe)
    decoder = load_decoder(sampling, recipe)
    assert image_size(recipe, decoder) == SIZE
    got = generate(build_model(recipe).eval(), recipe, sampling, decoder, torch.arange(4))
    side = SIZE // space.factor
    noise = normal(0, Stream.SAMPLE_NOISE, torch.arange(4), (space.channels, side, side))
    model = type(KINDS[kind][0]()).from_pretrained(vae).eval()
    z = noise / space.scale + space.shift
    with torch.no_grad():
        image = model.decode(z).sample.clamp(-1, 1)
        # In float64, as a convolution's last bit may depend on where memory was allocated.
        exact = [part.double() for part in (decoder, model)]
        torch.testing.assert_close(decode(exact[0], z.double()), exact[1].decode(z.double()).sample, rtol=0, atol=1e-12)
    want = ((image + 1) * 127.5).round()
    assert want.std() > 1  # a grey square would say nothing
    assert got.dtype == torch.uint8 and (got.float() - want).abs().max() <= 1


def test_scaled_latents_decode_to_the_same_image(kind, vae, images):
    _, stored, space = KINDS[kind]
    model = load_vae(str(vae))
    crop = np.asarray(center_crop(Image.open(images / "a/0.png"), SIZE)).copy()
    z = stored(model.encode(torch.from_numpy(crop).permute(2, 0, 1)[None] / 127.5 - 1))[:, : space.channels]
    x = (z - space.shift) * space.scale
    torch.testing.assert_close(decode(model, x / space.scale + space.shift), model.decode(z).sample, rtol=0, atol=1e-5)


def test_large_images_are_decoded_a_few_at_once():
    """Sixteen of 256 pixels, as ever, and a quarter of that of 512; with the images of one call."""
    model, seen = tiny().eval(), []
    model.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    z = torch.randn(5, 4, 128, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(decode(model, z), model.decode(z).sample, rtol=0, atol=1e-5)
    assert seen == [4, 1, 5]


def float32_means() -> tuple:
    """What torch would compute float32 convolutions and products in, on a GPU."""
    backends = torch.backends
    return (
        backends.cudnn.allow_tf32,
        backends.cudnn.conv.fp32_precision,
        backends.cuda.matmul.allow_tf32,
        torch.get_float32_matmul_precision(),
        backends.cudnn.deterministic,
    )


def features_of(model, images):
    network = torch.nn.Sequential(model)
    network.forward = lambda images: {"features": model(images).sample}
    network.title = network.identity = "some"
    return Extractor([network], torch.device("cpu"))(images)


@pytest.mark.parametrize(
    ("compute", "shape"), [(encode, (1, 3, 8, 8)), (decode, (1, 4, 4, 4)), (features_of, (1, 3, 8, 8))]
)
def test_float32_is_float32_while_a_vae_or_features_are_computed(compute, shape):
    model, seen, before = kl(2).eval(), [], torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # as some containers do
    try:
        outside = float32_means()
        assert outside[0] and outside[2]  # TF32, or this test says nothing
        convolution = next(module for module in model.decoder.modules() if isinstance(module, torch.nn.Conv2d))
        if compute is encode:
            convolution = next(module for module in model.encoder.modules() if isinstance(module, torch.nn.Conv2d))
        hook = convolution.register_forward_hook(lambda *_: seen.append(float32_means()))
        with torch.no_grad():
            compute(model, torch.zeros(shape))
        assert seen == [(False, "ieee", False, "highest", True)] and float32_means() == outside
        hook.remove()
        convolution.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            compute(model, torch.zeros(shape))
        assert float32_means() == outside
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    "model",
    [lambda: kl(2, latents_mean=[0.1] * 4, latents_std=[2.0] * 4), lambda: AutoencoderKLFlux2(**FLUX2)],
    ids=["a number a channel", "none"],
)
def test_an_autoencoder_may_name_no_scale(model):
    space = latent_space(model())
    assert (space.scale, space.shift, space.posterior) == (None, 0.0, True)


def test_a_hub_name_may_have_a_subfolder(tmp_path, monkeypatch):
    """Read from the hub's own cache, as after a download."""
    snapshot = tmp_path / "models--org--pipeline/snapshots" / (40 * "a")
    flux_like().save_pretrained(snapshot / "vae")
    (tmp_path / "models--org--pipeline/refs").mkdir()
    (tmp_path / "models--org--pipeline/refs/main").write_text(40 * "a")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert latent_space(load_vae("org/pipeline/vae")).channels == 16
    with pytest.raises(InputError, match=r"VAE org/pipeline cannot be loaded: .*config.json"):
        load_vae("org/pipeline")


# ----------------------------------------------------------------------------------------------------------------------
# The hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server in the hub's place, with a cache of its own; answers all with what is put there: status and headers."""
    answer = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            status, headers = answer[0]
            self.send_response(status)
            for name, value in {"Content-Length": "0", **headers}.items():
                self.send_header(name, value)
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    at(f"http://127.0.0.1:{server.server_port}", tmp_path, monkeypatch)
    yield answer
    server.shutdown()
    server.server_close()


def at(endpoint: str, tmp_path, monkeypatch) -> None:
    """The hub is there, and nothing in its cache; its client's pauses before it asks once more take no time."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)


def refusal(name: str) -> str:
    with pytest.raises(InputError) as error:
        load_vae(name)
    assert len(str(error.value)) < 400
    return str(error.value)


@pytest.mark.parametrize(
    ("status", "headers", "words"),
    [
        (401, {"X-Error-Code": "RepoNotFound"}, r"the hub \(.*\) has no such repository, or a private one"),
        (401, {}, r"does not allow it, or has no such repository \(401 Unauthorized\); check the name and HF_TOKEN"),
        (404, {"X-Error-Code": "RepoNotFound"}, r"the hub \(.*\) has no such repository, or a private one"),
        (403, {"X-Error-Code": "GatedRepo"}, "gives it to those alone who were admitted"),
        (403, {}, r"does not allow it, or has no such repository \(403 Forbidden\); check the name and HF_TOKEN"),
        (404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": 40 * "a"}, "the repository has no file {file}$"),
        (404, {}, r"does not give {file} \(404 Not Found\); check the name, HF_ENDPOINT, and the proxy"),
        (429, {}, r"refuses for now \(429 Too Many Requests\).*try again later"),
        (503, {}, r"refuses for now \(503 Service Unavailable\).*try again later"),
        (200, {}, r"what answers at http://127\.0\.0\.1:\d+ is not the hub"),  # a proxy's page
    ],
    ids=["unknown", "no token", "gone", "gated", "forbidden", "no file", "a proxy", "too many", "down", "another"],
)
@pytest.mark.parametrize("name", ["org/name", "org/name/vae"])
def test_why_the_hub_gives_no_file(hub, name, status, headers, words):
    hub.append((status, headers))
    found = refusal(name)
    file = "vae/config.json" if name == "org/name/vae" else "config.json"
    assert found.startswith(f"VAE {name} cannot be loaded: ") and re.search(words.format(file=file), found), found
    assert "no file" not in found or headers.get("X-Error-Code") == "EntryNotFound"


def test_a_hub_that_is_not_there_is_told_of(tmp_path, monkeypatch):
    at(f"http://127.0.0.1:{free_port()}", tmp_path, monkeypatch)
    found = refusal("org/name")
    assert re.search(
        r"the hub \(.*\) cannot be reached \(ConnectError: .*refused\), and config.json is not in its", found
    )


def test_a_hub_that_says_nothing_is_told_of(tmp_path, monkeypatch):
    """It takes connections, and answers none."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    monkeypatch.setattr(huggingface_hub.constants, "DEFAULT_ETAG_TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        at(f"http://127.0.0.1:{silent.getsockname()[1]}", tmp_path, monkeypatch)
        assert re.search(r"the hub \(.*\) cannot be reached \(ReadTimeout: .*\)", refusal("org/name"))


def test_without_the_hub_what_is_not_in_its_cache_is_told_of(tmp_path, monkeypatch):
    at("http://127.0.0.1:1", tmp_path, monkeypatch)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    found = refusal("org/name")
    assert "config.json is not in the hub's cache here, and HF_HUB_OFFLINE is set" in found


def test_weights_that_the_hub_does_not_give_are_told_of(tmp_path, monkeypatch):
    """The configuration is in the cache, and the network is gone."""
    snapshot = tmp_path / "cache/models--org--name/snapshots" / (40 * "a")
    kl(2).save_pretrained(snapshot)
    (snapshot / WHOLE).unlink()
    (tmp_path / "cache/models--org--name/refs").mkdir()
    (tmp_path / "cache/models--org--name/refs/main").write_text(40 * "a")
    at(f"http://127.0.0.1:{free_port()}", tmp_path, monkeypatch)
    words = (
        r"as a diffusers AutoencoderKL: the hub \(.*\) cannot be reached .* a file of its weights is not in its cache"
    )
    assert re.search(words, refusal("org/name"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "a file of its weights is not in the hub's cache here, and HF_HUB_OFFLINE is set" in refusal("org/name")


# ----------------------------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--vae {text_encoder}", "not a diffusers .*config.json names no class of diffusers"),
        ("--vae {unet}", "not a diffusers .*config.json names the class UNet2DModel"),
        ("--vae {video}", "not a diffusers .*AutoencoderKLCogVideoX .*does not take"),
        ("--vae {grey}", "not a diffusers .*AutoencoderKL .*does not take"),
        ("--vae {half}", r"not a diffusers .*takes .* to \[1, 4, 256, 256\] to \[1, 1, 512, 512\]"),
        ("--vae {weightless}", "cannot be loaded as a diffusers AutoencoderKL"),
        ("--vae {other}", "weights are missing or of other shapes|cannot be loaded"),
        ("--size 60", "--size 60 is not a multiple of 8"),
    ],
)
def test_what_is_no_autoencoder_of_images_is_one_line(flags, message, images, tmp_path, monkeypatch, capsys):
    names = ("text_encoder", "unet", "video", "grey", "half", "weightless", "other", "good")
    folders = {name: tmp_path / name for name in names}
    folders["text_encoder"].mkdir()
    (folders["text_encoder"] / "config.json").write_text('{"architectures": ["CLIPTextModel"], "hidden_size": 8}')
    blocks = {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
    UNet2DModel(block_out_channels=[8], norm_num_groups=4, **blocks).save_pretrained(folders["unet"])
    with torch.device("meta"):
        AutoencoderKLCogVideoX().save_config(folders["video"])
    kl(2, in_channels=1, out_channels=1).save_pretrained(folders["grey"])
    kl(2, out_channels=1).save_pretrained(folders["half"])
    kl(4).save_config(folders["weightless"])
    kl(4).save_pretrained(folders["good"])
    kl(3).save_pretrained(folders["other"])
    (folders["other"] / "config.json").write_bytes((folders["good"] / "config.json").read_bytes())
    given = ["--images", images, "--vae", folders["good"], "--size", SIZE, "--out", tmp_path / "out"]
    printed = refused(capsys, "data_prep.encode_latents", *given, *flags.format(**folders).split())
    assert re.search(message, printed), printed
    assert not (tmp_path / "out").exists()


WHOLE = "diffusion_pytorch_model.safetensors"
NAME = "decoder.conv_in.bias"


def in_shards(folder) -> None:
    """A small VAE in files with an index."""
    kl(2).save_pretrained(folder, max_shard_size="20KB")
    assert (folder / f"{WHOLE}.index.json").exists() and not (folder / WHOLE).exists()


def change(folder, edit, *, pickled: bool = False) -> None:
    """Edit the tensors of the file that holds NAME, whatever the index says; or make it one that torch.save writes."""
    index = folder / f"{WHOLE}.index.json"
    file = folder / (json.loads(index.read_text())["weight_map"][NAME] if index.exists() else WHOLE)
    tensors = load_file(file)
    edit(tensors)
    file.unlink()
    if pickled:
        torch.save(tensors, file.with_suffix(".bin"))
        index.write_text(index.read_text().replace(file.name, file.with_suffix(".bin").name))
    else:
        save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors: tensors.pop(NAME), f"weights are missing or of other shapes, e.g. {NAME}"),
        (
            lambda tensors: tensors.update(new=torch.zeros(2)),
            "it holds weights that no such AutoencoderKL has, e.g. new",
        ),
    ],
)
def test_the_weights_are_those_that_the_files_hold(tmp_path, edit, message, pickled):
    """Not those that an index names: diffusers fills what then is missing with whatever the memory held."""
    in_shards(tmp_path / "vae")
    whole = load_vae(str(tmp_path / "vae")).state_dict()
    change(tmp_path / "vae", lambda tensors: None, pickled=pickled)
    for name, value in load_vae(str(tmp_path / "vae")).state_dict().items():
        assert torch.equal(value, whole[name])
    shutil.rmtree(tmp_path / "vae")
    in_shards(tmp_path / "vae")
    change(tmp_path / "vae", edit, pickled=pickled)
    with pytest.raises(InputError, match=re.escape(f"VAE {tmp_path / 'vae'}: {message}")):
        load_vae(str(tmp_path / "vae"))


def test_the_hub_s_weights_are_those_that_its_files_hold(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--org--pipeline/snapshots" / (40 * "a")
    in_shards(snapshot / "vae")
    (tmp_path / "models--org--pipeline/refs").mkdir()
    (tmp_path / "models--org--pipeline/refs/main").write_text(40 * "a")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert latent_space(load_vae("org/pipeline/vae")).channels == 4
    change(snapshot / "vae", lambda tensors: tensors.pop(NAME))
    with pytest.raises(InputError, match=f"VAE org/pipeline/vae: weights are missing .*{NAME}"):
        load_vae("org/pipeline/vae")


def test_older_names_of_a_single_file_s_weights_are_known(tmp_path):
    kl(2).save_pretrained(tmp_path)
    new = load_vae(str(tmp_path)).state_dict()
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(tensors):
        for name in list(tensors):
            for now, before in older.items():
                if f"attentions.0.{now}." in name:
                    tensors[name.replace(now, before)] = tensors.pop(name)

    change(tmp_path, rename)
    assert "decoder.mid_block.attentions.0.query.weight" in load_file(tmp_path / WHOLE)
    for name, value in load_vae(str(tmp_path)).state_dict().items():
        assert torch.equal(value, new[name])


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            torch.ones(8, dtype=torch.int8),
            "cannot be loaded .*floating point .*|VAE .* weights are not floating-point numbers",
        ),
        (torch.tensor([0.0] * 7 + [math.nan]), "weights are not finite as float32"),
        (torch.tensor([0.0] * 7 + [-math.inf], dtype=torch.bfloat16), "weights are not finite as float32"),
        (torch.tensor([0.0] * 7 + [1e300], dtype=torch.float64), "weights are not finite as float32"),
    ],
)
def test_the_weights_are_numbers(tmp_path, value, message, shards):
    in_shards(tmp_path) if shards else kl(2).save_pretrained(tmp_path)
    change(tmp_path, lambda tensors: tensors.update({NAME: value}))
    with pytest.raises(InputError, match=rf"^VAE .* {message}.*{re.escape(NAME)}"):
        load_vae(str(tmp_path))


@pytest.mark.parametrize(
    ("key", "text"),
    [
        *(("scaling_factor", text) for text in ("0", "-0.18", "NaN", "Infinity", "1e999", '"much"', "true", "[1]")),
        *(("shift_factor", text) for text in ("NaN", "-Infinity", '"0"', "1" + 400 * "0")),
    ],
)
def test_scale_and_shift_are_numbers(tmp_path, key, text):
    kl(2).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {key: "HERE"}
    (tmp_path / "config.json").write_text(json.dumps(config).replace('"HERE"', text))
    positive = " > 0" if key == "scaling_factor" else ""
    with pytest.raises(
        InputError, match=rf"^VAE .*: {key} of its config\.json is .*; it should be a finite number{positive}$"
    ):
        load_vae(str(tmp_path))


@pytest.mark.parametrize("kind", ["flux"], indirect=True)
@pytest.mark.parametrize(
    ("change", "overrides", "message"),
    [
        ({}, ["model.in_channels=4"], r"shape \[32, 8, 8\].*takes \[8, 8, 8\].*encode with a VAE of 4 channels"),
        ({}, ["model.input_size=16"], "encode images of the size that fits"),
        ({"posterior": False}, [], r"takes \[16, 8, 8\]"),
        ({}, ["data.latent_shift=0"], "by a VAE of shift 0.1159, but data.latent_shift of recipe digits is 0.0"),
        ({}, ["data.latent_scale=0.2"], "by a VAE of scale 0.3611, but"),
        ({"scale": None}, [], "names no scale of its latents; set data.latent_scale"),
        ({"shift": "much"}, [], "cannot be read as a manifest"),
    ],
)
def test_shards_of_another_autoencoder_are_refused(kind, change, overrides, message, shards, tmp_path):
    manifest = json.loads((shards / "manifest.json").read_text()) | change
    for record in manifest["shards"]:
        (tmp_path / record["name"]).symlink_to(shards / record["name"])
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=message):
        check_manifest(read_manifest(tmp_path), recipe_for(KINDS[kind][2], SIZE, *overrides))


@pytest.mark.parametrize("kind", ["kl"], indirect=True)
def test_older_manifests_mean_what_they_meant(kind, shards, tmp_path):
    manifest = json.loads((shards / "manifest.json").read_text())
    for record in manifest["shards"]:
        (tmp_path / record["name"]).symlink_to(shards / record["name"])
    old = {key: value for key, value in manifest.items() if key not in ("shift", "posterior")}
    (tmp_path / "manifest.json").write_text(json.dumps(old))
    assert replace(read_manifest(tmp_path), folder=shards) == read_manifest(shards)


@pytest.mark.parametrize("kind", ["flux"], indirect=True)
def test_a_decoder_of_other_channels_is_refused(kind, vae):
    recipe = recipe_for(replace(KINDS[kind][2], channels=4), SIZE, "data.latent_scale=1")
    with pytest.raises(InputError, match="has 16 latent channels and the model makes 4"):
        load_decoder(resolve(arguments("--vae", vae), recipe), recipe)


# ----------------------------------------------------------------------------------------------------------------------
# 512 pixels


def test_512_pixels_in_pixel_space(tmp_path, monkeypatch):
    """JiT on patches of 32: 256 tokens, as with 256 pixels and patches of 16."""
    shards = tmp_path / "shards"
    call(
        pack_pixels,
        monkeypatch,
        "--images",
        write_images(tmp_path / "images", 512, 560),
        "--size",
        512,
        "--out",
        shards,
    )
    sizes = ["model.input_size=512", "model.patch_size=32", "model.depth=2", "model.hidden_size=16"]
    sizes += ["model.num_heads=2", "model.in_context_start=1", "data.workers=0", "global_batch_size=2"]
    recipe, manifest = load_recipe("jit_b_16", sizes), read_manifest(shards)
    check_manifest(manifest, recipe)
    assert recipe.model.tokens == 16 * 16 + 32
    model = build_model(recipe)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _, batch in zip(range(2), batches(recipe, manifest, 2, 0, World()), strict=False):
        inputs = training_inputs(recipe, batch, Latents.of(recipe, manifest))
        assert inputs["x"].shape == (2, 3, 512, 512) and inputs["x"].abs().max() <= 1
        flow = build_flow(recipe)
        loss = flow.loss(model, inputs["x"], inputs["y"], noise=inputs["noise"], t=flow.times(inputs["u"]))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert loss.isfinite()
    moved = [name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])]
    assert "x_embedder.proj1.weight" in moved and "final_layer.linear.weight" in moved
    images = generate(model.eval(), recipe, resolve(arguments("--steps", 1), recipe), None, torch.arange(1))
    assert images.shape == (1, 3, 512, 512)
