#!/usr/bin/env python3
"""Hold the project's networks, losses and samplers against recorded outputs of the published reference code.

Usage, from the project's root, in its environment:  python tests/golden/check.py tests/golden/*/

Each case directory has meta.json (hyper-parameters in the reference's own names), reference_state.safetensors (weights
under the reference's own names) and io.safetensors (recorded inputs and outputs, float32, CPU). Prints one line a
quantity and exits 1 if any is off. What the project must offer for it:

    from moe_dit.reference import from_reference
    model, flow = from_reference(meta, state)
    model(x, t, y)                                          # network output, all channels; never drops a label itself
    flow.loss(model, x, y, noise=noise, t=t)                # dict with scalar "loss"; DiffMoE also "mse", "capacity_loss"
    flow.sample(model, z, y, steps=7, method="euler", cfg_scale=1.5, cfg_interval=(0.0, 1.0))
                                                            # noise and z are unit normal; cfg_scale=None: no guidance
"""
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

OUTPUT_TOLERANCE, GRADIENT_TOLERANCE = 2e-5, 2e-4


def relative_error(got, want):
    got, want = got.detach().double(), want.detach().double()
    if got.shape != want.shape or not torch.isfinite(got).all():
        return float("inf")
    return ((got - want).norm() / want.norm().clamp_min(1e-12)).item()


def compare(case, rows):
    from moe_dit.reference import from_reference

    meta = json.loads((case / "meta.json").read_text())
    io = load_file(case / "io.safetensors")

    def build():
        torch.manual_seed(0)
        return from_reference(meta, load_file(case / "reference_state.safetensors"))

    def add(name, got, want, tolerance=OUTPUT_TOLERANCE):
        rows.append((case.name, name, relative_error(got, want), tolerance))

    model, flow = build()
    model.eval()
    with torch.no_grad():
        add("output", model(io["x"], io["t"], io["y"]), io.get("output", io.get("output_eval")))

    def backward(loss):
        model.zero_grad()
        loss.backward()
        got = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
        want = torch.tensor(list(meta["grad_norms"].values())).norm()
        add("gradient norm", got, want, GRADIENT_TOLERANCE)

    if meta["family"] == "DiffMoE":
        model, flow = build()
        model.train()
        terms = flow.loss(model, io["x"], io["y"], noise=io["noise"], t=io["t"])
        add("mse", terms["mse"].reshape(1), io["mse"])
        add("capacity loss", terms["capacity_loss"].reshape(1), io["capacity_loss"])
        backward(terms["loss"])
        want = torch.stack([v for k, v in sorted(io.items()) if k.startswith("after_step.")]).sum()
        got = torch.stack([b for n, b in sorted(model.named_buffers()) if "threshold" in n]).sum()
        add("expert thresholds after a step", got, want)
        return

    jit = meta.get("denoiser")
    noise = io["noise"] / (jit["noise_scale"] if jit else 1.0)
    t = io["t_loss"] if jit else io["t"]
    loss = flow.loss(model, io["x"], io["y_dropped"], noise=noise, t=t)["loss"]
    add("loss", loss.reshape(1), io["loss"])
    backward(loss)
    with torch.no_grad():
        if jit:
            interval = (jit["interval_min"], jit["interval_max"])
            for method in ("euler", "heun"):
                got = flow.sample(model, io["z"], io["y"], steps=jit["num_sampling_steps"], method=method,
                                  cfg_scale=jit["cfg"], cfg_interval=interval)
                add(f"{method} samples", got, io[f"sample_{method}"])
        else:
            for name, steps, method, scale in (("sample_euler7_cfg", 7, "euler", meta["cfg_scale"]),
                                               ("sample_heun5_cfg", 5, "heun", meta["cfg_scale"]),
                                               ("sample_euler7_nocfg", 7, "euler", None)):
                got = flow.sample(model, io["z"], io["y"], steps=steps, method=method, cfg_scale=scale)
                add(name.replace("_", " "), got, io[name])


def main(cases):
    sys.path.insert(0, str(Path.cwd()))
    rows = []
    for case in map(Path, cases):
        try:
            compare(case, rows)
        except Exception as error:
            rows.append((case.name, f"{type(error).__name__}: {error}"[:150], float("inf"), 0.0))
    bad = [row for row in rows if not row[2] <= row[3]]
    for case, name, error, tolerance in rows:
        print(f"{'ok ' if error <= tolerance else 'OFF'} {case:26s} {name:34s} relative error {error:.2e} (allowed {tolerance:.0e})")
    print(f"{len(rows) - len(bad)} of {len(rows)} quantities match the reference")
    return 1 if bad or not rows else 0


if __name__ == "__main__":
    sys.exit(main([path for path in sys.argv[1:] if (Path(path) / "meta.json").exists()]))
