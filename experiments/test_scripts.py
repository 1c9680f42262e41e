"""What speed.py and orders.py promise, and the command lines of all scripts here.

pytest experiments/test_scripts.py
"""

import argparse
import sys

import pytest
import torch

import train_expert
import transformer2 as t2
from conftest import TOKENIZER, make_svf, random_expert
from experiments import claims, curves, gpu, orders, speed
from tasks import get_task

# ---- The command lines ---------------------------------------------------------------------------


@pytest.fixture
def refusal(monkeypatch, capsys):
    """Runs a script that has to end with exit code 2 and one sentence; gives the sentence."""

    def run(script, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [script.__name__, *arguments])
        with pytest.raises(SystemExit) as stop:
            train_expert.guarded(script.main)
        error = capsys.readouterr().err
        assert stop.value.code == 2
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        return error

    return run


@pytest.mark.parametrize(
    "script, arguments",
    [
        (train_expert, []),
        (claims, ["cost"]),
        (curves, []),
        (gpu, []),
        (orders, ["--model", "tiny"]),
        (speed, []),
    ],
)
def test_an_option_that_there_is_not_is_one_sentence(refusal, script, arguments):
    assert "--nonsense" in refusal(script, *arguments, "--nonsense")


def test_an_unknown_claim_is_named_with_those_that_there_are(refusal):
    error = refusal(claims, "nonsense")
    assert "nonsense" in error
    assert all(name in error for name in [*claims.CLAIMS, "all"])


def test_a_token_budget_of_0_is_refused(refusal):
    says = "--token-budget 0 is out of range: it must be at least 1"
    assert says in refusal(train_expert, "--token-budget", "0")


# ---- speed.py ------------------------------------------------------------------------------------


def test_the_commit_of_changed_code_is_called_dirty(tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "__file__", str(tmp_path / "experiments" / "speed.py"))
    speed.git("init")
    user = ["-c", "user.name=a", "-c", "user.email=a@a"]
    speed.git(*user, "commit", "--allow-empty", "--message", "first")
    (tmp_path / "results.json").write_text("no code")
    commit = speed.about_this_run()["commit"]
    assert len(commit) == 40
    (tmp_path / "code.py").write_text("")
    assert speed.about_this_run()["commit"] == f"{commit}-dirty"


def test_options_run_whole_and_on_a_cache_with_the_same_gradient(monkeypatch):
    problem = {"question": "What is 1 plus 2", "options": ["red", "green blue", "math", "red blue"]}
    monkeypatch.setattr(speed, "option_problems", lambda count: [problem])
    model = make_svf()
    lengths, tokens, gradients = [], {}, {}

    def count(layer: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        lengths.append(inputs[0].numel())

    def run_each(ways: dict) -> dict:
        for name, run in ways.items():
            lengths.clear()
            model.zero_grad()
            run()
            tokens[name] = sum(lengths)
            gradients[name] = [layer.z.grad.clone() for layer in t2.svf_layers(model).values()]
        return {}

    bench = argparse.Namespace(
        model=model, processor=TOKENIZER, seconds=run_each, report=lambda *row: None
    )
    with model.get_input_embeddings().register_forward_hook(count):
        speed.measure_options(bench)
    assert tokens["whole sequences"] > 2 * tokens["ours, cached"]
    torch.testing.assert_close(*gradients.values(), atol=1e-5, rtol=1e-4)


# ---- orders.py -----------------------------------------------------------------------------------


def test_an_expert_of_the_tiny_model_is_measured_in_all_24_orders():
    model = make_svf()
    problems = get_task("tiny-classify").problems("test")[:3]
    expert = random_expert(model, seed=0)
    cells = orders.measure(model, TOKENIZER, "tiny-classify", problems, expert)
    assert len({tuple(cell["order"]) for cell in cells}) == len(cells) == 24
    assert {cell["prompts"] for cell in cells} == {3}


def test_a_missing_expert_is_named_with_the_command_that_trains_it(refusal, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = refusal(orders, "--model", "tiny")
    assert "experts/tiny/tiny-classify.safetensors" in error
    assert "train_expert.py --model tiny --task tiny-classify" in error
