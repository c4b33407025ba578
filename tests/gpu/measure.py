"""The speed of S, B and L on this GPU, by jobs/bench.py: OUT/bench.json, and OUT/bench.md for docs/performance.md."""

import datetime
import json
import subprocess
import sys
from pathlib import Path

import torch

RECIPES = ("dsmoe_s_e16", "dsmoe_b_e16", "dsmoe_l_e16")
LIMIT = 150  # seconds for a recipe


def main(out: Path) -> int:
    results, failed = {}, []
    for name in RECIPES:
        file = out / f"{name}.json"
        command = ["jobs/bench.py", "--recipe", name, "--device", "cuda", "--json", str(file)]
        try:
            done = subprocess.run([sys.executable, *command], timeout=LIMIT)
        except subprocess.TimeoutExpired:
            failed.append(f"{name}: over {LIMIT} s")
            continue
        if done.returncode:
            failed.append(f"{name}: status {done.returncode}")
        else:
            results[name] = {"command": " ".join(["python", *command]), **json.loads(file.read_text())}
    gpu, date = torch.cuda.get_device_name(), datetime.date.today().isoformat()
    (out / "bench.json").write_text(json.dumps({"gpu": gpu, "date": date, "recipes": results}, indent=1))
    lines = [f"{gpu}, {date}, torch {torch.__version__}; `bash tests/gpu.sh`", "", "| recipe | what | value |"]
    lines += ["|---|---|---|"]
    for name, result in results.items():
        lines += [
            f"| {name} | {key} | {value} |" for key, value in result.items() if not isinstance(value, dict | list)
        ]
    (out / "bench.md").write_text("\n".join(lines) + "\n")
    print("\n".join([*lines, *failed]))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
