"""Transformer²: self-adaptive language models, in one file to be read beside the paper.

Sun, Cetin, Tang: "Transformer-Squared: Self-adaptive LLMs", ICLR 2025, arXiv 2501.06252.

A weight matrix is split once into its singular components, W = U diag(s) Vᵀ. A vector z with one
number per component rescales them: W' = U diag(s * z) Vᵀ. The z's of all matrices are an *expert*.
They are all that trains, by reinforcement learning on the model's own answers. At inference a
first pass finds out which expert or mixture of experts a prompt needs. A second pass answers.

The file follows the paper, section 3.1 and section 3.2. The plumbing comes last.
Shapes in comments: B rows of a batch, P prompt tokens, T completion tokens, V vocabulary,
C choices of one problem, N choices of all problems in a batch, r singular values, K experts.
"""

import contextlib
import functools
import hashlib
import inspect
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from operator import itemgetter
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
Experts = Expert | None | list[Expert | None]  # None: the base model; a list: one for each row


class Transformer2Error(ValueError):
    """Something the caller can put right. The message is one sentence that says what and how."""


# ---- Section 3.1: singular value fine-tuning, W' = U diag(s * z) Vᵀ ------------------------------


def decompose(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Splits W (m, n) into U (m, r), s (r,) and Vh (r, n) with W = U diag(s) Vh; r = min(m, n).

    s descends, in float32. W = (W V) Vᵀ for any orthogonal V; the eigenvectors of WᵀW are the V for
    which W V has orthogonal columns. So the factors are exact, up to rounding.
    """
    # 1) Take the side on which WᵀW is small, (r, r). It needs float64, which Apple's GPUs lack.
    is_wide = weight.shape[0] < weight.shape[1]
    W = weight.detach().T if is_wide else weight.detach()
    W = W.float() if W.device.type == "mps" else W.double()
    # 2) The right singular vectors. eigh sorts by eigenvalue from small to large.
    V = torch.linalg.eigh(W.T @ W).eigenvectors.flip(-1)  # (n, r)
    # 3) The columns of W V are the left singular vectors, times the singular values.
    scaled_U = W @ V  # (m, r)
    s = scaled_U.norm(dim=0)
    U = scaled_U / s.clamp(min=1e-12)
    if is_wide:  # Wᵀ was split: Wᵀ = U diag(s) Vᵀ means W = V diag(s) Uᵀ
        U, V = V, U
    return U.to(weight.dtype).contiguous(), s.float(), V.T.to(weight.dtype).contiguous()


class SVFLinear(nn.Module):
    """y = U diag(s * z) Vᵀ x + b, in the place of a linear layer. z (r,) is all that trains.

    W' is never built, so autograd reaches z without a dense gradient. x: (B, ..., in_features).
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
        self.z = nn.Parameter(torch.ones_like(s))
        self.active_z: torch.Tensor | None = None  # set by use_expert: (r,), or (B, r), one per row
        self.bias = linear.bias
        # merge_svf needs the former layer. In a list it is no submodule; its weight is released.
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
            raise Transformer2Error("a layer's weight is read where every row has its own expert")
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
    layers = matching_layers(model, targets)
    model.requires_grad_(False)
    for name in tqdm(list(layers), desc="decomposing", leave=False, delay=2, disable=None):
        layer = layers.pop(name)  # so that its dense weight is released before the next layer
        model.set_submodule(name, SVFLinear(layer, cache_dir))
    return model.eval()


def svf_layers(model: Model) -> dict[str, SVFLinear]:
    """Layer name -> SVFLinear, in the order of the model."""
    modules = model.named_modules()
    return {name: module for name, module in modules if isinstance(module, SVFLinear)}


def merge_svf(model: Model) -> Model:
    """Folds the z's in use into layers of the former class. In place; returns the model."""
    for name, layer in svf_layers(model).items():
        dense_layer = layer.dense_layer[0]
        weight = layer.weight.T if isinstance(dense_layer, Conv1D) else layer.weight
        dense_layer.weight = nn.Parameter(weight.detach().contiguous(), requires_grad=False)
        model.set_submodule(name, dense_layer)
    return model


# ---- Experts: one z for every adapted layer ------------------------------------------------------


def get_expert(model: Model) -> Expert:
    """A copy of the z's in use."""
    layers = svf_layers(model)
    return {name: layer.current_z().detach().clone() for name, layer in layers.items()}


@contextlib.contextmanager
def use_expert(model: Model, expert: Experts) -> Iterator[None]:
    """`with use_expert(model, expert):` runs the model with these z's, then puts back the former.

    expert: None for the base model (z = 1), an Expert, or a list with one of these for each row of
    the batch. Raises Transformer2Error for an expert that does not fit the model.
    """
    layers = svf_layers(model)
    new_z = stack_experts(expert, layers)  # layer name -> (r,), or (B, r) for a list
    before = {name: layer.active_z for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.active_z = new_z[name]
        yield
    finally:
        for name, layer in layers.items():
            layer.active_z = before[name]


# ---- Section 3.1: learning an expert with policy gradients ---------------------------------------
#
# Eq. 1 is     J(z) = E[ r(ŷ, y) ] - λ KL( π_W' ‖ π_W ),   ŷ an answer drawn from π_W'( · | x).
#
# Its gradient is an expectation over the model's own answers,
#     ∇J = E[ ∇ log π_W'(ŷ|x) · ( r(ŷ, y) - λ log( π_W'(ŷ|x) / π_W(ŷ|x) ) ) ],
# so one sampled answer to each problem estimates it: the gradient of log π_W'(ŷ|x), weighted with
# the reward less λ times the log ratio. The weight is a number: no gradient flows through it.


@dataclass
class Task:
    """What training and evaluation need to know. A problem is a dict with question and answer."""

    name: str
    problems: Callable[[str], list[dict]]  # of a split: "train", "validation" or "test"
    conversation: Callable[[dict], Conversation]  # the prompt of a problem
    reward: Callable[[str, dict], float]  # of an answer: 1 is right, below 0 is wrong
    max_new_tokens: int = 256
    prefill: str = ""  # the start of every answer, such as "Let's think step by step"
    # The only possible answers: a list, or a function of the problem. Nothing is generated then.
    choices: list[str] | Callable[[dict], list[str]] | None = None
    category: str | None = None  # what pass 1 calls prompts of this kind
    hyper: dict = field(default_factory=dict)  # Hyperparameters that suit this task


@dataclass
class Hyperparameters:
    """The settings of reinforce. Defaults are the paper's (appendix A.1) where it has one."""

    steps: int = 100  # updates of z
    batch_size: int = 256  # problems in an update, with one answer each
    lr: float = 2e-3  # of AdamW; it falls to 0 along a cosine
    kl_coef: float = 0.0  # λ; the paper picks 0, 0.1, 0.2 or 0.3 on validation problems
    max_grad_norm: float = 1e-3  # over all z's together
    baseline: bool = True  # subtract the mean of the other rewards (not in the paper)
    validate_every: int = 10  # steps; the z of the best validation accuracy is the result
    validation_problems: int = 128
    token_budget: int = 2048  # tokens in a micro-batch of an update, padding included
    checkpointing: bool = False  # less memory for activations, a third more time
    seed: int = 0  # of the draw of problems and of the sampled answers


@dataclass
class Answer:
    """What the model said to a problem, and what that was worth."""

    tokens: list[int]
    text: str
    reward: float


@dataclass
class StepStats:
    """The figures of one training step. Reward and KL are means over its problems."""

    step: int = 0
    reward: float = 0.0
    kl: float = 0.0  # of π_W' from π_W; 0 at λ = 0, where it is not computed
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
    on from there. on_step: gets the figures and the sampled answers of each step (no answers for a
    task with choices). Raises Transformer2Error if nothing requires gradients, and for the
    checkpoint of another run.
    """
    hp = Hyperparameters(**hyperparameters)
    check_seed(hp.seed)
    train_problems = task.problems("train")
    held_out_problems = task.problems("validation")[: hp.validation_problems]
    progress = Progress(model, task, hp)
    if checkpoint is not None and Path(checkpoint).exists():
        progress.load(checkpoint)
    try:
        for step in range(progress.next_step, hp.steps + 1):
            stats, answers = StepStats(step), []
            if step > 0:  # step 0 only validates the start
                problems = draw_problems(train_problems, hp, step)
                stats, answers = update(model, processor, task, problems, progress, hp, step)
            if step % hp.validate_every == 0 or step == hp.steps:
                z = get_expert(model)
                stats.validation = evaluate(model, processor, task, held_out_problems, expert=z)
                if stats.validation >= progress.best_score:  # of equals the later, trained longer
                    progress.best, progress.best_score = progress.values(), stats.validation
            progress.next_step = step + 1
            if checkpoint is not None and process_rank() == 0:
                progress.save(checkpoint)
            tqdm.write(describe(stats))
            if on_step is not None:
                on_step(stats, answers)
    finally:
        progress.set_values(progress.start)
        progress.optimizer.zero_grad()
    return progress.best


def draw_problems(problems: list[dict], hp: Hyperparameters, step: int) -> list[dict]:
    """The problems of a step. Seed and step alone decide, so that a run can be resumed."""
    generator = torch.Generator().manual_seed(hp.seed * 100_003 + step)
    order = torch.randperm(len(problems), generator=generator)
    return [problems[i] for i in order[: hp.batch_size]]


def update(model, processor, task, problems, progress, hp, step) -> tuple[StepStats, list[Answer]]:
    """One step of eq. 1: the model answers, answers are rewarded, z follows the gradient of J."""
    start_time = time.time()
    # 1) add the gradient of -J to z.grad
    if task.choices is not None:
        answers = []
        stats = add_choice_gradient(model, processor, task, problems, hp)
    else:
        z, seed = get_expert(model), hp.seed * 100_003 + step
        answers = rollout(model, processor, task, problems, z, temperature=1.0, seed=seed)
        stats = add_gradient(model, processor, task, problems, answers, hp)
        stats.mean_length = sum(len(answer.tokens) for answer in answers) / len(answers)
    # 2) a step of AdamW, with a clipped gradient and a learning rate that falls along a cosine
    parameters = list(progress.parameters.values())
    sum_over_processes(parameters, stats)
    stats.grad_norm = nn.utils.clip_grad_norm_(parameters, hp.max_grad_norm).item()
    cosine = math.cos(math.pi * (step - 1) / hp.steps)
    progress.optimizer.param_groups[0]["lr"] = hp.lr * (1 + cosine) / 2
    progress.optimizer.step()
    progress.optimizer.zero_grad()
    stats.step, stats.seconds = step, time.time() - start_time
    return stats, answers


def rollout(
    model, processor, task, problems: list[dict], expert: Experts, temperature: float, seed: int
) -> list[Answer]:
    """One answer to each problem, and its reward. expert, temperature, seed: as for generate."""
    rows = my_share(range(len(problems)))  # all of them, unless several processes share the work
    prompts = [task.conversation(problems[row]) for row in rows]
    sampling = Sampling(task.max_new_tokens, temperature, task.prefill, seed, rows)
    completions = generate_tokens(model, processor, prompts, select_experts(expert, rows), sampling)
    answers = []
    for row, tokens in zip(rows, completions):
        text = tokenizer_of(processor).decode(tokens, skip_special_tokens=True)
        answers.append(Answer(tokens, text, float(task.reward(text, problems[row]))))
    return gather_shares(answers)


def add_gradient(
    model, processor, task, problems: list[dict], answers: list[Answer], hp: Hyperparameters
) -> StepStats:
    """Adds the gradient of -J (eq. 1), a mean over problems, estimated from an answer to each."""
    rewards = torch.tensor([answer.reward for answer in answers], device=model.device)  # (B,)
    advantages = leave_one_out_advantages(rewards) if hp.baseline else rewards
    answers, advantages = my_share(answers), my_share(advantages)
    conversations = [task.conversation(problem) for problem in my_share(problems)]
    lengths = [len(answer.tokens) for answer in answers]
    stats = StepStats(reward=sum(answer.reward for answer in answers) / len(rewards))
    for rows, inputs in batches(
        model, processor, conversations, task.prefill, lengths, hp.token_budget, with_logits=True
    ):
        completions = [answers[row].tokens for row in rows]
        with checkpointing(model, hp.checkpointing):
            log_probs = completion_log_probs(model, inputs, completions)  # (B,) log π_W'(ŷ|x)
        ref_log_probs = log_probs.detach()
        if hp.kl_coef > 0:
            with torch.no_grad(), reference_policy(model):
                ref_log_probs = completion_log_probs(model, inputs, completions)  # log π_W(ŷ|x)
        loss = reinforce_loss(log_probs, ref_log_probs, advantages[rows], hp.kl_coef)
        share = len(rows) / len(rewards)
        (share * loss).backward()
        stats.kl += share * (log_probs.detach() - ref_log_probs).mean().item()
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
    """Each reward less the mean of the others, (B,). Less noise, and the gradient is unbiased."""
    other_rewards = rewards.sum() - rewards
    return rewards - other_rewards / max(1, len(rewards) - 1)


def reinforce_loss(
    log_probs: torch.Tensor, ref_log_probs: torch.Tensor, advantages: torch.Tensor, kl_coef: float
) -> torch.Tensor:
    """A scalar whose gradient estimates that of -J (eq. 1) from sampled answers; all are (B,)."""
    penalty = kl_coef * (log_probs - ref_log_probs).detach()
    return -(log_probs * (advantages - penalty)).mean()


def evaluate(
    model: Model, processor: Processor, task: Task, problems: list[dict], *, expert: Experts = None
) -> float:
    """Mean accuracy of greedy answers, in [0, 1]. A reward below 0 counts as 0."""
    if not problems:
        raise Transformer2Error(f"task {task.name} has no problems to evaluate on")
    rewards = greedy_rewards(model, processor, task, problems, expert)
    return sum(max(0.0, reward) for reward in rewards) / len(rewards)


def greedy_rewards(model, processor, task, problems: list[dict], expert: Experts) -> list[float]:
    """The reward of the greedy answer, or of the likeliest choice, to each problem."""
    if task.choices is None:
        answers = rollout(model, processor, task, problems, expert, temperature=0.0, seed=0)
        return [answer.reward for answer in answers]
    own_expert = select_experts(expert, my_share(range(len(problems))))
    mine = my_share(problems)
    texts = likeliest_choices(model, processor, task, mine, own_expert)
    return gather_shares([float(task.reward(text, p)) for text, p in zip(texts, mine)])


# ---- Section 3.2: self-adaptation. Pass 1 decides on z', pass 2 answers with it ------------------


def classify(
    model: Model,
    processor: Processor,
    conversations: list[Conversation],
    categories: list[str],
    *,
    expert: Experts = None,
) -> list[str]:
    """Pass 1: the likeliest category of each conversation.

    Strategy A (the prompt) without an expert, B with expert z^c, which is trained to classify.
    """
    questions = [category_question(conversation, categories) for conversation in conversations]
    task = Task("classify", list, itemgetter("question"), reward=None, prefill=CATEGORY_PREFILL)
    task.choices = list(categories)
    problems = [{"question": question} for question in questions]
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
    strategy B. options: of generate. All rows answer in one batch, each under its own expert.
    """
    categories = list(dict.fromkeys([*experts, "other"]))
    chosen = classify(model, processor, conversations, categories, expert=classifier)
    row_experts = [experts.get(category) for category in chosen]
    answers = generate(model, processor, conversations, expert=row_experts, **options)
    return list(zip(chosen, answers))


def mix(experts: list[Expert], alphas: torch.Tensor | np.ndarray) -> Expert:
    """z' = 1 + sum_k α_k (z_k - 1): the paper's sum, where the base model takes what α leaves.

    alphas: (K, 1), or (K, blocks) with a weight for each expert in each block of the network.
    """
    mixture = {}
    for expert, own_alphas in zip(experts, torch.as_tensor(alphas, dtype=torch.float32)):
        for name, z in expert.items():
            block = re.search(r"\.(\d+)\.|$", name).group(1) or 0  # 3 in model.layers.3.mlp.up_proj
            alpha = own_alphas[int(block) % len(own_alphas)]
            before = mixture.get(name, torch.ones_like(z, device="cpu"))
            mixture[name] = before + alpha * (z.cpu() - 1)
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

    Accuracy decides, and between equals the mean log-likelihood of the right answers. α is (K, 1),
    or (K, blocks) with per_layer. It is not clipped.
    """
    check_seed(seed)
    blocks = model.config.get_text_config().num_hidden_layers if per_layer else 1
    # The search starts with the base model and every single expert.
    base_and_experts = np.eye(len(experts) + 1, len(experts), -1)  # (K + 1, K)
    first = np.repeat(base_and_experts[..., None], blocks, axis=2)  # (K + 1, K, blocks)
    own_experts = list(experts.values())
    score = functools.partial(score_mixtures, model, processor, task, problems, own_experts)
    alphas = cross_entropy_method(score, first, population, iterations, seed)
    return mix(own_experts, alphas), torch.tensor(alphas, dtype=torch.float32)


def score_mixtures(model, processor, task, problems, experts, candidates) -> list[tuple]:
    """(accuracy, mean log-likelihood of the right answers) of every candidate α.

    All candidates answer all problems in one batch, each row under its own z.
    """
    all_problems, all_experts = [], []
    for alphas in candidates:
        all_problems += problems
        all_experts += [mix(experts, alphas)] * len(problems)
    rewards = greedy_rewards(model, processor, task, all_problems, all_experts)
    likelihoods = solution_log_probs(model, processor, task, all_problems, all_experts)
    accuracies = np.clip(rewards, 0, None).reshape(len(candidates), -1).mean(1)
    likelihoods = np.reshape(likelihoods, (len(candidates), -1)).mean(1)
    return list(zip(accuracies, likelihoods))


def cross_entropy_method(
    score: Callable, first: np.ndarray, population: int, iterations: int, seed: int
) -> np.ndarray:
    """The best candidate that the cross-entropy method finds.

    score: a list of candidates -> a list of scores. first: (n, *shape), the first candidates.
    """
    rng = np.random.default_rng(seed)
    mean = np.full(first.shape[1:], 1 / first.shape[1])
    deviation = np.full(first.shape[1:], 0.5)
    num_elite = max(2, round(0.2 * population))
    best, best_score = None, None
    for iteration in tqdm(range(iterations), desc="CEM", leave=False, delay=3, disable=None):
        # 1) sample candidates around the mean
        candidates = list(first) if iteration == 0 else []
        while len(candidates) < population:
            candidates.append(mean + deviation * rng.standard_normal(mean.shape))
        # 2) score them, all in one batch; the best so far stays among them, with its score
        scores = score(candidates)
        if best is not None:
            candidates.append(best)
            scores.append(best_score)
        # 3) refit mean and deviation to the elite; a floor that shrinks to 0 keeps the search open
        ranking = sorted(range(len(candidates)), key=scores.__getitem__, reverse=True)
        best, best_score = candidates[ranking[0]], scores[ranking[0]]
        elite = np.stack([candidates[i] for i in ranking[:num_elite]])
        mean = elite.mean(0)
        deviation = elite.std(0) + 0.2 * (1 - iteration / iterations)
    return best


# ==== Plumbing: what makes the method work with any model and fast. None of it is in the paper. ===

# ---- Tasks with choices: so few answers that all can be scored, instead of one sampled -----------


def choice_log_probs(
    model: Model, inputs: dict[str, torch.Tensor], choices: list[list[list[int]]]
) -> list[torch.Tensor]:
    """log π(choice|x) of every choice, summed over its tokens: a tensor (C,) for each prompt.

    inputs: left-padded prompts from encode. choices: the token ids of each prompt's own choices;
    their number may differ. Each prompt runs once, its key-value cache is repeated for its choices,
    and these run as one batch of short rows. Differentiable, also through the cache.
    """
    if not can_repeat_cache(model, inputs):
        return whole_choice_log_probs(model, inputs, choices)
    counts = [len(own_choices) for own_choices in choices]
    owner = torch.tensor(np.repeat(np.arange(len(choices)), counts), device=model.device)  # (N,)
    all_choices = [choice for own_choices in choices for choice in own_choices]
    tokens, mask = pad_right(all_choices, model.device)  # (N, L); choice i is of prompt owner[i]

    # 1) Every prompt runs once. Its last position predicts the first token of all its choices.
    prompts = run_model(model, inputs, logits_to_keep=1, use_cache=True)
    first_logits = prompts.logits[owner, -1]  # (N, V)
    log_probs = token_log_probs(first_logits, tokens[:, 0]) * mask[:, 0]  # (N,)

    # 2) The other tokens of a choice run on a copy of its prompt's cache. Token t predicts token
    #    t + 1, so the last one need not run.
    if tokens.shape[1] > 1:
        cache = prompts[cache_name(model)]
        cache.batch_select_indices(owner)
        prompt_mask = inputs["attention_mask"][owner]  # (N, P)
        choice_inputs = {
            "input_ids": tokens[:, :-1],
            "attention_mask": torch.cat([prompt_mask, mask[:, :-1]], dim=1),
            cache_name(model): cache,
        }
        logits = run_model(model, choice_inputs, use_cache=True).logits  # (N, L - 1, V)
        later_log_probs = token_log_probs(logits, tokens[:, 1:]) * mask[:, 1:]
        log_probs = log_probs + later_log_probs.sum(1)
    return list(log_probs.split(counts))


def whole_choice_log_probs(model, inputs, choices) -> list[torch.Tensor]:
    """As choice_log_probs, but prompt and choice run as one sequence, one pass for each choice."""
    columns = []
    for c in range(max(len(own_choices) for own_choices in choices)):
        # A prompt with fewer choices repeats its last one, which is dropped below.
        completions = [own_choices[min(c, len(own_choices) - 1)] for own_choices in choices]
        columns.append(completion_log_probs(model, inputs, completions))
    log_probs = torch.stack(columns, dim=1)  # (B, most choices)
    return [row[: len(own_choices)] for row, own_choices in zip(log_probs, choices)]


def can_repeat_cache(model, inputs) -> bool:
    """False for state-space and hybrid layers, pictures, checkpointing, and an expert per row."""
    causal_lm = without_peft(model)
    layer_types = getattr(causal_lm.config, "layer_types", None) or []
    attention = {"full_attention", "sliding_attention", "chunked_attention"}
    if getattr(causal_lm, "_is_stateful", False) or not set(layer_types) <= attention:
        return False
    for module in model.modules():
        has_row_experts = isinstance(module, SVFLinear) and module.current_z().dim() > 1
        if has_row_experts or getattr(module, "gradient_checkpointing", False):
            return False
    return not has_pictures(inputs)


def choice_loss(log_probs: list, ref_log_probs: list, rewards: list, kl_coef: float) -> tuple:
    """-J of eq. 1, exact: its expectations are sums over the choices. Also the reward and the KL.

    The lists have a tensor (C,) for each problem. π is the softmax over a problem's choices.
    """
    expected_rewards, kls = [], []
    for scores, ref_scores, own_rewards in zip(log_probs, ref_log_probs, rewards):
        log_pi = scores.log_softmax(0)
        log_ratio = log_pi - ref_scores.log_softmax(0)
        expected_rewards.append((log_pi.exp() * own_rewards).sum())
        kls.append((log_pi.exp() * log_ratio).sum())
    reward, kl = torch.stack(expected_rewards).mean(), torch.stack(kls).mean()
    return kl_coef * kl - reward, reward.detach(), kl.detach()


def add_choice_gradient(model, processor, task, problems, hp: Hyperparameters) -> StepStats:
    """As add_gradient, for a task with choices: over all of them instead of one sampled answer."""
    stats = StepStats()
    mine = my_share(problems)
    for rows, inputs, choices in choice_batches(model, processor, task, mine, hp.token_budget):
        rewards = []
        for problem in [mine[row] for row in rows]:
            own = [float(task.reward(text, problem)) for text in choices_of(task, problem)]
            rewards.append(torch.tensor(own, device=model.device))  # (C,)
        with checkpointing(model, hp.checkpointing):
            log_probs = choice_log_probs(model, inputs, choices)
        ref_log_probs = [scores.detach() for scores in log_probs]
        if hp.kl_coef > 0:
            with torch.no_grad(), reference_policy(model):
                ref_log_probs = choice_log_probs(model, inputs, choices)
        loss, reward, kl = choice_loss(log_probs, ref_log_probs, rewards, hp.kl_coef)
        share = len(rows) / len(problems)
        (share * loss).backward()
        stats.reward += share * reward.item()
        stats.kl += share * kl.item()
    return stats


@torch.no_grad()
def score_choices(
    model: Model, processor: Processor, task: Task, problems: list[dict], *, expert: Experts = None
) -> list[torch.Tensor]:
    """log π of the choices of each problem: a tensor (C,) for each. expert: as for generate."""
    scores, budget = {}, TOKEN_BUDGET // 4
    for rows, inputs, choices in choice_batches(model, processor, task, problems, budget):
        with use_expert(model, select_experts(expert, rows)):
            scores.update(zip(rows, choice_log_probs(model, inputs, choices)))
    return [scores[row] for row in range(len(problems))]


def likeliest_choices(model, processor, task, problems, expert: Experts) -> list[str]:
    """The likeliest choice of each problem."""
    scores = score_choices(model, processor, task, problems, expert=expert)
    return [choices_of(task, problem)[row.argmax()] for problem, row in zip(problems, scores)]


def choices_of(task: Task, problem: dict) -> list[str]:
    """The possible answers to a problem. Raises Transformer2Error if there are none."""
    choices = task.choices(problem) if callable(task.choices) else task.choices
    if not choices:
        question = problem.get("question")
        raise Transformer2Error(f"task {task.name} has no choices for the problem {question!r}")
    return choices


def choice_tokens(processor, task: Task, problem: dict) -> list[list[int]]:
    """Token ids of the choices of a problem.

    In a chat they get an end token where one begins another, as "math" begins "mathematics". After
    a plain string they get none, as benchmarks score them.
    """
    prompt, end = task.conversation(problem), tokenizer_of(processor).eos_token_id
    texts = choices_of(task, problem)
    choices = [continuation(processor, prompt, task.prefill, text) for text in texts]
    begins_another = any(a != b and b[: len(a)] == a for a in choices for b in choices)
    if begins_another and end is not None and not isinstance(prompt, str):
        choices = [[*choice, end] for choice in choices]
    return choices


def choice_batches(model, processor, task, problems, budget: int) -> Iterator[tuple]:
    """Yields (row numbers, encoded prompts, choices) for choice_log_probs."""
    choices = [choice_tokens(processor, task, problem) for problem in problems]
    conversations = [task.conversation(problem) for problem in problems]
    longest = [max(len(choice) for choice in own_choices) for own_choices in choices]
    copies = 1 + max([len(own_choices) for own_choices in choices], default=0)  # of each prompt
    for rows, inputs in batches(
        model, processor, conversations, task.prefill, longest, budget // copies, with_logits=True
    ):
        yield rows, inputs, [choices[row] for row in rows]


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

    expert: None for the base model, an Expert, or a list with one of these per conversation.
    temperature: 0 is greedy. prefill: the start of every answer. seed: of sampled answers; None
    draws one from torch's generator. Raises Transformer2Error for a prompt that is longer than the
    model's context or cannot be encoded.
    """
    seed = int(torch.randint(2**31, ())) if seed is None else seed
    check_seed(seed)
    rows = range(len(conversations))
    sampling = Sampling(max_new_tokens, temperature, prefill, seed, rows)
    completions = generate_tokens(model, processor, conversations, expert, sampling)
    tokenizer = tokenizer_of(processor)
    return [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in completions]


@dataclass
class Sampling:
    """How answers are generated: as the parameters of generate say."""

    max_new_tokens: int
    temperature: float
    prefill: str
    seed: int
    rows: range  # answer i is drawn from the random stream (seed, rows[i])


def generate_tokens(
    model, processor, conversations: list, expert: Experts, sampling: Sampling
) -> list[list[int]]:
    """Token ids of the answers, end token included. No answer depends on the rest of its batch."""
    causal_lm, tokenizer = without_peft(model), tokenizer_of(processor)
    ends = model.generation_config.eos_token_id
    if ends is None:
        ends = tokenizer.eos_token_id
    ends = [] if ends is None else np.ravel(ends).tolist()
    new_tokens = [sampling.max_new_tokens] * len(conversations)
    completions = [[]] * len(conversations)
    for rows, inputs in batches(model, processor, conversations, sampling.prefill, new_tokens):
        samplers = []
        if sampling.temperature > 0:
            row_seeds = [sampling.seed * 1_000_003 + sampling.rows[row] for row in rows]
            samplers.append(RowSampler(model.device, row_seeds, sampling.temperature))
        room = context_length(model) - int(inputs["attention_mask"].sum(1).max())
        image_token = getattr(processor, "image_token_id", None)  # would ask for another picture
        settings = GenerationConfig(
            max_new_tokens=min(sampling.max_new_tokens, room),
            do_sample=False,  # a RowSampler turns greedy decoding into sampling
            eos_token_id=ends or None,
            pad_token_id=tokenizer.pad_token_id,
            suppress_tokens=image_token and [image_token],
        )
        own_expert = select_experts(expert, rows)
        with use_expert(model, own_expert), generation_settings(causal_lm, settings):
            sequences = causal_lm.generate(**inputs, logits_processor=samplers)  # (B, P + T)
        prompt_length = inputs["input_ids"].shape[1]
        for row, tokens in zip(rows, sequences[:, prompt_length:].tolist()):
            stops = [t for t, token in enumerate(tokens) if token in ends]
            completions[row] = tokens[: stops[0] + 1] if stops else tokens
    return completions


class RowSampler(LogitsProcessor):
    """Samples each row of a batch from a random stream of its own.

    The Gumbel trick: if E is exponential noise, the argmax over the vocabulary of
    logits / temperature - log E is a draw from softmax(logits / temperature). So the model decodes
    greedily from the scores returned here, and no draw depends on the rest of the batch.
    """

    def __init__(self, device: torch.device, row_seeds: list[int], temperature: float):
        self.temperature = temperature
        self.generators = []
        for row_seed in row_seeds:
            self.generators.append(torch.Generator(device).manual_seed(row_seed % 2**63))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        noise = torch.empty_like(scores, dtype=torch.float32)  # (B, V)
        for row, generator in zip(noise, self.generators):
            row.exponential_(generator=generator)
        noise = noise.clamp(min=2**-24)  # some devices draw an exact 0
        return scores.float() / self.temperature - noise.log()


def check_seed(seed: int) -> None:
    """Raises Transformer2Error for a seed that is negative or over 2^31."""
    if not 0 <= seed <= 2**31:
        raise Transformer2Error(f"the seed {seed} is out of range: take one from 0 to 2^31")


@contextlib.contextmanager
def generation_settings(causal_lm, settings: GenerationConfig) -> Iterator[None]:
    """Replaces the model's own settings (top_k, penalties, ...) inside the `with` block."""
    before = causal_lm.generation_config
    causal_lm.generation_config = settings
    try:
        yield
    finally:
        causal_lm.generation_config = before


# ---- Prompts -------------------------------------------------------------------------------------

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


def category_question(conversation: Conversation, categories: list[str]) -> list[dict]:
    """The conversation of pass 1: the last message, after the question for its category."""
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


def tokenizer_of(processor) -> PreTrainedTokenizerBase:
    """The tokenizer of what AutoProcessor or AutoTokenizer gives, ready for batches of prompts."""
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
    tokenizer, sees = tokenizer_of(processor), hasattr(processor, "image_processor")
    options = {"return_tensors": "pt", "padding": True}
    try:
        if isinstance(conversations[0], str):
            inputs = tokenizer([text + prefill for text in conversations], **options)
        else:
            if not processor.chat_template and not tokenizer.chat_template:
                print("note: no chat template, so prompts read 'User: ...'", file=sys.stderr)
                processor.chat_template = tokenizer.chat_template = FALLBACK_TEMPLATE
            messages = [messages_of(prompt, prefill, sees) for prompt in conversations]
            if sees:
                options = {"return_tensors": "pt", "processor_kwargs": {"padding": True}}
            options.update(tokenize=True, return_dict=True)
            options.update(add_generation_prompt=not prefill, continue_final_message=bool(prefill))
            inputs = processor.apply_chat_template(messages, **options)
    except Exception as error:  # an unknown role, a picture that does not load: of many kinds
        reason = f"a prompt cannot be encoded, check its roles and pictures: {error}"
        raise Transformer2Error(reason.splitlines()[0]) from error
    P, context = inputs["input_ids"].shape[1], context_length(model)
    if P >= context:
        reason = f"a prompt has {P} tokens, but the model's context ends at {context}: shorten it"
        raise Transformer2Error(reason)
    names = list(inputs) if sees else ["input_ids", "attention_mask"]  # no token_type_ids of text
    return {name: inputs[name].to(model.device) for name in names}


def messages_of(conversation: list[dict], prefill: str, sees: bool) -> list[dict]:
    """The messages of a prompt, with the start of the answer, as the chat template takes them."""
    messages = [dict(message) for message in conversation]
    if prefill:
        messages.append({"role": "assistant", "content": prefill})
    for message in messages:
        if not sees and not isinstance(message["content"], str):
            raise ValueError("it has a picture, but the model reads only text")
        if sees and isinstance(message["content"], str):
            message["content"] = [{"type": "text", "text": message["content"]}]
        if sees:
            message["content"] = [load_picture(part) for part in message["content"]]
    return messages


def load_picture(part: dict) -> dict:
    """A part of a message. Its picture may be a function that loads it."""
    return {**part, "image": part["image"]()} if callable(part.get("image")) else part


def continuation(processor, prompt: Conversation, prefill: str, text: str) -> list[int]:
    """Token ids of a text that follows a prompt.

    Tokenizers disagree on where a blank goes, so the last word before the text is tokenized with
    the text and without it. After a prefill, a text without a blank gets one.
    """
    before = prompt + prefill if isinstance(prompt, str) else prefill
    last_word = "".join(before.split()[-1:])
    blank = " " if prefill and not text[:1].isspace() else ""
    tokenize = functools.partial(tokenizer_of(processor), add_special_tokens=False)
    start = tokenize(last_word)["input_ids"]
    return tokenize(last_word + blank + text)["input_ids"][len(start) :]


@torch.no_grad()
def solution_log_probs(model, processor, task, problems, expert: Experts) -> list[float]:
    """log π of the right answer to each problem."""
    prompts = [task.conversation(problem) for problem in problems]
    texts = [str(problem.get("solution", problem["answer"])) for problem in problems]
    solutions = [continuation(processor, p, task.prefill, text) for p, text in zip(prompts, texts)]
    lengths = [len(tokens) for tokens in solutions]
    log_probs = {}
    for rows, inputs in batches(model, processor, prompts, task.prefill, lengths, with_logits=True):
        with use_expert(model, select_experts(expert, rows)):
            batch = completion_log_probs(model, inputs, [solutions[row] for row in rows])
        log_probs.update(zip(rows, batch.tolist()))
    return [log_probs[row] for row in range(len(problems))]


# ---- Batches -------------------------------------------------------------------------------------

TOKEN_BUDGET = 16384  # tokens of a batch where no gradient is taken


def batches(model, processor, conversations, prefill, new_tokens, budget=None, with_logits=False):
    """Yields (row numbers, encoded prompts) of batches of rows of similar length.

    A batch has at most `budget` tokens of prompts and new tokens, padding included. with_logits: its
    new tokens also have at most 1 GiB of logits. A row that could pass the end of the context has a
    batch of its own.
    """
    lengths = []
    for start in range(0, len(conversations), 256):  # not the pictures of all prompts at once
        inputs = encode(model, processor, conversations[start : start + 256], prefill)
        lengths += inputs["attention_mask"].sum(1).tolist()
    lengths, new_tokens = np.array(lengths, int), np.array(new_tokens, int)
    budget = TOKEN_BUDGET if budget is None else budget
    vocabulary = model.config.get_text_config().vocab_size
    most_with_logits = 2**28 / vocabulary if with_logits else math.inf  # a logit has 4 bytes
    groups = []
    for row in np.argsort(-(lengths + new_tokens), kind="stable").tolist():
        rows = [*groups[-1], row] if groups else [row]
        width, new_width = lengths[rows].max(), new_tokens[rows].max()
        is_full = len(rows) * (width + new_width) > budget
        is_full = is_full or len(rows) * new_width > most_with_logits
        is_full = is_full or (lengths + new_tokens)[rows].max() > context_length(model)
        if is_full or not groups:
            groups.append([row])
        else:
            groups[-1].append(row)
    for rows in tqdm(groups, leave=False, delay=3, disable=None):
        yield rows, encode(model, processor, [conversations[row] for row in rows], prefill)


def pad_right(rows: list[list[int]], device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of unequal length in one tensor, and their mask: both (len(rows), longest)."""
    tokens = [torch.tensor(row, dtype=torch.long, device=device) for row in rows]
    mask = [torch.ones_like(row) for row in tokens]
    return pad_sequence(tokens, batch_first=True), pad_sequence(mask, batch_first=True)


def append_tokens(inputs: dict, tokens: torch.Tensor, mask: torch.Tensor) -> dict:
    """Prompts with tokens after them; what pictures need goes along."""
    sequences = dict(inputs)
    for name, tensor in inputs.items():
        if tensor.shape == inputs["input_ids"].shape:  # as token_type_ids, which are 0 for text
            sequences[name] = F.pad(tensor, (0, tokens.shape[1]))
    sequences["input_ids"] = torch.cat([inputs["input_ids"], tokens], dim=1)
    sequences["attention_mask"] = torch.cat([inputs["attention_mask"], mask], dim=1)
    return sequences


# ---- Models --------------------------------------------------------------------------------------


def run_model(model, inputs: dict, logits_to_keep: int = 0, use_cache: bool = False):
    """The model's output. logits_to_keep: how many of the last positions have logits; 0: all."""
    accepted = inspect.signature(without_peft(model).forward).parameters
    options = {"use_cache": use_cache}
    if "logits_to_keep" in accepted:
        options["logits_to_keep"] = logits_to_keep
    # Positions count real tokens only, so that left padding does not shift a prompt. A model that
    # sees pictures counts them itself.
    if "position_ids" in accepted and not has_pictures(inputs):
        positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        options["position_ids"] = positions[:, -inputs["input_ids"].shape[1] :]
    return model(**inputs, **options)


def has_pictures(inputs: dict) -> bool:
    """True if the inputs of a model hold more than text."""
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


@contextlib.contextmanager
def checkpointing(model, enabled: bool = True) -> Iterator[None]:
    """Inside, the model's blocks keep only their input for the backward pass, and run again in it.

    transformers does so for blocks in training mode, so their own dropout is set to 0.
    """
    modules = model.modules() if enabled else []
    blocks = [block for block in modules if isinstance(block, GradientCheckpointingLayer)]
    if enabled and not blocks:
        raise Transformer2Error("this model has no blocks that can be checkpointed: do without")
    before = [dict(vars(block)) for block in blocks]
    for block in blocks:
        block.training = block.gradient_checkpointing = True
        block._gradient_checkpointing_func = functools.partial(
            run_checkpointed, use_reentrant=False
        )
        for name in [name for name in vars(block) if name.endswith("dropout")]:
            setattr(block, name, 0.0)
    try:
        yield
    finally:
        for block, attributes in zip(blocks, before):
            vars(block).clear()
            vars(block).update(attributes)


# ---- Layers and experts --------------------------------------------------------------------------

# Regular expressions over layer names, by the name of the targets. Vision towers stay as they are.
TEXT_ONLY = r"^(?!.*(vision|visual|image|audio|multi_modal|projector|connector)).*"
TARGETS = {
    "mlp": TEXT_ONLY + r"\b(mlp|ffn|feed_forward|fc1|fc2|fc_in|fc_out)(\.|$)",
    "attention": TEXT_ONLY + r"\b(self_attn|attn|attention|self_attention)\.",
    "all": TEXT_ONLY,
}


def matching_layers(model, targets: str) -> dict[str, nn.Linear | Conv1D]:
    """The layers that targets name. Raises Transformer2Error if there are none.

    Some mixtures of experts have weights with three dimensions, a matrix for each of their
    experts. These stay as they are, and one sentence says so.
    """
    try:
        pattern = re.compile(TARGETS.get(targets, targets))
    except re.error:
        pattern = re.compile("(?!)")  # what is no regular expression matches nothing
    layers, linear_names = {}, []
    for name, module in model.named_modules():
        is_head = module is model.get_output_embeddings() or name.endswith("lm_head")
        if isinstance(module, nn.Linear | Conv1D) and not is_head:
            linear_names.append(name)
            is_quantised = module.weight.element_size() == 1
            if pattern.search(name) and not is_quantised:
                layers[name] = module
    unsplit = [n for n, p in model.named_parameters() if p.dim() == 3 and "conv" not in n]
    unsplit = [name for name in unsplit if pattern.search(name)]
    what = f"{len(unsplit)} weights of mixtures of experts such as {unsplit[:1]} cannot be adapted"
    if unsplit and layers:
        print(f"note: {what}; {len(layers)} layers such as {[*layers][:1]} are", file=sys.stderr)
    if not layers:
        reason = f"targets {targets!r} match no linear layer" + f" ({what})" * bool(unsplit)
        names = f"{', '.join(TARGETS)} or a regular expression over names like {linear_names[:1]}"
        raise Transformer2Error(f"{reason}, quantised ones not counted: use {names}")
    return layers


def spread_over_rows(scale: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """One scale for each row, (B, r), in a shape that multiplies the components of x, (..., r)."""
    if x.dim() == 2 and len(x) % len(scale) == 0:  # OPT flattens (B, T, d) to (B * T, d)
        return scale.repeat_interleave(len(x) // len(scale), dim=0)
    if len(scale) not in (1, len(x)):
        reason = f"there are {len(scale)} experts for {len(x)} rows"
        raise Transformer2Error(f"{reason}: give one for each, or one for all")
    return scale.view(len(scale), *[1] * (x.dim() - 2), -1)


def stack_experts(expert: Experts, layers: dict[str, SVFLinear]) -> dict[str, torch.Tensor]:
    """Layer name -> z of an expert (r,), or of one expert for each row (B, r); see use_expert."""
    row_experts = expert if isinstance(expert, list) else [expert]
    for row_expert in row_experts:
        check_expert(row_expert or {}, layers, "the expert")
    stacked = {}
    for name, layer in layers.items():
        if len(row_experts) > 1 and ".experts." in name:
            reason = f"layer {name} of a mixture of experts does not see the rows of a batch"
            raise Transformer2Error(f"{reason}: use one expert for all rows")
        ones = torch.ones_like(layer.s)
        z = [(row_expert or {}).get(name, ones).to(ones) for row_expert in row_experts]
        stacked[name] = torch.stack(z) if isinstance(expert, list) else z[0]
    return stacked


def select_experts(expert: Experts, rows: list[int]) -> Experts:
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
    """Where a training run is: enough to go on after an interruption, to the same end."""

    def __init__(self, model: Model, task: Task, hp: Hyperparameters):
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        if not trained:
            raise Transformer2Error("nothing in the model requires gradients: call apply_svf first")
        self.parameters = {name.removesuffix(".z"): parameter for name, parameter in trained}
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=hp.lr, weight_decay=0.0)
        self.start = self.values()
        self.next_step, self.best, self.best_score = 0, self.start, -1.0
        # All that changes the result has to be the same for a run to be resumed.
        self.settings = {**asdict(hp), "task": task.name, "token limit": task.max_new_tokens}
        del self.settings["token_budget"], self.settings["checkpointing"]
        self.settings["model"] = model.config._name_or_path
        self.settings["layers"] = [f"{name} {[*z.shape]}" for name, z in self.start.items()]

    def values(self) -> Expert:
        """A copy of what trains: after apply_svf layer name -> z."""
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def set_values(self, values: Expert) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])

    def save(self, path: str | Path) -> None:
        state = {"next_step": self.next_step, "best": self.best, "best_score": self.best_score}
        state |= {"values": self.values(), "optimizer": self.optimizer.state_dict()}
        state["settings"] = self.settings
        write_whole(path, lambda temporary: torch.save(state, temporary))

    def load(self, path: str | Path) -> None:
        """Raises Transformer2Error for a damaged file, or one of a run with other settings."""
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise Transformer2Error(f"cannot read {path}: delete it to begin again") from error
        theirs = state.get("settings", {})
        names = [name for name, value in self.settings.items() if theirs.get(name) != value]
        if names:
            reason = f"{path} is of a run with another {', '.join(names)}"
            raise Transformer2Error(f"{reason}: go on with the same, or delete it")
        self.next_step, self.best, self.best_score = (
            state["next_step"],
            state["best"],
            state["best_score"],
        )
        self.set_values(state["values"])
        self.optimizer.load_state_dict(state["optimizer"])


def describe(stats: StepStats) -> str:
    """One line about a step."""
    line = f"step {stats.step:3}"
    if stats.step > 0:
        line += f"  reward {stats.reward:+.3f}  KL {stats.kl:.4f}  gradient {stats.grad_norm:.2e}"
    if stats.validation is not None:
        line += f"  validation {stats.validation:.1%}"
    return line + f"  {stats.seconds:.1f} s"


def process_rank() -> int:
    """The number of this process among those that train together."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def process_count() -> int:
    """How many processes train together, as torchrun starts them."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def my_share(values):
    """Every n-th of a sequence, where n processes share the work; all of it for one process."""
    return values[process_rank() :: process_count()]


def gather_shares(values: list) -> list:
    """The results of all processes for their shares, in the order of the whole sequence."""
    shares = [values]
    if process_count() > 1:
        shares = [None] * process_count()
        distributed.all_gather_object(shares, values)
    total = sum(len(share) for share in shares)
    return [shares[i % len(shares)][i // len(shares)] for i in range(total)]


def sum_over_processes(parameters: list[nn.Parameter], stats: StepStats) -> None:
    """Adds up the processes' gradients and figures, in place."""
    if process_count() == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:  # this process had no problem
            parameter.grad = torch.zeros_like(parameter)
        distributed.all_reduce(parameter.grad)
    figures = torch.tensor([stats.reward, stats.kl], device=parameters[0].device)
    distributed.all_reduce(figures)
    stats.reward, stats.kl = figures.tolist()


# ---- Files ---------------------------------------------------------------------------------------


def save_expert(expert: Expert, path: str | Path, **about: object) -> None:
    """Writes a safetensors file in float32, whole or not at all. about: facts for its header."""
    tensors = {name: z.detach().float().cpu().contiguous() for name, z in expert.items()}
    header = {key: str(value) for key, value in about.items()}
    write_whole(path, lambda temporary: save_file(tensors, temporary, metadata=header))


def load_expert(path: str | Path, model: Model | None = None) -> Expert:
    """Reads an expert: a file of save_expert, or a .pt file of the paper's authors.

    The authors' files need a model. With one, raises Transformer2Error unless names and shapes fit
    it. Raises it also for a file that cannot be read.
    """
    is_authors = str(path).endswith(".pt")
    try:
        if is_authors:
            expert = torch.load(path, map_location="cpu", weights_only=True)
        else:
            expert = load_file(path)
    except Exception as error:  # a damaged file raises errors of many kinds
        reason = f"cannot read the expert {path}: {type(error).__name__}, {error}"
        raise Transformer2Error(reason.splitlines()[0]) from error
    layers = {} if model is None else svf_layers(model)
    if is_authors:
        expert = convert_authors_expert(expert, layers)
    if is_authors or model is not None:
        check_expert(expert, layers, path)
    return expert


def convert_authors_expert(expert: Expert, layers: dict[str, SVFLinear]) -> Expert:
    """The z's of the authors' checkpoint, in the paper's terms.

    They learn p with z = sigmoid(p), and multiply W' by sum(s) / sum(s * z), which keeps the sum
    of the singular values. Here both become a part of z.
    """
    mlp_names = dict(enumerate(name for name in layers if "mlp" in name))
    converted = {}
    for key, p in expert.items():
        name = key.removesuffix(".weight")  # learnable_params*.pt has the names of the weights
        if "module_list" in key:  # policy_params*.pt counts the MLP layers in the model's order
            name = mlp_names.get(int(key.rpartition(".")[2]), key)
        z = p.detach().float().sigmoid()
        if name in layers and layers[name].s.shape == z.shape:
            s = layers[name].s.to(z)
            z = z * s.sum() / (s * z).sum()
        converted[name] = z
    return converted


def decompose_cached(weight: torch.Tensor, cache_dir: str | Path) -> tuple:
    """decompose, remembered in cache_dir under a hash of the weight's content."""
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
    """Has `write` fill a temporary file, and moves it to path: readers see all of it or nothing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        write(Path(folder, "new"))
        os.replace(Path(folder, "new"), path)
