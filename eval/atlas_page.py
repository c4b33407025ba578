"""The routing atlas as parts of the report: pictures, each with a sentence on how to read it."""

from collections.abc import Iterator

import numpy as np

from eval import plots
from eval.atlas_file import FEWEST, Atlas, shares

MOST_CLASSES = 20  # shown; of more, those whose routing differs most from the layer's
MOST_LAYERS = 6  # in the large pictures: the first, the last, and some between
MOST_EXPERTS = 16  # maps in a row; of more, those whose use varies most over the image
TIME = "t (0 noise, 1 data)"


def atlas_parts(atlas: Atlas) -> Iterator[tuple[str, str, str]]:
    """Title, note (plain text) and drawing of each part."""
    layers = [f"block {name.split('.')[1]}" if name.count(".") == 2 else name for name in atlas.layers.tolist()]
    experts = atlas.by_time.shape[-1]
    by_time = shares(atlas.by_time)
    even = (float(np.log2(experts)), f"even: {np.log2(experts):.3g} bits")
    yield (
        "Entropy over time",
        f"{_source(atlas)} Entropy of the experts' shares of tokens in each MoE layer: at the dashed line all "
        f"{experts} experts are used alike, at 0 one takes all; a curve that falls towards one end says that few "
        "experts do the work of those times.",
        _curves(atlas, layers, atlas.entropy, "bits", even),
    )
    if atlas.settings["choice"] == "expert":
        each = atlas.by_time.sum(-1) / atlas.tokens
        yield (
            "Experts a token gets",
            "On average at each time: the experts choose, so that hard times can get more than easy ones.",
            _curves(atlas, layers, each, "experts", (1.0, "one")),
        )
    yield (
        "Experts over time",
        "Share of tokens of each expert (down) at each time (across), beside an even share: a row that changes its "
        "colour from left to right is an expert for noisy or for nearly clean images.",
        _time_maps(layers, by_time * experts, "share of tokens by expert and time"),
    )
    if atlas.class_tokens_by_time.any():
        seen = atlas.class_tokens_by_time.sum((1, 2)) > 0
        ratios = shares(atlas.class_tokens_by_time[seen]) * experts
        yield (
            "Experts of the class tokens over time",
            "The same for the tokens that carry the label and have no place in the image; they are in no other "
            "picture here.",
            _time_maps([name for name, there in zip(layers, seen, strict=True) if there], ratios, "class tokens"),
        )
    yield "Experts over the image", *_positions(atlas, layers)
    yield "Experts by class", *_classes(atlas, layers)
    if (atlas.together * (1 - np.eye(experts, dtype=np.int64))).any():
        yield (
            "Experts together",
            "How often two experts share a token, beside how often they would by chance as much as each is used: "
            "blue pairs work together, orange pairs replace each other; pairs too rare to tell are grey.",
            plots.maps(
                dict(zip(layers, atlas.together_ratio(), strict=True)),
                "co-occurrence of experts",
                "expert",
                "expert",
                columns=4,
            ),
        )


def _source(atlas: Atlas) -> str:
    made = atlas.settings
    return (
        f"{made['samples']:,} samples of {made.get('data', 'the data')} (seed {made['seed']}) at {len(atlas.times)} "
        f"times, through {made.get('model', 'the model')}."
    )


def _curves(atlas: Atlas, layers: list[str], values: np.ndarray, label: str, limit: tuple[float, str]) -> str:
    return plots.lines(atlas.times.tolist(), dict(zip(layers, values.tolist(), strict=True)), label, TIME, limit)


def _time_maps(layers: list[str], ratios: np.ndarray, label: str) -> str:
    height = min(240.0, max(90.0, 10.0 * ratios.shape[-1]))
    panels = {name: layer.T for name, layer in zip(layers, ratios, strict=True)}
    return plots.maps(panels, label, TIME.split()[0], "expert", x_span=(0.0, 1.0), columns=5, height=height)


def _positions(atlas: Atlas, layers: list[str]) -> tuple[str, str]:
    shown, told = _some_layers(len(layers))
    experts = atlas.by_time.shape[-1]
    rows = {}
    for number in shown:
        everywhere = atlas.by_position[number].mean((0, 1))
        with np.errstate(invalid="ignore", divide="ignore"):
            ratios = np.where(everywhere >= FEWEST, atlas.by_position[number] / everywhere, np.nan)
        if experts > MOST_EXPERTS:
            chosen = np.sort(_most(_evidence(atlas.by_position[number].reshape(-1, experts)).sum(0), MOST_EXPERTS))
        else:
            chosen = np.arange(experts)
        rows[layers[number]] = {str(e): ratios[..., e] for e in chosen}
    note = (
        "Where each expert's tokens lie in the image, beside everywhere alike: an expert with a blue middle takes "
        "objects, one with a blue frame backgrounds; an expert too rare to tell is grey."
    )
    if experts > MOST_EXPERTS:
        note += f" Of {experts} experts those {MOST_EXPERTS} of each layer whose use varies most over the image."
    return note + told, plots.tiles(rows, "where each expert's tokens lie in the image")


def _classes(atlas: Atlas, layers: list[str]) -> tuple[str, str]:
    shown, told = _some_layers(len(layers))
    present = np.flatnonzero(atlas.samples_by_class)
    evidence = sum(_evidence(layer).sum(1) for layer in atlas.by_class)
    note = "Share of tokens of each expert for a class, beside its share of all classes: a coloured cell is an expert "
    note += "that the class prefers (blue) or avoids (orange); grey cells are too rare to tell."
    if len(present) > MOST_CLASSES:
        note += f" Of {len(present)} classes those {MOST_CLASSES} whose routing differs most from all others' "
        note += "(likelihood ratio over all layers)."
        present = np.sort(_most(evidence, MOST_CLASSES))
    fewest = int(atlas.samples_by_class[present].min())
    note += f" A class was seen in {fewest:,} samples or more: with few, what is one picture's looks like a class's."
    panels = {}
    for number in shown:
        counts = atlas.by_class[number][present]
        expected = counts.sum(1, keepdims=True) * shares(atlas.by_class[number].sum(0))
        with np.errstate(invalid="ignore", divide="ignore"):
            panels[layers[number]] = np.where(expected >= FEWEST, counts / expected, np.nan)
    names = [_shortened(str(atlas.classes[i])) for i in present]
    height = max(100.0, 16.0 * len(present))
    drawing = plots.maps(panels, "experts by class", "expert", "class", y_names=names, columns=3, height=height)
    return note + told, drawing


def _some_layers(layers: int) -> tuple[list[int], str]:
    """Numbers of the layers to show, and a sentence where they are not all."""
    if layers <= MOST_LAYERS:
        return list(range(layers)), ""
    return np.linspace(0, layers - 1, MOST_LAYERS).round().astype(int).tolist(), f" {MOST_LAYERS} of {layers} layers."


def _evidence(counts: np.ndarray) -> np.ndarray:
    """Each cell's part of the likelihood-ratio statistic of a table [N, E] against independence of rows and columns."""
    expected = counts.sum(1, keepdims=True) * counts.sum(0, keepdims=True) / max(counts.sum(), 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(counts > 0, 2 * counts * np.log(counts / expected), 0.0)


def _most(values: np.ndarray, count: int) -> np.ndarray:
    """Indices of the ``count`` largest; of equals the first."""
    return np.argsort(-values, kind="stable")[:count]


def _shortened(name: str) -> str:
    return name if len(name) <= 18 else name[:17] + "…"
