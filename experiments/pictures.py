"""The drawings of three claims. claims.py makes each as soon as its claim is measured.

`python experiments/pictures.py` draws the finished files of the built-in model again.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # where the modules below are

import train_expert
from experiments.curves import BOTTOM, COLORS, TOP, mean, svg, text, write_text

HEIGHT = 430  # pixels of a drawing
LEFT, RIGHT, GAP = 62, 740, 56  # pixels: where the panels end, and between them
GRAY, DARK, CENTERED = "fill='#666'", "fill='#222'", "text-anchor='middle'"
SEARCHES = ["α per expert", "α per expert and block"]
RANKS = ["none", "first quarter", "first half", "last half", "last quarter", "all"]


def y_of(accuracy: float) -> float:
    return BOTTOM - (BOTTOM - TOP) * accuracy


def draw_grid(left: float, right: float) -> list[str]:
    """Lines from left to right (pixels) at some accuracies, and their numbers."""
    parts = []
    for percent in (0, 25, 50, 75, 100):
        y = y_of(percent / 100)
        parts.append(f"<path d='M{left:g} {y:.1f}H{right:g}' stroke='#e4e4e4'/>")
        parts.append(text(left - 10, y + 4, f"{percent} %", "text-anchor='end' fill='#666'"))
    return parts


@dataclass
class Panel:
    """Axes, and what they show: places on the x-axis, each with the accuracies of the seeds."""

    title: str
    x_title: str
    ticks: dict[float, str]  # place -> text
    groups: dict[str, dict[float, list[float]]]  # name -> place -> accuracies in [0, 1]
    bars: bool = False  # instead of lines


def main() -> None:
    for claim in PICTURES:
        draw_file(claim, Path(__file__).parent / "results" / f"{claim}-tiny.json")


def draw_file(claim: str, path: Path) -> None:
    """Draws the runs of a claim as an SVG file beside them. path: their JSON file."""
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
    write_text(PICTURES[claim](runs), path.with_suffix(".svg"))
    print(f"wrote {path.with_suffix('.svg')}")


def draw_compose(runs: list[dict]) -> str:
    """A panel for each pair of experts: the accuracy on both tasks, over α."""
    panels = []
    for first, second in dict.fromkeys((run["run"]["first"], run["run"]["second"]) for run in runs):
        own_runs = select(runs, first=first, second=second)
        groups = {task: accuracies(own_runs, "alpha", task) for task in [first, second]}
        title, ticks = f"{first} and {second}", {0: "0", 0.5: "0.5", 1: "1"}
        panels.append(Panel(title, f"α of {first}", ticks, groups))
    return draw("α of one expert and 1 − α of another: accuracy on both tasks", panels)


def draw_shots(runs: list[dict]) -> str:
    """A panel for each task: the accuracy of both forms of the search, over the examples."""
    panels = []
    for base in select(runs, strategy="base"):
        task, groups = base["run"]["task"], {}
        for name in SEARCHES:
            own_runs = select(runs, task=task, strategy=f"few-shot, {name}")
            groups[name] = accuracies(own_runs, "shots", "test")
        ticks = {count: str(count) for count in groups[SEARCHES[0]]}
        groups["base model"] = dict.fromkeys(ticks, [base["figures"]["test"]["accuracy"]])
        panels.append(Panel(task, "number of examples", ticks, groups))
    return draw("Few-shot search: accuracy on unseen tasks", panels)


def draw_spectrum(runs: list[dict]) -> str:
    """One panel: the accuracy of experts whose z is 1 outside of some ranks."""
    groups = {}
    scored = [run for run in runs if "ranks" in run["run"]]
    for number, task in enumerate(dict.fromkeys(run["run"]["task"] for run in scored)):
        by_ranks = accuracies(select(scored, task=task), "ranks", "test")
        shift = (number - 1) / 4  # bars of three tasks are side by side
        groups[task] = {place + shift: by_ranks[name] for place, name in enumerate(RANKS)}
    ticks = {-0.5: "", **dict(enumerate(RANKS)), len(RANKS) - 0.5: ""}
    panel = Panel("", "singular values that are scaled", ticks, groups, bars=True)
    return draw("Experts that scale some singular values only: accuracy", [panel])


PICTURES = {"compose": draw_compose, "shots": draw_shots, "spectrum": draw_spectrum}


def select(runs: list[dict], **wanted: object) -> list[dict]:
    """The runs whose arguments have these values."""
    return [run for run in runs if wanted.items() <= run["run"].items()]


def accuracies(runs: list[dict], argument: str, figure: str) -> dict:
    """Value of an argument -> the accuracies of the seeds."""
    found = {}
    for run in runs:
        found.setdefault(run["run"][argument], []).append(run["figures"][figure]["accuracy"])
    return found


def draw(title: str, panels: list[Panel]) -> str:
    """Panels side by side, as the text of an SVG file. A name has the same color in all."""
    parts = [text(16, 24, title, f"font-weight='600' {DARK}")]
    names = dict.fromkeys(name for panel in panels for name in panel.groups)
    colors = dict(zip(names, COLORS))
    step = (RIGHT - LEFT + GAP) / len(panels)
    for number, panel in enumerate(panels):
        parts += draw_panel(panel, LEFT + step * number, step - GAP, colors)
    x, y = LEFT, HEIGHT - 16  # the legend
    for name, color in colors.items():
        parts.append(f"<circle cx='{x}' cy='{y - 4}' r='5' fill='{color}'/>")
        parts.append(text(x + 10, y, name, DARK))
        x += 34 + 7 * len(name)
    note = text(RIGHT, y, "mean, lowest and highest of the seeds", f"text-anchor='end' {GRAY}")
    return svg(title, HEIGHT, [*parts, note])


def draw_panel(panel: Panel, left: float, width: float, colors: dict[str, str]) -> list[str]:
    """The axes, and the lines or the bars. left, width: of the axes, in pixels."""
    parts = draw_grid(left, left + width)
    parts.append(text(left, TOP - 12, panel.title, DARK))
    places = [*panel.ticks, *[place for group in panel.groups.values() for place in group]]
    first, scale = min(places), width / (max(places) - min(places))
    for place, label in panel.ticks.items():
        parts.append(text(left + scale * (place - first), BOTTOM + 20, label, f"{CENTERED} {GRAY}"))
    parts.append(text(left + width / 2, BOTTOM + 42, panel.x_title, f"{CENTERED} {DARK}"))
    draw_group = draw_bars if panel.bars else draw_line
    for name, group in panel.groups.items():
        xs = [left + scale * (place - first) for place in group]
        parts += draw_group(xs, list(group.values()), colors[name])
    return parts


def draw_line(xs: list[float], values: list[list[float]], color: str) -> list[str]:
    """The means of the values at each x, on a band from the lowest to the highest."""
    middle, upper, lower = [], [], []
    for x, seeds in zip(xs, values):
        middle.append(f"{x:.1f},{y_of(mean(seeds)):.1f}")
        upper.append(f"{x:.1f},{y_of(max(seeds)):.1f}")
        lower.append(f"{x:.1f},{y_of(min(seeds)):.1f}")
    band = f"points='{' '.join(upper + lower[::-1])}' fill='{color}' fill-opacity='0.15'"
    line = f"points='{' '.join(middle)}' fill='none' stroke='{color}' stroke-width='2.5'"
    return [f"<polygon {band}/>", f"<polyline {line}/>"]


def draw_bars(xs: list[float], values: list[list[float]], color: str) -> list[str]:
    """A bar up to the mean at each x, with a thin line from the lowest to the highest."""
    parts = []
    for x, seeds in zip(xs, values):
        bar = f"M{x:.1f} {BOTTOM}V{y_of(mean(seeds)):.1f}"
        spread = f"M{x:.1f} {y_of(min(seeds)):.1f}V{y_of(max(seeds)):.1f}"
        parts.append(f"<path d='{bar}' stroke='{color}' stroke-width='24'/>")
        parts.append(f"<path d='{spread}' stroke='#222' stroke-width='1.5'/>")
    return parts


if __name__ == "__main__":
    train_expert.guarded(main)
