"""What claims.py, baselines.py and pictures.py promise, on small random models.

pytest experiments/test_claims.py
"""

import argparse
import json
import re
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

import train_expert
import transformer2 as t2
from conftest import TOKENIZER, logits, make, make_svf, toy
from experiments import baselines, claims, pictures

FEW = {"steps": 3, "batch_size": 4, "validate_every": 3, "validation_problems": 2, "lr": 0.1}


def never_right(text: str, problem: dict) -> float:
    return -1.0


@pytest.fixture
def lab(tmp_path) -> baselines.Lab:
    """A Lab with a random model, and with the tasks of the tiny one."""
    make().save_pretrained(tmp_path / "MODEL")
    TOKENIZER.save_pretrained(tmp_path / "MODEL")
    args = argparse.Namespace(
        model=str(tmp_path / "MODEL"), quick=True, seeds=[0], out=tmp_path / "results"
    )
    lab = baselines.Lab(args)
    lab.suite = baselines.SUITES["tiny"]
    return lab


# ---- Methods and objectives ----------------------------------------------------------------------


@pytest.mark.parametrize("name", baselines.METHODS)
def test_a_method_begins_at_the_base_model(name):
    pytest.importorskip("peft")
    model = baselines.METHODS[name](make())
    assert any(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(logits(model), logits(make()), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", baselines.METHODS)
@pytest.mark.parametrize("objective", baselines.OBJECTIVES)
def test_an_objective_returns_trained_values_and_puts_the_start_back(method, objective):
    pytest.importorskip("peft")
    model = baselines.METHODS[method](make())
    before = logits(model)
    alternating = iter([1.0, -1.0] * 1000)
    task = toy(lambda text, problem: next(alternating), max_new_tokens=3)
    values = baselines.OBJECTIVES[objective](model, TOKENIZER, task, **FEW)
    assert torch.equal(logits(model), before)
    baselines.set_values(model, values)
    assert not torch.equal(logits(model), before)


def test_next_token_prediction_makes_the_answer_likelier():
    model = make_svf()
    task = toy(never_right, max_new_tokens=3)
    inputs = t2.encode(model, TOKENIZER, [task.conversation(task.problems("test")[0])])
    answer = [TOKENIZER("B")["input_ids"] + [TOKENIZER.eos_token_id]]
    before = t2.completion_log_probs(model, inputs, answer).item()
    baselines.set_values(model, baselines.next_token(model, TOKENIZER, task, **FEW))
    assert t2.completion_log_probs(model, inputs, answer).item() > before


def test_both_objectives_draw_the_same_problems():
    drawn = {}
    for name, objective in baselines.OBJECTIVES.items():
        questions = drawn[name] = set()
        task = toy(never_right, max_new_tokens=3)
        plain_conversation = task.conversation

        def conversation(problem, questions=questions, plain_conversation=plain_conversation):
            questions.add(problem["question"])
            return plain_conversation(problem)

        task.conversation = conversation
        objective(make_svf(), TOKENIZER, task, **FEW)
    assert len(drawn["next token"]) > 10
    assert drawn["next token"] == drawn["policy gradient"]


def test_a_missing_peft_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(t2.Transformer2Error, match="pip install -r experiments/requirements.txt"):
        baselines.METHODS["LoRA"](make())


# ---- Results and experts -------------------------------------------------------------------------


def test_a_claim_goes_on_after_its_last_finished_run(lab, monkeypatch):
    measured = []

    def measure(lab: baselines.Lab, seed: int) -> dict:
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(seed)
        return {"figure": seed / 3}

    def claim(lab: baselines.Lab) -> claims.Runs:
        for seed in lab.seeds:
            yield measure, {"seed": seed}

    monkeypatch.setitem(claims.CLAIMS, "toy", claim)
    lab.seeds = [0, 1, 2]
    with pytest.raises(KeyboardInterrupt):
        claims.measure_claim("toy", lab)
    measured.clear()
    records = claims.measure_claim("toy", lab)
    assert measured == [2]
    assert [record["figures"]["figure"] for record in records] == [0, 1 / 3, 2 / 3]

    lab.settings = baselines.Settings()
    with pytest.raises(t2.Transformer2Error, match="another hyper, test_problems.*--out"):
        claims.measure_claim("toy", lab)


def test_an_expert_is_trained_once_and_not_taken_for_one_of_other_settings(lab):
    lab.settings = replace(lab.settings, hyper=FEW)
    expert = lab.expert("reversal", seed=0)
    again = lab.expert("reversal", seed=0)
    assert all(torch.equal(expert[name], again[name]) for name in expert)
    assert [path.suffix for path in (lab.out / "experts").iterdir()] == [".safetensors"]
    lab.settings = replace(lab.settings, hyper={**FEW, "steps": 4})
    with pytest.raises(t2.Transformer2Error, match="other settings: delete it"):
        lab.expert("reversal", seed=0)


def test_the_settings_say_which_methods_are_measured_and_on_how_much(lab, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.setattr(claims, "train_method", lambda lab, **run: lab.model())
    few = {"methods": ("LoRA",), "test_problems": 3, "lr_problems": 2}
    lab.settings = replace(lab.settings, **few)
    records = claims.measure_claim("methods", lab)
    assert {record["run"]["method"] for record in records} == {"none", "LoRA"}
    for record in records:
        problems = {3} if "reversal" in record["figures"] else {2}
        scores = [value for value in record["figures"].values() if isinstance(value, dict)]
        assert {score["problems"] for score in scores} == problems


def test_only_the_ranks_asked_for_keep_their_z(lab, monkeypatch):
    seen = []
    z = torch.tensor([2.0, 3.0, 4.0, 5.0])
    monkeypatch.setattr(lab, "expert", lambda task, seed: {"layer": z})
    monkeypatch.setattr(lab, "score", lambda model, task, expert: seen.append(expert["layer"]))
    for ranks in claims.RANKS:
        claims.score_ranks(lab, "reversal", ranks, seed=0)
    parts = dict(zip(claims.RANKS, [part.tolist() for part in seen]))
    assert parts["none"] == [1, 1, 1, 1]
    assert parts["all"] == [2, 3, 4, 5]
    assert parts["first quarter"] == [2, 1, 1, 1]
    assert parts["last half"] == [1, 1, 4, 5]


def test_a_table_has_the_mean_and_the_spread(capsys):
    records = []
    for seed in range(2):
        figures = {"test": {"accuracy": (seed + 1) / 4, "problems": 100}, "alphas": [1.0]}
        records.append({"run": {"task": "reversal", "seed": seed}, "figures": figures})
    claims.print_tables(records)
    assert "reversal  2     37.5 (25.0 to 50.0)" in capsys.readouterr().out
    claims.print_tables(records[:1])
    assert "reversal  1     25.0 (17.5 to 34.3)" in capsys.readouterr().out


# ---- Pictures ------------------------------------------------------------------------------------


def made_up_runs(claim: str) -> list[dict]:
    """Two seeds with the accuracies 0.25 and 0.75."""
    runs = []
    if claim == "compose":
        for alpha in [0.0, 1.0]:
            runs.append({"first": "reversal", "second": "addition", "alpha": alpha})
    if claim == "shots":
        for form, shots in product(pictures.SEARCHES, [3, 20]):
            runs.append({"task": "smallest", "strategy": f"few-shot, {form}", "shots": shots})
        runs.append({"task": "smallest", "strategy": "base"})
    if claim == "spectrum":
        for ranks in pictures.RANKS:
            runs.append({"task": "reversal", "ranks": ranks})
        runs.append({"task": "reversal", "layer": "layer"})
    records = []
    for run in runs:
        accuracies = [0.25, 0.75]
        if run.get("strategy") == "base":
            accuracies = [0.5]
        for seed, accuracy in enumerate(accuracies):
            figure = {"accuracy": accuracy, "problems": 100}
            figures = dict.fromkeys(["reversal", "addition", "test"], figure)
            records.append({"run": {**run, "seed": seed}, "figures": figures})
    return records


@pytest.mark.parametrize("claim", pictures.PICTURES)
def test_a_picture_is_well_formed_and_shows_the_mean_and_the_spread(claim):
    names = {
        "compose": ["reversal", "addition", "α of reversal"],
        "shots": [*pictures.SEARCHES, "base model", "smallest", "20"],
        "spectrum": ["reversal", *pictures.RANKS],
    }
    svg = ElementTree.fromstring(pictures.PICTURES[claim](made_up_runs(claim)))
    assert set(names[claim]) <= {element.text for element in svg.iter()}
    assert min(float(element.get("font-size", 12)) for element in svg.iter()) >= 12
    marks = " ".join(element.get("points", element.get("d", "")) for element in svg.iter())
    marks = re.sub(r"M\S+ \S+H\S+", "", marks)  # without the grid
    for accuracy in [0.25, 0.5, 0.75]:
        assert f"{pictures.y_of(accuracy):.1f}" in marks


@pytest.mark.parametrize("claim", pictures.PICTURES)
def test_a_finished_claim_has_its_picture_beside_its_file(lab, monkeypatch, claim):
    records = made_up_runs(claim)

    def measure(lab: baselines.Lab, **run: object) -> dict:
        [figures] = [record["figures"] for record in records if record["run"] == run]
        return figures

    def runs(lab: baselines.Lab) -> claims.Runs:
        for record in records:
            yield measure, record["run"]

    monkeypatch.setitem(claims.CLAIMS, claim, runs)
    lab.name = "tiny"
    claims.measure_claim(claim, lab)
    drawing = (lab.out / f"{claim}-tiny.svg").read_text(encoding="utf-8")
    assert drawing == pictures.PICTURES[claim](records)


def test_the_pictures_in_results_are_those_of_the_results_files():
    folder = Path(__file__).parent / "results"
    for claim, draw_claim in pictures.PICTURES.items():
        runs = json.loads((folder / f"{claim}-tiny.json").read_text(encoding="utf-8"))["runs"]
        drawing = (folder / f"{claim}-tiny.svg").read_text(encoding="utf-8")
        assert drawing == draw_claim(runs), "run python experiments/pictures.py"
        assert len(drawing.encode()) <= 60 * 1024


# ---- The command line ----------------------------------------------------------------------------


def test_the_command_line_refuses_an_unwritable_folder(tmp_path, monkeypatch, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setattr(train_expert, "load_model", lambda name: (make(), TOKENIZER))
    command = ["claims.py", "cost", "--quick", "--out", str(blocked / "folder")]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stop:
        train_expert.guarded(claims.main)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: cannot write") and error.count("\n") == 1
    assert Path(command[-1]).name in error


def test_all_leaves_out_what_only_the_built_in_model_has(monkeypatch, capsys):
    measured = []

    def measure_claim(name: str, lab: baselines.Lab) -> list[dict]:
        measured.append(name)
        return []

    monkeypatch.setattr(claims, "measure_claim", measure_claim)
    monkeypatch.setattr(train_expert, "load_model", lambda name: (make(), TOKENIZER))
    monkeypatch.setattr(sys, "argv", ["claims.py", "all", "--model", "REAL", "--quick"])
    claims.main()
    assert measured == [name for name in claims.CLAIMS if name not in ("transfer", "compose")]
    output = capsys.readouterr().out
    assert "\ntransfer is left out: " in output
    assert "\ncompose is left out: " in output


@pytest.mark.parametrize("name", ["transfer", "compose"])
def test_a_claim_about_the_built_in_model_refuses_another_and_writes_nothing(name, lab):
    with pytest.raises(t2.Transformer2Error, match=f"{name} .*: give --model tiny"):
        claims.measure_claim(name, lab)
    assert not list(lab.out.glob("*.json"))


def test_methods_without_peft_writes_nothing(lab, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(t2.Transformer2Error, match="pip install -r experiments/requirements.txt"):
        claims.measure_claim("methods", lab)
    assert not list(lab.out.glob("*.json"))


def test_a_finished_file_stays_as_it_is_until_another_run_is_added(tmp_path):
    path = tmp_path / "claim.json"
    first = baselines.Results(path, {"settings": {}, "seeds": [0, 1], "commit": "a"})
    first.add({"seed": 0}, {"test": 1.0}, seconds=1.0)
    before = path.read_bytes()
    again = baselines.Results(path, {"settings": {}, "seeds": [0], "commit": "b"})
    assert again.find({"seed": 0})["commit"] == "a"
    assert path.read_bytes() == before
