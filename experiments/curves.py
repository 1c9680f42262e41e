"""Learning curves as an SVG drawing: of the built-in tiny model's experts, or of any training log.

    python experiments/curves.py                     # trains the seeds 0, 1 and 2, then draws
    python experiments/curves.py --seeds 0 --steps 20
    python experiments/curves.py --draw-only         # draws the JSON that is there again
    python experiments/curves.py experts/tiny/*.log.jsonl --svg FILE

It writes curves-tiny.json and curves-tiny.svg to experiments/results; what it draws of the logs of
train_expert.py lies beside the first of them if there is no --svg.
"""

import argparse
import html
import json
import sys
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # where the modules below are

import train_expert
import transformer2 as t2
from experiments.speed import about_this_run
from tasks import DEFAULT_TASKS, get_task
from tasks.log import read_log

MODEL = "tiny"


@dataclass
class Curve:
    """The training of one expert. Accuracies are in [0, 1]."""

    task: str
    seed: int
    settings: dict  # Hyperparameters
    steps: list[int]
    validation: list[float]  # at these steps; step 0 is the base model
    test_problems: int
    base_test: float  # on held-out problems
    expert_test: float


def main() -> None:
    args = read_arguments()
    if args.logs:
        svg_path = args.svg or args.logs[0].with_suffix(".svg")
        write_text(draw_logs(args.logs), svg_path)
        print(f"wrote {svg_path}")
        return
    if not args.draw_only:
        curves = train_all(args.seeds, args.steps)
        save_curves(curves, args.out / "curves-tiny.json")
    curves = load_curves(args.out / "curves-tiny.json")
    drawing = draw(curves)
    write_text(drawing, args.out / "curves-tiny.svg")
    print(f"wrote {args.out / 'curves-tiny.svg'}")


def read_arguments() -> argparse.Namespace:
    parser = train_expert.Parser(__doc__)
    parser.add_argument("logs", type=Path, nargs="*", metavar="LOG", help="draws these instead")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="for the drawing of logs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the training")
    parser.add_argument("--steps", type=int, help="updates of z; default: each task's own number")
    parser.add_argument("--draw-only", action="store_true", help="draw the JSON, train nothing")
    results = Path(__file__).parent / "results"
    parser.add_argument("--out", type=Path, default=results, help="the folder for both files")
    return parser.parse_args()


# ---- Training ------------------------------------------------------------------------------------


def train_all(seeds: list[int], steps: int | None) -> list[Curve]:
    """A curve for each task and each seed. steps: None for each task's own number."""
    model, processor = train_expert.load_model(MODEL)
    t2.apply_svf(model)
    curves = []
    for name in DEFAULT_TASKS[MODEL]:
        task = get_task(name)
        base_test = t2.evaluate(model, processor, task, task.problems("test"))
        for seed in seeds:
            settings = {**task.hyper, "seed": seed}
            if steps is not None:
                settings["steps"] = steps
            print(f"\n{name}, seed {seed}")
            curve = train(model, processor, task, t2.Hyperparameters(**settings), base_test)
            curves.append(curve)
    return curves


def train(
    model: t2.Model,
    processor: t2.Processor,
    task: t2.Task,
    hp: t2.Hyperparameters,
    base_test: float,
) -> Curve:
    """Trains an expert, and scores it on held-out problems."""
    validation = {}  # step -> accuracy

    def on_step(stats: t2.StepStats, answers: list[t2.Answer]) -> None:
        if stats.validation is not None:
            validation[stats.step] = stats.validation

    expert = t2.reinforce(model, processor, task, on_step=on_step, **asdict(hp))
    test_problems = task.problems("test")
    expert_test = t2.evaluate(model, processor, task, test_problems, expert=expert)
    print(f"held-out accuracy {base_test:.1%} -> {expert_test:.1%}")
    return Curve(
        task=task.name,
        seed=hp.seed,
        settings=asdict(hp),
        steps=list(validation),
        validation=list(validation.values()),
        test_problems=len(test_problems),
        base_test=base_test,
        expert_test=expert_test,
    )


def save_curves(curves: list[Curve], path: Path) -> None:
    about = {"model": MODEL, **about_this_run()}
    content = {"about": about, "curves": [asdict(curve) for curve in curves]}
    write_text(json.dumps(content, indent=1) + "\n", path)


def write_text(content: str, path: Path) -> None:
    t2.write_whole(path, lambda temporary: temporary.write_text(content, encoding="utf-8"))


def load_curves(path: Path) -> list[Curve]:
    """Raises Transformer2Error if the file is not there."""
    if not path.exists():
        raise t2.Transformer2Error(f"there is no {path} to draw: run without --draw-only first")
    content = json.loads(path.read_text())
    return [Curve(**curve) for curve in content["curves"]]


# ---- Drawing -------------------------------------------------------------------------------------

WIDTH, HEIGHT = 760, 400  # pixels of the drawing; each further chart makes it higher
LEFT, RIGHT, TOP, BOTTOM = 70, 530, 58, 340  # pixels: where the axes of the first chart end
COLORS = ["#0072B2", "#D55E00", "#009E73", "#AA4499"]  # distinct for the colour-blind, too
FONT = "font-family='system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif'"
PERCENT = {0.0: "0 %", 0.25: "25 %", 0.5: "50 %", 0.75: "75 %", 1.0: "100 %"}


@dataclass
class Line:
    """What one or several runs measured over their steps."""

    color: str
    steps: list[int]
    means: list[float]  # over the runs, at these steps
    lowest: list[float]
    highest: list[float]


@dataclass
class Chart:
    """A pair of axes with lines. number: 0 for the one on top, then 1, and so on."""

    title: str
    number: int
    ticks: dict[float, str]  # value -> how it is written, from the lowest to the highest
    lines: list[Line]
    last_step: int

    def x_of(self, step: float) -> float:
        return LEFT + (RIGHT - LEFT) * step / self.last_step

    def y_of(self, value: float) -> float:
        low, high = min(self.ticks), max(self.ticks)
        return self.number * HEIGHT + BOTTOM - (BOTTOM - TOP) * (value - low) / (high - low)

    def points(self, steps: list[int], values: list[float]) -> str:
        """The points of a line as SVG writes them."""
        pairs = []
        for step, value in zip(steps, values):
            pairs.append(f"{self.x_of(step):.1f},{self.y_of(value):.1f}")
        return " ".join(pairs)


@dataclass
class Entry:
    """What the legend says of a line. Accuracies are in [0, 1]."""

    name: str
    color: str
    base: float
    expert: float
    details: str = ""


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def draw(curves: list[Curve]) -> str:
    """The drawing of the tiny model's curves, as the text of an SVG file."""
    tasks = list(dict.fromkeys(curve.task for curve in curves))
    lines, entries = [], []
    for task, color in zip(tasks, COLORS):
        own_curves = [curve for curve in curves if curve.task == task]
        columns = list(zip(*[curve.validation for curve in own_curves]))  # the seeds at each step
        means = [mean(column) for column in columns]
        lowest = [min(column) for column in columns]
        highest = [max(column) for column in columns]
        lines.append(Line(color, own_curves[0].steps, means, lowest, highest))
        expert_test = mean([curve.expert_test for curve in own_curves])
        entries.append(Entry(task, color, own_curves[0].base_test, expert_test))
    last_step = max(line.steps[-1] for line in lines)
    chart = Chart("Accuracy on validation problems", 0, PERCENT, lines, last_step)
    seeds = len({curve.seed for curve in curves})
    notes = []
    if seeds > 1:
        notes = [f"Lines: mean of {seeds} seeds.", "Bands: lowest to highest."]
    title = "Accuracy of the experts of the tiny model over the training steps"
    legend = draw_legend("Held-out test, base → expert", entries, notes)
    return draw_charts(title, [chart], legend)


def draw_logs(paths: list[Path]) -> str:
    """The drawing of training logs: accuracy on validation problems, and rewards below it.

    Raises Transformer2Error for a file that is no log or has no accuracy.
    """
    logs = [read_log(path) for path in paths]
    all_settings = [log[0]["settings"] for log in logs]
    lines, reward_lines, entries = [], [], []
    for i, log in enumerate(logs):
        color = COLORS[i % len(COLORS)]
        line = line_of(log, "validation", color)
        if not line.steps:
            raise t2.Transformer2Error(f"{paths[i]} has no accuracy on validation problems to draw")
        lines.append(line)
        reward_lines.append(line_of(log, "reward", color))
        details = what_differs(all_settings[i], all_settings)
        task = all_settings[i]["task"]
        entries.append(Entry(task, color, line.means[0], max(line.means), details))

    last_step = max(1, *[line.steps[-1] for line in lines])
    charts = [Chart("Accuracy on validation problems", 0, PERCENT, lines, last_step)]
    rewards = [reward for line in reward_lines for reward in line.means]
    if rewards:
        ticks = {tick: f"{tick:+.3g}" for tick in (min(-1.0, *rewards), 0.0, max(1.0, *rewards))}
        reward_lines = [line for line in reward_lines if line.steps]
        charts.append(Chart("Reward of a step", 1, ticks, reward_lines, last_step))
    legend = draw_legend("Validation, base → best step", entries, [])
    return draw_charts("Training logs", charts, legend)


def line_of(log: list[dict], figure: str, color: str) -> Line:
    """One figure of a log over its steps, where it is not null."""
    measured = [line for line in log if line.get(figure) is not None]
    steps = [line["step"] for line in measured]
    values = [line[figure] for line in measured]
    return Line(color, steps, values, values, values)


def what_differs(settings: dict, all_settings: list[dict]) -> str:
    """The settings that set a run apart from the other runs of its task."""
    parts = []
    for name, value in settings.items():
        for other in all_settings:
            if other["task"] == settings["task"] and other.get(name) != value:
                parts.append(f"{name} {value}")
                break
    return ", ".join(parts)


def draw_charts(title: str, charts: list[Chart], legend: list[str]) -> str:
    """The text of an SVG file."""
    parts = []
    for chart in charts:
        parts += draw_axes(chart)
        for line in chart.lines:
            parts += draw_band(chart, line)
        for line in chart.lines:
            parts += draw_line(chart, line)
    return svg(title, HEIGHT * len(charts), parts + legend)


def svg(title: str, height: int, parts: list[str]) -> str:
    """The text of an SVG file: the parts on a white ground, so that a dark page shows them, too."""
    lines = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {height}' "
        f"width='{WIDTH}' height='{height}' {FONT} font-size='13' role='img'>",
        f"<title>{title}</title>",
        f"<rect width='{WIDTH}' height='{height}' rx='8' fill='white'/>",
        *parts,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def text(x: float, y: float, content: str, style: str = "") -> str:
    """A piece of text. style: further attributes, such as its color and its anchor."""
    return f"<text x='{x:.1f}' y='{y:.1f}' {style}>{html.escape(content)}</text>"


def draw_axes(chart: Chart) -> list[str]:
    """The grid, its numbers, what they mean, and a dashed line where the base model is."""
    gray, dark = "fill='#666'", "fill='#222'"
    top, bottom = TOP + chart.number * HEIGHT, BOTTOM + chart.number * HEIGHT
    parts = []
    for value, content in chart.ticks.items():
        y = chart.y_of(value)
        parts.append(f"<path d='M{LEFT} {y:.1f}H{RIGHT}' stroke='#e4e4e4'/>")
        parts.append(text(LEFT - 10, y + 4, content, f"text-anchor='end' {gray}"))
    for fifth in range(6):
        step = round(chart.last_step * fifth / 5)
        x = chart.x_of(step)
        parts.append(text(x, bottom + 20, str(step), f"text-anchor='middle' {gray}"))
    parts.append(f"<path d='M{LEFT} {top - 8}V{bottom}' stroke='#888' stroke-dasharray='4 4'/>")
    parts.append(text(LEFT + 7, bottom - 8, "base model", gray))
    middle = (LEFT + RIGHT) / 2
    parts.append(text(middle, bottom + 42, "training step", f"text-anchor='middle' {dark}"))
    parts.append(text(16, top - 30, chart.title, f"font-weight='600' {dark}"))
    return parts


def draw_band(chart: Chart, line: Line) -> list[str]:
    """The area between the lowest and the highest of the runs."""
    upper = chart.points(line.steps, line.highest)
    lower = chart.points(line.steps[::-1], line.lowest[::-1])
    return [f"<polygon points='{upper} {lower}' fill='{line.color}' fill-opacity='0.15'/>"]


def draw_line(chart: Chart, line: Line) -> list[str]:
    """The mean of the runs: a line, with a dot at its end."""
    x = chart.x_of(line.steps[-1])
    y = chart.y_of(line.means[-1])
    stroke = f"stroke='{line.color}' stroke-width='2.5' stroke-linejoin='round'"
    return [
        f"<polyline points='{chart.points(line.steps, line.means)}' fill='none' {stroke}/>",
        f"<circle cx='{x:.1f}' cy='{y:.1f}' r='4' fill='{line.color}'/>",
    ]


def draw_legend(title: str, entries: list[Entry], notes: list[str]) -> list[str]:
    """The lines beside the axes, with the accuracies of base model and expert."""
    left = RIGHT + 34
    gray, dark = "fill='#666'", "fill='#222'"
    parts = [text(left, TOP + 4, title, f"font-size='12' {gray}")]
    for number, entry in enumerate(entries):
        y = TOP + 38 + 48 * number
        parts.append(f"<path d='M{left} {y - 4}h20' stroke='{entry.color}' stroke-width='3'/>")
        parts.append(text(left + 28, y, entry.name, f"font-weight='600' {dark}"))
        figures = f"{entry.base:.1%} → {entry.expert:.1%}".replace("%", " %")
        parts.append(text(left + 28, y + 18, figures, gray))
        if entry.details:
            details = textwrap.shorten(entry.details, 34, placeholder=" …")
            parts.append(text(left + 28, y + 32, details, f"font-size='10' {gray}"))
    for number, note in enumerate(notes):
        y = TOP + 38 + 48 * len(entries) + 16 * number
        parts.append(text(left, y, note, f"font-size='12' {gray}"))
    return parts


if __name__ == "__main__":
    train_expert.guarded(main)
