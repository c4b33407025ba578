"""Show a run in one HTML file: loss, expert load, samples, scores and recipe. It needs no network and no other file."""

import base64
import html
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_dit.runtime.command import Parser, run
from moe_dit.runtime.errors import InputError
from moe_dit.runtime.progress import say

EXAMPLES = """\
  python -m eval.report --run RUN --out report.html
  python -m eval.report --run RUN --samples SAMPLES --scores SAMPLES/metrics.json --out report.html
"""
POINTS = 1500  # of a curve: more than a screen can show
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 860, 300, 64, 44, 12, 28
LARGEST_IMAGE = 1280  # pixels; a bigger grid of samples is scaled down

STYLE = """
:root { color-scheme: light dark; --back: #ffffff; --text: #1c1e21; --faint: #6a7078; --line: #dfe3e8; --card: #f6f7f9;
  --accent: #2563c9; --over: #2563c9; --under: #d9731a; }
@media (prefers-color-scheme: dark) { :root { --back: #14161a; --text: #e6e8eb; --faint: #9aa2ac; --line: #31363e;
  --card: #1c2026; --accent: #6ba4ff; --over: #6ba4ff; --under: #f0a050; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 920px; padding: 32px 24px 64px; background: var(--back); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 18px; margin: 40px 0 8px; }
p { margin: 4px 0 12px; color: var(--faint); }
dl.facts { display: flex; flex-wrap: wrap; gap: 12px; margin: 20px 0 0; }
dl.facts div { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 8px 14px; }
dt { color: var(--faint); font-size: 12px; } dd { margin: 0; font-size: 17px; font-variant-numeric: tabular-nums; }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--faint); font-size: 12px; }
.grid { stroke: var(--line); } .raw { stroke: var(--accent); stroke-width: .7; opacity: .3; fill: none; }
.smooth { stroke: var(--accent); stroke-width: 2; fill: none; stroke-linejoin: round; }
.over { fill: var(--over); } .under { fill: var(--under); } .cell { stroke: var(--line); stroke-width: .5; }
table { border-collapse: collapse; } td { border-bottom: 1px solid var(--line); padding: 5px 28px 5px 0;
  font-variant-numeric: tabular-nums; } td:first-child { color: var(--faint); }
img { max-width: 100%; height: auto; border-radius: 8px; border: 1px solid var(--line); }
details { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px 14px; }
summary { cursor: pointer; } pre { overflow-x: auto; font-size: 13px; }
"""

# --- reading ----------------------------------------------------------------------------------------------------------


def read_metrics(run_folder: Path) -> list[dict[str, Any]]:
    """The records of RUN/metrics.jsonl by step; lines that are not whole records (a run still writing) are left out.

    Raises:
        InputError: no such file, or no record in it.
    """
    file = run_folder / "metrics.jsonl"
    try:
        lines = file.read_text(errors="replace").splitlines()
    except OSError:
        raise InputError(f"no {file}; --run should be a folder that jobs/train.py made") from None
    records = {}
    for line in lines:
        try:
            record = json.loads(line)
            # A step that was repeated after a stop counts as it was last computed.
            records[int(record["step"])] = record
        except (ValueError, KeyError, TypeError):
            continue
    if not records:
        raise InputError(f"{file} holds no step yet; let the run make one first")
    return [records[step] for step in sorted(records)]


def curve(records: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of a key, where it is a finite number."""
    steps, values = [], []
    for record in records:
        value = record.get(key)
        if isinstance(value, int | float) and math.isfinite(value):
            steps.append(record["step"])
            values.append(float(value))
    return steps, values


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Exponential moving average over about ``window`` values, unbiased at the start."""
    keep, average, weight, result = 1 - 1 / max(window, 1), 0.0, 0.0, []
    for value in values:
        average, weight = keep * average + (1 - keep) * value, keep * weight + (1 - keep)
        result.append(average / weight)
    return result


def data_uri(file: Path) -> str:
    """An image file as a data URI; a large one scaled down."""
    from PIL import Image

    try:
        image = Image.open(file).convert("RGB")
    except (OSError, ValueError, SyntaxError):
        raise InputError(f"{file} is not an image; eval.sample writes it") from None
    buffer = io.BytesIO()
    if max(image.size) > LARGEST_IMAGE:
        image.thumbnail((LARGEST_IMAGE, LARGEST_IMAGE))
        image.save(buffer, "JPEG", quality=92)
        kind = "jpeg"
    else:
        image.save(buffer, "PNG")
        kind = "png"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


# --- drawing ----------------------------------------------------------------------------------------------------------


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round numbers that divide [low, high] into about ``count`` parts."""
    span = (high - low) or abs(high) or 1.0
    step = 10 ** math.floor(math.log10(span / count))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= count)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten in [low, high]; powers alone where that is many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    found = [value for value in found if low <= value <= high]
    return found if len(found) <= 9 else [value for value in found if math.log10(value).is_integer()]


def line_chart(steps: list[int], values: list[float], label: str) -> str:
    """An SVG of values over steps: raw thin, smoothed thick; logarithmic where values span more than a decade."""
    # The first steps and rare spikes would flatten everything else.
    ordered = sorted(values)
    low, high = ordered[0], ordered[min(len(ordered) - 1, math.ceil(0.999 * len(ordered)))]
    log = low > 0 and high / low > 10
    if log:
        low, high = low / 1.1, high * 1.1
        marks = log_ticks(low, high)
        scaled_low, scaled_high = math.log10(low), math.log10(high)
    else:
        margin = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
        low, high = low - margin, high + margin
        marks = ticks(low, high)
        scaled_low, scaled_high = low, high

    def x(step: float) -> float:
        return LEFT + (step - steps[0]) / max(steps[-1] - steps[0], 1) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        value = min(max(value, low), high)
        share = ((math.log10(value) if log else value) - scaled_low) / (scaled_high - scaled_low)
        return HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP)

    def path(series: Sequence[float], kind: str) -> str:
        stride = max(1, len(series) // POINTS)
        kept = sorted({*range(0, len(series), stride), len(series) - 1})
        points = " ".join(f"{x(steps[i]):.1f},{y(series[i]):.1f}" for i in kept)
        return f'<polyline class="{kind}" points="{points}"/>'

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label} over steps">']
    for mark in marks:
        at = f"{y(mark):.1f}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{at}" text-anchor="end" dominant-baseline="middle">{mark:.4g}</text>')
    for mark in ticks(steps[0], max(steps[-1], steps[0] + 1)):
        parts.append(f'<text x="{x(mark):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{mark:,.0f}</text>')
    window = max(1, len(values) // 50)
    parts += [path(values, "raw"), path(smooth(values, window), "smooth")]
    middle = (HEIGHT - BOTTOM + TOP) / 2
    parts.append(f'<text x="{(WIDTH + LEFT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">step</text>')
    name = f"{label} (log scale)" if log else label
    parts.append(f'<text transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">{name}</text></svg>')
    return "".join(parts)


def heat_map(load: list[list[float]]) -> str:
    """An SVG of the share of tokens of each layer's experts, against an even share; stronger is further from it."""
    columns = max(len(layer) for layer in load)
    side = min(34.0, (WIDTH - LEFT - RIGHT - 30) / columns)
    top = 26
    height = top + side * len(load) + 40
    parts = [f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="expert load by layer and expert">']

    def cell(x: float, y: float, ratio: float, tip: str, side: float = side) -> str:
        kind = "over" if ratio >= 1 else "under"
        opacity = min(1.0, abs(math.log2(max(ratio, 1e-6))) / 2)
        box = f'x="{x:.1f}" y="{y:.1f}" width="{side:.1f}" height="{side:.1f}"'
        return f'<rect class="cell {kind}" fill-opacity="{opacity:.2f}" {box}><title>{tip}</title></rect>'

    for column in range(0, columns, max(1, math.ceil(26 / side))):
        parts.append(f'<text x="{LEFT + (column + 0.5) * side:.1f}" y="{top - 8}" text-anchor="middle">{column}</text>')
    for row, layer in enumerate(load):
        y = top + row * side
        parts.append(
            f'<text x="{LEFT - 8}" y="{y + side / 2:.1f}" text-anchor="end" dominant-baseline="middle">{row}</text>'
        )
        for column, share in enumerate(layer):
            tip = f"MoE layer {row}, expert {column}: {share:.2%} of the tokens"
            parts.append(cell(LEFT + column * side, y, share * len(layer), tip))
    y, x = top + len(load) * side + 14, LEFT
    for ratio, name in (
        (0.25, "a quarter of an even share"),
        (0.5, "half"),
        (1.0, "even"),
        (2.0, "double"),
        (4.0, "4x"),
    ):
        parts.append(cell(x, y, ratio, name, 18))
        parts.append(f'<text x="{x + 24:.1f}" y="{y + 9:.1f}" dominant-baseline="middle">{name}</text>')
        x += 24 + 7 * len(name) + 18
    parts.append(f'<text x="14" y="{top - 8}">layer</text>')
    parts.append(f'<text x="{LEFT + columns * side + 8:.1f}" y="{top - 8}">expert</text></svg>')
    return "".join(parts)


# --- the page ---------------------------------------------------------------------------------------------------------


def last_load(records: list[dict[str, Any]]) -> tuple[int, list[list[float]]] | None:
    """The step and value of the last recorded expert load."""
    for record in reversed(records):
        load = record.get("expert_load")
        if isinstance(load, list) and load and all(isinstance(layer, list) and layer for layer in load):
            return record["step"], load
    return None


def section(title: str, note: str, body: str) -> str:
    """A part of the page; note is plain text."""
    return f"<h2>{title}</h2>" + (f"<p>{html.escape(note)}</p>" if note else "") + body


def report(run_folder: Path, samples: Path | None, scores: Path | None) -> str:
    """The page.

    Args:
        run_folder: a run with metrics.jsonl and config.yaml.
        samples: a folder with samples.png, or None.
        scores: a file that eval.score wrote, or None.

    Raises:
        InputError: one of them is not what it should be.
    """
    records = read_metrics(run_folder)
    steps, losses = curve(records, "loss")
    if not steps:
        raise InputError(f"{run_folder}/metrics.jsonl holds no finite loss; the run has diverged from its first step")
    recent = losses[-max(1, len(losses) // 50) :]
    facts = {"steps": f"{records[-1]['step']:,}", "loss, last 2%": f"{sum(recent) / len(recent):.4g}"}
    _, speeds = curve(records, "images_per_second")
    if speeds:
        facts["images per second (median)"] = f"{sorted(speeds)[len(speeds) // 2]:,.4g}"
    parts = [section("Loss", "Thin: every step. Thick: smoothed.", line_chart(steps, losses, "loss"))]

    imbalance_steps, imbalance = curve(records, "moe_imbalance")
    load = last_load(records)
    if load:
        note = f"Share of tokens of each expert at step {load[0]:,}, against an even share."
        parts.append(section("Expert load", note, heat_map(load[1])))
    if imbalance:
        facts["imbalance, last"] = f"{imbalance[-1]:.3g}"
        note = "Largest over mean tokens of an expert, in the worst layer; 1 is even."
        chart = line_chart(imbalance_steps, imbalance, "imbalance")
        parts.append(section("Expert imbalance", note, chart))
    if samples is not None:
        grid = samples / "samples.png"
        if not grid.exists():
            raise InputError(f"no {grid}; --samples should be a folder that eval.sample finished")
        parts.append(section("Samples", "", f'<img alt="samples" src="{data_uri(grid)}">'))
    if scores is not None:
        parts.append(section("Scores", "", _scores_table(scores)))
    config = run_folder / "config.yaml"
    if config.exists():
        text = html.escape(config.read_text())
        parts.append(section("Recipe", "", f"<details><summary>config.yaml</summary><pre>{text}</pre></details>"))
    title = html.escape(run_folder.absolute().name)
    listed = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts.items())
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>'
        f'<body><h1>{title}</h1><dl class="facts">{listed}</dl>{"".join(parts)}</body></html>\n'
    )


def _scores_table(file: Path) -> str:
    from eval.score import rows

    try:
        result = json.loads(file.read_text())
        shown = rows(result) + [(key, str(value)) for key, value in result.get("sampling", {}).items()]
    except OSError:
        raise InputError(f"no scores {file}; eval.score writes them") from None
    except (ValueError, AttributeError, TypeError):
        raise InputError(f"{file} does not hold scores; eval.score writes them") from None
    hidden = ("model_sha256", "vae_sha256", "num", "features", "save")
    cells = (
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>"
        for name, value in shown
        if name not in hidden or (name, value) in rows(result)
    )
    return f"<table>{''.join(cells)}</table>"


def main() -> None:
    from eval.features import write_atomically

    parser = Parser(__doc__, EXAMPLES)
    add = parser.add_argument
    add("--run", type=Path, required=True, metavar="RUN", help="a run folder of jobs/train.py")
    add("--samples", type=Path, metavar="SAMPLES", help="a folder of eval.sample")
    add("--scores", type=Path, metavar="FILE.json", help="what eval.score wrote")
    add("--out", type=Path, required=True, metavar="report.html", help="file to write")
    args = parser.parse_args()
    if not args.out.absolute().parent.is_dir():
        raise InputError(f"there is no folder {args.out.parent} for --out {args.out}; make it first")
    page = report(args.run, args.samples, args.scores)
    write_atomically(args.out, lambda file: file.write(page.encode()))
    say(f"report in {args.out}")


if __name__ == "__main__":
    run(main)
