"""What the tables of the two READMEs promise: their figures are those of the results files.

pytest experiments/test_tables.py
"""

import json
import re
from itertools import product
from pathlib import Path

from experiments import baselines, claims, pictures
from experiments.curves import mean

RESULTS = Path(__file__).parent / "results"
WORDS = {  # how a table writes what is in the results file
    "SVF, MLPs": "SVF, mlp",
    "LoRA, rank 16": "LoRA",
    "IA³": "IA3",
    "MLP": "mlp",
    "both": "all",
    "base model": "base",
    "numbers": "trained numbers",
    "pass 1 / pass 2": "pass 1 / pass 2, s",
    "tokens in pass 1": "pass 1, tokens",
    "in pass 2": "pass 2, tokens",
}


def read_runs(path: Path) -> list[dict]:
    """The runs of a results file, without those that only choose a learning rate."""
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
    return [run for run in runs if run["run"].get("seed") != baselines.LR_SEED]


def tables_of(path: Path) -> list[tuple[str, list[str], list[list[str]]]]:
    """The paragraph before each table of a Markdown file, its header, and its other rows."""
    text = path.read_text(encoding="utf-8")
    tables = []
    for match in re.finditer(r"(?:^\|.*\n)+", text, re.MULTILINE):
        paragraph = text[: match.start()].rstrip().split("\n\n")[-1]
        lines = [line.strip("|").split("|") for line in match.group().splitlines()]
        header, _, *rows = [[cell.strip() for cell in line] for line in lines]
        tables.append((paragraph, header, rows))
    return tables


def cell_of(claim: str, labels: list[str], column: str) -> tuple[dict, str]:
    """What a cell shows: arguments of its runs, and the name of the figure.

    labels: its row; the first cells name the runs. column: the title of its column.
    """
    first, second, third = [WORDS.get(label, label) for label in labels[:3]]
    column = WORDS.get(column.removeprefix("unseen "), column.removeprefix("unseen "))
    if claim == "methods" and first == "none":
        return {"method": first}, column
    if claim == "methods":
        return {"method": first, "objective": second, "lr": float(third)}, column
    if claim == "modules":
        return {"targets": first}, column
    if claim == "transfer":
        return {"pair": first, "task": second}, column
    if claim == "strategies":
        return {"strategy": first.replace("expert of", "expert"), "task": column}, "test"
    if claim == "spectrum":
        return {"ranks": first, "task": column}, "test"
    if claim == "cost":
        return {"length": int(first), "categories": int(second)}, column
    if claim == "compose":
        pair, task = column.split(", on ")
        names = pair.split(" + ")
        return {"first": names[0], "second": names[1], "alpha": float(first)}, task
    assert claim == "shots", f"this test does not know how to read a table of {claim}"
    task, form = column.split(", ", maxsplit=1)
    if first == "none":
        return {"strategy": "base", "task": task}, "test"
    return {"strategy": f"few-shot, {form}", "task": task, "shots": int(first)}, "test"


def test_every_number_under_here_is_that_of_its_row_and_column():
    checked = 0
    for paragraph, header, rows in tables_of(RESULTS.parent / "README.md"):
        columns = [i for i, title in enumerate(header) if re.match("here|numbers", title)]
        if not columns:
            continue
        name = re.search(r"results/(\S+\.json)", paragraph)[1]
        runs = read_runs(RESULTS / name)
        for row, i in product(rows, columns):
            arguments, figure = cell_of(name.split("-")[0], row, header[i].removeprefix("here: "))
            if "in seconds" in paragraph:
                figure = "search, s"
            values = [run["figures"][figure] for run in pictures.select(runs, **arguments)]
            assert values, f"{name} has no runs with {arguments}"
            assert row[i].replace(",", "") == claims.summary(values), f"{name}: {arguments}"
            checked += 1
    assert checked > 200


def figures_of(path: Path) -> dict[tuple, list]:
    """(arguments of a run without the seed, name of a figure) -> the values of the seeds."""
    figures = {}
    for run in read_runs(path):
        arguments = tuple(item for item in run["run"].items() if item[0] != "seed")
        for name, value in run["figures"].items():
            if not isinstance(value, list):
                figures.setdefault((arguments, name), []).append(value)
    return figures


def test_every_mean_in_the_table_of_claims_is_in_the_results_of_its_row():
    """Numbers with one decimal, of any run of the claim, and two ratios.

    Not checked: whole numbers, and what is said in words (half of each, below the base).
    """
    tables = tables_of(RESULTS.parents[1] / "README.md")
    [rows] = [rows for _, header, rows in tables if header == ["claim", "here"]]
    assert rows
    for label, here in rows:
        claim = re.match(r"`(\w+)`", label)[1]
        figures = figures_of(RESULTS / f"{claim}-tiny.json")
        means = {claims.summary(values).split()[0] for values in figures.values()}
        for number in re.findall(r"(?<![\d.])\d+\.\d(?!\d)", here):
            assert number in means, f"{claim}: {number}"
        if claim == "cost":
            name = "pass 1 / pass 2, s"
            percents = [100 * mean(values) for key, values in figures.items() if key[1] == name]
            assert f"{min(percents):.0f} to {max(percents):.0f} % of the time" in here
        if claim == "methods":
            numbers = {}
            for (arguments, name), values in figures.items():
                if name == "trained numbers":
                    numbers[dict(arguments)["method"]] = values[0]
            assert f"{numbers['LoRA'] / numbers['SVF, mlp']:.0f} times the numbers" in here
