"""Plots of a benchmark run: time and memory against size, speed against the best peer, share of the limit."""

from __future__ import annotations

import collections
import pathlib
import re
from collections.abc import Iterator

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

OURS, PEERS = "#0072B2", ("#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#999999")  # Okabe and Ito's, for all eyes
LOSS = "#D55E00"
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "figure.titlesize": 12,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "savefig.dpi": 150,
}
SIZE = re.compile(r"\b([NMST])(\d+)\b")  # the sequence length in a workload's label


def draw(races: list, folder: pathlib.Path, machine: str) -> Iterator[pathlib.Path]:
    """Write the plots of all ops into the folder; yields their paths."""
    with matplotlib.rc_context(STYLE):
        for name in dict.fromkeys(race.op for race in races):
            timed = [race for race in races if race.op == name and race.timings]
            figures = {"speed": bars(timed), **sizes(timed)}
            for kind, figure in figures.items():
                if figure is None:
                    continue
                figure.suptitle(f"{name} on {machine}", x=0.01, ha="left", weight="bold")
                path = folder / f"{name}-{kind}.png"
                figure.savefig(path)
                yield path


def colors(races: list) -> dict[str, str]:
    """A color for each candidate, ours always the same."""
    ours = {race.ours for race in races}
    peers = sorted({name for race in races for name in race.timings} - ours)
    return {**dict.fromkeys(ours, OURS), **dict(zip(peers, PEERS))}


def bars(races: list):
    """How many times faster than the best peer, and the share of the nearer limit, by workload."""
    races = [race for race in races if race.ratio]
    if not races:
        return None
    figure = Figure(figsize=(11, 1.6 + 0.3 * len(races)))
    left, right = figure.subplots(1, 2, sharey=True)
    rows = range(len(races))
    ratios = [race.ratio.median for race in races]
    spread = [[r.ratio.median - r.ratio.low for r in races], [r.ratio.high - r.ratio.median for r in races]]
    faces = [OURS if ratio >= 1 else LOSS for ratio in ratios]
    left.barh(rows, [ratio - 1 for ratio in ratios], left=1, color=faces, xerr=spread, ecolor="#444444", height=0.7)
    left.axvline(1, color="black", linewidth=1)
    left.set_xscale("log")
    low, high = min(0.75, *ratios) / 1.2, max(1.5, *(race.ratio.high for race in races)) ** 1.2 * 1.3
    left.set_xlim(low, high)
    ticks = [tick for tick in (0.1, 0.2, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 20, 50, 100) if low <= tick <= high]
    left.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
    left.minorticks_off()
    for row, race in enumerate(races):
        at = max(race.ratio.high, 1) * 1.02
        left.text(at, row, f" {race.ratio.median:.2f} × {race.peer}", va="center", fontsize=8, color="#333333")
    labels = [f"{race.workload}{', fwd+bwd' if race.train else ''}, {race.dtype}" for race in races]
    left.set_yticks(rows, labels)
    left.invert_yaxis()
    left.grid(axis="y", visible=False)
    left.set_title("speed against the best peer (quartiles)")

    right.barh([r - 0.18 for r in rows], [100 * r.timings[r.ours].share for r in races], 0.36, color=OURS, label="ours")
    shares = [100 * race.timings[race.peer].share for race in races]
    right.barh([r + 0.18 for r in rows], shares, 0.36, color=PEERS[0], label="best peer")
    for row, race in enumerate(races):
        share = race.timings[race.ours].share
        right.text(100 * share + 1, row - 0.18, f"{share:.0%} {race.limit}", va="center", fontsize=7, color="#333333")
    right.axvline(100, color="black", linewidth=1, linestyle=":")
    right.set_xlim(0, max(110, 1.15 * max(100 * race.timings[race.ours].share for race in races), *shares))
    right.set_xlabel("%")
    right.grid(axis="y", visible=False)
    right.legend(frameon=False, fontsize=8)
    right.set_title("share of the nearer limit, compute or memory")
    return figure


def sizes(races: list) -> dict:
    """For workloads that differ in nothing but a length: time, and memory beside it, against that length."""
    series = collections.defaultdict(list)
    for race in races:
        if found := SIZE.search(race.workload):
            series[SIZE.sub(r"\1", race.workload), race.train].append((int(found[2]), race))
    figures = {}
    for (label, train), points in series.items():
        if len({size for size, _ in points}) < 2:
            continue
        dtypes = list(dict.fromkeys(race.dtype for _, race in points))
        figure = Figure(figsize=(4.6 * len(dtypes) + 1, 6.4))
        axes = figure.subplots(2, len(dtypes), sharex=True, squeeze=False)
        palette = colors([race for _, race in points])
        for (top, bottom), dtype in zip(axes.T, dtypes):
            chosen = sorted(((size, race) for size, race in points if race.dtype == dtype), key=lambda p: p[0])
            for name, color in palette.items():
                line = [(size, race.timings[name]) for size, race in chosen if name in race.timings]
                if not line:
                    continue
                x = [size for size, _ in line]
                style = dict(color=color, marker="o", markersize=4, linewidth=2.4 if color == OURS else 1.4)
                style["label"] = f"ours ({name})" if color == OURS else name
                top.plot(x, [1e3 * timing.seconds.median for _, timing in line], **style)
                low, high = ([1e3 * getattr(t.seconds, side) for _, t in line] for side in ("low", "high"))
                top.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
                if all(timing.memory for _, timing in line):
                    bottom.plot(x, [timing.memory / 2**20 for _, timing in line], **style)
                    if color == OURS:
                        guide = [line[0][1].memory / 2**20 * size / x[0] for size in x]
                        bottom.plot(x, guide, ":", color="#888888", linewidth=1, zorder=0)
                        bottom.annotate(
                            "linear ", (x[-1], guide[-1]), ha="right", va="bottom", fontsize=8, color="#888888"
                        )
            top.set_title(f"{dtype}, {'forward + backward' if train else 'forward'}")
            for axis in (top, bottom):
                axis.set_xscale("log", base=2)
                axis.set_yscale("log")
                axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.yaxis.set_major_formatter("{x:g}")
                axis.minorticks_off()
            ticks = sorted({size for size, _ in chosen})
            bottom.set_xticks(ticks, [str(tick) for tick in ticks])
            bottom.set_xlabel(f"{SIZE.search(chosen[0][1].workload)[1]}   ({label})")
        axes[0, 0].set_ylabel("ms")
        axes[1, 0].set_ylabel("MiB beyond the inputs")
        axes[0, 0].legend(frameon=False, fontsize=9)
        slug = re.sub(r"\W+", "-", label).strip("-")
        figures[f"size-{slug}{'-train' if train else ''}"] = figure
    return figures
