"""Show a run in one HTML file: losses, expert load, routing, samples, scores and recipe.

It needs no network and no other file.
"""

import base64
import html
import io
import json
import os
import re
from pathlib import Path
from typing import Any

from PIL import Image

from eval.atlas_file import load_atlas
from eval.atlas_page import atlas_parts
from eval.plots import bars, heat_map, line_chart, printable
from moe_dit.runtime.command import Parser, run
from moe_dit.runtime.errors import InputError
from moe_dit.runtime.files import check_new_file, explained, write_bytes
from moe_dit.runtime.progress import say

EXAMPLES = """\
  python -m eval.report --run RUN --out report.html
  python -m eval.report --run RUN --samples SAMPLES --scores SAMPLES/metrics.json --atlas ATLAS \\
      --out report.html
"""
LOOK = re.compile(r"step_(\d+)\.png")
BEGINNING = '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>'
SUMMARY = '<dl class="summary">'
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
dl.summary { display: flex; flex-wrap: wrap; gap: 12px; margin: 20px 0 0; }
dl.summary div { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 8px 14px; }
dt { color: var(--faint); font-size: 12px; } dd { margin: 0; font-size: 17px; font-variant-numeric: tabular-nums; }
h3 { font-size: 15px; margin: 28px 0 4px; }
svg { display: block; width: 100%; height: auto; font-family: inherit; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
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
    records: dict[int, dict[str, Any]] = {}
    for line in lines:
        try:
            record = json.loads(line)
            step = record["step"]
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        if type(step) is int and abs(step) < 2**53:  # an axis is of floats
            # A step that was repeated after a stop counts as it was last computed; one may also have several lines.
            named = {printable(key): value for key, value in record.items()}
            records[step] = records.get(step, {}) | named
    if not records:
        raise InputError(f"{file} holds no step yet; let the run make one first")
    return [records[step] for step in sorted(records)]


def curve(records: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of a key, where it is a finite number."""
    steps = []
    values = []
    for record in records:
        if key in record and _is_number(record[key]):
            steps.append(record["step"])
            values.append(float(record[key]))
    return steps, values


def _is_number(value: Any) -> bool:
    """Whether a value is a finite number that a curve can be drawn of."""
    return type(value) in (int, float) and abs(value) < 1e100


def data_uri(file: Path) -> str:
    """An image file as a data URI; a large one scaled down."""
    try:
        image = Image.open(file).convert("RGB")
    except Exception:  # decoders raise whatever they meet
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


# --- the page ---------------------------------------------------------------------------------------------------------


def last_load(records: list[dict[str, Any]]) -> tuple[int, list[list[float]]] | None:
    """The step and value of the last recorded expert load."""
    for record in reversed(records):
        load = record.get("expert_load")
        if isinstance(load, list) and load and all(_is_list_of_numbers(layer) for layer in load):
            return record["step"], load
    return None


def section(title: str, note: str, body: str, heading: str = "h2") -> str:
    """A part of the page; note is plain text."""
    return f"<{heading}>{html.escape(title)}</{heading}>" + (f"<p>{html.escape(note)}</p>" if note else "") + body


def report(run_folder: Path, samples: Path | None, scores: Path | None, atlas: Path | None = None) -> str:
    """The page.

    Args:
        run_folder: a run with metrics.jsonl and config.yaml, and perhaps looks/step_*.png.
        samples: a folder with samples.png, or None.
        scores: a file that eval.score wrote, or None.
        atlas: a file that eval.atlas wrote, or None.

    Raises:
        InputError: one of them is not what it should be.
    """
    records = read_metrics(run_folder)
    steps, losses = curve(records, "loss")
    if not steps:
        raise InputError(f"{run_folder}/metrics.jsonl holds no finite loss; the run has diverged from its first step")
    recent = losses[-max(1, len(losses) // 50) :]
    summary = {"steps": f"{records[-1]['step']:,}", "loss, last 2%": f"{sum(recent) / len(recent):.4g}"}
    _, speeds = curve(records, "images_per_second")
    if speeds:
        summary["images per second (median)"] = f"{sorted(speeds)[len(speeds) // 2]:,.4g}"
    _, held_out = curve(records, "held_out_loss")
    if held_out:
        summary["held-out loss, last"] = f"{held_out[-1]:.4g}"
    _, imbalance = curve(records, "moe_imbalance")
    if imbalance:
        summary["imbalance, last"] = f"{imbalance[-1]:.3g}"

    parts = [section("Loss", "Thin: every step. Thick: smoothed.", line_chart(steps, losses, "loss"))]
    parts += _more_losses(records)
    parts += _experts(records)
    if atlas is not None:
        parts.append(section("Routing atlas", "Which experts the model sends real samples' tokens to.", ""))
        parts += [section(*part, heading="h3") for part in atlas_parts(load_atlas(atlas))]
    parts += _looks(run_folder, records)
    if samples is not None:
        grid = samples / "samples.png"
        if not os.path.exists(grid):
            raise InputError(f"no {grid}; --samples should be a folder that eval.sample finished")
        parts.append(section("Samples", "", f'<img alt="samples" src="{data_uri(grid)}">'))
    if scores is not None:
        parts.append(section("Scores", "", _scores_table(scores)))
    config = run_folder / "config.yaml"
    if config.is_file():
        text = html.escape(config.read_text(errors="replace"))
        parts.append(section("Recipe", "", f"<details><summary>config.yaml</summary><pre>{text}</pre></details>"))
    title = html.escape(run_folder.absolute().name)
    listed = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in summary.items())
    return (
        f"{BEGINNING}{title}</title>"
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>'
        f"<body><h1>{title}</h1>{SUMMARY}{listed}</dl>{''.join(parts)}</body></html>\n"
    )


def _more_losses(records: list[dict[str, Any]]) -> list[str]:
    """The held-out loss, and the terms that the loss is made of, where the run has them."""
    parts = []
    steps, held_out = curve(records, "held_out_loss")
    if held_out:
        note = "Of samples that are never trained on: where it rises while the loss falls, the model learns by heart."
        parts.append(section("Held-out loss", note, line_chart(steps, held_out, "held-out loss")))
    by_time = [record for record in records if _is_list_of_numbers(record.get("held_out_loss_by_time"))]
    if by_time:
        note = f"At step {by_time[-1]['step']:,}, for equal parts of t: which noise levels the loss is made of."
        drawing = bars(by_time[-1]["held_out_loss_by_time"], "held-out loss", "t (0 noise, 1 data)")
        parts.append(section("Held-out loss by time", note, drawing))
    keys = sorted({key for record in records for key in record if key == "mse" or key.endswith("_loss")})
    for key in keys:
        steps, values = curve(records, key)
        if values and key != "held_out_loss":
            parts.append(section(f"Loss term {key}", "", line_chart(steps, values, key)))
    return parts


def _is_list_of_numbers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(_is_number(v) for v in value)


def _experts(records: list[dict[str, Any]]) -> list[str]:
    """Load and imbalance of the experts in training."""
    parts = []
    load = last_load(records)
    if load:
        note = f"Share of tokens of each expert at step {load[0]:,}, against an even share."
        parts.append(section("Expert load", note, heat_map(load[1])))
    steps, imbalance = curve(records, "moe_imbalance")
    if imbalance:
        note = "Largest over mean tokens of an expert, in the worst layer; 1 is even."
        parts.append(section("Expert imbalance", note, line_chart(steps, imbalance, "imbalance")))
    return parts


def _looks(run_folder: Path, records: list[dict[str, Any]]) -> list[str]:
    """What the run showed of itself on its way: the newest picture, and scores of the looks over steps."""
    body = ""
    numbered = {int(found[1]): file for file in run_folder.glob("looks/step_*.png") if (found := LOOK.match(file.name))}
    if numbered:
        newest = max(numbered)
        body += f'<p>Step {newest:,}.</p><img alt="samples at step {newest}" src="{data_uri(numbered[newest])}">'
    for key in sorted({key for record in records for key in record if key.startswith("look_")}):
        steps, values = curve(records, key)
        if values:
            body += line_chart(steps, values, key.removeprefix("look_"))
    return [section("Looks", "Small samples taken during training.", body)] if body else []


def _scores_table(file: Path) -> str:
    from eval.score import read_scores, rows  # with torch's metrics it takes seconds to import

    result = read_scores(file)
    shown = rows(result) + [(key, str(value)) for key, value in result.get("sampling", {}).items()]
    hidden = ("model_sha256", "vae_sha256", "num", "features", "save")
    cells = (
        f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>"
        for name, value in shown
        if name not in hidden or (name, value) in rows(result)
    )
    return f"<table>{''.join(cells)}</table>"


def _is_report(file: Path) -> bool:
    """Whether a file is a page that :func:`report` made."""
    page = file.read_bytes()
    return page.startswith(BEGINNING.encode()) and SUMMARY.encode() in page


def main() -> None:
    parser = Parser(__doc__ or "", EXAMPLES)
    add = parser.add_argument
    add("--run", type=Path, required=True, metavar="RUN", help="a run folder of jobs/train.py")
    add("--samples", type=Path, metavar="SAMPLES", help="a folder of eval.sample")
    add("--scores", type=Path, metavar="FILE.json", help="what eval.score wrote")
    add("--atlas", type=Path, metavar="ATLAS", help="what eval.atlas wrote")
    add("--out", type=Path, required=True, metavar="report.html", help="file to write")
    args = parser.parse_args()
    check_new_file(args.out, _is_report)
    page = report(args.run, args.samples, args.scores, args.atlas)
    with explained(str(args.out)):
        write_bytes(args.out, page.encode(errors="replace"))  # a folder's name may be no Unicode
    say(f"report in {args.out}")


if __name__ == "__main__":
    run(main)
