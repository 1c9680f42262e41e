"""What curves.py draws of the logs of train_expert.py.

pytest experiments/test_curves.py
"""

import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

import train_expert
from experiments import curves

NAME = "{http://www.w3.org/2000/svg}"  # of SVG's elements


def write_log(path: Path, validation: list[float | None], **settings: object) -> None:
    """A log with this accuracy at its steps; the reward is 0.5 but for step 0."""
    lines = [{"settings": {"task": "addition", "seed": 0, **settings}}]
    for step, accuracy in enumerate(validation):
        reward = 0.5
        if step == 0:
            reward = None
        lines.append({"step": step, "reward": reward, "validation": accuracy})
    lines.append({"step": 1, "samples": []})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def draw(monkeypatch, tmp_path):
    """Runs curves.py in an empty folder with these arguments."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["curves", *arguments])
        curves.main()

    return run


def test_a_log_is_drawn_beside_it(draw):
    write_log(Path("a.log.jsonl"), [0.25, None, 0.75, None, 1.0])
    draw("a.log.jsonl")
    drawing = ElementTree.parse("a.log.svg")
    accuracy, reward = [line.get("points") for line in drawing.iter(f"{NAME}polyline")]
    assert accuracy == "70.0,269.5 300.0,128.5 530.0,58.0"  # the axes: x 70 to 530, y 340 to 58
    xs = [point.split(",")[0] for point in reward.split()]
    ys = [point.split(",")[1] for point in reward.split()]
    assert xs == ["185.0", "300.0", "415.0", "530.0"]
    assert set(ys) == {"528.5"}  # 3/4 of the way from -1 to +1, 400 further down


def test_runs_of_the_same_task_are_told_apart(draw):
    write_log(Path("a"), [0.25, 1.0], seed=0, lr=0.1)
    write_log(Path("b"), [0.5, 0.5], seed=1, lr=0.1, model="A & B")
    draw("a", "b", "--svg", "both.svg")
    drawing = ElementTree.parse("both.svg")
    texts = [element.text for element in drawing.iter(f"{NAME}text")]
    assert {"25.0 % → 100.0 %", "50.0 % → 50.0 %"} <= set(texts)
    assert "seed 0" in texts
    assert "seed 1, model A & B" in texts


@pytest.mark.parametrize(
    "content, says",
    [
        (None, "cannot read x.jsonl: "),
        ("", "x.jsonl is not the log of a training run"),
        ("no log\n", "x.jsonl is not the log of a training run"),
        ('{"settings": {"task": "addition"}}\n', "x.jsonl has no accuracy on validation problems"),
    ],
)
def test_what_cannot_be_drawn_is_one_sentence(draw, capsys, content, says):
    if content is not None:
        Path("x.jsonl").write_text(content)
    with pytest.raises(SystemExit) as stop:
        train_expert.guarded(lambda: draw("x.jsonl"))
    assert stop.value.code == 2
    assert says in capsys.readouterr().err


def test_the_figure_of_the_readme_is_what_its_json_draws():
    results = Path(curves.__file__).parent / "results"
    drawing = curves.draw(curves.load_curves(results / "curves-tiny.json"))
    assert drawing == (results / "curves-tiny.svg").read_text()
