"""What the two command lines, train_expert.py and adapt.py, promise."""

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import adapt
import train_expert
import transformer2 as t2
from conftest import TOKENIZER, logits, make, random_expert, relative, toy

SCRIPTS = Path(train_expert.__file__).parent
FEW = "--batch-size 4 --validation-problems 4 --test-problems 4 --max-new-tokens 3".split()
SHORT_SEARCH = "--shots 2 --population 4 --iterations 1 --test-problems 4".split()
TWO_TASKS = ["--task", "addition", "reversal", "--steps", "1", *FEW]


@pytest.fixture
def run_script(tmp_path, monkeypatch, capsys) -> Callable[..., str]:
    """Runs a script in an empty folder with a random model MODEL; gives what it prints."""
    monkeypatch.chdir(tmp_path)
    make().save_pretrained("MODEL")
    TOKENIZER.save_pretrained("MODEL")

    def run(script, *arguments: str) -> str:
        command = [script.__name__, "--model", "MODEL", *arguments]
        monkeypatch.setattr(sys, "argv", command)
        capsys.readouterr()
        script.main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def refusal(run_script, capsys) -> Callable[..., str]:
    """Runs a script that has to end with exit code 2 and one sentence; gives the sentence."""

    def run(script, *arguments: str) -> str:
        def main() -> None:
            run_script(script, *arguments)

        with pytest.raises(SystemExit) as stop:
            train_expert.guarded(main)
        error = capsys.readouterr().err.strip()
        assert stop.value.code == 2
        assert error.startswith("error: ")
        assert error.count("\n") == 0
        return error

    return run


def save_experts(
    folder: str, categories: list[str], suffix: str = "expert", model: str = "MODEL", **facts: str
) -> None:
    """Random experts, one for each category; that of "classify" is the classifier."""
    svf_model = t2.apply_svf(make())
    for seed, category in enumerate(categories):
        name = category if category == "classify" else f"{category}-{suffix}"
        path = Path(folder, f"{name}.safetensors")
        expert = random_expert(svf_model, seed)
        t2.save_expert(expert, path, category=category, model=model, **facts)


@pytest.fixture
def interrupt_before_saving(run_script, monkeypatch) -> Callable[..., None]:
    """Runs train_expert.py, and interrupts it just before the expert of a task is saved."""

    def run(task_name: str, *arguments: str) -> None:
        def save_expert(expert, path, **facts):
            if facts["task"] == task_name:
                raise KeyboardInterrupt
            t2.save_expert(expert, path, **facts)

        with monkeypatch.context() as patch:
            patch.setattr(train_expert, "save_expert", save_expert)
            with pytest.raises(KeyboardInterrupt):
                run_script(train_expert, *arguments)

    return run


# ---- train_expert.py ----------------------------------------------------------------------------


def test_training_writes_one_expert_a_task_and_a_table(run_script):
    printed = run_script(train_expert, *TWO_TASKS)
    names = ["addition.safetensors", "reversal.safetensors"]
    assert sorted(os.listdir("experts/MODEL")) == names
    table = printed.partition("held-out accuracy, base -> expert\n")[2]
    for name in names:
        assert f"experts/MODEL/{name}" in table


def test_an_expert_says_where_it_comes_from(run_script):
    run_script(train_expert, "--task", "addition", "--steps", "1", "--kl", "0.1", *FEW)
    facts = adapt.read_headers(Path("experts/MODEL"), "MODEL")["addition"]
    assert facts["task"] == "addition"
    assert facts["category"] == "arithmetic"
    assert facts["model"] == "MODEL"
    assert facts["targets"] == "mlp"
    assert facts["steps"] == 1
    assert facts["kl_coef"] == 0.1
    assert facts["problems"] == 4
    assert 0 <= float(facts["accuracy"]) <= 1


def test_layers_trains_the_last_share_of_the_blocks(run_script):
    run_script(train_expert, "--task", "addition", "--steps", "1", "--layers", "0.5", *FEW)
    expert = t2.load_expert("experts/MODEL/addition.safetensors")
    names = [f"model.layers.1.mlp.{part}_proj" for part in ("down", "gate", "up")]
    assert sorted(expert) == names


def test_an_expert_of_half_the_layers_fits_the_whole_model():
    half = make()
    t2.apply_svf(half, train_expert.last_blocks(half, "mlp", 0.5))
    whole = t2.apply_svf(make())
    expert = random_expert(half)
    assert {name.split(".")[2] for name in expert} == {"1"}
    with t2.use_expert(half, expert), t2.use_expert(whole, expert):
        assert relative(logits(whole), logits(half)) < 1e-4


def test_the_summary_does_without_the_resource_module(run_script, monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    printed = run_script(train_expert, "--task", "addition", "--steps", "0", *FEW)
    assert printed.endswith("of the model\n")


def test_resume_trains_nothing_again(run_script, interrupt_before_saving):
    names = ["addition.safetensors", "reversal.safetensors"]
    assert "step   1" in run_script(train_expert, *TWO_TASKS, "--out", "whole")
    interrupt_before_saving("reversal", *TWO_TASKS)
    assert "step   1" not in run_script(train_expert, *TWO_TASKS, "--resume")
    for name in names:
        resumed = t2.load_expert(f"experts/MODEL/{name}")
        for layer, z in t2.load_expert(f"whole/MODEL/{name}").items():
            assert torch.equal(resumed[layer], z)
    assert sorted(os.listdir("experts/MODEL")) == names  # nothing is left of the progress


def test_without_resume_training_begins_again(run_script, interrupt_before_saving):
    interrupt_before_saving("addition", *TWO_TASKS)
    assert "step   1" in run_script(train_expert, *TWO_TASKS)


@pytest.mark.parametrize("change", [["--token-budget", "64"], ["--checkpointing"]])
def test_resume_goes_on_with_less_memory(run_script, interrupt_before_saving, change):
    interrupt_before_saving("addition", *TWO_TASKS)
    run_script(train_expert, *TWO_TASKS, "--resume", *change)
    assert Path("experts/MODEL/reversal.safetensors").exists()


@pytest.mark.parametrize(
    "change, name",
    [(["--lr", "0.5"], "lr"), (["--seed", "5"], "seed"), (["--layers", "0.5"], "layers")],
)
def test_resume_refuses_another_run_and_says_what_differs(
    refusal, interrupt_before_saving, change, name
):
    interrupt_before_saving("addition", *TWO_TASKS)
    error = refusal(train_expert, *TWO_TASKS, "--resume", *change)
    assert "addition.state" in error
    assert re.search(rf"\b{name}\b", error)


def test_a_full_gpu_is_met_with_advice_that_resume_takes(refusal, monkeypatch):
    def run_out_of_memory(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train_expert, "reinforce", run_out_of_memory)
    error = refusal(train_expert, "--task", "addition", *FEW)
    assert "--resume --checkpointing" in error
    assert "--resume --token-budget N" in error


def test_a_built_in_model_is_pretrained_once(run_script, monkeypatch):
    pretrained = []

    def pretrain():
        pretrained.append("tiny")
        return make(), TOKENIZER

    monkeypatch.setitem(train_expert.BUILT_IN_MODELS, "tiny", pretrain)
    first, _ = train_expert.load_model("tiny")
    second, _ = train_expert.load_model("tiny")
    assert pretrained == ["tiny"]
    assert torch.equal(logits(first), logits(second))
    [folder] = os.listdir(train_expert.CACHE)
    assert re.fullmatch(r"tiny-[0-9a-f]{8}", folder)


def test_without_a_model_the_first_line_says_which_and_why(run_script, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setitem(train_expert.BUILT_IN_MODELS, "tiny", lambda: (make(), TOKENIZER))
    monkeypatch.setattr(sys, "argv", ["train_expert", "--steps", "0", *FEW])
    train_expert.main()
    first_line = capsys.readouterr().out.splitlines()[0]
    assert first_line == "model tiny: no GPU here, so the built-in one (choose with --model)"
    assert len(os.listdir("experts/tiny")) == 4


# ---- adapt.py -----------------------------------------------------------------------------------


def test_adapt_compares_all_strategies_on_an_unseen_task(run_script):
    save_experts("experts/MODEL", ["math", "code", "classify"])
    printed = run_script(adapt, "--task", "smallest", *SHORT_SEARCH, "--max-new-tokens", "3")
    assert "MODEL: experts code-expert, math-expert; classifier: yes" in printed
    assert (
        "smallest, a task no expert here was trained on: accuracy on 4 held-out problems" in printed
    )
    rows = re.findall(r"^  (\S.*?) +acc +\d+\.\d% \(.* to .*\)  +\d+\.\d s$", printed, re.MULTILINE)
    assert rows == [
        "base model",
        "expert code-expert",
        "expert math-expert",
        "prompt",
        "classifier",
        "few-shot",
        "few-shot, one α each",
    ]
    assert re.search(r"α code-expert [+-]\d\.\d\d, math-expert [+-]\d\.\d\d\)", printed)


def test_adapt_shows_only_the_strategies_asked_for(run_script):
    save_experts("experts/MODEL", ["math", "classify"])
    arguments = ["--task", "smallest", "--strategy", "classifier", *SHORT_SEARCH]
    printed = run_script(adapt, *arguments, "--max-new-tokens", "3")
    assert "\n  classifier " in printed
    assert "\n  prompt " not in printed
    assert "few-shot" not in printed


def test_adapt_answers_prompts_before_and_after(run_script):
    save_experts("experts/MODEL", ["math", "code", "reasoning", "other"])
    printed = run_script(adapt, "Hello ABC", "What is 1 plus 2?", "--max-new-tokens", "3")
    answers = re.findall(r"prompt    (.*)\ncategory  (\S+)\nbase      .*\nanswer    ", printed)
    assert [prompt for prompt, _ in answers] == ["Hello ABC", "What is 1 plus 2?"]
    assert {category for _, category in answers} <= {"math", "code", "reasoning", "other"}
    assert "base model" not in printed


def test_a_category_without_an_expert_is_answered_by_the_base_model(run_script):
    save_experts("experts/MODEL", ["classify"])
    printed = run_script(adapt, "Hello ABC", "--max-new-tokens", "3")
    assert "answer    the same: no expert for this category" in printed


@pytest.fixture
def printed_dispatch(run_script, monkeypatch, capsys) -> str:
    """What adapt.py prints for the model "tiny", with 40 problems to dispatch and no other task."""
    monkeypatch.setitem(train_expert.BUILT_IN_MODELS, "tiny", lambda: (make(), TOKENIZER))
    problems = adapt.get_task("tiny-classify").problems("test")[:40]
    task = replace(adapt.get_task("tiny-classify"), problems=lambda split: problems)
    monkeypatch.setattr(adapt, "get_task", lambda name: task)
    monkeypatch.setattr(adapt, "TINY_UNSEEN", [])
    save_experts("experts/tiny", ["arithmetic", "classify"])
    monkeypatch.setattr(sys, "argv", ["adapt", "--model", "tiny", "--max-new-tokens", "3"])
    adapt.main()
    return capsys.readouterr().out


def test_adapt_shows_how_held_out_prompts_are_dispatched(printed_dispatch):
    for strategy in ("prompt", "classifier"):
        table = printed_dispatch.partition(f"dispatch by {strategy}: ")[2].partition("\n\n")[0]
        title, header, *rows = table.splitlines()
        mean, worst, order = re.fullmatch(
            r"(\S+)% of 40 held-out prompts, each in 4 orders of the categories; "
            r"(\S+)% in the worst, (.*)",
            title,
        ).groups()
        assert float(worst) <= float(mean)
        assert sorted(order.split(", ")) == ["arithmetic", "comparison", "letters", "other"]
        assert header.split() == ["arithmetic", "letters", "comparison", "other", "right"]
        right = 0
        for i, row in enumerate(rows):
            category, *counts, share = row.split()
            assert category == header.split()[i]
            counts = [int(count) for count in counts]
            assert sum(counts) == 4 * 10  # each prompt once in each order
            assert share == f"{counts[i] / sum(counts):.1%}"
            right += counts[i]
        assert len(rows) == 4
        assert mean == f"{100 * right / 160:.1f}"
    assert printed_dispatch.count(" (truth: ") == 6


def test_dispatch_is_measured_with_each_category_in_each_place(run_script, monkeypatch, capsys):
    categories = ["math", "code", "reasoning", "other"]
    orders = []

    def recorded_classify(model, processor, conversations, order, *, expert=None):
        orders.append(order)
        return ["math"] * len(conversations) if order[-1] == "code" else ["code"]

    monkeypatch.setattr(adapt, "classify", recorded_classify)
    library = adapt.Library(None, None, {}, dict.fromkeys(categories), {"prompt": None})
    task = toy(lambda text, problem: 1.0)
    problem = {"question": "What is 1 plus 2?", "answer": "code"}
    args = argparse.Namespace(test_problems=1)
    adapt.show_dispatch(library, replace(task, problems=lambda split: [problem] * 2), args)
    places = [{order[place] for order in orders} for place in range(4)]
    assert places == 4 * [set(categories)]
    pairs = {pair for order in orders for pair in zip(order, order[1:])}
    assert len(pairs) == 12
    title = capsys.readouterr().out.splitlines()[1]
    [worst] = [order for order in orders if order[-1] == "code"]
    assert title.startswith("dispatch by prompt: 75.0% of 1 held-out prompts")
    assert title.endswith(f"0.0% in the worst, {', '.join(worst)}")


def test_an_expert_of_another_model_and_one_that_takes_a_place_are_noted(run_script):
    save_experts("experts/MODEL", ["math"], model="OTHER")
    save_experts("experts/MODEL", ["math"], suffix="second")
    printed = run_script(adapt, "Hello", "--max-new-tokens", "3")
    assert "note: expert math-expert was trained on OTHER" in printed
    assert "note: expert math-second takes the place of another one" in printed


def test_adapt_shows_what_each_expert_says_of_pictures(capsys):
    model = t2.apply_svf(make())
    task = toy(lambda text, problem: 1.0, max_new_tokens=3)
    experts = {"shapes": random_expert(model)}
    adapt.show_pictures(adapt.Library(model, TOKENIZER, experts, {}, {}), [task])
    printed = capsys.readouterr().out
    assert printed.count("\npicture     none\nquestion    What is ") == 6
    assert printed.count("\nbase        ") == 6
    assert printed.count("\nshapes      ") == 6
    assert printed.count("(right)") == 12


# ---- Bad input, warnings ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--model", "tiny", "--task", "nonsense"], "unknown task 'nonsense'"),
        (["--model", "no/such-model"], "neither 'tiny' or 'tiny-vlm', nor a folder"),
        (["--targets", "nothing"], "match no linear layer"),
        (["--targets", "(["], "or a regular expression"),
        (["--layers", "50"], "above 0, up to 1"),
        (["--layers", "-1"], "above 0, up to 1"),
        (["--steps", "-1"], "--steps -1 is out of range: it must be at least 0"),
        (["--batch-size", "0"], "--batch-size 0 is out of range"),
        (["--kl-coef", "nan"], "--kl-coef nan is out of range"),
        (["--kl-coef", "-0.1"], "--kl-coef -0.1 is out of range"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0 is out of range"),
        (["--test-problems", "0"], "--test-problems 0 is out of range"),
        (["--seed", "-1"], "seed -1 is out of range"),
        (["--seed", "2147483649"], "seed 2147483649 is out of range"),
        (["--out", "MODEL/config.json"], "MODEL/config.json"),
    ],
)
def test_bad_input_of_training_is_one_sentence(refusal, monkeypatch, arguments, says):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert says in refusal(train_expert, "--task", "addition", *FEW, *arguments)
    assert set(os.listdir(".")) <= {"MODEL", ".cache"}  # no experts were begun


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--experts", "EMPTY"], "no experts in EMPTY: train some with python train_expert.py"),
        (["--experts", "DAMAGED"], "cannot read the expert DAMAGED/x.safetensors"),
        (["--experts", "OTHERS"], "for another model"),
        (["--experts", "MIXED"], "have different targets (attention, mlp)"),
        (["--model", "no/such-model"], "neither 'tiny' or 'tiny-vlm', nor a folder"),
        (["A" * 300], "context of 160"),
        (["--seed", "-1"], "seed -1 is out of range"),
        (["--shots", "0"], "--shots 0 is out of range"),
        (["--iterations", "-2"], "--iterations -2 is out of range"),
    ],
)
def test_bad_input_of_adaptation_is_one_sentence(refusal, monkeypatch, arguments, says):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for folder in ("EMPTY", "DAMAGED"):
        os.mkdir(folder)
    Path("DAMAGED/x.safetensors").write_bytes(b"damaged")
    t2.save_expert({"model.layers.0.mlp.up_proj": torch.ones(7)}, "OTHERS/x.safetensors")
    save_experts("MIXED", ["math"])
    save_experts("MIXED", ["code"], targets="attention")
    save_experts("OWN", ["math"])
    names = {*os.listdir("."), ".cache"}
    assert says in refusal(adapt, "--experts", "OWN", *arguments)
    assert set(os.listdir(".")) <= names  # nothing else was written


@pytest.mark.parametrize(
    "arguments",
    [
        ["train_expert.py", *TWO_TASKS],
        ["adapt.py", "--task", "smallest", *SHORT_SEARCH, "--max-new-tokens", "3"],
    ],
    ids=["train_expert.py", "adapt.py"],
)
def test_no_library_warns(run_script, arguments):
    save_experts("experts/MODEL", ["math"])
    script, *rest = arguments
    command = [sys.executable, "-W", "default", str(SCRIPTS / script), "--model", "MODEL", *rest]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0
    assert result.stderr == ""
    assert "Warning" not in result.stdout
