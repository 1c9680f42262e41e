"""Transformer²: self-adaptive language models, in one file to be read beside the paper.

Sun, Cetin, Tang: "Transformer-Squared: Self-adaptive LLMs", ICLR 2025, arXiv 2501.06252.

A weight matrix is split once into its singular components, W = U diag(s) Vᵀ. A vector z with one
number per component rescales them: W' = U diag(s * z) Vᵀ. The z's of all matrices are an *expert*.
They are all that trains, by reinforcement learning on the model's own answers. At inference a
first pass finds out which expert or mixture of experts a prompt needs. A second pass answers.

The file follows the paper, section 3.1 and section 3.2. The plumbing comes last.
Shapes in comments: B rows of a batch, P prompt tokens, T completion tokens, V vocabulary, C choices
of one problem, N choices of all problems in a batch, m x n a weight, r singular values, K experts.
"""

import contextlib
import hashlib
import inspect
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
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
ExpertOrRows = Expert | None | list[Expert | None]


class Transformer2Error(ValueError):
    """Something the caller can put right. The message is one sentence that says what and how."""


# ---- Section 3.1: singular value fine-tuning, W' = U diag(s * z) Vᵀ ------------------------------


def decompose(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Splits W (m, n) into U (m, r), s (r,) and Vh (r, n) with W = U diag(s) Vh; r = min(m, n).

    s descends, in float32; U and Vh have the weight's dtype. The eigenvectors of WᵀW are V, and
    column i of W V is s_i u_i. So U diag(s) Vh = W V Vᵀ is W exactly, up to rounding.
    """
    # 1) Transpose a wide W, so that WᵀW is (r, r). Its eigenvalues are s²: in float32 a small s
    #    would drown in rounding, so compute in float64.
    is_wide = weight.shape[0] < weight.shape[1]
    W = weight.detach().T if is_wide else weight.detach()
    if W.device.type == "mps":  # it has no float64
        W = W.cpu()
    W = W.double()
    # 2) The right singular vectors. eigh sorts from small to large.
    V = torch.linalg.eigh(W.T @ W).eigenvectors.flip(-1)  # (r, r)
    # 3) The left singular vectors and the singular values.
    scaled_U = W @ V  # (max(m, n), r)
    s = scaled_U.norm(dim=0)
    U = scaled_U / s.clamp(min=1e-12)
    if is_wide:  # Wᵀ = U diag(s) Vᵀ means W = V diag(s) Uᵀ
        U, V = V, U
    return U.to(weight).contiguous(), s.float().to(weight.device), V.T.to(weight).contiguous()


class SVFLinear(nn.Module):
    """y = U diag(s * z) Vᵀ x + b, in the place of a linear layer. z (r,) is all that trains.

    forward never builds W', so backward makes no (m, n) gradient. x: (B, ..., in_features).
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
        self.z = nn.Parameter(torch.ones_like(s))  # z = 1 is the base model
        self.active_z: torch.Tensor | None = None  # set by use_expert: (r,), or (B, r), one per row
        self.bias = linear.bias
        # The layer is kept for merge_svf: in a list, so that torch does not register it as a
        # submodule, and without its weight, which is no longer needed.
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
        return ((self.U.float() * (self.s * z)) @ self.Vh.float()).to(self.U.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.s * self.current_z()  # float32: bfloat16 would round small steps of z away
        if scale.dim() == 2:
            scale = spread_over_rows(scale, x)
        components = F.linear(x, self.Vh)  # Vᵀ x, (..., r)
        scaled = (components * scale).to(x.dtype)
        return F.linear(scaled, self.U, self.bias)


def apply_svf(model: Model, targets: str = "mlp", cache_dir: str | Path | None = None) -> Model:
    """Freezes the model and puts an SVFLinear in the place of every matching layer (section 3.1).

    In place; returns the model. targets: "mlp" (as in the paper), "attention", "all", or a regular
    expression over layer names; never embeddings or the output head. cache_dir: a folder that keeps
    decompositions for the next time. Raises Transformer2Error if no layer matches.
    """
    layers = matching_layers(model, targets).items()
    model.requires_grad_(False)
    for name, layer in tqdm(layers, desc="decomposing", leave=False, delay=2, disable=None):
        model.set_submodule(name, SVFLinear(layer, cache_dir))
    return model.eval()


def svf_layers(model: Model) -> dict[str, SVFLinear]:
    """Layer name -> SVFLinear, in the order of the model."""
    modules = model.named_modules()
    return {name: module for name, module in modules if isinstance(module, SVFLinear)}


def merge_svf(model: Model) -> Model:
    """Folds the z's in use into layers of the original class. In place; returns the model."""
    for name in list(svf_layers(model)):
        layer = model.get_submodule(name)
        dense_layer = layer.dense_layer[0]
        weight = layer.weight.detach()
        if isinstance(dense_layer, Conv1D):  # it keeps its weight transposed
            weight = weight.T
        dense_layer.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        model.set_submodule(name, dense_layer)
    return model


# ---- Experts: one z for every adapted layer ------------------------------------------------------


def get_expert(model: Model) -> Expert:
    """A copy of the z's in use: inside `with use_expert` those, otherwise the model's own."""
    layers = svf_layers(model)
    return {name: layer.current_z().detach().clone() for name, layer in layers.items()}


def use_expert(model: Model, expert: ExpertOrRows) -> contextlib.AbstractContextManager:
    """`with use_expert(model, expert):` runs the model with these z's, then puts the previous back.

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
# REINFORCE takes the drawn ŷ and their rewards as given. The gradient of the KL is an expectation
# over the same answers (its other term, E[∇ log π_W'], is 0), so that
#     ∇J = E[ ∇ log π_W'(ŷ|x) · ( r(ŷ, y) - λ log( π_W'(ŷ|x) / π_W(ŷ|x) ) ) ].
# This is also the gradient of E[r] - λ KL. One sampled answer to each problem estimates it: see
# reinforce_loss below.


@dataclass
class Task:
    """A task. A problem is a dict with question, answer and, if there is one, a worked solution."""

    name: str
    problems: Callable[[str], list[dict]]  # split ("train", "validation", "test") -> problems
    conversation: Callable[[dict], Conversation]  # problem -> prompt
    reward: Callable[[str, dict], float]  # (answer, problem) -> 1 if right, below 0 if wrong
    max_new_tokens: int = 256
    prefill: str = ""  # the start of every answer, such as "Let's think step by step"
    # The only possible answers: a list, or a function of the problem. Nothing is generated then.
    choices: list[str] | Callable[[dict], list[str]] | None = None
    category: str | None = None  # for the caller: what pass 1 calls prompts of this kind
    hyper: dict = field(default_factory=dict)  # for the caller: Hyperparameters that suit the task


@dataclass
class Hyperparameters:
    """The settings of reinforce. Defaults are the paper's (appendix A.1) where it has one."""

    steps: int = 100  # updates of z
    batch_size: int = 256  # problems in an update, with one answer each
    lr: float = 2e-3  # AdamW's learning rate, which falls to 0 along a cosine
    kl_coef: float = 0.0  # λ; the paper picks 0, 0.1, 0.2 or 0.3 on validation problems
    max_grad_norm: float = 1e-3  # over all z's together
    baseline: bool = True  # subtract the mean of the other rewards (not in the paper)
    validate_every: int = 10  # steps; the z of the best validation accuracy is the result
    validation_problems: int = 128
    token_budget: int = 2048  # tokens in a micro-batch of an update, padding included
    checkpointing: bool = False  # less memory for activations, a third more time
    seed: int = 0  # draws the problems and the answers


@dataclass
class Answer:
    """The model's answer to a problem, and its reward."""

    tokens: list[int]  # empty for a task with choices
    text: str
    reward: float


@dataclass
class StepStats:
    """The statistics of one training step. Reward and KL are means over its problems."""

    step: int = 0
    reward: float = 0.0
    kl: float = 0.0  # KL(π_W' ‖ π_W); 0 at λ = 0, where it is not computed
    grad_norm: float = 0.0  # before clipping
    mean_length: float = 0.0  # tokens of an answer
    seconds: float = 0.0
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

    Trains in place whatever requires gradients: z after apply_svf, or a PEFT adapter. Returns the
    values with the best validation accuracy, and restores the start. hyperparameters: fields of
    Hyperparameters. checkpoint: a file for the progress after each step; if it exists, the run goes
    on from there. on_step: gets the statistics and the sampled answers of each step (no answers for
    a task with choices). Raises Transformer2Error if nothing requires gradients, or if the
    checkpoint belongs to a run with other settings.
    """
    hp = Hyperparameters(**hyperparameters)
    check_seed(hp.seed)
    model.eval()  # dropout would change the policy
    train_problems = task.problems("train")
    held_out_problems = task.problems("validation")[: hp.validation_problems]
    progress = Progress(model, task, hp)
    if checkpoint is not None and Path(checkpoint).exists():
        progress.load(checkpoint)
    try:
        for step in range(progress.next_step, hp.steps + 1):
            if step == 0:  # only validates the start
                stats, answers = StepStats(), []
            else:
                problems = draw_problems(train_problems, hp, step)
                stats, answers = update(model, processor, task, problems, progress, hp, step)
            if step % hp.validate_every == 0 or step == hp.steps:
                z = get_expert(model)  # None would be the base model
                stats.validation = evaluate(model, processor, task, held_out_problems, expert=z)
                if stats.validation >= progress.best_score:  # at a tie the later one
                    progress.best_score = stats.validation
                    progress.best = progress.trained_values()
            tqdm.write(describe(stats))
            progress.next_step = step + 1
            if checkpoint is not None and process_rank() == 0:
                progress.save(checkpoint)
            if on_step is not None:
                on_step(stats, answers)
    finally:
        progress.set_values(progress.start)
        progress.optimizer.zero_grad()
    return progress.best


def draw_problems(problems: list[dict], hp: Hyperparameters, step: int) -> list[dict]:
    """The problems of a step. Seed and step alone decide, so that a run can be resumed."""
    if not problems:
        raise Transformer2Error("the task has no problems to train on")
    generator = torch.Generator().manual_seed(step_seed(hp, step))
    order = torch.randperm(len(problems), generator=generator)
    return [problems[i] for i in order[: hp.batch_size]]


def update(
    model, processor, task: Task, problems: list[dict], progress, hp: Hyperparameters, step: int
) -> tuple[StepStats, list[Answer]]:
    """One step of eq. 1: the model answers, answers are rewarded, z follows the gradient of J."""
    start_time = time.time()
    # 1) add the gradient of -J to z.grad
    if task.choices is None:
        z = get_expert(model)  # None would be the base model
        seed = step_seed(hp, step)
        answers = rollout(model, processor, task, problems, z, temperature=1.0, seed=seed)
        stats = add_gradient(model, processor, task, problems, answers, hp)
        stats.mean_length = sum(len(answer.tokens) for answer in answers) / len(answers)
    else:
        answers = []
        stats = add_choice_gradient(model, processor, task, problems, hp)
    # 2) a step of AdamW, with a clipped gradient and a learning rate that falls along a cosine
    parameters = list(progress.parameters.values())
    sum_over_processes(parameters, stats)
    stats.grad_norm = nn.utils.clip_grad_norm_(parameters, hp.max_grad_norm).item()
    cosine = math.cos(math.pi * (step - 1) / hp.steps)
    progress.optimizer.param_groups[0]["lr"] = hp.lr * (1 + cosine) / 2
    progress.optimizer.step()
    progress.optimizer.zero_grad()
    stats.step = step
    stats.seconds = time.time() - start_time
    return stats, answers


def rollout(
    model,
    processor,
    task,
    problems: list[dict],
    expert: ExpertOrRows,
    temperature: float,
    seed: int,
) -> list[Answer]:
    """An answer to each problem with its reward. For a task with choices, the likeliest of them."""
    # All problems, or this process's share of them if several train together. Their numbers also
    # seed the answers, so that the split over processes changes nothing.
    problem_numbers = my_share(range(len(problems)))
    problems = my_share(problems)
    expert = select_experts(expert, problem_numbers)
    if task.choices is None:
        conversations = [task.conversation(problem) for problem in problems]
        completions = generate_tokens(
            model,
            processor,
            conversations,
            expert,
            problem_numbers,
            max_new_tokens=task.max_new_tokens,
            temperature=temperature,
            prefill=task.prefill,
            seed=seed,
        )
        texts = decode(processor, completions)
    else:
        completions = [[]] * len(problems)
        texts = likeliest_choices(model, processor, task, problems, expert)
    answers = []
    for problem, tokens, text in zip(problems, completions, texts):
        answers.append(Answer(tokens, text, float(task.reward(text, problem))))
    return gather_shares(answers)


def add_gradient(
    model, processor, task, problems: list[dict], answers: list[Answer], hp: Hyperparameters
) -> StepStats:
    """Adds the gradient of -J (eq. 1), estimated from one answer to each problem."""
    rewards = torch.tensor([answer.reward for answer in answers], device=model.device)  # (B,)
    all_advantages = leave_one_out_advantages(rewards) if hp.baseline else rewards
    # With several processes, each adds the part of its own problems.
    my_answers, advantages = my_share(answers), my_share(all_advantages)
    conversations = [task.conversation(problem) for problem in my_share(problems)]
    lengths = [len(answer.tokens) for answer in my_answers]
    stats = StepStats(reward=sum(answer.reward for answer in my_answers) / len(answers))
    budget = hp.token_budget
    for rows, inputs in batches(
        model, processor, conversations, task.prefill, lengths, budget, completions_with_logits=1
    ):
        completions = [my_answers[row].tokens for row in rows]
        with checkpointing(model, hp.checkpointing):
            log_probs = completion_log_probs(model, inputs, completions)  # log π_W'(ŷ|x) of rows
            ref_log_probs = log_probs.detach()  # at λ = 0 the log ratio is not needed
            if hp.kl_coef > 0:
                with torch.no_grad(), reference_policy(model):
                    ref_log_probs = completion_log_probs(model, inputs, completions)  # log π_W(ŷ|x)
            loss = reinforce_loss(log_probs, ref_log_probs, advantages[rows], hp.kl_coef)
            # Micro-batches, and processes, add up to the mean over all problems.
            fraction = len(rows) / len(answers)
            (fraction * loss).backward()
        stats.kl += fraction * (log_probs.detach() - ref_log_probs).mean().item()
    return stats


def completion_log_probs(
    model: Model, inputs: dict[str, torch.Tensor], completions: list[list[int]]
) -> torch.Tensor:
    """log π(ŷ|x) of one completion for each prompt, summed over its tokens: (B,), in float32.

    inputs: left-padded prompts from encode. completions: B lists of token ids. Differentiable.
    """
    tokens, mask = pad_right(completions, model.device)  # (B, T)
    T = tokens.shape[1]
    sequences = append_tokens(inputs, tokens, mask)
    logits = run_model(model, sequences, logits_to_keep=T + 1).logits
    logits = logits[:, -T - 1 : -1]  # (B, T, V); position t predicts token t
    return (token_log_probs(logits, tokens) * mask).sum(1)


def token_log_probs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """log softmax(logits) at the tokens, in float32: (..., V) and (...) give (...)."""
    logits = logits.float()
    logits_of_tokens = logits.gather(-1, tokens[..., None]).squeeze(-1)
    return logits_of_tokens - logits.logsumexp(-1)


def leave_one_out_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """Each reward minus the mean of the others, (B,). The gradient has less noise, and no bias."""
    other_rewards = rewards.sum() - rewards
    return rewards - other_rewards / max(1, len(rewards) - 1)


def reinforce_loss(
    log_probs: torch.Tensor, ref_log_probs: torch.Tensor, advantages: torch.Tensor, kl_coef: float
) -> torch.Tensor:
    """A scalar whose gradient estimates that of -J (eq. 1) from sampled answers; all are (B,)."""
    penalty = kl_coef * (log_probs - ref_log_probs).detach()
    return -(log_probs * (advantages - penalty)).mean()


def evaluate(
    model: Model,
    processor: Processor,
    task: Task,
    problems: list[dict],
    *,
    expert: ExpertOrRows = None,
) -> float:
    """Mean accuracy of greedy answers, in [0, 1]. A reward below 0 counts as 0.

    expert: as for use_expert. Raises Transformer2Error if there are no problems.
    """
    if not problems:
        raise Transformer2Error(f"task {task.name} has no problems to evaluate on")
    answers = rollout(model, processor, task, problems, expert, temperature=0.0, seed=0)
    return sum(max(0.0, answer.reward) for answer in answers) / len(answers)


# ---- Section 3.2: self-adaptation. Pass 1 decides on z', pass 2 answers with it ------------------


def classify(
    model: Model,
    processor: Processor,
    conversations: list[Conversation],
    categories: list[str],
    *,
    expert: ExpertOrRows = None,
) -> list[str]:
    """Pass 1: the likeliest category of each conversation.

    Strategy A (the prompt) without an expert, B with expert z^c, which is trained to classify.
    """

    def ask_category(problem: dict) -> list[dict]:
        return category_question(problem["conversation"], categories)

    task = Task(
        name="classify",
        problems=None,
        conversation=ask_category,
        reward=None,
        prefill=CATEGORY_PREFILL,
        choices=list(categories),
    )
    problems = [{"conversation": conversation} for conversation in conversations]
    return likeliest_choices(model, processor, task, problems, expert)


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

    experts: category -> Expert, or None for the base model; "other" is added. classifier: z^c of
    strategy B. options: of generate. Batches mix the experts, one for each row.
    """
    categories = [*experts]
    if "other" not in categories:
        categories.append("other")
    chosen = classify(model, processor, conversations, categories, expert=classifier)
    row_experts = [experts.get(category) for category in chosen]
    answers = generate(model, processor, conversations, expert=row_experts, **options)
    return list(zip(chosen, answers))


def mix(experts: list[Expert], alphas: torch.Tensor | np.ndarray) -> Expert:
    """z' = 1 + sum_k α_k (z_k - 1): the paper's sum of α_k z_k if the α sum to 1.

    Otherwise the rest of the weight goes to the base model, z = 1. alphas: (K, 1), or (K, blocks)
    with a weight for each expert in each block of the network.
    """
    alphas = torch.as_tensor(alphas, dtype=torch.float32).reshape(len(experts), -1)
    mixture = {}
    for expert, expert_alphas in zip(experts, alphas):
        for name, z in expert.items():
            block = 0
            block_number = re.search(r"\.(\d+)\.", name)  # 3 in model.layers.3.mlp.up_proj
            if block_number and len(expert_alphas) > 1:
                block = int(block_number.group(1))
            z = z.cpu()
            so_far = mixture.get(name, torch.ones_like(z))  # the sum starts at 1
            mixture[name] = so_far + expert_alphas[block] * (z - 1)
    return mixture


def few_shot(
    model: Model,
    processor: Processor,
    task: Task,
    problems: list[dict],
    experts: dict[str, Expert],
    *,
    population: int = 32,
    iterations: int = 20,
    per_layer: bool = False,
    seed: int = 0,
) -> tuple[Expert, torch.Tensor]:
    """Strategy C: the mixture of experts that answers a few problems best, and its α.

    Accuracy decides, and at a tie the mean log-likelihood of the right answers. α is (K, 1), or
    (K, blocks) if per_layer: a weight for each transformer block. It is not clipped. Raises
    Transformer2Error without problems or experts.
    """
    check_seed(seed)
    if not problems or not experts:
        raise Transformer2Error("few_shot needs at least one problem and one expert")
    expert_list = list(experts.values())
    K = len(expert_list)
    blocks = model.config.get_text_config().num_hidden_layers if per_layer else 1
    # The search starts with the base model (all α are 0) and every single expert.
    base_and_experts = np.vstack([np.zeros((1, K)), np.eye(K)])  # (K + 1, K)
    # The same α in every block.
    first = np.repeat(base_and_experts[:, :, None], blocks, axis=2)  # (K + 1, K, blocks)
    score = partial(score_mixtures, model, processor, task, problems, expert_list)
    alphas = cross_entropy_method(score, first, population, iterations, seed)
    return mix(expert_list, alphas), torch.tensor(alphas, dtype=torch.float32)


def score_mixtures(
    model, processor, task, problems: list[dict], experts: list[Expert], candidates: list
) -> list[tuple[float, float]]:
    """(accuracy, mean log-likelihood of the right answers) of each candidate α.

    The log-likelihood of an answer is summed over its tokens. The candidates answer together: a
    batch has rows of several candidates, each under its own z.
    """
    all_problems, all_experts = [], []
    for alphas in candidates:
        all_problems += problems
        all_experts += [mix(experts, alphas)] * len(problems)
    answers = rollout(model, processor, task, all_problems, all_experts, temperature=0.0, seed=0)
    accuracies = np.array([max(0.0, answer.reward) for answer in answers])
    # score_choices gives log π of all choices of a problem: here of one, the right answer.
    right_answers = replace(task, choices=right_answer)
    scores = score_choices(model, processor, right_answers, all_problems, expert=all_experts)
    log_likelihoods = np.array([log_probs.item() for log_probs in scores])
    shape = (len(candidates), len(problems))
    return list(zip(accuracies.reshape(shape).mean(1), log_likelihoods.reshape(shape).mean(1)))


def right_answer(problem: dict) -> list[str]:
    """The worked solution of a problem, or else its answer."""
    return [str(problem["solution"] if "solution" in problem else problem["answer"])]


def cross_entropy_method(
    score: Callable, first: np.ndarray, population: int, iterations: int, seed: int
) -> np.ndarray:
    """The best candidate that the cross-entropy method finds.

    score: a list of candidates -> a list of scores. first: (n, *shape), the first candidates.
    """
    rng = np.random.default_rng(seed)
    shape = first.shape[1:]
    mean = np.full(shape, 1 / shape[0])  # 1/K
    deviation = np.full(shape, 0.5)
    num_elite = max(2, round(0.2 * population))
    best, best_score = None, None
    for iteration in tqdm(range(iterations), desc="CEM", leave=False, delay=3, disable=None):
        # 1) sample candidates around the mean
        candidates = list(first) if iteration == 0 else []
        while len(candidates) < population:
            candidates.append(mean + deviation * rng.standard_normal(shape))
        # 2) score them (accuracy first); the best so far stays among them, with its score
        scores = score(candidates)
        if best is not None:
            candidates.append(best)
            scores.append(best_score)
        ranking = sorted(range(len(candidates)), key=lambda i: scores[i], reverse=True)
        best, best_score = candidates[ranking[0]], scores[ranking[0]]
        # 3) fit mean and deviation to the elite; an extra deviation, smaller in each iteration,
        #    keeps the search from narrowing down too early
        elite = np.stack([candidates[i] for i in ranking[:num_elite]])
        mean = elite.mean(0)
        deviation = elite.std(0) + 0.2 * (1 - iteration / iterations)
    return best


# ==== Plumbing: what makes the method work with any model, and fast ===============================

# ---- Tasks with choices: so few answers that all can be scored, instead of one sampled -----------


def choice_log_probs(
    model: Model, inputs: dict[str, torch.Tensor], choices: list[list[list[int]]]
) -> list[torch.Tensor]:
    """log π(choice|x) of every choice, summed over its tokens: a tensor (C,) for each prompt.

    inputs: left-padded prompts from encode. choices: the token ids of each prompt's own choices;
    their number may differ. Each prompt runs once, its key-value cache is repeated for its choices,
    and the choices run on these copies. Differentiable, also through the cache.
    """
    if not can_repeat_cache(model, inputs):
        return choice_log_probs_without_cache(model, inputs, choices)
    counts = [len(own_choices) for own_choices in choices]
    # (N,): [0, 0, 0, 1, 1] for two prompts with 3 and 2 choices
    prompt_of_choice = torch.arange(len(choices)).repeat_interleave(torch.tensor(counts))
    prompt_of_choice = prompt_of_choice.to(model.device)
    all_choices = [choice for own_choices in choices for choice in own_choices]
    tokens, mask = pad_right(all_choices, model.device)  # (N, T)

    # 1) Every prompt runs once. Its last position predicts the first token of all its choices.
    prompt_output = run_model(model, inputs, logits_to_keep=1, use_cache=True)
    first_logits = prompt_output.logits[prompt_of_choice, -1]  # (N, V)
    log_probs = token_log_probs(first_logits, tokens[:, 0]) * mask[:, 0]  # (N,)

    # 2) The other tokens of each choice run on a copy of its prompt's cache. Running a token gives
    #    the logits of the next: tokens[:, :-1] run, tokens[:, 1:] are scored.
    if tokens.shape[1] > 1:
        cache = prompt_output[cache_name(model)]
        cache.batch_select_indices(prompt_of_choice)  # in place: row i is a copy of its prompt's
        prompt_mask = inputs["attention_mask"][prompt_of_choice]  # (N, P)
        choice_inputs = {
            "input_ids": tokens[:, :-1],
            "attention_mask": torch.cat([prompt_mask, mask[:, :-1]], dim=1),
            cache_name(model): cache,
        }
        logits = run_model(model, choice_inputs, use_cache=True).logits  # (N, T - 1, V)
        later_log_probs = token_log_probs(logits, tokens[:, 1:]) * mask[:, 1:]
        log_probs = log_probs + later_log_probs.sum(1)
    return list(log_probs.split(counts))


def choice_log_probs_without_cache(model, inputs: dict, choices: list) -> list[torch.Tensor]:
    """As choice_log_probs, but prompt and choice run as one sequence, one pass for each choice."""
    columns = []
    for c in range(max(len(own_choices) for own_choices in choices)):
        # A prompt with fewer choices repeats its last one, which is dropped below.
        completions = [own_choices[min(c, len(own_choices) - 1)] for own_choices in choices]
        columns.append(completion_log_probs(model, inputs, completions))
    log_probs = torch.stack(columns, dim=1)  # (B, most choices)
    return [row[: len(own_choices)] for row, own_choices in zip(log_probs, choices)]


def can_repeat_cache(model, inputs: dict) -> bool:
    """True if choice_log_probs can run the choices on copies of the prompts' cache."""
    # State-space layers (Mamba) and convolutions keep a state that transformers cannot repeat.
    layer_types = getattr(model.config.get_text_config(), "layer_types", None) or []
    repeatable = {"full_attention", "sliding_attention", "chunked_attention"}
    if getattr(without_peft(model), "_is_stateful", False) or not set(layer_types) <= repeatable:
        return False
    # Layers under checkpointing run without a cache.
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        return False
    # A z for each row has B rows, but the choices run as N rows.
    if any(layer.current_z().dim() > 1 for layer in svf_layers(model).values()):
        return False
    # Pictures change how positions are counted.
    return not has_pictures(inputs)


def choice_loss(log_probs: list, ref_log_probs: list, rewards: list, kl_coef: float) -> tuple:
    """λ KL minus the expected reward, exactly: it has the gradient of -J (eq. 1).

    This is for a policy that answers with one of the choices: π is renormalised over them. The
    lists have a tensor (C,) for each problem. Returns the loss, the mean reward, the mean KL.
    """
    reward, kl = 0.0, 0.0
    for own_log_probs, own_ref_log_probs, own_rewards in zip(log_probs, ref_log_probs, rewards):
        log_pi = own_log_probs.log_softmax(0)  # (C,)
        log_ratio = log_pi - own_ref_log_probs.log_softmax(0)
        reward = reward + (log_pi.exp() * own_rewards).sum() / len(rewards)
        kl = kl + (log_pi.exp() * log_ratio).sum() / len(rewards)
    return kl_coef * kl - reward, reward.detach(), kl.detach()


def add_choice_gradient(model, processor, task, problems, hp: Hyperparameters) -> StepStats:
    """As add_gradient, for a task with choices: from all choices instead of one answer."""
    stats = StepStats()
    my_problems = my_share(problems)
    all_choices = [choice_tokens(processor, task, problem) for problem in my_problems]
    for rows, inputs in choice_batches(
        model, processor, task, my_problems, all_choices, hp.token_budget
    ):
        choices = [all_choices[row] for row in rows]
        rewards = [choice_rewards(model, task, my_problems[row]) for row in rows]
        fraction = len(rows) / len(problems)
        with checkpointing(model, hp.checkpointing):
            log_probs = choice_log_probs(model, inputs, choices)
            ref_log_probs = [own_log_probs.detach() for own_log_probs in log_probs]
            if hp.kl_coef > 0:
                with torch.no_grad(), reference_policy(model):
                    ref_log_probs = choice_log_probs(model, inputs, choices)
            loss, reward, kl = choice_loss(log_probs, ref_log_probs, rewards, hp.kl_coef)
            (fraction * loss).backward()
        stats.reward += fraction * reward.item()
        stats.kl += fraction * kl.item()
    return stats


@torch.no_grad()
def score_choices(
    model: Model,
    processor: Processor,
    task: Task,
    problems: list[dict],
    *,
    expert: ExpertOrRows = None,
) -> list[torch.Tensor]:
    """log π of the choices of each problem: a tensor (C,) for each. expert: as for use_expert."""
    choices = [choice_tokens(processor, task, problem) for problem in problems]
    scores = {}
    budget = TOKEN_BUDGET // 4  # repeated caches are slow in larger batches
    for rows, inputs in choice_batches(model, processor, task, problems, choices, budget):
        with use_expert(model, select_experts(expert, rows)):
            batch_scores = choice_log_probs(model, inputs, [choices[row] for row in rows])
        scores.update(zip(rows, batch_scores))
    return [scores[row] for row in range(len(problems))]


def likeliest_choices(model, processor, task, problems, expert: ExpertOrRows) -> list[str]:
    """The likeliest choice of each problem."""
    scores = score_choices(model, processor, task, problems, expert=expert)
    texts = []
    for problem, log_probs in zip(problems, scores):
        texts.append(choices_of(task, problem)[log_probs.argmax()])
    return texts


def choices_of(task: Task, problem: dict) -> list[str]:
    """The possible answers to a problem. Raises Transformer2Error if there are none."""
    choices = task.choices(problem) if callable(task.choices) else task.choices
    if not choices:
        question = problem.get("question")
        raise Transformer2Error(f"task {task.name} has no choices for the problem {question!r}")
    return choices


def choice_rewards(model, task: Task, problem: dict) -> torch.Tensor:
    """The rewards of a problem's choices, (C,)."""
    rewards = [float(task.reward(text, problem)) for text in choices_of(task, problem)]
    return torch.tensor(rewards, device=model.device)


def choice_tokens(processor, task: Task, problem: dict) -> list[list[int]]:
    """Token ids of the choices of a problem.

    If one begins another ("math", "mathematics") all get an end token, or the shorter would always
    be the likelier. If the prompt is plain text, no end token is added: benchmarks do it that way.
    A prefill is followed by a space.
    """
    tokenizer = prepared_tokenizer(processor)
    prompt = task.conversation(problem)
    # The text just before a choice; after a chat template that is only the prefill.
    before = prompt + task.prefill if isinstance(prompt, str) else task.prefill
    choices = []
    for text in choices_of(task, problem):
        if task.prefill and not text[:1].isspace():
            text = " " + text
        choices.append(continuation(tokenizer, before, text))
    begins_another = False
    for shorter in choices:
        for longer in choices:
            if len(shorter) < len(longer) and longer[: len(shorter)] == shorter:
                begins_another = True
    if begins_another and not isinstance(prompt, str) and tokenizer.eos_token_id is not None:
        choices = [[*choice, tokenizer.eos_token_id] for choice in choices]
    return choices


def continuation(tokenizer, before: str, text: str) -> list[int]:
    """Token ids of a text that follows another: those of "is math" without those of "is".

    Many tokenizers have different tokens for "math" and " math", so the text alone is not enough.
    One word before it is, as tokens do not cross spaces. If the two share a token after all, the
    text is tokenized alone.
    """
    words = before.split()
    last_word = words[-1] if words else ""
    start = tokenizer(last_word, add_special_tokens=False)["input_ids"]
    joint = tokenizer(last_word + text, add_special_tokens=False)["input_ids"]
    if joint[: len(start)] == start:
        return joint[len(start) :]
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def choice_batches(model, processor, task, problems, choices: list, budget: int) -> Iterator[tuple]:
    """Yields (row numbers, encoded prompts) for choice_log_probs.

    A prompt counts once for itself and once for each of its choices, as its cache is repeated, so
    the budget is divided by the number of these copies.
    """
    conversations = [task.conversation(problem) for problem in problems]
    longest = [max(len(choice) for choice in own_choices) for own_choices in choices]
    most = max([len(own_choices) for own_choices in choices], default=1)
    return batches(
        model,
        processor,
        conversations,
        task.prefill,
        longest,
        budget // (1 + most),
        completions_with_logits=most,
    )


# ---- Generation ----------------------------------------------------------------------------------


def generate(
    model: Model,
    processor: Processor,
    conversations: list[Conversation],
    *,
    expert: ExpertOrRows = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    prefill: str = "",
    seed: int | None = None,
) -> list[str]:
    """The model's answers to conversations.

    expert: None for the base model, an Expert, or a list with one entry for each conversation.
    temperature: 0 is greedy. prefill: the start of every answer. seed: for sampled answers; None
    draws one from torch's generator. Raises Transformer2Error for a prompt that is longer than the
    model's context or cannot be encoded.
    """
    if seed is None:
        seed = int(torch.randint(2**31, ()))
    check_seed(seed)
    completions = generate_tokens(
        model,
        processor,
        conversations,
        expert,
        range(len(conversations)),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        prefill=prefill,
        seed=seed,
    )
    return decode(processor, completions)


def generate_tokens(
    model,
    processor,
    conversations: list[Conversation],
    expert: ExpertOrRows,
    stream_numbers: range,
    *,
    max_new_tokens: int,
    temperature: float,
    prefill: str,
    seed: int,
) -> list[list[int]]:
    """Token ids of the answers, end token included. Parameters as for generate.

    Answer i is drawn from the random stream (seed, stream_numbers[i]), whatever its batch.
    """
    tokenizer = prepared_tokenizer(processor)
    ends = end_tokens(model, tokenizer)
    # A model must not write this token: it would expect a picture for it.
    image_token = getattr(processor, "image_token_id", None)
    settings = GenerationConfig(
        do_sample=False,  # a RowSampler turns greedy decoding into sampling
        eos_token_id=ends or None,
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=None if image_token is None else [image_token],
    )
    new_lengths = [max_new_tokens] * len(conversations)
    completions = {}
    for rows, inputs in batches(
        model, processor, conversations, prefill, new_lengths, TOKEN_BUDGET
    ):
        samplers = []
        if temperature > 0:
            row_seeds = [seed * 1_000_003 + stream_numbers[row] for row in rows]
            samplers.append(RowSampler(model.device, row_seeds, temperature))
        # A prompt near the end of the context is alone in its batch (see group_rows), so this cuts
        # no other answer.
        room = context_length(model) - int(inputs["attention_mask"].sum(1).max())
        settings.max_new_tokens = min(max_new_tokens, room)
        # generate() would fill what our settings leave open from the model's generation_config
        # (top_k, repetition_penalty, ...). So they replace that for the call.
        causal_lm = without_peft(model)
        with (
            use_expert(model, select_experts(expert, rows)),
            changed([(causal_lm, "generation_config", settings)]),
        ):
            sequences = causal_lm.generate(**inputs, logits_processor=samplers)  # (B, P + T)
        prompt_length = inputs["input_ids"].shape[1]
        for row, tokens in zip(rows, sequences[:, prompt_length:].tolist()):
            completions[row] = until_end(tokens, ends)
    return [completions[row] for row in range(len(conversations))]


class RowSampler(LogitsProcessor):
    """Samples each row of a batch from a random stream of its own.

    The Gumbel trick: if E is exponential noise, the argmax over the vocabulary of
    logits / temperature - log E is a draw from softmax(logits / temperature). So the model decodes
    greedily from the scores returned here, and no draw depends on the rest of the batch.
    """

    def __init__(self, device: torch.device, row_seeds: list[int], temperature: float):
        self.temperature = temperature
        self.generators = []
        for row_seed in row_seeds:  # % 2**63: what torch takes
            self.generators.append(torch.Generator(device).manual_seed(row_seed % 2**63))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        noise = torch.empty_like(scores, dtype=torch.float32)  # (B, V)
        for row, generator in zip(noise, self.generators):
            row.exponential_(generator=generator)
        noise = noise.clamp(min=2**-24)  # some devices draw an exact 0
        return scores.float() / self.temperature - noise.log()


def step_seed(hp: Hyperparameters, step: int) -> int:
    """A seed for each step. The factor only keeps the steps of different seeds apart."""
    return hp.seed * 100_003 + step


def check_seed(seed: int) -> None:
    """Raises Transformer2Error for a seed that is negative or over 2^31."""
    if not 0 <= seed <= 2**31:
        raise Transformer2Error(f"the seed {seed} is out of range: take one from 0 to 2^31")


def end_tokens(model, tokenizer) -> list[int]:
    """The tokens that end an answer: those of the model's settings, or else the tokenizer's."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        ends = tokenizer.eos_token_id
    return [] if ends is None else np.ravel(ends).tolist()


def until_end(tokens: list[int], ends: list[int]) -> list[int]:
    """The tokens up to the first that ends an answer, that one included."""
    for t, token in enumerate(tokens):
        if token in ends:
            return tokens[: t + 1]
    return tokens


def decode(processor, completions: list[list[int]]) -> list[str]:
    """The texts of completions, without end tokens and the like."""
    tokenizer = prepared_tokenizer(processor)
    return [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in completions]


# ---- Prompts and batches -------------------------------------------------------------------------

CATEGORY_PREFILL = "The category of this question is"
CATEGORY_GUIDE = {  # as the paper's prompt explains its categories
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
TOKEN_BUDGET = 16384  # tokens of a batch where no gradient is taken, padding included
LOGIT_BUDGET = 2**28  # logits of a batch: 1 GiB in float32


def category_question(conversation: Conversation, categories: list[str]) -> list[dict]:
    """The conversation of pass 1: asks for the category, then repeats the last message."""
    if isinstance(conversation, str):
        conversation = [{"role": "user", "content": conversation}]
    *earlier, last = conversation
    question = f"Classify the question into one of these categories: {', '.join(categories)}.\n"
    if set(categories) <= set(CATEGORY_GUIDE):
        for number, category in enumerate(categories, 1):
            guide = CATEGORY_GUIDE[category]
            question += f"{number}. {category.capitalize()}: questions {guide}.\n"
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

    Pictures add tensors of their own. Raises Transformer2Error for a prompt that is longer than
    the context or cannot be encoded.
    """
    tokenizer = prepared_tokenizer(processor)
    try:
        if isinstance(conversations[0], str):
            texts = [text + prefill for text in conversations]
            inputs = tokenizer(texts, padding=True, return_tensors="pt")
        else:
            inputs = apply_chat_template(processor, conversations, prefill)
    except Exception as error:  # many kinds: an unknown role, a picture that does not load
        reason = f"a prompt cannot be encoded, check its roles and pictures: {error}"
        raise Transformer2Error(reason.splitlines()[0]) from error
    length, context = inputs["input_ids"].shape[1], context_length(model)
    if length >= context:
        reason = f"a prompt has {length} tokens, but the model's context ends at {context}"
        raise Transformer2Error(f"{reason}: shorten it")
    names = list(inputs)
    if not has_vision(processor):  # language models do not take token_type_ids
        names = ["input_ids", "attention_mask"]
    return {name: inputs[name].to(model.device) for name in names}


def apply_chat_template(processor, conversations: list[list[dict]], prefill: str) -> dict:
    """Conversations through the chat template. A prefill is the start of the assistant's turn."""
    tokenizer = prepared_tokenizer(processor)
    if not processor.chat_template and not tokenizer.chat_template:
        print("note: no chat template, so prompts read 'User: ...'", file=sys.stderr)
        processor.chat_template = tokenizer.chat_template = FALLBACK_TEMPLATE
    messages = [template_messages(processor, prompt, prefill) for prompt in conversations]
    padding = {"padding": True}
    if has_vision(processor):
        padding = {"processor_kwargs": padding}
    return processor.apply_chat_template(
        messages,
        add_generation_prompt=not prefill,
        continue_final_message=bool(prefill),
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        **padding,
    )


def template_messages(processor, conversation: list[dict], prefill: str) -> list[dict]:
    """A conversation with its prefill, as the chat template takes it."""
    messages = [dict(message) for message in conversation]
    if prefill:
        messages.append({"role": "assistant", "content": prefill})
    for message in messages:
        if has_vision(processor):
            message["content"] = content_parts(message["content"])
        elif not isinstance(message["content"], str):
            raise ValueError("it has a picture, but the model reads only text")
    return messages


def content_parts(content: str | list[dict]) -> list[dict]:
    """A message as a list of texts and pictures. A picture may be a function that loads it."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    parts = [dict(part) for part in content]
    for part in parts:
        if callable(part.get("image")):
            part["image"] = part["image"]()
    return parts


def has_vision(processor) -> bool:
    """True for the processor of a model that takes pictures."""
    return hasattr(processor, "image_processor")


def batches(
    model,
    processor,
    conversations: list[Conversation],
    prefill: str,
    new_lengths: list[int],
    budget: int,
    completions_with_logits: int = 0,
) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
    """Yields (row numbers, encoded prompts) of batches of at most `budget` tokens.

    new_lengths: the tokens that follow each prompt. They count, and so does padding.
    completions_with_logits: for how many completions of each prompt all logits are kept;
    LOGIT_BUDGET bounds them. 0, as in generation: no bound.
    """
    # Encode everything once to know the lengths; 256 prompts at a time, as pictures are large.
    lengths = []
    for start in range(0, len(conversations), 256):
        inputs = encode(model, processor, conversations[start : start + 256], prefill)
        lengths += inputs["attention_mask"].sum(1).tolist()
    logit_tokens = math.inf  # how many new tokens of a batch may have logits
    if completions_with_logits > 0:
        vocabulary = model.config.get_text_config().vocab_size
        logit_tokens = LOGIT_BUDGET // (completions_with_logits * vocabulary)
    groups = group_rows(lengths, new_lengths, budget, logit_tokens, context_length(model))
    for rows in tqdm(groups, leave=False, delay=3, disable=None):
        yield rows, encode(model, processor, [conversations[row] for row in rows], prefill)


def group_rows(
    lengths: list[int], new_lengths: list[int], budget: int, logit_tokens: float, context: int
) -> list[list[int]]:
    """Row numbers in groups of similar length, for batches.

    A group is padded to its longest prompt and longest new text. It may have `budget` tokens in
    all, and `logit_tokens` new ones. A row that may exceed the context stays alone, as its answer
    has less room than others.
    """
    totals = [length + new_length for length, new_length in zip(lengths, new_lengths)]
    longest_first = sorted(range(len(totals)), key=lambda row: totals[row], reverse=True)
    groups = []
    for row in longest_first:
        if groups:
            group = [*groups[-1], row]  # the last group with this row
            longest_prompt = max(lengths[i] for i in group)
            longest_new = max(new_lengths[i] for i in group)
            too_many_tokens = len(group) * (longest_prompt + longest_new) > budget
            too_many_logits = len(group) * longest_new > logit_tokens
            too_long = max(totals[i] for i in group) > context
        if not groups or too_many_tokens or too_many_logits or too_long:
            groups.append([row])
        else:
            groups[-1].append(row)
    return groups


def pad_right(rows: list[list[int]], device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of unequal length in one tensor, and their mask: both (len(rows), longest)."""
    tokens = [torch.tensor(row, dtype=torch.long, device=device) for row in rows]
    mask = [torch.ones_like(row) for row in tokens]
    return pad_sequence(tokens, batch_first=True), pad_sequence(mask, batch_first=True)


def append_tokens(inputs: dict, tokens: torch.Tensor, mask: torch.Tensor) -> dict:
    """Prompts with tokens after them. The tensors of pictures are kept."""
    sequences = {}
    for name, tensor in inputs.items():
        if name == "input_ids":
            tensor = torch.cat([tensor, tokens], dim=1)
        elif name == "attention_mask":
            tensor = torch.cat([tensor, mask], dim=1)
        elif tensor.shape == inputs["input_ids"].shape:  # token_type_ids: 0 is text
            tensor = F.pad(tensor, (0, tokens.shape[1]))
        sequences[name] = tensor
    return sequences


# ---- Models and layers ---------------------------------------------------------------------------


def run_model(model, inputs: dict, logits_to_keep: int = 0, use_cache: bool = False):
    """The model's output. logits_to_keep: how many of the last positions have logits; 0: all."""
    accepted = inspect.signature(without_peft(model).forward).parameters
    options = {"use_cache": use_cache}
    if "logits_to_keep" in accepted:
        options["logits_to_keep"] = logits_to_keep
    # Positions count real tokens only, so that left padding does not shift a prompt. With a cache
    # the mask is longer than the input. With pictures the model counts by itself.
    if "position_ids" in accepted and not has_pictures(inputs):
        positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        options["position_ids"] = positions[:, -inputs["input_ids"].shape[1] :]
    return model(**inputs, **options)


def has_pictures(inputs: dict) -> bool:
    """True if a model's inputs hold more than text, its mask and a cache."""
    return not set(inputs) <= {"input_ids", "attention_mask", "cache", "past_key_values"}


def without_peft(model) -> Model:
    """The model of transformers, which a PEFT model wraps."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def cache_name(model) -> str:
    """What the model calls its key-value cache: transformers 5.24 renamed it."""
    is_new = "cache" in inspect.signature(without_peft(model).forward).parameters
    return "cache" if is_new else "past_key_values"


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


def checkpointing(model, enabled: bool = True) -> contextlib.AbstractContextManager:
    """In this `with` block, transformer blocks save only their input and run again in backward().

    A block of transformers does so if it is in training mode and has the attributes below. The
    layers inside it stay in eval mode, so that nothing else changes.
    """
    changes = []
    for block in model.modules():
        if enabled and isinstance(block, GradientCheckpointingLayer):
            run_block = partial(run_checkpointed, use_reentrant=False)
            changes.append((block, "_gradient_checkpointing_func", run_block))
            changes.append((block, "gradient_checkpointing", True))
            changes.append((block, "training", True))
            # Some blocks call dropout themselves, with a rate of their own.
            rates = [name for name in vars(block) if name.endswith("dropout")]
            changes += [(block, name, 0.0) for name in rates]
    if enabled and not changes:
        raise Transformer2Error("this model cannot be checkpointed: leave checkpointing off")
    return changed(changes)


@contextlib.contextmanager
def changed(changes: list[tuple[object, str, object]]) -> Iterator[None]:
    """Sets attributes, given as (object, name, value), and puts the previous values back."""
    # An attribute may come from the object's class: then it is deleted afterwards, not set.
    before = [dict(vars(thing)) for thing, _, _ in changes]
    try:
        for thing, name, value in changes:
            setattr(thing, name, value)
        yield
    finally:
        for (thing, name, _), attributes in zip(changes, before):
            if name in attributes:
                setattr(thing, name, attributes[name])
            else:
                delattr(thing, name)


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
    """The layers that targets name. Raises Transformer2Error if there are none.

    Some mixtures of experts keep a matrix for each of their experts in a single tensor. These are
    left out, with a printed note.
    """
    kinds = f"{', '.join(TARGETS)} or a regular expression over layer names"
    try:
        pattern = re.compile(TARGETS.get(targets, targets))
    except re.error as error:
        reason = f"targets {targets!r} match no layer, as they are no regular expression"
        raise Transformer2Error(f"{reason}: use {kinds}") from error
    layers = {}
    for name, module in model.named_modules():
        is_linear = isinstance(module, nn.Linear | Conv1D)
        is_head = module is model.get_output_embeddings() or name.endswith("lm_head")
        if is_linear and not is_head and pattern.search(name):
            if module.weight.element_size() > 1:  # 1 byte: a quantised layer
                layers[name] = module
    fused = []  # a tensor (experts, m, n) holds a matrix for each expert of the mixture
    for name, parameter in model.named_parameters():
        if parameter.dim() == 3 and "conv" not in name and pattern.search(name):
            fused.append(name)
    note = ""
    if fused:
        note = f"{len(fused)} fused weights of mixtures of experts ({fused[0]}) cannot be adapted"
    if not layers:
        reason = f"targets {targets!r} match no linear layer, or only quantised ones"
        if fused:
            reason += f"; {note}"
        raise Transformer2Error(f"{reason}: use {kinds}")
    if fused:
        print(
            f"note: {note}; {len(layers)} layers ({next(iter(layers))}) are adapted",
            file=sys.stderr,
        )
    return layers


def spread_over_rows(scale: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """One scale for each row, (B, r), in a shape that multiplies the components of x, (..., r)."""
    if len(scale) in (1, len(x)):
        ones = [1] * (x.dim() - 2)
        return scale.view(len(scale), *ones, -1)  # (B, 1, ..., 1, r)
    if x.dim() == 2 and len(x) % len(scale) == 0:  # OPT flattens (B, T, d) to (B * T, d)
        return scale.repeat_interleave(len(x) // len(scale), dim=0)
    reason = f"there are {len(scale)} experts for {len(x)} rows"
    raise Transformer2Error(f"{reason}: give one for each, or one for all")


def stack_experts(expert: ExpertOrRows, layers: dict[str, SVFLinear]) -> dict[str, torch.Tensor]:
    """Layer name -> z of an expert (r,), or of one expert for each row (B, r); see use_expert."""
    row_experts = expert if isinstance(expert, list) else [expert]
    row_experts = [row_expert or {} for row_expert in row_experts]  # None: z = 1 everywhere
    for row_expert in row_experts:
        check_expert(row_expert, layers, "the expert")
    stacked = {}
    for name, layer in layers.items():
        # A mixture-of-experts layer gets tokens that a router picked from all rows.
        if len(row_experts) > 1 and ".experts." in name:
            reason = f"layer {name} of a mixture of experts does not see the rows of a batch"
            raise Transformer2Error(f"{reason}: use one expert for all, or adapt other layers")
        ones = torch.ones_like(layer.s)
        rows = [row_expert.get(name, ones).to(ones) for row_expert in row_experts]
        stacked[name] = torch.stack(rows) if isinstance(expert, list) else rows[0]
    return stacked


def select_experts(expert: ExpertOrRows, rows: list[int]) -> ExpertOrRows:
    """The experts of some rows, where every row has its own."""
    return [expert[row] for row in rows] if isinstance(expert, list) else expert


def check_expert(expert: Expert, layers: dict[str, SVFLinear], what: str | Path) -> None:
    """Raises Transformer2Error unless every z of an expert fits its layer."""
    for name, z in expert.items():
        if name not in layers or layers[name].s.shape != z.shape:
            reason = f"{what} is for another model or other targets"
            raise Transformer2Error(f"{reason}: {name} {[*z.shape]} does not fit")


# ---- Training: its progress, several processes ---------------------------------------------------


class Progress:
    """The state of a training run, with which it can be resumed with the same result."""

    def __init__(self, model: Model, task: Task, hp: Hyperparameters):
        self.parameters = {}  # what trains; after apply_svf: layer name -> z
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self.parameters[name.removesuffix(".z")] = parameter
        if not self.parameters:
            raise Transformer2Error("nothing in the model requires gradients: call apply_svf first")
        # Without weight decay, which would pull z to 0.
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=hp.lr, weight_decay=0.0)
        self.start = self.trained_values()
        self.next_step = 0
        self.best = self.start
        self.best_score = -1.0
        # load compares these and names those that differ. Two do not change the result.
        result_settings = asdict(hp)
        del result_settings["token_budget"], result_settings["checkpointing"]
        self.settings = {
            **result_settings,
            "task": task.name,
            "token limit": task.max_new_tokens,
            "model": model.config._name_or_path,
            "layers": [f"{name} {[*z.shape]}" for name, z in self.start.items()],
        }

    def trained_values(self) -> Expert:
        """A copy of what trains."""
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def set_values(self, values: Expert) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])

    def save(self, path: str | Path) -> None:
        state = {
            "settings": self.settings,
            "next_step": self.next_step,
            "best": self.best,
            "best_score": self.best_score,
            "values": self.trained_values(),
            "optimizer": self.optimizer.state_dict(),
        }
        write_whole(path, lambda temporary: torch.save(state, temporary))

    def load(self, path: str | Path) -> None:
        """Raises Transformer2Error for a damaged file, or one of a run with other settings."""
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            theirs = state["settings"]
        except Exception as error:
            raise Transformer2Error(f"cannot read {path}: delete it to begin again") from error
        settings = self.settings.items()
        differing = [name for name, value in settings if theirs.get(name) != value]
        if differing:
            reason = f"{path} belongs to a run with another {', '.join(differing)}"
            raise Transformer2Error(f"{reason}: go on with the same, or delete it")
        self.next_step = state["next_step"]
        self.best = state["best"]
        self.best_score = state["best_score"]
        self.set_values(state["values"])
        self.optimizer.load_state_dict(state["optimizer"])


def describe(stats: StepStats) -> str:
    """One line about a step."""
    line = f"step {stats.step:3}"
    if stats.step > 0:
        line += f"  reward {stats.reward:+.3f}  KL {stats.kl:.4f}  gradient {stats.grad_norm:.2e}"
        line += f"  {stats.seconds:.1f} s"
    if stats.validation is not None:
        line += f"  validation {stats.validation:.1%}"
    return line


def process_rank() -> int:
    """The number of this process among those that train together (torchrun starts them)."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def my_share(values):
    """Every n-th of a sequence, where n processes share the work; all of it for one process."""
    if not distributed.is_initialized():
        return values
    return values[distributed.get_rank() :: distributed.get_world_size()]


def gather_shares(values: list) -> list:
    """The results of all processes for their shares, in the order of the whole sequence."""
    if not distributed.is_initialized():
        return values
    shares = [None] * distributed.get_world_size()
    distributed.all_gather_object(shares, values)
    gathered = [None] * sum(len(share) for share in shares)
    for rank, share in enumerate(shares):
        gathered[rank :: len(shares)] = share
    return gathered


def sum_over_processes(parameters: list[nn.Parameter], stats: StepStats) -> None:
    """Adds up the processes' gradients and statistics, in place."""
    if not distributed.is_initialized():
        return
    for parameter in parameters:
        if parameter.grad is None:  # this process had no problem
            parameter.grad = torch.zeros_like(parameter)
        distributed.all_reduce(parameter.grad)
    sums = torch.tensor([stats.reward, stats.kl], device=parameters[0].device)
    distributed.all_reduce(sums)
    stats.reward, stats.kl = sums.tolist()


# ---- Files ---------------------------------------------------------------------------------------


def save_expert(expert: Expert, path: str | Path, **about: object) -> None:
    """Writes a safetensors file in float32, whole or not at all. about: facts for its header."""
    tensors = {name: z.detach().float().cpu().contiguous() for name, z in expert.items()}
    header = {key: str(value) for key, value in about.items()}
    write_whole(path, lambda temporary: save_file(tensors, temporary, metadata=header))


def load_expert(path: str | Path, model: Model | None = None) -> Expert:
    """Reads an expert: a file of save_expert, or a .pt file of the paper's authors.

    model: for a check of names and shapes; the authors' files need it. Raises Transformer2Error
    for a file that cannot be read or does not fit the model.
    """
    is_authors = str(path).endswith(".pt")
    if is_authors and model is None:
        raise Transformer2Error(f"{path} is a file of the authors: load it with a model")
    try:
        if is_authors:
            expert = torch.load(path, map_location="cpu", weights_only=True)
        else:
            expert = load_file(path)
    except Exception as error:  # a damaged file raises errors of many kinds
        reason = f"cannot read the expert {path}: {type(error).__name__}, {error}"
        raise Transformer2Error(reason.splitlines()[0]) from error
    if model is None:
        return expert
    layers = svf_layers(model)
    if is_authors:
        expert = convert_authors_expert(expert, layers)
    check_expert(expert, layers, path)
    return expert


def convert_authors_expert(expert: Expert, layers: dict[str, SVFLinear]) -> Expert:
    """The z's of the authors' checkpoint, in the paper's terms.

    They learn p with z = sigmoid(p), and multiply W' by sum(s) / sum(s * z), which keeps the sum
    of the singular values. Here both become a part of z. What fits no layer keeps its name, which
    check_expert then reports.
    """
    mlp_names = [name for name in layers if "mlp" in name]
    converted = {}
    for key, p in expert.items():
        number = key.rpartition(".")[2]
        if number.isdigit() and int(number) < len(mlp_names):
            # policy_params*.pt: learnable_params_module_list.7 is the eighth MLP layer
            name = mlp_names[int(number)]
        else:
            # learnable_params*.pt: model.layers.0.mlp.gate_proj.weight
            name = key.removesuffix(".weight")
        z = p.detach().float().sigmoid()
        if name in layers and layers[name].s.shape == z.shape:
            s = layers[name].s.to(z)
            z = z * s.sum() / (s * z).sum()
        converted[name] = z
    return converted


def decompose_cached(weight: torch.Tensor, cache_dir: str | Path) -> tuple:
    """decompose, stored in cache_dir under a hash of the weight's content."""
    content = weight.detach().contiguous().cpu().view(torch.uint8).numpy()
    digest = hashlib.sha256(content).hexdigest()[:24]
    path = Path(cache_dir) / f"{digest}-{weight.dtype}-{len(weight)}.safetensors"
    try:
        factors = load_file(path, device=str(weight.device))
        return factors["U"], factors["s"], factors["Vh"]
    except Exception:  # not there yet, or damaged: it is made again
        U, s, Vh = decompose(weight)
        write_whole(path, lambda temporary: save_file({"U": U, "s": s, "Vh": Vh}, temporary))
        return U, s, Vh


def write_whole(path: str | Path, write: Callable[[Path], object]) -> None:
    """Calls write(temporary file), then renames the file to path: it is there whole, or not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        write(Path(folder, "new"))
        os.replace(Path(folder, "new"), path)
