"""Transformer²: self-adaptive language models, in one file to be read beside the paper.

Sun, Cetin, Tang: "Transformer-Squared: Self-adaptive LLMs", ICLR 2025, arXiv 2501.06252.

A weight matrix is split once into its singular components, W = U diag(s) Vᵀ. A vector z with one
number per component rescales them: W' = U diag(s * z) Vᵀ. All z's together are an *expert*.
They are all that trains, by reinforcement learning on the model's own answers. At inference a
first pass finds out which expert a prompt needs, and a second pass answers with it.

The file follows sections 3.1 and 3.2 of the paper. The plumbing comes last.
Shapes in comments: B rows of a batch, P prompt tokens, T completion tokens, V vocabulary, C choices
of one problem, N answers, m x n a weight, r singular values, K experts.
"""

import contextlib
import glob
import hashlib
import inspect
import itertools
import json
import math
import os
import platform
import re
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import distributed, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint as run_checkpointed
from tqdm import tqdm
from transformers import GenerationConfig, LogitsProcessor, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

Model = nn.Module  # a causal language model of transformers, or a PEFT model around one
Processor = PreTrainedTokenizerBase  # or the processor of a model that sees pictures
Conversation = list[dict] | str  # messages {"role", "content"}, or plain text without a template
Expert = dict[str, torch.Tensor]  # layer name -> z (r,); a layer that is not in it has z = 1
# What a batch runs with: None for the base model (z = 1), one Expert, or a list, one for each row.
# An adapter of PEFT has no z's, so it stays on in all of these cases.
Experts = Expert | None | list[Expert | None]


class Transformer2Error(ValueError):
    """An error that the caller can fix. The message is one sentence that says what is wrong."""


# ---- Section 3.1: singular value fine-tuning, W' = U diag(s * z) Vᵀ ------------------------------


def decompose(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Splits W (m, n) into U (m, r), s (r,) and Vh = Vᵀ (r, n): W = U diag(s) Vᵀ, r = min(m, n).

    For a tall W, WᵀW = V diag(s²) Vᵀ, so the columns of V are its eigenvectors (faster than an
    SVD). Then W V = U diag(s): column i has the length s_i and the direction u_i. A wide W is split
    through its transpose. s descends, in float32; U and Vh have the weight's dtype.
    """
    if weight.shape[0] < weight.shape[1]:  # wide: Wᵀ = V diag(s) Uᵀ is tall
        V, s, Uh = decompose(weight.T)
        return Uh.T.contiguous(), s, V.T.contiguous()
    # WᵀW has the eigenvalues s². In float32 a small s would drown in rounding.
    device = "cpu" if weight.device.type == "mps" else weight.device  # mps has no float64
    W = weight.detach().to(device, torch.float64)
    V = torch.linalg.eigh(W.T @ W).eigenvectors.flip(-1)  # (r, r); eigh sorts from small to large
    scaled_U = W @ V  # (m, r)
    s = scaled_U.norm(dim=0)
    U = scaled_U / s.clamp(min=1e-12)
    return U.to(weight).contiguous(), s.float().to(weight.device), V.T.to(weight).contiguous()


class SVFLinear(nn.Module):
    """y = U diag(s * z) Vᵀ x + b, in place of a linear layer. z (r,) is all that trains.

    In training W' is not built: x goes through Vᵀ, then s * z, then U. So the gradient of z needs r
    saved numbers for each token, and never a matrix of W's size. x: (..., in_features).
    """

    def __init__(self, linear: nn.Linear | Conv1D, cache_dir: str | Path | None = None):
        super().__init__()
        # GPT-2's Conv1D keeps its weight transposed.
        weight = linear.weight.T if isinstance(linear, Conv1D) else linear.weight
        self.out_features, self.in_features = weight.shape
        U, s, Vh = decompose_cached(weight, cache_dir) if cache_dir else decompose(weight)
        self.register_buffer("U", U)  # (out, r)
        self.register_buffer("s", s)  # (r,), in float32 whatever the model's dtype
        self.register_buffer("Vh", Vh)  # (r, in)
        self.z = nn.Parameter(torch.ones_like(s))  # z = 1 is the base model, up to rounding
        self.active_z: torch.Tensor | None = None  # see use_expert: (r,), or (B, r), one per row
        self.folded_weight: torch.Tensor | None = None  # set by folded: W' (out, in), built ahead
        self.bias = linear.bias
        # Kept for merge_svf, without its weight. The list keeps torch from registering it.
        linear.weight = None
        self.dense_layer = [linear]

    def current_z(self) -> torch.Tensor:
        """The z in use: (r,), or (B, r) where every row of the batch has its own."""
        return self.z if self.active_z is None else self.active_z

    @property
    def weight(self) -> torch.Tensor:
        """W' (out, in), built: for merge_svf and for code that reads a layer's weight."""
        z = self.current_z()
        if z.dim() > 1:
            raise Transformer2Error("W' cannot be built for a list of experts: use a single one")
        return (self.U.float() @ ((self.s * z)[:, None] * self.Vh.float())).to(self.U.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.folded_weight is not None:
            return F.linear(x, self.folded_weight, self.bias)
        scale = self.s * self.current_z()  # float32: bfloat16 would round small steps of z away
        if scale.dim() == 2:
            scale = spread_over_rows(scale, x)
        components = F.linear(x, self.Vh)  # Vᵀ x, (..., r)
        return F.linear((components * scale).to(x.dtype), self.U, self.bias)


def apply_svf(model: Model, targets: str = "mlp", cache_dir: str | Path | None = None) -> Model:
    """Freezes the model and replaces every matching layer by an SVFLinear, in place.

    targets: "mlp" (as in the released code), "attention", "all", or a regular expression over layer
    names; never embeddings or the output head. cache_dir: a folder that keeps decompositions for
    the next time. Returns the model, in eval mode. Raises Transformer2Error if no layer matches.
    """
    layers = matching_layers(model, targets).items()
    model.requires_grad_(False)
    for layer in svf_layers(model).values():  # adapted by an earlier call
        layer.z.requires_grad_(True)
    for name, layer in tqdm(layers, desc="decomposing", leave=False, delay=2, disable=None):
        model.set_submodule(name, SVFLinear(layer, cache_dir))
    return model.eval()


def svf_layers(model: Model) -> dict[str, SVFLinear]:
    """Layer name -> SVFLinear, in the order of the model."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, SVFLinear)}


def merge_svf(model: Model) -> Model:
    """Folds the z's in use back into the original layers. In place; returns the model."""
    for name, layer in svf_layers(model).items():
        dense_layer = layer.dense_layer[0]
        weight = layer.weight.T if isinstance(dense_layer, Conv1D) else layer.weight
        dense_layer.weight = nn.Parameter(weight.detach().contiguous(), requires_grad=False)
        model.set_submodule(name, dense_layer)
    return model


# ---- Experts: one z for every adapted layer ------------------------------------------------------


def get_expert(model: Model) -> Expert:
    """A copy of the z's in use: the model's own, or those of a use_expert ((B, r) for a list)."""
    layers = svf_layers(model).items()
    return {name: layer.current_z().detach().clone() for name, layer in layers}


def use_expert(model: Model, expert: Experts) -> contextlib.AbstractContextManager:
    """In a `with` block the model runs with these z's. Afterwards its former ones are back.

    expert: None for the base model (z = 1), an Expert, or a list of these, one for each row of the
    batch. Raises Transformer2Error for an expert that does not fit the model.
    """
    layers = svf_layers(model)
    new_z = stack_experts(expert, layers)  # layer name -> (r,), or (B, r) for a list
    return changed([(layer, "active_z", new_z[name]) for name, layer in layers.items()])


# ---- Section 3.1: learning an expert with policy gradients ---------------------------------------
#
# Eq. 1 is     J(z) = E[ log π_W'(ŷ|x) r(ŷ, y) ] - λ KL( π_W' ‖ π_W ),   ŷ drawn from π_W'( · | x).
#
# In the first term REINFORCE differentiates only log π_W', at the drawn ŷ. The KL is the mean of
# log(π_W' / π_W) over ŷ from π_W'. So z enters the KL twice, in the probabilities of the ŷ and in
# the logarithm, and its gradient is a sum:
#     ∇KL = E[ ∇ log π_W' · log(π_W' / π_W) ] + E[ ∇ log π_W' ].
# The last term is the sum over all ŷ of ∇π_W'(ŷ), which is ∇1 = 0. So
#     ∇J = E[ ∇ log π_W'(ŷ|x) · ( r(ŷ, y) - λ log( π_W'(ŷ|x) / π_W(ŷ|x) ) ) ].
# It is the exact gradient of E[r] - λ KL. One sampled answer to each problem estimates it: see
# reinforce_loss below.


@dataclass
class Task:
    """What a model is asked, and how its answers are rewarded.

    A problem is a dict with "question", "answer" and perhaps "solution", a worked answer.
    """

    name: str
    problems: Callable[[str], list[dict]]  # split ("train", "validation", "test") -> problems
    conversation: Callable[[dict], Conversation]  # problem -> prompt
    reward: Callable[[str, dict], float]  # (answer, problem) -> 1 if right, below 0 if wrong
    max_new_tokens: int = 256
    prefill: str = ""  # the start of every answer, such as "Let's think step by step"
    # The only possible answers: a list, or a function of the problem. Nothing is generated then.
    choices: list[str] | Callable[[dict], list[str]] | None = None
    category: str | None = None  # not used here: what pass 1 calls prompts of this kind
    hyper: dict = field(default_factory=dict)  # not used here: Hyperparameters that suit the task


@dataclass
class Hyperparameters:
    """The settings of reinforce. batch_size, lr and max_grad_norm are the paper's (A.1)."""

    steps: int = 100  # updates of z
    batch_size: int = 256  # problems in an update, with one sampled answer each, or all choices
    lr: float = 2e-3  # AdamW's, on a falling cosine; the authors' z, a sigmoid, moves half as far
    kl_coef: float = 0.0  # λ; the paper picks 0, 0.1, 0.2 or 0.3 on validation problems
    max_grad_norm: float = 1e-3  # a longer gradient, of all z's together, is scaled down to it
    baseline: bool = True  # subtract the others' mean reward (not in the paper); not with choices
    validate_every: int = 10  # steps; the z with the best accuracy is returned, at a tie the later
    validation_problems: int = 128
    token_budget: int | None = None  # most tokens in a batch; a longer row runs alone
    checkpointing: bool = False  # less memory for activations, a third more time
    seed: int = 0  # decides which problems and answers are drawn

    def __post_init__(self) -> None:
        check_seed(self.seed)
        least = {"batch_size": 1, "validate_every": 1, "validation_problems": 1}
        least |= {"steps": 0, "lr": 0, "kl_coef": 0, "max_grad_norm": 0}
        for name, value in least.items():
            if not getattr(self, name) >= value:  # unlike <, this refuses nan, too
                raise Transformer2Error(f"{name} {getattr(self, name)} must be at least {value}")


@dataclass
class Answer:
    """An answer to a problem: one that the model wrote, or one of the task's choices."""

    tokens: list[int]
    text: str
    cut_off: bool = False  # it ended at the token limit
    problem: dict | None = None  # set by update, for on_step
    reward: float = 0.0
    # Set by set_gradient:
    advantage: float = 0.0  # the reward, minus the baseline if there is one
    weight: float = 0.0  # 1 / number of problems; for a choice, times its probability
    log_prob: float = 0.0  # log π_W'(ŷ|x)
    ref_log_prob: float = 0.0  # log π_W(ŷ|x); at λ = 0 it is not computed, and equals log_prob


@dataclass
class StepStats:
    """The figures of a training step. What was not measured is None; step 0 only validates."""

    step: int = 0
    reward: float | None = None  # the mean over the problems; with choices, of the expected reward
    reward_deviation: float | None = None  # standard deviation; 0: all rewards are equal
    kl: float | None = None  # KL(π_W' ‖ π_W), estimated unless there are choices; None at λ = 0
    kl_coef: float | None = None  # λ
    grad_norm: float | None = None  # before clipping
    skipped: bool = False  # gradient or loss was not finite: the step changed nothing
    lr: float | None = None
    mean_length: float | None = None  # tokens of a sampled answer
    cut_off: float | None = None  # share of the sampled answers that ended at the token limit
    tokens_per_second: float | None = None  # of sampling, rewards included
    seconds: float | None = None
    validation: float | None = None  # accuracy, in the steps that measure it


def reinforce(
    model: Model,
    processor: Processor,
    task: Task,
    *,
    checkpoint: str | Path | None = None,
    on_step: Callable[[StepStats, list[Answer]], None] | None = None,
    **hyperparameters: object,
) -> Expert:
    """Trains an expert with REINFORCE (section 3.1), starting from the model's own z's.

    Trains whatever requires gradients, in eval mode: z after apply_svf, or a PEFT adapter. Returns
    the values with the best validation accuracy, and puts the starting values back.
    hyperparameters: fields of Hyperparameters. checkpoint: a file for the progress after each step;
    if it exists, the run goes on from there. on_step: called before the file is written, with the
    step's figures and one answer to each problem: the sampled one or the likeliest choice. Raises
    Transformer2Error for no problems, nothing that requires gradients, a KL without a base model,
    checkpointing that the model does not have, a call inside of use_expert, or a bad checkpoint.
    """
    hp = Hyperparameters(**hyperparameters)
    model.eval()  # dropout would change the policy
    train_problems = task.problems("train")
    if not train_problems:
        raise Transformer2Error(f"task {task.name} has no problems to train on")
    if hp.batch_size > len(train_problems):
        cut = f"cut to the {len(train_problems)} problems that task {task.name} has"
        print(f"note: the batch of {hp.batch_size} is {cut}", file=sys.stderr)
    held_out_problems = task.problems("validation")[: hp.validation_problems]
    # Called for their errors only: without `with` they change nothing.
    checkpointing(model, hp.checkpointing)
    if hp.kl_coef > 0:
        reference_policy(model)
    progress = Progress(model, task, hp)
    with token_budget(model, hp.token_budget), contextlib.closing(progress):
        if checkpoint is not None and Path(checkpoint).exists():
            progress.load(checkpoint)
        steps = range(progress.next_step, hp.steps + 1)
        bar = tqdm(steps, desc=task.name, leave=False, disable=None)
        for step in bar:
            stats, answers = StepStats(), []
            if step > 0:  # step 0 only validates the start
                stats, answers = update(model, processor, task, train_problems, progress, hp, step)
            if step % hp.validate_every == 0 or step == hp.steps:
                z = get_expert(model)  # as trained so far; None would be the base model
                stats.validation = evaluate(model, processor, task, held_out_problems, expert=z)
                if stats.validation >= progress.best_score:  # at a tie the later one
                    progress.best, progress.best_score = progress.values(), stats.validation
            bar.set_postfix(reward=stats.reward, best_validation=progress.best_score)
            if on_step is not None:
                on_step(stats, answers)
            progress.next_step = step + 1
            if checkpoint is not None and process_rank() == 0:
                progress.save(checkpoint)
    return progress.best


def update(model, processor, task, train_problems, progress, hp, step) -> tuple[StepStats, list]:
    """One step of eq. 1: the model answers, answers are rewarded, z follows the gradient of J."""
    start_time = time.time()
    # 1) Draw problems. Seed and step alone decide, so that a run can be resumed.
    seed = hp.seed * 100_003 + step
    problems = draw_problems(train_problems, hp.batch_size, seed)
    # 2) Answer each of them: answers[i] holds one sample for problem i, or all its choices.
    if task.choices is None:
        z = get_expert(model)  # as trained so far
        sampled = rollout(model, processor, task, problems, z, temperature=1.0, seed=seed)
        answers = [[answer] for answer in sampled]
    else:
        answers = [choices_of(processor, task, problem) for problem in problems]
        for problem, choices in zip(problems, answers):
            for choice in choices:
                choice.reward = float(task.reward(choice.text, problem))
    rollout_seconds = time.time() - start_time
    # 3) Set z.grad to the gradient of -J. This fills in the answers' log-probabilities.
    answers = set_gradient(model, processor, task, problems, answers, hp)
    # 4) A step of AdamW, with a clipped gradient and a learning rate that falls along a cosine.
    stats = step_stats(step, task, answers, hp, rollout_seconds)
    descend(progress, stats, hp)
    stats.seconds = time.time() - start_time
    # 5) For on_step: the likeliest choice, or the one sampled answer, to each problem.
    shown = [max(choices, key=lambda answer: answer.log_prob) for choices in answers]
    for problem, answer in zip(problems, shown):
        answer.problem = problem
    return stats, shown


def rollout(model, processor, task, problems, expert, temperature, seed) -> list[Answer]:
    """An answer to each problem with its reward. For a task with choices, the likeliest of them."""
    if task.choices is None:
        prompts = [task.conversation(problem) for problem in problems]
        sampling = (task.max_new_tokens, temperature, task.prefill, seed)
        answers = generate_answers(model, processor, prompts, expert, *sampling)
    else:
        answers = likeliest_choices(model, processor, task, problems, expert)
    # Several processes also share this work: a program takes long to test.
    rewards = {}
    for row in my_share(range(len(problems))):
        rewards[row] = float(task.reward(answers[row].text, problems[row]))
    for row, reward in merge_shares(rewards).items():
        answers[row].reward = reward
    return answers


def set_gradient(model, processor, task, problems, answers: list[list[Answer]], hp) -> list:
    """Sets z.grad to the gradient of -J (eq. 1), from the answers to each problem.

    One sampled answer estimates the expectation in ∇J. Where a task has choices, all of them are
    given and weighted with their probability, so that the expectation is exact. Returns the answers
    with their advantages, weights and log-probabilities filled in. (Of several processes each
    computes a share, and all get every answer.)
    """
    # 1) The advantages: rewards, minus a baseline if there is one.
    set_advantages(answers, hp.baseline and task.choices is None)
    # 2) The gradient of -J, added up batch by batch.
    prompts = [task.conversation(problem) for problem in problems]
    lengths = [[len(answer.tokens) for answer in group] for group in answers]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sums = [torch.zeros_like(parameter) for parameter in parameters]

    # run_in_batches calls this for each batch of problems that fits in memory.
    def add_batch_gradient(rows: list[int], inputs: dict) -> list[list[Answer]]:
        batch = [answers[row] for row in rows]
        with checkpointing(model, hp.checkpointing):
            loss = batch_loss(model, task, inputs, batch, len(problems), hp)
            # If memory runs out, this gives nothing, and the batch is run again. backward() could
            # leave a part of the gradient in z.grad, which would then count twice.
            gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
        for total, gradient in zip(sums, gradients):
            total += gradient
        return batch  # batch_loss has set its figures

    answers_with_figures = run_in_batches(
        model, processor, prompts, task.prefill, lengths, "gradient", add_batch_gradient
    )
    # 3) The gradient is the total over all processes.
    for parameter, total in zip(parameters, sums):
        parameter.grad = sum_over_processes(total)
    return answers_with_figures


def batch_loss(
    model, task, inputs: dict, groups: list[list[Answer]], num_problems: int, hp: Hyperparameters
) -> torch.Tensor:
    """A scalar whose gradient is this batch's part of -∇J. Sets weights and log-probabilities.

    inputs: prompts from encode. groups: the answers to each. num_problems: of the whole update.
    """
    answers = [answer for group in groups for answer in group]  # N
    completions = [[answer.tokens for answer in group] for group in groups]
    # 1) log π_W'(ŷ|x) and log π_W(ŷ|x), both (N,). At λ = 0 π_W does not matter.
    log_probs = answer_log_probs(model, task, inputs, completions)
    ref_log_probs = log_probs.detach()
    if hp.kl_coef > 0:
        with torch.no_grad(), reference_policy(model):
            ref_log_probs = answer_log_probs(model, task, inputs, completions)
    # 2) The loss is a mean over problems, so each answer counts 1 / num_problems. Where all choices
    #    of a problem are given, each counts by its probability, which is a constant here.
    weights = torch.ones_like(log_probs) / num_problems
    if task.choices is not None:
        weights = weights * log_probs.detach().exp()
    # 3) The loss
    advantages = log_probs.new_tensor([answer.advantage for answer in answers])
    loss = reinforce_loss(log_probs, ref_log_probs, advantages, hp.kl_coef, weights)
    if not loss.isfinite():
        loss = loss * math.nan  # an infinite loss may have a finite gradient; descend skips nan
    # 4) For the figures of the step
    figures = zip(weights.tolist(), log_probs.tolist(), ref_log_probs.tolist())
    for answer, (weight, log_prob, ref_log_prob) in zip(answers, figures):
        answer.weight = weight
        answer.log_prob = log_prob
        answer.ref_log_prob = ref_log_prob
    return loss


def answer_log_probs(model, task, inputs: dict, completions: list[list[list[int]]]) -> torch.Tensor:
    """log π of the answers to each prompt, in one tensor (N,): one sample each, or all choices."""
    if task.choices is None:
        return completion_log_probs(model, inputs, [group[0] for group in completions])
    # The policy answers with one of the choices: their probabilities add up to 1.
    scores = choice_log_probs(model, inputs, completions)
    return torch.cat([log_probs.log_softmax(0) for log_probs in scores])


def completion_log_probs(model: Model, inputs: dict, completions: list[list[int]]) -> torch.Tensor:
    """log π(ŷ|x) of one completion for each prompt, summed over its tokens: (B,), in float32.

    inputs: left-padded prompts from encode. completions: B lists of token ids. Differentiable.
    """
    tokens, mask = pad_right(completions, model.device)  # (B, T)
    T = tokens.shape[1]
    sequences = append_tokens(inputs, tokens, mask)
    logits = run_model(model, sequences, logits_to_keep=T + 1).logits
    # (B, T, V): position t predicts token t. Some models ignore logits_to_keep.
    logits = logits[:, -T - 1 : -1]
    return (token_log_probs(logits, tokens) * mask).sum(1)


def token_log_probs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """log softmax(logits) at the tokens, in float32: (..., V) and (...) give (...)."""
    logits = logits.float()
    logits_of_tokens = logits.gather(-1, tokens[..., None]).squeeze(-1)
    return logits_of_tokens - logits.logsumexp(-1)


def leave_one_out_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """Each reward minus the mean of the others, (N,): less noise in the gradient, and no bias."""
    other_rewards = rewards.sum() - rewards
    return rewards - other_rewards / max(1, len(rewards) - 1)


def reinforce_loss(log_probs, ref_log_probs, advantages, kl_coef: float, weights) -> torch.Tensor:
    """A scalar whose gradient is -∇J (eq. 1): a sum over answers with weights. Tensors: (N,)."""
    penalty = kl_coef * (log_probs - ref_log_probs).detach()
    return -(weights * log_probs * (advantages - penalty)).sum()


def evaluate(
    model: Model, processor: Processor, task: Task, problems: list[dict], *, expert: Experts = None
) -> float:
    """Mean accuracy of greedy answers, or of the likeliest choices. A reward below 0 counts as 0.

    expert: as for use_expert. Raises Transformer2Error if there are no problems.
    """
    if not problems:
        raise Transformer2Error(f"task {task.name} has no problems to evaluate on")
    answers = rollout(model, processor, task, problems, expert, temperature=0.0, seed=0)
    return sum(max(0.0, answer.reward) for answer in answers) / len(answers)


# ---- Section 3.2: self-adaptation. Pass 1 chooses z', pass 2 answers with it --------------------


def classify(
    model: Model,
    processor: Processor,
    conversations: list[Conversation],
    categories: list[str],
    *,
    expert: Experts = None,
) -> list[str]:
    """Pass 1: the likeliest category of each conversation.

    Without an expert this is strategy A (the prompt); with z^c, trained to classify, strategy B.
    Raises Transformer2Error if categories are missing, repeated or empty.
    """
    names = {category.strip() for category in categories}
    if not categories or "" in names or len(names) < len(categories):
        raise Transformer2Error(f"categories {categories} must be different names, one or more")
    # A Task whose problems are the conversations. It has no reward.
    ask = partial(category_question, categories=categories)
    options = {"prefill": CATEGORY_PREFILL, "choices": categories}
    task = Task("classify", problems=None, conversation=ask, reward=None, **options)
    chosen = likeliest_choices(model, processor, task, conversations, expert)
    return [choice.text for choice in chosen]


def two_pass(
    model: Model,
    processor: Processor,
    conversations: list[Conversation],
    experts: dict[str, Expert | None],
    *,
    classifier: Expert | None = None,
    **options: object,
) -> list[tuple[str, str]]:
    """(category, answer) of each conversation: pass 1 classifies it, pass 2 answers.

    experts: category -> Expert, or None for the base model; "other", the base model, is added if it
    is missing. classifier: z^c of strategy B. options: passed on to generate.
    """
    categories = [*experts] if "other" in experts else [*experts, "other"]
    chosen = classify(model, processor, conversations, categories, expert=classifier)
    row_experts = [experts.get(category) for category in chosen]
    answers = generate(model, processor, conversations, expert=row_experts, **options)
    return list(zip(chosen, answers))


def mix(experts: list[Expert], alphas: torch.Tensor | np.ndarray) -> Expert:
    """z' = 1 + sum_k α_k (z_k - 1): the paper's sum of α_k z_k if the α_k sum to 1.

    Otherwise the rest of the weight goes to the base model, z = 1. alphas: (K, 1), or (K, blocks)
    with a weight for each expert in each block of the network.
    """
    alphas = torch.as_tensor(alphas, dtype=torch.float32, device="cpu").reshape(len(experts), -1)
    mixture = {}
    for expert, expert_alphas in zip(experts, alphas):
        for name, z in expert.items():
            # The layer's block is the first number in its name: 3 in model.layers.3.mlp.up_proj.
            match = re.search(r"\.(\d+)\.", name)
            block = int(match[1]) if match and len(expert_alphas) > 1 else 0
            mixture[name] = mixture.get(name, 1.0) + expert_alphas[block] * (z.cpu() - 1)
    return mixture


def few_shot(
    model: Model,
    processor: Processor,
    task: Task,
    problems: list[dict],
    experts: dict[str, Expert | None],
    *,
    population: int = 32,
    iterations: int = 20,
    per_layer: bool = False,
    seed: int = 0,
) -> tuple[Expert, torch.Tensor]:
    """Strategy C: the mixture of experts that answers a few problems best, and its α.

    Accuracy decides, and at a tie the mean log-likelihood of the right answers. α is (K, 1), or
    (K, blocks) if per_layer: a weight for each transformer block. A weight may be below 0 or above
    1. population: candidates in each iteration (the first has K + 1 or more). Raises
    Transformer2Error without problems, experts, candidates or iterations.
    """
    check_seed(seed)
    if not problems or not experts or population < 1 or iterations < 1:
        reason = "few_shot needs a problem and an expert, and population and iterations above 0"
        raise Transformer2Error(reason)
    expert_list = [expert or {} for expert in experts.values()]  # None: the base model
    K = len(expert_list)
    blocks = model.config.get_text_config().num_hidden_layers if per_layer else 1
    # The search starts with the base model (all α are 0) and each expert alone.
    first_candidates = np.zeros((K + 1, K, blocks))
    for k in range(K):
        first_candidates[k + 1, k] = 1  # in every block
    score = partial(score_mixtures, model, processor, task, problems, expert_list)
    alphas = cross_entropy_method(score, first_candidates, population, iterations, seed)
    return mix(expert_list, alphas), torch.tensor(alphas, dtype=torch.float32)


def score_mixtures(model, processor, task, problems, experts: list[Expert], candidates) -> list:
    """(accuracy, log-likelihood of a right answer) of each candidate α, means over the problems.

    The candidates answer together: a batch mixes rows of several, each row under its own z.
    """
    # Rows: all problems under the first candidate, then all under the second, ...
    all_problems = problems * len(candidates)
    mixtures = [mix(experts, alphas) for alphas in candidates]
    all_experts = [mixture for mixture in mixtures for _ in problems]
    answers = rollout(model, processor, task, all_problems, all_experts, temperature=0.0, seed=0)
    accuracy = np.array([max(0.0, answer.reward) for answer in answers])
    # The right answer as the only choice: score_choices gives its log-likelihood.
    solution_task = replace(task, choices=lambda p: [p.get("solution") or p["answer"]])
    log_probs = score_choices(model, processor, solution_task, all_problems, expert=all_experts)
    log_likelihood = np.array([log_prob.item() for log_prob in log_probs])
    shape = (len(candidates), len(problems))
    return list(zip(accuracy.reshape(shape).mean(1), log_likelihood.reshape(shape).mean(1)))


def cross_entropy_method(
    score: Callable, first_candidates: np.ndarray, population: int, iterations: int, seed: int
) -> np.ndarray:
    """The best candidate α, (K, blocks), that the cross-entropy method finds.

    score: a list of candidates -> a list of scores. first_candidates: each (K, blocks).
    """
    rng = np.random.default_rng(seed)
    shape = first_candidates.shape[1:]
    mean = np.full(shape, 1 / shape[0])  # α = 1/K
    deviation = np.full(shape, 0.5)
    num_elite = max(2, round(0.2 * population))  # one alone would have no deviation
    best = []  # empty, then the one best (score, candidate)
    for iteration in tqdm(range(iterations), desc="CEM", leave=False, delay=3, disable=None):
        # 1) sample candidates around the mean
        candidates = list(first_candidates) if iteration == 0 else []
        while len(candidates) < population:
            candidates.append(mean + deviation * rng.standard_normal(shape))
        # 2) score them, the best first (accuracy decides); the best so far stays among them
        scored = [*zip(score(candidates), candidates), *best]
        scored.sort(key=lambda pair: pair[0], reverse=True)
        best = scored[:1]
        # 3) fit mean and deviation to the elite; an extra deviation, smaller in each iteration,
        #    keeps the search from narrowing down too early
        elite = np.stack([candidate for _, candidate in scored[:num_elite]])
        mean = elite.mean(0)
        deviation = elite.std(0) + 0.2 * (1 - iteration / iterations)
    return best[0][1]


# ==== Plumbing: what makes the method work with any model, and fast ===============================

# ---- Tasks with choices: few enough answers to score them all, instead of sampling one -----------


def choice_log_probs(model: Model, inputs: dict, choices: list[list[list[int]]]) -> list:
    """log π(choice|x) of every choice, summed over its tokens: a tensor (C,) for each prompt.

    inputs: left-padded prompts from encode. choices: token ids of each prompt's own choices; C may
    differ. Where the model's cache can be copied, each prompt runs only once. Differentiable.
    """
    if not can_repeat_cache(model, inputs):
        return whole_choice_log_probs(model, inputs, choices)
    counts = [len(own_choices) for own_choices in choices]
    # The prompt of each choice, (N,): [0, 0, 0, 1, 1] for two prompts with 3 and 2 choices.
    prompt_of = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).to(model.device)
    tokens, mask = pad_right([choice for own in choices for choice in own], model.device)  # (N, T)
    # 1) The prompts run. Their last position predicts the first token of their choices.
    output = run_model(model, inputs, logits_to_keep=1, use_cache=True)
    log_probs = token_log_probs(output.logits[prompt_of, -1], tokens[:, 0])  # (N,)
    # 2) The choices run on copies of the prompts' cache. Each token predicts the next one, so the
    #    last column need not run.
    if tokens.shape[1] > 1:
        prompt_mask = inputs["attention_mask"][prompt_of]
        logits = run_on_copies(model, output, prompt_of, prompt_mask, tokens[:, :-1], mask[:, :-1])
        log_probs = log_probs + (token_log_probs(logits, tokens[:, 1:]) * mask[:, 1:]).sum(1)
    return list(log_probs.split(counts))


def run_on_copies(model, output, prompt_of, prompt_mask, tokens, mask) -> torch.Tensor:
    """The logits (N, T, V) of tokens (N, T), each row after a copy of its prompt's cache.

    output: what run_model gave for the prompts; its cache changes. prompt_of: the prompt of each
    row, (N,). prompt_mask, mask: the attention masks of the rows' prompts and tokens.
    """
    cache_name = "cache" if "cache" in output else "past_key_values"  # before transformers 5.24
    cache = output[cache_name]
    cache.batch_select_indices(prompt_of)  # in place: row i becomes that of prompt prompt_of[i]
    inputs = {"input_ids": tokens, cache_name: cache}
    # The mask covers the cached tokens, too.
    inputs["attention_mask"] = torch.cat([prompt_mask, mask], dim=1)
    # Where each prompt has its own z, (B, r), copy that, too: (N, r).
    copies = []
    for layer in svf_layers(model).values():
        z = layer.current_z()
        if z.dim() > 1:
            copies.append((layer, "active_z", z[prompt_of]))
    with changed(copies):
        return run_model(model, inputs, use_cache=True).logits


def whole_choice_log_probs(model, inputs: dict, choices: list) -> list[torch.Tensor]:
    """choice_log_probs without a cache: run c takes every prompt followed by its choice c."""
    columns = []
    for c in range(max(len(own_choices) for own_choices in choices)):
        # A prompt with fewer choices repeats its last one. The repetition is dropped below.
        completions = [own_choices[min(c, len(own_choices) - 1)] for own_choices in choices]
        columns.append(completion_log_probs(model, inputs, completions))
    log_probs = torch.stack(columns, dim=1)  # (B, most choices)
    return [row[: len(own_choices)] for row, own_choices in zip(log_probs, choices)]


def can_repeat_cache(model, inputs: dict) -> bool:
    """True if choice_log_probs can run the choices on copies of the prompts' cache."""
    # State-space layers (Mamba) and convolutions keep a state that transformers cannot copy by row.
    layer_types = getattr(model.config.get_text_config(), "layer_types", None) or []
    repeatable = {"full_attention", "sliding_attention", "chunked_attention"}
    only_attention = set(layer_types) <= repeatable
    has_state = getattr(without_peft(model), "_is_stateful", False)
    # Layers under checkpointing run without a cache.
    checkpointed = any(getattr(part, "gradient_checkpointing", False) for part in model.modules())
    # Pictures change how positions are counted.
    return only_attention and not (has_state or checkpointed or has_pictures(inputs))


@torch.no_grad()
def score_choices(
    model: Model, processor: Processor, task: Task, problems: list[dict], *, expert: Experts = None
) -> list[torch.Tensor]:
    """log π(choice|x) of each problem's choices, a tensor (C,) for each. expert: as in evaluate."""
    check_count(expert, problems)
    prompts = [task.conversation(problem) for problem in problems]
    choices = [choices_of(processor, task, problem) for problem in problems]
    lengths = [[len(choice.tokens) for choice in group] for group in choices]

    def score_batch(rows: list[int], inputs: dict) -> list[torch.Tensor]:
        tokens = [[choice.tokens for choice in choices[row]] for row in rows]
        with use_expert(model, select_experts(expert, rows)):
            scores = choice_log_probs(model, inputs, tokens)
        return [log_probs.cpu() for log_probs in scores]

    return run_in_batches(model, processor, prompts, task.prefill, lengths, "choices", score_batch)


def likeliest_choices(model, processor, task, problems, expert: Experts) -> list[Answer]:
    """The likeliest choice of each problem."""
    scores = score_choices(model, processor, task, problems, expert=expert)
    choices = [choices_of(processor, task, problem) for problem in problems]
    return [own_choices[log_probs.argmax()] for own_choices, log_probs in zip(choices, scores)]


def choices_of(processor, task: Task, problem: dict) -> list[Answer]:
    """The possible answers to a problem, not yet rewarded.

    The text before a choice decides how it is split into tokens. Raises Transformer2Error if there
    are no choices, or if one has no tokens.
    """
    texts = task.choices(problem) if callable(task.choices) else task.choices
    if not texts:
        question = problem.get("question")
        raise Transformer2Error(f"task {task.name} has no choices for the problem {question!r}")
    tokenizer, prompt = prepared_tokenizer(processor), task.conversation(problem)
    if isinstance(prompt, str):
        before = prompt + task.prefill
        end = []  # benchmarks score plain text without an end token
    else:
        before = task.prefill  # a text hardly ever merges with the end of a chat template
        end = end_tokens(tokenizer, texts)
    choices = []
    for text in texts:
        tokens = continuation(tokenizer, before, with_space(task.prefill, text))
        if not text.strip() or not tokens:
            raise Transformer2Error(f"the choice {text!r} of task {task.name} gives no tokens")
        choices.append(Answer(tokens + end, text))
    return choices


def with_space(prefill: str, text: str) -> str:
    """The text, with a space before it if it would touch a prefill."""
    would_touch = prefill != "" and not prefill[-1].isspace() and not text[:1].isspace()
    return f" {text}" if would_touch else text


def end_tokens(tokenizer, texts: list[str]) -> list[int]:
    """What has to stand after each choice: an end token if one of them is the start of another.

    Without it the probability of "math" would count answers that go on to "mathematics", too.
    """
    one_starts_another = any(a != b and b.startswith(a) for a in texts for b in texts)
    if one_starts_another and tokenizer.eos_token_id is not None:
        return [tokenizer.eos_token_id]
    return []


@lru_cache(maxsize=10_000)  # a search asks for the same choices again and again
def continuation(tokenizer, before: str, text: str) -> list[int]:
    """Token ids of a text that follows another one.

    A tokenizer often splits a text differently on its own than after another. So both are tokenized
    together, and the tokens of the first are cut off. If the two have merged where they meet, the
    second is tokenized alone.
    """
    start = tokenizer(before, add_special_tokens=False)["input_ids"]
    joint = tokenizer(before + text, add_special_tokens=False)["input_ids"]
    if joint[: len(start)] == start:
        return joint[len(start) :]
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# ---- Generation ----------------------------------------------------------------------------------


def generate(
    model: Model,
    processor: Processor,
    conversations: list[Conversation],
    *,
    expert: Experts = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    prefill: str = "",
    seed: int | None = None,
) -> list[str]:
    """The model's answers to conversations.

    expert: None for the base model, even inside of use_expert; an Expert; or a list with one entry
    for each conversation. temperature: 0 is greedy. prefill: the start of every answer, not
    returned. seed: for sampled answers; None draws one from torch's generator. Raises
    Transformer2Error for a prompt that leaves no room in the model's context or cannot be encoded.
    """
    seed = int(torch.randint(2**31, ())) if seed is None else seed
    check_seed(seed)
    if max_new_tokens < 1 or temperature < 0:
        raise Transformer2Error("max_new_tokens must be at least 1, and temperature at least 0")
    sampling = (max_new_tokens, temperature, prefill, seed)
    answers = generate_answers(model, processor, conversations, expert, *sampling)
    return [answer.text for answer in answers]


def generate_answers(
    model, processor, conversations, expert, max_new_tokens, temperature, prefill, seed
) -> list[Answer]:
    """The answers with their token ids, end token included. Parameters as for generate."""
    check_count(expert, conversations)
    settings = generation_settings(model, processor)
    ends = settings.eos_token_id or []
    causal_lm, tokenizer = without_peft(model), prepared_tokenizer(processor)

    def generate_batch(rows: list[int], inputs: dict) -> list[Answer]:
        prompt_length = inputs["input_ids"].shape[1]
        samplers = []
        if temperature > 0:
            samplers.append(RowSampler(model.device, seed, rows, temperature))
        # The context may have less room than max_new_tokens. run_in_batches sees to it that such a
        # row is alone in its batch, so no other row is cut short.
        room = context_length(model) - prompt_length
        settings.max_new_tokens = min(max_new_tokens, room)
        our_settings = changed([(causal_lm, "generation_config", settings)])
        own_expert = select_experts(expert, rows)
        with use_expert(model, own_expert), our_settings:
            with folded(model, own_expert, temperature, inputs, settings.max_new_tokens):
                sequences = causal_lm.generate(**inputs, logits_processor=samplers)  # (B, P + T)
        answers = []
        for tokens in sequences[:, prompt_length:].tolist():
            ended_at = [t + 1 for t, token in enumerate(tokens) if token in ends]
            if ended_at:
                tokens = tokens[: ended_at[0]]
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            answers.append(Answer(tokens, text, cut_off=not ended_at))
        return answers

    lengths = [[max_new_tokens]] * len(conversations)
    return run_in_batches(
        model, processor, conversations, prefill, lengths, "generation", generate_batch
    )


def generation_settings(model, processor) -> GenerationConfig:
    """The settings for generation. They replace model.generation_config during the call.

    If they were passed to generate() instead, transformers would fill in what they leave unset,
    such as top_k, from the model's own settings.
    """
    tokenizer = prepared_tokenizer(processor)
    ends = model.generation_config.eos_token_id
    if ends is None:
        ends = tokenizer.eos_token_id
    # A model must not write the token for a picture: it would then expect a picture.
    image_token = getattr(processor, "image_token_id", None)
    return GenerationConfig(
        do_sample=False,  # at any temperature: the noise of a RowSampler makes the argmax a sample
        eos_token_id=None if ends is None else np.ravel(ends).tolist(),
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=None if image_token is None else [image_token],
    )


class RowSampler(LogitsProcessor):
    """Samples each row of a batch with noise of its own.

    The Gumbel trick: for exponential noise E, -log E is Gumbel noise, and the argmax over the
    vocabulary of logits / temperature - log E is a draw from softmax(logits / temperature). So the
    model decodes greedily from these scores, and no draw depends on the rest of the batch.
    """

    def __init__(self, device: torch.device, seed: int, rows: list[int], temperature: float):
        self.rows, self.temperature = rows, temperature
        # A row's noise must depend on its number only, not on its batch. The simplest way is a
        # generator for each row. On a GPU that is many slow calls, so there 256 rows share one,
        # which always draws for all 256.
        self.group_size = NOISE_GROUPS.get(device.type, 1)
        self.generators = {}
        for group in {row // self.group_size for row in rows}:
            group_seed = (seed * 1_000_003 + group) % 2**63
            self.generators[group] = torch.Generator(device).manual_seed(group_seed)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        noise_of_group = {}
        for group, generator in self.generators.items():
            noise = torch.empty(self.group_size, scores.shape[1], device=scores.device)
            noise_of_group[group] = noise.exponential_(generator=generator)
        noise = []  # of each row of this batch
        for row in self.rows:
            noise.append(noise_of_group[row // self.group_size][row % self.group_size])
        noise = torch.stack(noise).clamp(min=2**-24)  # (B, V); some devices draw an exact 0
        return scores.float() / self.temperature - noise.log()


def folded(
    model, expert: Experts, temperature: float, inputs: dict, new_tokens: int
) -> contextlib.AbstractContextManager:
    """In this `with` block the layers run with W', built once, if all of this is true:

    1. all rows have the same expert,
    2. there may be 64 new tokens or more (for fewer, building W' does not pay),
    3. W' fits in memory beside the key-value cache, and
    4. the answers are greedy, or the model is in float32.

    Otherwise they run as in training. Call it inside of use_expert: W' is built from the z's in
    use. The reason for 4: a W' rounded to bfloat16 moves the log-probability of a token by 0.04
    (SmolLM2; in float32 by 5e-6), so sampled answers would come from another policy than the one
    that is trained.
    """
    layers = svf_layers(model).values()
    one_expert = not isinstance(expert, list)
    dense_numbers = sum(layer.out_features * layer.in_features for layer in layers)
    rows, prompt_length = inputs["input_ids"].shape
    cache = rows * (prompt_length + new_tokens) * cache_bytes(model)
    fits = dense_numbers * model.dtype.itemsize + cache <= free_memory(model)
    rounding_is_harmless = temperature == 0 or model.dtype == torch.float32
    changes = []
    if one_expert and new_tokens >= 64 and fits and rounding_is_harmless:
        with contextlib.suppress(torch.OutOfMemoryError):  # then it goes on with the factors
            changes = [(layer, "folded_weight", layer.weight) for layer in layers]
    return changed(changes)


def check_seed(seed: int) -> None:
    """Raises Transformer2Error for a seed that is negative or over 2^31."""
    if not 0 <= seed <= 2**31:
        raise Transformer2Error(f"the seed {seed} is out of range: take one from 0 to 2^31")


# ---- Prompts and batches -------------------------------------------------------------------------

CATEGORY_PREFILL = "The category of this question is"
CATEGORY_GUIDE = {  # after the paper's prompt, shortened
    "code": "asking for programming solutions",
    "math": "involving calculations",
    "reasoning": "requiring logic or knowledge of science",
    "other": "of any other kind",
}
FALLBACK_TEMPLATE = (
    "{{ bos_token or '' }}"
    "{% for m in messages %}{{ m['role'] | capitalize }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
# The most tokens in a batch, padding included. On a GPU free memory limits generation instead.
BATCH_TOKENS = {"generation": 16384, "choices": 4096, "gradient": 2048}
NOISE_GROUPS = {"cuda": 256}  # rows that share a generator in RowSampler; elsewhere 1


def category_question(conversation: Conversation, categories: list[str]) -> list[dict]:
    """The conversation of pass 1: asks for the category, before the text of the last message."""
    if isinstance(conversation, str):
        conversation = [{"role": "user", "content": conversation}]
    *earlier, last = conversation
    question = f"Classify the question into one of these categories: {', '.join(categories)}.\n"
    if set(categories) <= set(CATEGORY_GUIDE):
        for number, name in enumerate(categories, 1):
            question += f"{number}. {name.capitalize()}: questions {CATEGORY_GUIDE[name]}.\n"
    if isinstance(last["content"], str):
        content = f"{question}\n{last['content']}"
    else:  # a list of texts and pictures
        content = [{"type": "text", "text": question}, *last["content"]]
    return [*earlier, {**last, "content": content}]


def prepared_tokenizer(processor) -> PreTrainedTokenizerBase:
    """The tokenizer of what AutoProcessor or AutoTokenizer gives, set up for batches of prompts."""
    tokenizer = getattr(processor, "tokenizer", processor)
    tokenizer.padding_side = "left"  # all completions of a batch start in the same column
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def encode(
    model: Model, processor: Processor, conversations: list[Conversation], prefill: str = ""
) -> dict[str, torch.Tensor]:
    """Prompts as left-padded tensors on the model's device: input_ids, attention_mask (B, P).

    Pictures add tensors of their own. Raises Transformer2Error for a prompt that leaves no room in
    the context or cannot be encoded.
    """
    try:
        if isinstance(conversations[0], str):
            texts = [text + prefill for text in conversations]
            inputs = prepared_tokenizer(processor)(texts, padding=True, return_tensors="pt")
        else:
            inputs = apply_chat_template(processor, conversations, prefill)
    except Exception as error:  # many kinds: an unknown role, a picture that does not load
        reason = f"a prompt cannot be encoded (check its roles and pictures): {error}"
        raise Transformer2Error(reason.splitlines()[0]) from error
    length, context = inputs["input_ids"].shape[1], context_length(model)
    if length >= context:
        reason = f"a prompt of {length} tokens leaves no room in the model's context of {context}"
        raise Transformer2Error(f"{reason}: shorten it")
    if not sees_pictures(processor):
        inputs.pop("token_type_ids", None)  # many text-only models do not take it
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}


def apply_chat_template(processor, conversations, prefill: str) -> dict:
    """Encodes conversations with the chat template. A prefill starts the assistant's turn."""
    tokenizer = prepared_tokenizer(processor)
    if not processor.chat_template and not tokenizer.chat_template:
        print("note: no chat template, so prompts read 'User: ...'", file=sys.stderr)
        processor.chat_template = tokenizer.chat_template = FALLBACK_TEMPLATE
    start = [{"role": "assistant", "content": prefill}] if prefill else []
    # Copies of the messages, which are changed below.
    prompts = [[dict(message) for message in [*turns, *start]] for turns in conversations]
    for message in itertools.chain(*prompts):
        if sees_pictures(processor):
            message["content"] = content_parts(message["content"])
        elif not isinstance(message["content"], str):
            raise ValueError("a message has parts, but the model reads plain text only")
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    options |= {"add_generation_prompt": not prefill, "continue_final_message": bool(prefill)}
    if sees_pictures(processor):
        options["processor_kwargs"] = {"padding": True}
    else:
        options["padding"] = True
    return processor.apply_chat_template(prompts, **options)


def sees_pictures(processor) -> bool:
    """True for the processor of a model that can take pictures."""
    return hasattr(processor, "image_processor")


def content_parts(content: str | list[dict]) -> list[dict]:
    """The content of a message in parts. A picture may be a function that loads it."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    parts = [dict(part) for part in content]
    for part in parts:
        if callable(part.get("image")):
            part["image"] = part["image"]()
    return parts


def run_in_batches(
    model, processor, conversations, prefill, lengths: list[list[int]], kind: str, compute: Callable
) -> list:
    """One result for each conversation. compute(row numbers, encoded prompts) runs a batch.

    lengths[i]: how many tokens may follow prompt i: one number for an answer, or one for each of
    its choices. kind: a key of BATCH_TOKENS. Several processes share the rows. If a GPU runs out of
    memory, this batch and all later ones of its kind are at most half as large. Raises
    Transformer2Error for a row that does not fit in memory alone, or in the context.
    """
    # 1) The lengths of the prompts. 256 at a time, as pictures are large.
    prompt_lengths = []
    for start in range(0, len(conversations), 256):
        inputs = encode(model, processor, conversations[start : start + 256], prefill)
        prompt_lengths += inputs["attention_mask"].sum(1).tolist()
    # 2) The longest first, so that the rows of a batch have similar lengths. Prompt and
    #    answer must fit in the context, except in generation, which stops at its end.
    totals = [prompt_length + max(own) for prompt_length, own in zip(prompt_lengths, lengths)]
    longest_first = sorted(range(len(totals)), key=lambda row: totals[row], reverse=True)
    waiting = my_share(longest_first)  # row numbers
    longest, context = max(totals, default=0), context_length(model)
    if kind != "generation" and longest > context:
        reason = (
            f"a prompt and its answer have {longest} tokens, but the model's context is {context}"
        )
        raise Transformer2Error(f"{reason}: shorten one of them")

    results = {}
    with tqdm(total=len(waiting), leave=False, delay=3, disable=None) as bar:
        while waiting:
            # 3) As many as fit.
            limit = most_tokens(model, kind)
            rows, tokens = next_batch(waiting, prompt_lengths, lengths, limit, context)
            # 4) Run them. If the memory is too small for that, try again with fewer.
            try:
                inputs = encode(model, processor, [conversations[row] for row in rows], prefill)
                results.update(zip(rows, compute(rows, inputs)))
            except torch.OutOfMemoryError as error:
                halve_batches(model, kind, len(rows), tokens, error)
                continue
            waiting = waiting[len(rows) :]
            bar.update(len(rows))
    results = merge_shares(results)
    return [results[row] for row in range(len(conversations))]


def next_batch(waiting, prompt_lengths, lengths, limit: float, context: int) -> tuple[list, int]:
    """The first waiting rows that fit together, at least one, and how many tokens they have.

    Tokens are counted with padding, and with a copy of the prompt for each choice. A row that may
    pass the end of the context goes alone: generation stops there, for all rows of its batch.
    """
    rows, tokens = [], 0
    longest_prompt = longest_answer = most_choices = 0
    for row in waiting:
        longest_prompt = max(longest_prompt, prompt_lengths[row])
        longest_answer = max(longest_answer, *lengths[row])
        most_choices = max(most_choices, len(lengths[row]))
        length = longest_prompt + longest_answer
        tokens_with_row = (len(rows) + 1) * most_choices * length
        if rows and (tokens_with_row > limit or length > context):
            break
        rows.append(row)
        tokens = tokens_with_row
    return rows, tokens


def most_tokens(model, kind: str) -> float:
    """How many tokens a batch may have, padding included. kind: a key of BATCH_TOKENS."""
    memory = free_memory(model)
    budget = getattr(model, "token_budget", None)  # see token_budget
    if kind == "generation" and memory < math.inf:  # on a GPU the key-value cache has to fit
        limit = memory / cache_bytes(model)
        if budget is not None:
            limit = min(limit, budget)
    elif budget is not None:
        limit = budget
    else:
        limit = BATCH_TOKENS[kind]
    fitting_tokens = getattr(model, "fitting_tokens", {})  # see halve_batches
    return min(limit, fitting_tokens.get(kind, math.inf))


def halve_batches(model, kind: str, num_rows: int, tokens: int, error: Exception) -> None:
    """After a batch ran out of memory: limits later ones of its kind to half its tokens.

    Raises Transformer2Error if that was a single row.
    """
    if num_rows == 1:
        reason = f"there is not enough memory for a single row of {tokens} tokens"
        way_out = "take shorter prompts or answers, or a smaller model"
        if kind == "gradient":
            way_out = f"resume with checkpointing, or {way_out}"
        raise Transformer2Error(f"{reason}: {way_out}") from error
    fitting_tokens = vars(model).setdefault("fitting_tokens", {})
    if not fitting_tokens:  # said once
        note = f"a batch of {tokens} tokens does not fit in memory: later ones have at most half"
        way_out = f"a token budget of {tokens // 2} or less avoids this"
        tqdm.write(f"note: {note}; {way_out}", file=sys.stderr)
    fitting_tokens[kind] = tokens // 2


def token_budget(model, tokens: int | None) -> contextlib.AbstractContextManager:
    """In this `with` block a batch has at most `tokens` tokens. A longer row runs alone.

    None leaves the bound as it is.
    """
    return changed([] if tokens is None else [(model, "token_budget", tokens)])


def free_memory(model) -> float:
    """Nine tenths of the bytes that are left on the model's GPU; infinite without a GPU."""
    device = model.device
    if device.type != "cuda":
        return math.inf
    # What torch has reserved, but no tensor takes
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return 0.9 * (torch.cuda.mem_get_info(device)[0] + unused)


def cache_bytes(model) -> int:
    """Bytes of a token in the key-value cache: an upper bound where windows slide."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 1
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2 * config.num_hidden_layers * kv_heads * head_size * model.dtype.itemsize


def pad_right(rows: list[list[int]], device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of unequal length in one tensor, and their mask: both (len(rows), longest)."""
    tokens = [torch.tensor(row, dtype=torch.long, device=device) for row in rows]
    mask = [torch.ones_like(row) for row in tokens]
    return pad_sequence(tokens, batch_first=True), pad_sequence(mask, batch_first=True)


def append_tokens(inputs: dict, tokens: torch.Tensor, mask: torch.Tensor) -> dict:
    """Prompts with tokens after them. The tensors of pictures are kept."""
    sequences = dict(inputs)
    for name, tensor in inputs.items():
        if tensor.shape == inputs["input_ids"].shape:  # such as token_type_ids, where 0 is text
            sequences[name] = F.pad(tensor, (0, tokens.shape[1]))
    sequences["input_ids"] = torch.cat([inputs["input_ids"], tokens], dim=1)
    sequences["attention_mask"] = torch.cat([inputs["attention_mask"], mask], dim=1)
    return sequences


# ---- Models and layers ---------------------------------------------------------------------------

TEXT_INPUTS = {"input_ids", "attention_mask", "cache", "past_key_values"}


def has_pictures(inputs: dict) -> bool:
    """True if there is more than text: pictures, or the token types that go with them."""
    return any(name not in TEXT_INPUTS for name in inputs)


def run_model(model, inputs: dict, logits_to_keep: int = 0, use_cache: bool = False):
    """The model's output. logits_to_keep: how many last positions need logits; 0: all."""
    accepted = inspect.signature(without_peft(model).forward).parameters
    options = {"use_cache": use_cache}
    if "logits_to_keep" in accepted:
        options["logits_to_keep"] = logits_to_keep
    # Positions count real tokens only, so that left padding does not shift a prompt. With a cache
    # the mask covers more than the input, whose positions are the last ones. With pictures the
    # model makes the positions itself.
    if "position_ids" in accepted and not has_pictures(inputs):
        positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        num_new = inputs["input_ids"].shape[1]
        options["position_ids"] = positions[:, -num_new:]
    return model(**inputs, **options)


def without_peft(model) -> Model:
    """The transformers model inside a PEFT model. Any other model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def context_length(model) -> int:
    """How many tokens the model can see; some models have no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**30


def reference_policy(model) -> contextlib.AbstractContextManager:
    """π_W inside a `with` block: the model with z = 1, or a PEFT model without its adapter."""
    if svf_layers(model):
        return use_expert(model, None)
    if hasattr(model, "disable_adapter"):
        return model.disable_adapter()
    raise Transformer2Error("the KL needs a base model: use apply_svf or PEFT, or kl_coef=0")


def checkpointing(model, enabled: bool) -> contextlib.AbstractContextManager:
    """In this `with` block, transformer blocks save only their input and run again in backward().

    transformers does this only for a block whose `training` is True. So this is set for each block,
    but not for the layers inside it, which stay in eval mode. A block that trains would also apply
    dropout of its own, so that is set to 0.
    """
    changes = []
    run_block = partial(run_checkpointed, use_reentrant=False)
    for block in model.modules():
        if enabled and isinstance(block, GradientCheckpointingLayer):
            changes += [(block, "gradient_checkpointing", True), (block, "training", True)]
            changes += [(block, "_gradient_checkpointing_func", run_block)]
            changes += [(block, name, 0.0) for name in vars(block) if name.endswith("dropout")]
    if enabled and not changes:
        raise Transformer2Error("this model cannot be checkpointed: leave checkpointing off")
    return changed(changes)


@contextlib.contextmanager
def changed(changes: list[tuple[object, str, object]]) -> Iterator[None]:
    """Sets attributes, given as (object, name, value), and puts the previous values back."""
    with contextlib.ExitStack() as undo:
        for thing, name, value in changes:
            if name in vars(thing):
                undo.callback(setattr, thing, name, vars(thing)[name])
            else:  # its class has it, or nothing does
                undo.callback(delattr, thing, name)
            setattr(thing, name, value)
        yield


# Regular expressions over layer names. Vision and audio towers are left out.
TEXT_ONLY = r"^(?!.*(vision|visual|image|audio|multi_modal|projector|connector)).*"
TARGETS = {
    # model.layers.3.mlp.up_proj, transformer.h.3.mlp.c_fc, decoder.layers.3.fc1
    "mlp": TEXT_ONLY + r"\b(mlp|ffn|feed_forward|fc1|fc2|fc_in|fc_out)(\.|$)",
    # model.layers.3.self_attn.q_proj, transformer.h.3.attn.c_attn
    "attention": TEXT_ONLY + r"\b(self_attn|attn|attention|self_attention)\.",
    "all": TEXT_ONLY,
}


def matching_layers(model, targets: str) -> dict[str, nn.Linear | Conv1D]:
    """The layers that `targets` selects. Raises Transformer2Error if there are none."""
    way_out = f"use {', '.join(TARGETS)} or a regular expression over layer names"
    try:
        pattern = re.compile(TARGETS.get(targets, targets))
    except re.error as error:
        reason = f"targets {targets!r} match no layer: they are not a valid regular expression"
        raise Transformer2Error(f"{reason}: {way_out}") from error
    layers = {}
    for name, module in model.named_modules():
        is_linear = isinstance(module, nn.Linear | Conv1D)
        is_head = module is model.get_output_embeddings() or name.endswith("lm_head")
        if is_linear and not is_head and pattern.search(name):
            if module.weight.element_size() > 1:  # 1 byte: a quantised layer
                layers[name] = module
    fused = fused_weights(model, pattern)
    if not layers and fused:
        reason = f"targets {targets!r} match only fused mixture-of-experts weights"
        raise Transformer2Error(f"{reason}, which cannot be adapted, like {fused[0]}: {way_out}")
    if not layers:
        reason = f"targets {targets!r} match no linear layer, or only quantised or adapted ones"
        raise Transformer2Error(f"{reason}: {way_out}")
    if fused:
        note = f"{len(fused)} fused mixture-of-experts weights cannot be adapted, like {fused[0]}"
        print(f"note: {note}; adapted: {len(layers)}, like {[*layers][0]}", file=sys.stderr)
    return layers


def fused_weights(model, pattern: re.Pattern) -> list[str]:
    """Names of matching 3-D parameters: some mixtures of experts keep all their matrices in one."""
    in_3d = [name for name, weight in model.named_parameters() if weight.dim() == 3]
    return [name for name in in_3d if "conv" not in name and pattern.search(name)]


def spread_over_rows(scale: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """One scale for each row, (B, r), in a shape that multiplies the components of x, (..., r)."""
    if len(scale) == len(x):
        ones = [1] * (x.dim() - 2)
        return scale.view(len(scale), *ones, -1)  # (B, 1, ..., 1, r)
    if x.dim() == 2 and len(x) % len(scale) == 0:  # OPT flattens (B, T, d) to (B * T, d)
        return scale.repeat_interleave(len(x) // len(scale), dim=0)
    reason = f"there are {len(scale)} experts for {len(x)} rows"
    raise Transformer2Error(f"{reason}: give one for each, or one for all")


def stack_experts(expert: Experts, layers: dict[str, SVFLinear]) -> dict[str, torch.Tensor]:
    """Layer name -> z of an expert (r,), or of one expert for each row (B, r); see use_expert."""
    row_experts = expert if isinstance(expert, list) else [expert]  # a single one: as a list
    row_experts = [row_expert or {} for row_expert in row_experts]  # None: z = 1 everywhere
    for row_expert in row_experts:
        check_shapes({name: z.shape for name, z in row_expert.items()}, layers)
    stacked = {}
    for name, layer in layers.items():
        # A mixture-of-experts layer gets tokens that a router picked from all rows.
        if len(row_experts) > 1 and ".experts." in name:
            reason = f"mixture-of-experts layer {name} cannot tell the rows of a batch apart"
            raise Transformer2Error(f"{reason}: use one expert for all, or adapt other layers")
        ones = torch.ones_like(layer.s)
        rows = [row_expert.get(name, ones).detach().to(ones) for row_expert in row_experts]
        stacked[name] = torch.stack(rows) if isinstance(expert, list) else rows[0]
    return stacked


def check_count(expert: Experts, rows: list) -> None:
    """Raises Transformer2Error unless a list of experts has one for each row."""
    if isinstance(expert, list) and len(expert) != len(rows):
        reason = f"there are {len(expert)} experts for {len(rows)} rows"
        raise Transformer2Error(f"{reason}: give one for each, or one for all")


def select_experts(expert: Experts, rows: list[int]) -> Experts:
    """The experts of some rows: a list, or a single one if all have the same."""
    if not isinstance(expert, list):
        return expert
    own = [expert[row] for row in rows]
    all_the_same = all(row_expert is own[0] for row_expert in own)
    return own[0] if all_the_same else own


def check_shapes(shapes: dict, layers: dict[str, SVFLinear]) -> None:
    """Raises Transformer2Error unless every z of an expert, given by its shape, fits its layer."""
    for name, shape in shapes.items():
        if name not in layers or [*layers[name].s.shape] != [*shape]:
            reason = "the expert is for another model or other targets"
            raise Transformer2Error(f"{reason}: {name} {[*shape]} does not fit")


# ---- Training: its progress, several processes ---------------------------------------------------


class Progress:
    """The state of a training run, from which it can be resumed with the same result.

    Model and task have to be the same; only their names and shapes are compared.
    """

    def __init__(self, model: Model, task: Task, hp: Hyperparameters):
        # What trains; after apply_svf: layer name -> z.
        trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.parameters = {name.removesuffix(".z"): p for name, p in trainable}
        if not self.parameters:
            raise Transformer2Error("nothing in the model requires gradients: call apply_svf first")
        if any(layer.active_z is not None for layer in svf_layers(model).values()):
            raise Transformer2Error("use_expert hides the model's own z's: train outside of it")
        # Without weight decay, which would pull z to 0.
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=hp.lr, weight_decay=0.0)
        self.start = self.values()
        self.next_step = 0
        self.best, self.best_score = self.start, -1.0
        # load compares these and names those that differ.
        layers = [f"{name} {[*z.shape]}" for name, z in self.start.items()]
        self.settings = {**asdict(hp), "task": task.name, "token limit": task.max_new_tokens}
        self.settings |= {"model": model.config._name_or_path, "layers": layers}
        # These two may differ when a run is resumed: they affect no more than rounding.
        del self.settings["token_budget"], self.settings["checkpointing"]

    def values(self) -> Expert:
        """A copy of what trains."""
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def set_values(self, values: Expert) -> None:
        """Puts values into the model."""
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])

    def close(self) -> None:
        """Puts the starting values back."""
        self.set_values(self.start)
        self.optimizer.zero_grad()

    def save(self, path: str | Path) -> None:
        """Writes all that load needs. Raises Transformer2Error if it cannot be written."""
        state = {"settings": self.settings, "next_step": self.next_step, "values": self.values()}
        state |= {"best": self.best, "best_score": self.best_score}
        state["optimizer"] = self.optimizer.state_dict()
        write_whole(path, partial(torch.save, state))

    def load(self, path: str | Path) -> None:
        """Raises Transformer2Error for a damaged file, or one of a run with other settings."""
        try:
            device = next(iter(self.start.values())).device
            state = torch.load(path, map_location=device, weights_only=True)
            theirs = state["settings"]
            differing = [name for name in self.settings if theirs.get(name) != self.settings[name]]
            if differing:
                reason = f"{path} belongs to a run with other settings ({', '.join(differing)})"
                raise Transformer2Error(f"{reason}: resume with the same settings, or delete it")
            self.next_step = state["next_step"]
            self.best, self.best_score = state["best"], state["best_score"]
            self.set_values(state["values"])
            self.optimizer.load_state_dict(state["optimizer"])
        except Transformer2Error:
            raise
        except Exception as error:  # a damaged file raises errors of many kinds
            reason = f"cannot resume from {path}: {error}".splitlines()[0]
            way_out = "if it is damaged, delete it to begin again"
            raise Transformer2Error(f"{reason}: {way_out}") from error


def descend(progress, stats: StepStats, hp: Hyperparameters) -> None:
    """A step of AdamW, unless the gradient is not finite. Sets grad_norm, lr and skipped."""
    parameters = progress.parameters.values()
    stats.grad_norm = nn.utils.clip_grad_norm_(parameters, hp.max_grad_norm).item()
    stats.lr = hp.lr * (1 + math.cos(math.pi * (stats.step - 1) / hp.steps)) / 2
    stats.skipped = not math.isfinite(stats.grad_norm)
    if not stats.skipped:
        progress.optimizer.param_groups[0]["lr"] = stats.lr
        progress.optimizer.step()
    progress.optimizer.zero_grad()


def draw_problems(problems: list[dict], count: int, seed: int) -> list[dict]:
    """Some of the problems, each at most once, in random order."""
    order = torch.randperm(len(problems), generator=torch.Generator().manual_seed(seed))
    return [problems[i] for i in order[:count]]


def set_advantages(answers: list[list[Answer]], use_baseline: bool) -> None:
    """Sets each answer's advantage: its reward, or leave_one_out_advantages with a baseline."""
    all_answers = [answer for group in answers for answer in group]
    advantages = torch.tensor([answer.reward for answer in all_answers])
    if use_baseline:
        advantages = leave_one_out_advantages(advantages)
    for answer, advantage in zip(all_answers, advantages.tolist()):
        answer.advantage = advantage


def step_stats(step, task, answers: list[list[Answer]], hp, rollout_seconds: float) -> StepStats:
    """The figures of a step that follow from its answers."""
    stats = StepStats(step, kl_coef=hp.kl_coef)
    all_answers = [answer for group in answers for answer in group]
    stats.reward = sum(answer.weight * answer.reward for answer in all_answers)
    squares = sum(answer.weight * (answer.reward - stats.reward) ** 2 for answer in all_answers)
    stats.reward_deviation = round(math.sqrt(squares), 6)  # exactly 0 where all are equal
    if hp.kl_coef > 0:
        stats.kl = sum(a.weight * (a.log_prob - a.ref_log_prob) for a in all_answers)
    if task.choices is None:
        num_tokens = sum(len(answer.tokens) for answer in all_answers)
        stats.mean_length = num_tokens / len(all_answers)
        stats.cut_off = sum(answer.cut_off for answer in all_answers) / len(all_answers)
        stats.tokens_per_second = num_tokens / rollout_seconds
    return stats


def process_rank() -> int:
    """The number of this process among those that train together (torchrun starts them)."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def my_share(rows: Sequence[int]) -> Sequence[int]:
    """Every n-th row, where n processes share the work; all rows for one process."""
    if not distributed.is_initialized():
        return rows
    return rows[distributed.get_rank() :: distributed.get_world_size()]


def merge_shares(results: dict) -> dict:
    """The results of all processes, by row."""
    if distributed.is_initialized():
        shares = [None] * distributed.get_world_size()
        distributed.all_gather_object(shares, results)
        for share in shares:
            results.update(share)
    return results


def sum_over_processes(values: torch.Tensor) -> torch.Tensor:
    """The sum of the tensors of all processes."""
    if distributed.is_initialized():
        distributed.all_reduce(values)
    return values


# ---- Files ---------------------------------------------------------------------------------------


def save_expert(expert: Expert, path: str | Path, **about: object) -> None:
    """Writes a safetensors file in float32, whole or not at all. about: facts for its header.

    Equal experts with equal facts give equal bytes.
    """
    tensors = {name: expert[name].detach().float().cpu().contiguous() for name in sorted(expert)}
    header = {"transformer2": expert_header(tensors, about)}
    write_whole(path, partial(save_file, tensors, metadata=header))


def expert_header(expert: Expert, about: dict) -> str:
    """Facts about an expert as one JSON object, with a format number and a checksum."""
    facts = json.loads(json.dumps(about, default=str))  # as load_expert sees them
    checksum = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(expert):
        checksum.update(name.encode() + expert[name].numpy().tobytes())
    header = {"format": 1, "about": facts, "sha256": checksum.hexdigest()}
    return json.dumps(header, sort_keys=True)


def expert_facts(path: str | Path) -> dict:
    """What save_expert was told about an expert. Raises an error for a damaged header."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    if "transformer2" in metadata:
        return dict(json.loads(metadata["transformer2"])["about"])
    if "sha256" in str(metadata):
        # A checksum without the key "transformer2" means that the key is damaged.
        raise ValueError("its header is damaged")
    return metadata  # a file written before formats were numbered


def load_expert(path: str | Path, model: Model | None = None) -> Expert:
    """Reads an expert: a file by save_expert, or a .pt file by the paper's authors.

    model: for a check of names and shapes; the authors' files need it. Raises Transformer2Error
    for a file that is damaged, holds anything but finite numbers, or does not fit the model.
    """
    try:
        if str(path).endswith(".pt"):
            return load_authors_expert(path, model)
        facts = expert_facts(path)
        with safe_open(path, "pt") as file:
            if model is not None:  # before a tensor is read
                shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
                check_shapes(shapes, svf_layers(model))
                # An expert would also fit a deeper model, in its first blocks. So our scripts save
                # the number of blocks. (Older files hold it as text.)
                blocks = model.config.get_text_config().num_hidden_layers
                if str(facts.get("blocks", blocks)) != str(blocks):
                    raise ValueError(
                        f"it is for {facts['blocks']} blocks, but the model has {blocks}"
                    )
            expert = {name: file.get_tensor(name) for name in file.keys()}
            header = (file.metadata() or {}).get("transformer2")
        check_values(expert)
        # Older files have no header. With one, what was read must give the same header again.
        if header is not None and header != expert_header(expert, facts):
            raise ValueError("it is damaged or of a later format: its checksum does not match")
    except Exception as error:  # a damaged file raises errors of many kinds
        reason = f"cannot use the expert {path}: {error}"
        raise Transformer2Error(reason.splitlines()[0]) from error
    return expert


def check_values(expert: Expert) -> None:
    """Raises ValueError unless an expert holds tensors of finite floating-point numbers."""
    if not expert:
        raise ValueError("it holds no tensors")
    for name, z in expert.items():
        is_tensor = isinstance(z, torch.Tensor)
        if not is_tensor or not z.is_floating_point() or not z.isfinite().all():
            raise ValueError(f"{name} is not a tensor of finite floating-point numbers")


def load_authors_expert(path: str | Path, model: Model | None) -> Expert:
    """The z's of the authors' checkpoint, in the paper's terms.

    They learn p with z = sigmoid(p), and multiply W' by sum(s) / sum(s * z), which keeps the sum
    of the singular values. Here both become a part of z.
    """
    if model is None:
        raise ValueError("it is a file by the paper's authors: pass the model as well")
    try:
        with warnings.catch_warnings(action="ignore"):  # torch's, about the file's format
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except OSError:  # no such file, no permission
        raise
    except Exception as error:  # torch's own message would advise to load the file unsafely
        raise ValueError("it is not a torch file that holds only tensors") from error
    if not isinstance(content, dict):
        raise ValueError("it is not a dict of tensors")
    layers = svf_layers(model)
    mlp_names = [name for name in layers if "mlp" in name]
    parameters = {}
    for key, p in content.items():
        # Keys: model.layers.0.mlp.gate_proj.weight, or learnable_params_module_list.7, the eighth
        # MLP layer.
        name = str(key).removesuffix(".weight")
        number = name.rpartition(".")[2]
        if number.isdigit() and int(number) < len(mlp_names):
            name = mlp_names[int(number)]
        parameters[name] = p
    check_shapes({name: getattr(p, "shape", []) for name, p in parameters.items()}, layers)
    check_values(parameters)
    expert = {}
    for name, p in parameters.items():
        z = p.detach().float().sigmoid()
        s = layers[name].s.to(z)
        expert[name] = z * s.sum() / (s * z).sum()
    return expert


def decompose_cached(weight: torch.Tensor, cache_dir: str | Path) -> tuple:
    """decompose, kept in cache_dir under a hash of the weight's bytes, with its dtype and rows."""
    content = weight.detach().contiguous().cpu().view(torch.uint8).numpy()
    digest = hashlib.sha256(content).hexdigest()[:24]
    path = Path(cache_dir) / f"{digest}-{weight.dtype}-{len(weight)}.safetensors"
    with contextlib.suppress(Exception):  # not there yet, or damaged
        factors = load_file(path, device=str(weight.device))
        return factors["U"], factors["s"], factors["Vh"]
    U, s, Vh = decompose(weight)
    with contextlib.suppress(Transformer2Error):  # the cache cannot be written: go on without
        write_whole(path, partial(save_file, {"U": U, "s": s, "Vh": Vh}))
    return U, s, Vh


def write_whole(path: str | Path, write: Callable[[Path], object]) -> None:
    """Calls write(temporary path), then renames the result: the path never holds half a file.

    Several processes may write to the same path: the last one wins. What a killed process left over
    is removed. Raises Transformer2Error if the path cannot be written.
    """
    path = Path(path).absolute()
    prefix = f".{path.name}.{platform.node()}."
    folder = path.parent / f"{prefix}{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in path.parent.glob(f"{glob.escape(prefix)}*"):
            process_id = leftover.name.removeprefix(prefix)
            if process_id.isdigit() and not is_running(int(process_id)):
                shutil.rmtree(leftover, ignore_errors=True)
        write(folder / path.name)
        os.replace(folder / path.name, path)
    except Exception as error:  # no space, no permission: libraries raise errors of many kinds
        reason = f"cannot write {path}: {error}"
        raise Transformer2Error(reason.splitlines()[0]) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def is_running(process_id: int) -> bool:
    """False only if there is certainly no such process on this machine."""
    if os.name == "nt":  # there os.kill(process_id, 0) sends Ctrl+C
        return True
    try:
        os.kill(process_id, 0)
    except OSError as error:  # PermissionError: it runs, and belongs to another user
        return not isinstance(error, ProcessLookupError)
    return True
