"""Learning curves of the built-in tiny model's experts, as figures in JSON and as an SVG drawing.

    python experiments/curves.py                     # trains the seeds 0, 1 and 2, then draws
    python experiments/curves.py --seeds 0 --steps 20
    python experiments/curves.py --draw-only         # draws the JSON that is there again

It writes curves-tiny.json and curves-tiny.svg to experiments/results.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # where the modules below are

import train_expert
import transformer2 as t2
from experiments.speed import about_this_run
from tasks import DEFAULT_TASKS, get_task

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
    if not args.draw_only:
        curves = train_all(args.seeds, args.steps)
        save_curves(curves, args.out / "curves-tiny.json")
    curves = load_curves(args.out / "curves-tiny.json")
    drawing = draw(curves)
    write_text(drawing, args.out / "curves-tiny.svg")
    print(f"wrote {args.out / 'curves-tiny.svg'}")


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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

WIDTH, HEIGHT = 760, 400  # pixels of the drawing
LEFT, RIGHT, TOP, BOTTOM = 70, 530, 58, 340  # pixels: where the axes end
COLORS = ["#0072B2", "#D55E00", "#009E73", "#AA4499"]  # distinct for the colour-blind, too
FONT = "font-family='system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif'"


@dataclass
class Summary:
    """The curves of one task, over its seeds."""

    task: str
    color: str
    steps: list[int]
    means: list[float]
    lowest: list[float]
    highest: list[float]
    base_test: float
    expert_test: float  # the mean


def summarise(curves: list[Curve]) -> list[Summary]:
    """One summary for each task, in the order of the curves."""
    tasks = list(dict.fromkeys(curve.task for curve in curves))
    summaries = []
    for task, color in zip(tasks, COLORS):
        own_curves = [curve for curve in curves if curve.task == task]
        columns = list(zip(*[curve.validation for curve in own_curves]))  # the seeds at each step
        expert_tests = [curve.expert_test for curve in own_curves]
        summary = Summary(
            task=task,
            color=color,
            steps=own_curves[0].steps,
            means=[mean(column) for column in columns],
            lowest=[min(column) for column in columns],
            highest=[max(column) for column in columns],
            base_test=own_curves[0].base_test,
            expert_test=mean(expert_tests),
        )
        summaries.append(summary)
    return summaries


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def draw(curves: list[Curve]) -> str:
    """The drawing, as the text of an SVG file."""
    summaries = summarise(curves)
    last_step = max(summary.steps[-1] for summary in summaries)
    seeds = len({curve.seed for curve in curves})
    parts = draw_axes(last_step)
    for summary in summaries:
        parts += draw_band(summary, last_step)
    for summary in summaries:
        parts += draw_line(summary, last_step)
    parts += draw_legend(summaries, seeds)
    title = "Accuracy of the experts of the tiny model over the training steps"
    return svg(title, HEIGHT, parts)


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


def x_of(step: float, last_step: int) -> float:
    return LEFT + (RIGHT - LEFT) * step / last_step


def y_of(accuracy: float) -> float:
    return BOTTOM - (BOTTOM - TOP) * accuracy


def text(x: float, y: float, content: str, style: str = "") -> str:
    """A piece of text. style: further attributes, such as its color and its anchor."""
    return f"<text x='{x:.1f}' y='{y:.1f}' {style}>{content}</text>"


def points(steps: list[int], values: list[float], last_step: int) -> str:
    """The points of a line as SVG writes them."""
    pairs = []
    for step, value in zip(steps, values):
        pairs.append(f"{x_of(step, last_step):.1f},{y_of(value):.1f}")
    return " ".join(pairs)


def draw_grid(left: float, right: float) -> list[str]:
    """Lines from left to right (pixels) at some accuracies, and their numbers."""
    parts = []
    for percent in (0, 25, 50, 75, 100):
        y = y_of(percent / 100)
        parts.append(f"<path d='M{left:g} {y:.1f}H{right:g}' stroke='#e4e4e4'/>")
        parts.append(text(left - 10, y + 4, f"{percent} %", "text-anchor='end' fill='#666'"))
    return parts


def draw_axes(last_step: int) -> list[str]:
    """The grid, its numbers, what they mean, and a dashed line where the base model is."""
    gray, dark = "fill='#666'", "fill='#222'"
    parts = draw_grid(LEFT, RIGHT)
    for fifth in range(6):
        step = round(last_step * fifth / 5)
        x = x_of(step, last_step)
        parts.append(text(x, BOTTOM + 20, str(step), f"text-anchor='middle' {gray}"))
    parts.append(f"<path d='M{LEFT} {TOP - 8}V{BOTTOM}' stroke='#888' stroke-dasharray='4 4'/>")
    parts.append(text(LEFT + 7, BOTTOM - 8, "base model", gray))
    middle = (LEFT + RIGHT) / 2
    parts.append(text(middle, BOTTOM + 42, "training step", f"text-anchor='middle' {dark}"))
    parts.append(text(16, 28, "Accuracy on validation problems", f"font-weight='600' {dark}"))
    return parts


def draw_band(summary: Summary, last_step: int) -> list[str]:
    """The area between the lowest and the highest of the seeds."""
    upper = points(summary.steps, summary.highest, last_step)
    lower = points(summary.steps[::-1], summary.lowest[::-1], last_step)
    return [f"<polygon points='{upper} {lower}' fill='{summary.color}' fill-opacity='0.15'/>"]


def draw_line(summary: Summary, last_step: int) -> list[str]:
    """The mean of the seeds: a line, with a dot at its end."""
    line = points(summary.steps, summary.means, last_step)
    x = x_of(summary.steps[-1], last_step)
    y = y_of(summary.means[-1])
    stroke = f"stroke='{summary.color}' stroke-width='2.5' stroke-linejoin='round'"
    return [
        f"<polyline points='{line}' fill='none' {stroke}/>",
        f"<circle cx='{x:.1f}' cy='{y:.1f}' r='4' fill='{summary.color}'/>",
    ]


def draw_legend(summaries: list[Summary], seeds: int) -> list[str]:
    """The tasks beside the axes, with their accuracy on held-out problems."""
    left = RIGHT + 34
    gray, dark = "fill='#666'", "fill='#222'"
    parts = [text(left, TOP + 4, "Held-out test, base → expert", f"font-size='12' {gray}")]
    for number, summary in enumerate(summaries):
        y = TOP + 38 + 48 * number
        parts.append(f"<path d='M{left} {y - 4}h20' stroke='{summary.color}' stroke-width='3'/>")
        parts.append(text(left + 28, y, summary.task, f"font-weight='600' {dark}"))
        figures = f"{summary.base_test:.1%} → {summary.expert_test:.1%}".replace("%", " %")
        parts.append(text(left + 28, y + 18, figures, gray))
    if seeds > 1:
        y = TOP + 38 + 48 * len(summaries)
        parts.append(text(left, y, f"Lines: mean of {seeds} seeds.", f"font-size='12' {gray}"))
        parts.append(text(left, y + 16, "Bands: lowest to highest.", f"font-size='12' {gray}"))
    return parts


if __name__ == "__main__":
    train_expert.guarded(main)
