"""What a run's files say of it, drawn for a terminal.

Everything is read anew for each picture, by seeking, and nothing is written; neither torch nor DeepSpeed is imported.
So this works over ssh, on any machine that sees the run's folder, and as soon as it is called.
"""

import math
import os
import statistics
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.progress_bar import ProgressBar
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from moe_dit.charts import FAINT, chart, heat_map
from moe_dit.events import events
from moe_dit.records import FAR, Record, Records, is_number
from moe_dit.runtime.errors import InputError
from moe_dit.runtime.reading import read_bytes, read_json, read_yaml
from moe_dit.runtime.wording import duration, printable
from moe_dit.status import read_status

POINTS = 200  # of a curve: two a column of a wide terminal
RECENT = 50  # records that the speed is a mean of
QUIET_SECONDS = 60.0  # without news from a run that trains are told of, and at least 10 steps
LOOK_KEYS = ("held_out_loss", "look_fid", "look_inception_score", "look_kid", "look_precision", "look_recall",
             "look_label_agreement")  # fmt: skip
STYLES = ("bright_blue", "dark_orange", "green3", "magenta", "cyan", "yellow", "red", "white")  # of runs in one chart
STATES = {"training": "green3", "stopping": "yellow", "stopped": "yellow", "done": "bright_blue", "failed": "bold red"}
HAPPENED = {"failed": "bold red", "hang": "bold red", "straggler": "yellow", "slow": "yellow", "done": "green3"}
TIMES = {"seconds": "a step", "data": "waiting for data", "compute": "computing, until the first collective",
         "exchange": "exchanging tokens"}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """What a run's files say at a moment; what they do not say is empty."""

    name: str
    state: str  # status.json's
    message: str
    steps: int | None  # to be done
    batch: float  # images a step
    first: int  # step that is recorded
    recent: list[Record]  # the last ones
    curve: list[Record]  # means, over the whole run
    load: list[list[float]]
    looked: Record  # the newest record with what was found at a look
    events: list[dict[str, Any]]
    memory: dict[str, list[int]]  # bytes by rank
    ranks: dict[str, Any]  # ranks.json
    skipped: int | None  # images that encoding left out; None where nothing tells
    starts: bool  # it trains, and its last start has recorded no step
    now: float  # this and the following are seconds since 1970, by whichever clock
    begun: float  # when its last start began, as far as it is known
    heard: float  # when the last of its news came
    changed: float  # when its state last changed

    @property
    def step(self) -> int:
        return self.recent[-1]["step"] if self.recent else 0

    @property
    def seconds_a_step(self) -> float | None:
        """The mean of the recent steps."""
        speeds: list[Any] = [record.get("images_per_second") for record in self.recent]
        times = [self.batch / speed for speed in speeds if is_number(speed) and speed > 0 and self.batch > 0]
        return statistics.fmean(times) if times else None

    @property
    def left(self) -> float | None:
        """Seconds until the last step at the recent speed, of a run that trains."""
        if self.state != "training" or self.steps is None or self.seconds_a_step is None:
            return None
        return max(0, self.steps - self.step) * self.seconds_a_step

    def doing(self) -> Text:
        """The state in words; how long nothing was heard of a run that says that it trains."""
        state = self.state or "state unknown"
        text = Text("starting" if self.starts else state, STATES.get(self.state, ""))
        if self.state not in ("training", "stopping"):
            return text
        quiet = self.now - self.heard
        if quiet > max(QUIET_SECONDS, 10 * (self.seconds_a_step or 0)):
            text.append(f", no news for {duration(quiet)}", "yellow")
        elif quiet < -QUIET_SECONDS:
            text.append(f", by a clock {duration(-quiet)} ahead of this one", "yellow")
        return text


def read_run(folder: Path, now: float) -> Run:
    """Read what a run's files say.

    Args:
        folder: the run.
        now: the time, in seconds since 1970.

    Raises:
        InputError: it is no run.
    """
    if os.path.isdir(folder) and not os.access(folder, os.R_OK | os.X_OK):
        raise InputError(f"{folder} cannot be looked into: it is another user's, and closed to you")
    if not any(os.path.isfile(folder / name) for name in ("config.yaml", "status.json", "metrics.jsonl")):
        raise InputError(f"{folder} is no run of jobs/train.py: it has no config.yaml, status.json or metrics.jsonl")
    status, config = read_status(folder), _config(folder / "config.yaml")
    recent: list[Record] = []
    curve: list[Record] = []
    load: Any = None
    looked: Record = {}
    first, written = 0, 0.0
    with suppress(OSError), Records(folder / "metrics.jsonl") as records:
        recent, curve = records.last(RECENT), records.thinned(POINTS)
        load = (records.newest("expert_load", FAR) or {}).get("expert_load")
        looked = _looked(records, recent, config.get("looks"))
        first = records.following(0, 1)[0]["step"] if curve else 0
        written = os.stat(folder / "metrics.jsonl").st_mtime if recent else 0.0
    told: list[dict[str, Any]] = []
    with suppress(OSError):
        told = [event for event in events(folder) if math.isfinite(event["time"])]
    changed: Any = status["time"] if is_number(status.get("time")) else 0.0
    begun = [event for event in told if event["what"] == "started"][-1:]
    # By what came after what, and not by times: clocks are set back, and differ.
    trains, this = status.get("state") == "training", bool(begun) and begun[0]["start"] == status.get("start")
    steps_since = bool(recent) and not (
        begun and type(begun[0]["step"]) is int and recent[-1]["step"] <= begun[0]["step"]
    )
    starts = trains and not (steps_since and (this or not begun))
    heard = (begun[0]["time"] if this else changed) if starts else written if trains else changed
    batch: Any = config.get("global_batch_size")
    steps, data = config.get("steps"), config.get("data")
    return Run(
        name=printable(folder.absolute().name),
        state=printable(str(status.get("state", ""))),
        message=printable(str(status.get("message", ""))),
        steps=steps if type(steps) is int and steps > 0 else None,
        batch=batch if is_number(batch) else 0.0,
        first=first,
        recent=recent,
        curve=curve,
        load=load if _is_load(load) else [],
        looked=looked,
        events=told,
        memory=_memory(_json(folder / "memory.json")),
        ranks=_ranks(_json(folder / "ranks.json")),
        skipped=_lines(data.get("path") if isinstance(data, dict) else None),
        starts=starts,
        now=now,
        begun=changed if starts and not this else begun[0]["time"] if begun else 0.0,
        heard=heard,
        changed=changed,
    )


def _json(file: Path) -> Any:
    """A file's value; None where there is none."""
    try:
        return read_json(file)
    except (OSError, ValueError):
        return None


def _config(file: Path) -> dict[str, Any]:
    """A run's recipe, as far as it can be read."""
    try:
        found = read_yaml(file, errors="replace")
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _looked(records: Records, recent: list[Record], looks: Any) -> Record:
    """The newest record with what a look found: at a multiple of ``looks.every``, or else near the end."""
    every = looks.get("every") if isinstance(looks, dict) else 0
    if not recent or type(every) is not int or every <= 0:
        return {}
    found = records.at(recent[-1]["step"] // every * every) or {}
    if not any(key in found for key in LOOK_KEYS):  # looks came at other steps before the last start
        found = records.newest("held_out_loss", FAR) or records.newest("look_fid", FAR) or {}
    return found


def _is_load(load: Any) -> bool:
    """Whether a value is shares by layer and expert."""
    lists = isinstance(load, list) and bool(load) and all(isinstance(layer, list) and layer for layer in load)
    return lists and all(is_number(share) for layer in load for share in layer)


def _memory(found: Any) -> dict[str, list[int]]:
    """Bytes by kind, of each rank."""
    if not isinstance(found, list) or not all(isinstance(rank, dict) for rank in found):
        return {}
    kinds = {kind: [rank.get(kind) for rank in found] for kind in ("weights", "master", "state")}
    return {kind: sizes for kind, sizes in kinds.items() if sizes and all(type(size) is int for size in sizes)}


def _ranks(found: Any) -> dict[str, Any]:
    """ranks.json, as far as it is numbers of every rank."""
    if not isinstance(found, dict) or not isinstance(hosts := found.get("hosts"), list) or not hosts:
        return {}
    kept = {
        key: values
        for key in (*TIMES, "memory_gb")
        if isinstance(values := found.get(key), list) and len(values) == len(hosts) and all(map(is_number, values))
    }
    return kept | {"hosts": [printable(str(host)) for host in hosts], "step": found.get("step")} if kept else {}


def _lines(shards: Any) -> int | None:
    """Images that are listed as left out beside a folder of shards."""
    try:
        return read_bytes(Path(shards) / "errors.jsonl").count(b"\n")
    except (OSError, TypeError, ValueError):
        return None


# --- drawing ----------------------------------------------------------------------------------------------------------


def picture(runs: Sequence[Run], width: int, colours: bool = True) -> RenderableType:
    """One run in full, or several beside each other and then each in what does not compare.

    Args:
        runs: at least one.
        width: of the terminal, in columns.
        colours: whether it has them.
    """
    if len(runs) == 1:
        return Group(*_head(runs[0]), *_charts(runs[0], width, colours), "", *_details(runs[0], width, colours))
    parts: list[RenderableType] = [_table(runs, colours)]
    curves = [(_curve(run, "loss"), _style(i), _letter(i)) for i, run in enumerate(runs)]
    parts += [
        "",
        chart("loss", curves, (min(run.first for run in runs), max(run.step for run in runs)), width, 14, colours),
    ]
    for i, run in enumerate(runs):
        parts += ["", Rule(Text(run.name, _style(i)), align="left", style=FAINT)]
        parts += _details(run, width, colours, most_events=3)
    return Group(*parts)


def _style(i: int) -> str:
    return STYLES[i % len(STYLES)]


def _letter(i: int) -> str:
    return chr(ord("a") + i % 26)


def _curve(run: Run, key: str) -> list[tuple[float, float]]:
    return [(record["step"], record[key]) for record in run.curve if key in record]


def _progress(run: Run) -> str:
    return f"{run.step:,}" if run.steps is None else f"{run.step:,} / {run.steps:,}"


def _head(run: Run) -> list[RenderableType]:
    """Name and state, how far it is, and times."""
    line = Table.grid(expand=True)
    line.add_column(no_wrap=True, ratio=1, overflow="ellipsis")
    line.add_column(no_wrap=True, justify="right")
    line.add_row(Text.assemble((run.name, "bold"), "  ", run.doing()), f"step {_progress(run)}")
    times = []
    if run.left is not None and run.recent:
        times.append(f"{duration(run.left)} left at the recent speed")
    if run.begun:
        starts = sum(event["what"] == "started" for event in run.events)
        times.append(f"started {_ago(run, run.begun)}" + (f", for the {_nth(starts)} time" if starts > 1 else ""))
    if run.state in ("stopped", "done", "failed"):
        times.append(f"{run.state} {_ago(run, run.changed)}")
    parts: list[RenderableType] = [line]
    if run.steps is not None:
        bar = Table.grid(expand=True)  # a bar alone would not end its line
        bar.add_row(
            ProgressBar(total=run.steps, completed=run.step, complete_style=STYLES[0], finished_style=STYLES[0])
        )
        parts.append(bar)
    parts.append(Text(" · ".join(times), FAINT, no_wrap=True, overflow="ellipsis"))
    if run.state == "failed" and run.message:
        parts.append(Text(run.message, "red", no_wrap=True, overflow="ellipsis"))
    return parts


def _nth(n: int) -> str:
    return f"{n}{'th' if n % 100 in (11, 12, 13) else {1: 'st', 2: 'nd', 3: 'rd'}.get(n % 10, 'th')}"


def _ago(run: Run, time: float) -> str:
    ahead = time > run.now + QUIET_SECONDS  # by another clock
    return f"{duration(time - run.now)} ahead" if ahead else f"{duration(max(0.0, run.now - time))} ago"


def _charts(run: Run, width: int, colours: bool) -> list[RenderableType]:
    """The loss and the speed, side by side where there is room."""

    def one(key: str, name: str, style: int, columns: int, lines: int) -> Text:
        return chart(name, [(_curve(run, key), _style(style), "")], (run.first, run.step), columns, lines, colours)

    if width < 76:
        return ["", one("loss", "loss", 0, width, 10), one("images_per_second", "images/s", 2, width, 7)]
    right = max(32, width * 2 // 5)
    pair = Table.grid(padding=(0, 2, 0, 0))
    pair.add_row(one("loss", "loss", 0, width - right - 2, 11), one("images_per_second", "images/s", 2, right, 11))
    return ["", pair]


def _details(run: Run, width: int, colours: bool, most_events: int = 6) -> list[RenderableType]:
    """Numbers of the last step, what happened, ranks, experts, memory and scores."""
    parts: list[RenderableType] = []
    last = run.recent[-1] if run.recent else {}
    shown = [
        _number(name, last.get(key), form)
        for key, name, form in (
            ("loss", "loss", ".4g"),
            ("lr", "learning rate", ".4g"),
            ("grad_norm", "gradient norm", ".4g"),
            ("images_per_second", "images/s", ",.4g"),
            ("data_wait", "waiting for data", ".1%"),
            ("moe_imbalance", "imbalance", ".4g"),
        )
    ]
    parts += _listed("", shown, width)
    looked = [
        _number(key.removeprefix("look_").replace("held_out", "held-out").replace("_", " "), run.looked.get(key), ".4g")
        for key in LOOK_KEYS
    ]
    if any(looked):
        parts += _listed(f"look at step {run.looked['step']:,}", looked, width)
    memory = [_item(kind, _range(sizes)) for kind, sizes in run.memory.items() if any(sizes)]
    parts += _listed("a rank's memory", memory, width)
    if run.skipped is not None:
        parts.append(_item("images skipped while encoding", f"{run.skipped:,}"))
    if run.events:
        parts += ["", _events(run, most_events)]
    if run.ranks:
        parts += ["", _rank_table(run.ranks)]
    if run.load:
        dead = sum(share <= 0 for layer in run.load for share in layer)
        title = Text.assemble(("experts' share of tokens, a line a layer", "bold"))
        title.append(f"  {dead} got none" if dead else "", "bold red")
        parts += ["", title, heat_map(run.load, width, colours)]
    return parts


def _number(name: str, value: Any, form: str) -> Text | None:
    """A name and a number; None where there is none."""
    if is_number(value):
        return _item(name, format(value, form))
    return _item(name, str(value), "bold red") if isinstance(value, float) else None


def _item(name: str, value: str, style: str = "") -> Text:
    return Text.assemble((f"{name} ", FAINT), (value, style), no_wrap=True)


def _listed(title: str, items: Sequence[Text | None], width: int) -> list[Text]:
    """What there is of some items, in as many lines as they take; nothing where there is none."""
    lines: list[Text] = []
    for item in items:
        if item is not None and lines and lines[-1].cell_len + 3 + item.cell_len <= width:
            lines[-1].append("   ").append_text(item)
        elif item is not None:
            start = Text.assemble((f"{title}   " if title and not lines else "", "bold"), item)
            start.no_wrap, start.overflow = True, "ellipsis"
            lines.append(start)
    return lines


def _range(sizes: Sequence[int]) -> str:
    """Sizes of all ranks: one, or the least and the most."""
    low, high = decimal(min(sizes)), decimal(max(sizes))
    return low if low == high else f"{low} to {high}"


def _events(run: Run, most: int) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0), expand=True)
    table.add_column(no_wrap=True, justify="right", style=FAINT)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, ratio=1, overflow="ellipsis", style=FAINT)
    for event in run.events[-most:]:
        what, message = printable(event["what"]), printable(event["message"])
        at = f"step {event['step']:,}" if type(event["step"]) is int else ""
        said = ": ".join(part for part in (at, message) if part)
        table.add_row(_ago(run, event["time"]), Text(what, HAPPENED.get(what, "")), Text(said))
    return table


def _rank_table(found: dict[str, Any]) -> Table:
    """Median and highest of each number of the ranks."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, overflow="ellipsis")
    for _ in range(2):
        table.add_column(no_wrap=True, justify="right")
    table.add_column(no_wrap=True, overflow="ellipsis", style=FAINT)
    count = len(found["hosts"])
    table.add_row(Text(f"{count} rank{'s' * (count > 1)}", "bold"), Text("median", FAINT), Text("most", FAINT), "")
    for key, name in (*TIMES.items(), ("memory_gb", "memory")):
        if key in found:
            unit = "GB" if key == "memory_gb" else "s"
            most = max(found[key])
            rank = found[key].index(most)
            where = f"rank {rank} ({found['hosts'][rank]})" if count > 1 else f"({found['hosts'][rank]})"
            table.add_row(name, f"{statistics.median(found[key]):.4g} {unit}", f"{most:.4g} {unit}", where)
    return table


def _table(runs: Sequence[Run], colours: bool) -> Table:
    """A row a run."""
    table = Table(box=box.SIMPLE_HEAD, expand=True, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("run", no_wrap=True, overflow="ellipsis", ratio=3)
    table.add_column("state", no_wrap=True, overflow="ellipsis", ratio=3)
    for name in ("step", "loss", "images/s", "left"):
        table.add_column(name, no_wrap=True, overflow="ellipsis", justify="right")
    for i, run in enumerate(runs):
        last = run.recent[-1] if run.recent else {}
        numbers = [
            format(last[key], ",.4g") if is_number(last.get(key)) else "" for key in ("loss", "images_per_second")
        ]
        mark = "●" if colours else _letter(i)
        left = duration(run.left) if run.left is not None else ""
        table.add_row(Text.assemble((f"{mark} ", _style(i)), run.name), run.doing(), _progress(run), *numbers, left)
    return table
