"""Show a run in one HTML file: scores, losses, speed, expert load, routing, samples beside real images, and recipe.

It needs no network and no other file.
"""

import base64
import html
import io
import os
import re
from bisect import bisect_right
from contextlib import suppress
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from eval.atlas_file import Atlas, load_atlas
from eval.atlas_page import atlas_parts
from eval.plots import HALF, WIDTH, bars, heat_map, line_chart
from eval.published import SAMPLES, published
from moe_dit.classes import are_numbers, labels_among
from moe_dit.events import events
from moe_dit.records import Records, is_number
from moe_dit.runtime.command import Parser, run
from moe_dit.runtime.errors import InputError
from moe_dit.runtime.files import check_new_file, explained, write_bytes
from moe_dit.runtime.progress import say
from moe_dit.runtime.reading import MOST_YAML, open_file, parse_yaml, read_bytes, read_json
from moe_dit.runtime.wording import duration, printable

EXAMPLES = """\
  python -m eval.report --run RUN --out report.html
  python -m eval.report --run RUN --samples SAMPLES --scores SAMPLES/metrics.json --atlas ATLAS \\
      --real imagenet256_pixels --inception FILE.pth --out report.html
"""
LOOK = re.compile(r"step_(\d+)\.png")
BEGINNING = '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>'
SUMMARY = '<dl class="summary">'
WHOLE = 32 << 20  # bytes of metrics.jsonl, some 150,000 steps; of a longer one, records spread over it are read
FIRST, EVEN, RISING = 300, 3000, 1000  # of those: the first ones, how many evenly spread, how many ever farther apart
LARGEST_IMAGE = 1280  # pixels; a bigger grid of samples is scaled down
SMALLEST_SHOWN = 96  # pixels across of an image that is to be judged

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
.wide { overflow-x: auto; } .wide > svg { min-width: 680px; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); gap: 8px 24px; }
.phone { display: none; }
@media (max-width: 720px) { body { padding: 20px 12px 48px; } .phone { display: block; } .desk { display: none; } }
p.score { color: var(--text); font-size: 17px; } p.score b { font-size: 26px; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; } th { text-align: left; font-weight: 500; color: var(--faint); padding: 5px 28px 5px 0; }
.beside { display: flex; flex-wrap: wrap; gap: 8px 20px; align-items: flex-end; margin: 0 0 20px; }
.beside figure { margin: 0; } figcaption { color: var(--faint); font-size: 12px; }
.beside img { image-rendering: pixelated; margin-right: 4px; }
svg * { stroke-linejoin: round; stroke-linecap: butt; }
table { border-collapse: collapse; } td { border-bottom: 1px solid var(--line); padding: 5px 28px 5px 0;
  font-variant-numeric: tabular-nums; } td:first-child { color: var(--faint); }
img { max-width: 100%; height: auto; border-radius: 8px; border: 1px solid var(--line); }
details { margin-top: 12px; background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 10px 14px; }
summary { cursor: pointer; }
pre { overflow-x: auto; font-size: 13px; }
"""

# --- reading ----------------------------------------------------------------------------------------------------------


def read_metrics(run_folder: Path) -> list[dict[str, Any]]:
    """The records of RUN/metrics.jsonl by step; lines that are not whole records (a run still writing) are left out.

    Of a file longer than WHOLE some are read, as many as curves can show, and all with what was found at looks.

    Raises:
        InputError: no such file, or no record in it.
    """
    file = run_folder / "metrics.jsonl"
    try:
        with Records(file) as read:
            found = list(read.all()) if read.size <= WHOLE else _spread(read)
    except OSError:
        raise InputError(f"no {file}; --run should be a folder that jobs/train.py made") from None
    records: dict[int, dict[str, Any]] = {}
    for record in found:
        # A step that was repeated after a stop counts as it was last computed; one may also have several lines.
        named = {printable(key): value for key, value in record.items()}
        records[record["step"]] = records.get(record["step"], {}) | named
    if not records:
        raise InputError(f"{file} holds no step yet; let the run make one first")
    return [records[step] for step in sorted(records)]


def _spread(records: Records) -> list[dict[str, Any]]:
    """Of a long run: its first records, some spread over it for curves over steps and over their logarithm, the last,
    all with what is found at looks, and the newest load of the experts."""
    first, last = records.following(0, FIRST), records.last()
    if not last:
        return []
    begin = FIRST / max(last[0]["step"], FIRST)
    places = {i / EVEN for i in range(EVEN)} | {begin ** (i / RISING) for i in range(1, RISING)}
    load = records.newest("expert_load", 1 << 20)
    found = [*first, *records.at_places(sorted(places)), *records.having("look_", "held_out_loss"), *last]
    return [*found, load] if load else found


def curve(records: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of a key, where it is a finite number."""
    steps = []
    values = []
    for record in records:
        if key in record and is_number(record[key]):
            steps.append(record["step"])
            values.append(float(record[key]))
    return steps, values


def data_uri(file: Path) -> str:
    """An image file as a data URI; a large one scaled down."""
    try:
        with open_file(file) as opened:
            image = Image.open(opened).convert("RGB")
    except Exception:  # decoders raise whatever they meet
        raise InputError(f"{file} is not an image; eval.sample writes it") from None
    return _image_uri(image)


def _image_uri(image: Image.Image) -> str:
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


def report(
    run_folder: Path,
    samples: Path | None,
    scores: Path | None,
    atlas: Path | None = None,
    real: Path | None = None,
    inception: str | None = None,
) -> str:
    """The page.

    Args:
        run_folder: a run with metrics.jsonl and config.yaml, and perhaps looks/step_*.png.
        samples: a folder with samples.png, or None.
        scores: a file that eval.score wrote, or None.
        atlas: a file that eval.atlas wrote, or None.
        real: labelled images to show beside the samples, or None.
        inception: weights of the network by whose features the nearest are found; None: a fitted classifier.

    Raises:
        InputError: one of them is not what it should be.
    """
    records = read_metrics(run_folder)
    steps, losses = curve(records, "loss")
    if not steps:
        raise InputError(f"{run_folder}/metrics.jsonl holds no finite loss; the run has diverged from its first step")
    settings, text = _config(run_folder)
    classes = None if real is None and atlas is None else _classes(run_folder, samples)
    parts = []
    if scores is not None:
        parts.append(section("Scores", "", _scores(scores, str(settings.get("name", "")))))
    shown = "every step" if records[-1]["step"] - records[0]["step"] < len(records) else "single steps"
    note = f"Thin: {shown}. Thick: the mean of its neighbours on both sides. Both axes are logarithmic."
    drawn = [line_chart(steps, losses, "loss", width, log_steps=True) for width in (WIDTH, HALF)]
    both = f'<div class="desk">{drawn[0]}</div><div class="phone">{drawn[1]}</div>'
    parts.append(section("Loss", note, both))
    parts += _more_losses(records)
    parts.append(_course(records))
    parts += _experts(records)
    if samples is not None:
        grid = samples / "samples.png"
        if not os.path.exists(grid):
            raise InputError(f"no {grid}; --samples should be a folder that eval.sample finished")
        parts.append(section("Samples", "", f'<img alt="samples" src="{data_uri(grid)}">'))
        if real is not None:
            parts.append(_beside(samples, real, inception, classes))
    parts += _looks(run_folder, records)
    if atlas is not None:
        parts.append(section("Routing atlas", "Which experts the model sends real samples' tokens to.", ""))
        drawn_parts = atlas_parts(_atlas(atlas, classes))
        parts += [section(name, note, _wide(body), heading="h3") for name, note, body in drawn_parts]
    if text is not None:
        shown = f"<details><summary>config.yaml</summary><pre>{html.escape(text)}</pre></details>"
        parts.append(section("Recipe", "", shown))
    title = html.escape(run_folder.absolute().name)
    summary = _summary(run_folder, records, settings)
    listed = "".join(f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>" for name, value in summary)
    return (
        f"{BEGINNING}{title}</title>"
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>'
        f"<body><h1>{title}</h1>{SUMMARY}{listed}</dl>{''.join(parts)}</body></html>\n"
    )


def _wide(drawing: str) -> str:
    """A drawing that is moved sideways where the page is narrow."""
    return f'<div class="wide">{drawing}</div>'


def _config(run_folder: Path) -> tuple[dict[str, Any], str | None]:
    """A run's recipe, as far as it can be read, and config.yaml as it stands."""
    try:
        text = read_bytes(run_folder / "config.yaml", MOST_YAML).decode("utf-8-sig", "replace")
    except (OSError, ValueError):
        return {}, None
    try:
        found = parse_yaml(text)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {}, text


def _classes(run_folder: Path, samples: Path | None) -> list[str] | None:
    """The names of the classes of the samples' model, or else of the run's newest checkpoint; None where none says."""
    from eval.sample_folder import read_settings  # these bring in torch, which a page without them need not wait for
    from moe_dit.export import checkpoint_classes
    from moe_dit.lineage import find_checkpoint

    with suppress(InputError):  # a page shows what is left of a run
        made = read_settings(samples) if samples is not None else None
        if made is not None and "classes" in made:
            return made["classes"]
        checkpoint = find_checkpoint(run_folder)
        return None if checkpoint is None else checkpoint_classes(checkpoint)
    return None


def _atlas(file: Path, classes: list[str] | None) -> Atlas:
    """An atlas, which is of these classes where they have names (InputError)."""
    atlas = load_atlas(file)
    names = atlas.classes.tolist()
    if classes is None:
        return atlas
    labels_among(names, classes, f"the atlas {file}", "the model of this page")
    return replace(atlas, classes=np.array(classes[: len(names)])) if are_numbers(names) else atlas


def _starts(run_folder: Path) -> list[dict[str, Any]]:
    """What the run's starts were computed with; none for older runs."""
    try:
        found = read_json(run_folder / "starts.json")
    except (OSError, ValueError):
        return []
    return [start for start in found if isinstance(start, dict)] if isinstance(found, list) else []


def _summary(run_folder: Path, records: list[dict[str, Any]], settings: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and values at the page's head."""
    summary = [("steps", f"{records[-1]['step']:,}")]
    steps, losses = curve(records, "loss")
    recent = losses[bisect_right(steps, steps[-1] - max(1, (steps[-1] - steps[0] + 1) // 50)) :]
    summary.append(("loss, last 2%", f"{sum(recent) / len(recent):.4g}"))
    steps, speeds = curve(records, "images_per_second")
    if speeds:
        # Each stands for the steps behind the one before, of which few are read where a run is long.
        lasted = [1, *(after - before for before, after in pairwise(steps))]
        ordered = sorted(zip(speeds, lasted, strict=True))
        passed = list(accumulate(steps_of for _, steps_of in ordered))
        median = ordered[bisect_right(passed, passed[-1] / 2)][0]
        summary.append(("images per second (median)", f"{median:,.4g}"))
        batch: Any = settings.get("global_batch_size")
        if is_number(batch):
            summary.append(("training time", duration(sum(n * batch / speed for speed, n in ordered if speed > 0))))
    for key, name in (("held_out_loss", "held-out loss, last"), ("moe_imbalance", "imbalance, last")):
        _, values = curve(records, key)
        if values:
            summary.append((name, f"{values[-1]:.4g}" if key == "held_out_loss" else f"{values[-1]:.3g}"))
    starts = _starts(run_folder)
    if starts:
        last = starts[-1]
        if is_number(last.get("parameters")) and is_number(last.get("activated")):
            summary.append(
                ("parameters, activated", f"{last['parameters'] / 1e6:,.4g} M, {last['activated'] / 1e6:,.4g} M")
            )
        summary.append(
            (
                "computed by",
                f"{last.get('ranks', '?')} x {last.get('machine', '?')}, {last.get('precision', '?')}, ZeRO "
                f"{last.get('zero_stage', '?')}, EP {last.get('expert_parallel', '?')}",
            )
        )
        summary.append(("starts", f"{len(starts)}, the first {starts[0].get('date', '?')}"))
        changed = [event["message"] for event in events(run_folder) if event["what"] == "changed"]
        summary += [("changed on the way", "; ".join(changed))] if changed else []
        summary.append(("code", f"{str(last.get('commit') or 'unknown')[:12]}, torch {last.get('torch', '?')}"))
    return summary


def _course(records: list[dict[str, Any]]) -> str:
    """How the rest went over steps, two drawings side by side."""
    drawings = []
    for key, name in (
        ("lr", "learning rate"),
        ("grad_norm", "gradient norm"),
        ("images_per_second", "images per second"),
        ("moe_imbalance", "imbalance"),
        ("data_wait", "wait for data"),
    ):
        steps, values = curve(records, key)
        if values:
            drawings.append(line_chart(steps, values, name, HALF))
    note = "Imbalance: largest over mean tokens of an expert, in the worst layer; 1 is even."
    return section(
        "Course", note, f'<div class="pair">{"".join(f"<div>{drawing}</div>" for drawing in drawings)}</div>'
    )


def _beside(samples: Path, real: Path, inception: str | None, classes: list[str] | None) -> str:
    """Samples beside real images of their class."""
    from eval.neighbours import comparisons  # brings in networks, which a page without it need not wait for

    rows = ""
    for found in comparisons(samples, real, inception, classes):
        side = max(SMALLEST_SHOWN, min(256, found.sample.shape[0]))
        kinds = (
            (html.escape(f"sample of class {printable(found.name)}"), [found.sample]),
            ("real, of its class", found.real),
        )
        figures = ""
        for name, images in (*kinds, ("nearest real ones", found.nearest)):
            shown = "".join(
                f'<img alt="{name}" width="{side}" height="{side}" src="{_image_uri(Image.fromarray(image))}">'
                for image in images
            )
            figures += f"<figure>{shown}<figcaption>{name}</figcaption></figure>"
        rows += f'<div class="beside">{figures}</div>'
    note = "A sample that equals its nearest real image was learned by heart; features are those of the scores."
    return section("Samples beside real images", note, rows)


def _more_losses(records: list[dict[str, Any]]) -> list[str]:
    """The held-out loss, and the terms that the loss is made of, where the run has them."""
    parts = []
    steps, held_out = curve(records, "held_out_loss")
    if held_out:
        note = "Of samples that are never trained on: where it rises while the loss falls, the model learns by heart."
        parts.append(section("Held-out loss", note, _wide(line_chart(steps, held_out, "held-out loss"))))
    by_time = [record for record in records if _is_list_of_numbers(record.get("held_out_loss_by_time"))]
    if by_time:
        note = f"At step {by_time[-1]['step']:,}, for equal parts of t: which noise levels the loss is made of."
        drawing = bars(by_time[-1]["held_out_loss_by_time"], "held-out loss", "t (0 noise, 1 data)")
        parts.append(section("Held-out loss by time", note, _wide(drawing)))
    keys = sorted({key for record in records for key in record if key == "mse" or key.endswith("_loss")})
    for key in keys:
        steps, values = curve(records, key)
        if values and key != "held_out_loss":
            parts.append(section(f"Loss term {key}", "", _wide(line_chart(steps, values, key))))
    return parts


def _is_list_of_numbers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(is_number(v) for v in value)


def _experts(records: list[dict[str, Any]]) -> list[str]:
    """Load of the experts in training, the dead ones named."""
    load = last_load(records)
    if load is None:
        return []
    dead = [f"{i}.{j}" for i, layer in enumerate(load[1]) for j, share in enumerate(layer) if share == 0]
    note = f"Share of tokens of each expert at step {load[0]:,}, against an even share. "
    some = ", ".join(dead[:20]) + (", ..." if len(dead) > 20 else "")
    note += f"Without a token (layer.expert): {some}." if dead else "Every expert gets tokens."
    return [section("Expert load", note, _wide(heat_map(load[1])))]


def _looks(run_folder: Path, records: list[dict[str, Any]]) -> list[str]:
    """What the run showed of itself on its way: the newest picture, and scores of the looks over steps."""
    body = ""
    numbered = {int(found[1]): file for file in run_folder.glob("looks/step_*.png") if (found := LOOK.match(file.name))}
    if numbered:
        newest = max(numbered)
        body += f'<p>Step {newest:,}.</p><img alt="samples at step {newest}" src="{data_uri(numbered[newest])}">'
    drawings = ""
    for key in sorted({key for record in records for key in record if key.startswith("look_")}):
        steps, values = curve(records, key)
        if values:
            drawings += f"<div>{line_chart(steps, values, key.removeprefix('look_'), HALF)}</div>"
    body += f'<div class="pair">{drawings}</div>' if drawings else ""
    return [section("Looks", "Small samples taken during training.", body)] if body else []


def _scores(file: Path, recipe: str) -> str:
    """What a scores file says: in words, beside what is published of the recipe, and whole."""
    from eval.score import read_scores, rows  # with torch's metrics it takes seconds to import

    result = read_scores(file)
    sampling = result.get("sampling", {})
    interval = result.get("fid_interval")
    between = f" (95%: {interval[0]:.4g} to {interval[1]:.4g})" if interval else ""
    count = f"{result['num_samples']:,} samples"
    count += f" against {result['num_reference']:,} real images" if result.get("num_reference") else ""
    words = f"FID <b>{result['fid']:.4g}</b>{between} of {count}, by {html.escape(str(result['features']))}"
    words += f", protocol {html.escape(str(result.get('protocol', 'fidelity')))}."
    body = f'<p class="score">{words}</p>' + _published(result, sampling, recipe)
    hidden = ("model_sha256", "vae_sha256", "num", "features", "save", "classes")
    how = [(key, str(value)) for key, value in sampling.items() if key not in hidden]
    body += f'<div class="scroll">{_table(rows(result))}</div>'
    if how:
        body += f'<details><summary>how they were sampled</summary><div class="scroll">{_table(how)}</div></details>'
    return body


def _table(rows: list[tuple[str, str]]) -> str:
    cells = (f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>" for name, value in rows)
    return f"<table>{''.join(cells)}</table>"


def _published(result: dict[str, Any], sampling: dict[str, Any], recipe: str) -> str:
    """The paper's numbers of a recipe, and whether these can be compared with them."""
    table = published(recipe)
    if not table:
        return ""
    lines = "".join(
        f"<tr><td>{row.guidance:g}</td><td>{row.fid:g}</td><td>{row.inception_score:g}</td><td>{row.protocol}</td></tr>"
        for row in table
    )
    wrong = []
    if result.get("protocol", "fidelity") != table[0].protocol:
        wrong.append(f"protocol {table[0].protocol}")
    if result["num_samples"] != SAMPLES:
        wrong.append(f"{SAMPLES:,} samples")
    if not str(result["features"]).startswith("Inception V3") or "not comparable" in str(result["features"]):
        wrong.append("Inception V3 with published weights")
    if sampling.get("cfg_scale") not in [row.guidance for row in table]:
        wrong.append(f"guidance {' or '.join(f'{row.guidance:g}' for row in table)}")
    note = f"Not to be compared: these have {', '.join(wrong)}." if wrong else "Scored in the same way as here."
    head = "<tr><th>guidance</th><th>published FID</th><th>Inception Score</th><th>protocol</th></tr>"
    return f'<div class="scroll"><table>{head}{lines}</table></div><p>{note} (arXiv:2512.01252)</p>'


def _is_report(file: Path) -> bool:
    """Whether a file is a page that :func:`report` made."""
    page = read_bytes(file)
    return page.startswith(BEGINNING.encode()) and SUMMARY.encode() in page


def main() -> None:
    parser = Parser(__doc__ or "", EXAMPLES)
    add = parser.add_argument
    add("--run", type=Path, required=True, metavar="RUN", help="a run folder of jobs/train.py")
    add("--samples", type=Path, metavar="SAMPLES", help="a folder of eval.sample")
    add("--scores", type=Path, metavar="FILE.json", help="what eval.score wrote")
    add("--atlas", type=Path, metavar="ATLAS", help="what eval.atlas wrote")
    add("--real", type=Path, metavar="IMAGES", help="labelled real images to show beside --samples: folders or shards")
    add("--inception", metavar="FILE.pth", help="by whose features the nearest are found; else a fitted classifier")
    add("--out", type=Path, required=True, metavar="report.html", help="file to write")
    args = parser.parse_args()
    if args.real is not None and args.samples is None:
        raise InputError("--real shows images beside --samples; give that too")
    check_new_file(args.out, _is_report)
    page = report(args.run, args.samples, args.scores, args.atlas, args.real, args.inception)
    with explained(str(args.out)):
        write_bytes(args.out, page.encode(errors="replace"))  # a folder's name may be no Unicode
    say(f"report in {args.out}")


if __name__ == "__main__":
    run(main)
