"""Makes .gpu, what tests/gpu.sh needs beyond the tree: python tests/gpu/pack.py [--wheels]

The digits as latent shards, their autoencoder, and a CPU's losses on them; with --wheels also the packages that a GPU
machine without network is likely to lack (Python 3.12, x86-64; torch, torchvision and timm are taken to be there).
Some MB, which git ignores: carry the folder along with the tree. What is there and of this code is not made again;
code.json says which code that is.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
ROOT = Path(__file__).parents[2]
PACKED = ROOT / ".gpu"
# What DeepSpeed, diffusers, webdataset and torch-fidelity need beside torch and timm; all are published as wheels.
WHEELS = """
    pydantic annotated-types typing-inspection typing-extensions diffusers webdataset braceexpand hjson einops
    msgpack ninja psutil py-cpuinfo regex requests certifi urllib3 idna charset-normalizer importlib-metadata
    zipp tqdm packaging
"""
PLATFORM = ["--python-version", "3.12", "--implementation", "cp"]
for _platform in ("2_28", "2_27", "2_17"):
    PLATFORM += ["--platform", f"manylinux_{_platform}_x86_64"]
PLATFORM += ["--platform", "manylinux2014_x86_64", "--only-binary=:all:"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--wheels", action="store_true", help="also wheels for a machine without network")
    args = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
    os.chdir(ROOT)
    from results import digest

    from moe_dit.runtime.machine import commit

    PACKED.mkdir(exist_ok=True)
    if args.wheels:
        make_wheels()
    code = PACKED / "code.json"
    now = digest(ROOT)
    if code.exists() and json.loads(code.read_text())["digest"] == now:
        return  # all is there, and of this code
    if not (PACKED / "shards" / "manifest.json").exists():
        make_shards()
    make_curve()
    replace(code, {"commit": commit(), "digest": now})
    size = sum(file.stat().st_size for file in PACKED.rglob("*") if file.is_file() and "compiled" not in file.parts)
    print(f"{PACKED}: {size / 1e6:.1f} MB")


def make_shards() -> None:
    """The digits' latents, and the autoencoder that made them."""
    from data_prep import digits

    with tempfile.TemporaryDirectory() as images:
        digits.write_images(Path(images) / "images")
        if not (PACKED / "vae").exists():
            digits.write_autoencoder(Path(images) / "images", PACKED / "vae", steps=30, seed=0)
        flags = [
            "--images",
            f"{images}/images",
            "--vae",
            str(PACKED / "vae"),
            "--size",
            "32",
            "--out",
            str(PACKED / "shards"),
        ]
        subprocess.run([sys.executable, "-m", "data_prep.encode_latents", *flags], check=True)


def make_curve() -> None:
    """The losses of a CPU's float32 steps, of the settings of parts/training.py."""
    import torch
    from parts import training

    from moe_dit.engine import Engine, start_ranks
    from moe_dit.manifest import read_manifest
    from moe_dit.parallel.deepspeed_config import load_parallelism

    start_ranks()
    recipe = training.digits("fp32")
    engine = Engine(recipe, load_parallelism(training.ONE_RANK, recipe, 1), torch.device("cpu"))
    losses = training.train(engine, read_manifest(PACKED / "shards"), 0, training.STEPS)
    replace(PACKED / "curve.json", {"loss": losses, "torch": torch.__version__})


def replace(file: Path, value: object) -> None:
    """Write a JSON file, whole or not at all."""
    new = file.with_name(f".{file.name}")
    new.write_text(json.dumps(value))
    new.replace(file)


def make_wheels() -> None:
    """Download what is published as wheels for that Python, and build the rest, which is Python alone."""
    folder = PACKED / "wheels"
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.whl"):
        old.unlink()
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]

    def download(*names: str) -> None:
        subprocess.run([*pip, "download", "--no-deps", *PLATFORM, "-d", str(folder), *names], check=True)

    wanted = (ROOT / "requirements.txt").read_text().splitlines()
    pinned = {line.split("==")[0]: line.split(" ")[0] for line in wanted if "==" in line}
    download(*WHEELS.split(), pinned["torch-fidelity"])
    wheel = next(folder.glob("pydantic-*.whl"))
    # It takes one exact pydantic-core.
    metadata = subprocess.check_output(["unzip", "-p", str(wheel), "*/METADATA"], text=True)
    download(next(line.split(": ")[1] for line in metadata.splitlines() if "pydantic-core==" in line).strip())
    # DeepSpeed is published as source alone; without compiled operators it is Python.
    subprocess.run([*pip, "wheel", "--no-deps", "-w", str(folder), pinned["deepspeed"]], check=True)


if __name__ == "__main__":
    main()
