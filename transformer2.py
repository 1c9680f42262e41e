"""
Transformer²: self-adaptive language models, in one file to be read beside the paper.

Paper: Sun, Cetin, Tang, "Transformer-Squared: Self-adaptive LLMs", ICLR 2025, https://arxiv.org/abs/2501.06252
Their code: https://github.com/SakanaAI/self-adaptive-llms

Each weight matrix of a language model is split once into its singular components, W = U diag(s) Vᵀ. A vector z, one
number per component, rescales them: W' = U diag(s * z) Vᵀ. The z's of all matrices together are an *expert*; it is all
that ever trains, by reinforcement learning, on the answers the model itself gives to a task. At inference a first pass
over the prompt decides which expert (or which mixture) it needs, and a second pass answers with it.

    apply_svf(model)                                              # section 3.1: singular value fine-tuning (SVF)
    expert = reinforce(model, processor, task, steps=100)         # section 3.1: policy gradient, eq. 1
    two_pass(model, processor, conversations, {"math": expert})   # section 3.2: self-adaptation, strategies A and B
    few_shot(model, processor, task, ten_problems, experts)       # section 3.2: strategy C

A conversation is a list of {"role", "content"} dicts; a processor is what AutoTokenizer or AutoProcessor gives.
Shapes: B rows of a batch, P prompt tokens, T completion tokens, V vocabulary, C choices, r singular values.
"""
import contextlib
import hashlib
import math
import os
import re
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Callable

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm
from transformers import GenerationConfig
from transformers.pytorch_utils import Conv1D

Expert = dict[str, torch.Tensor]  # layer name -> z (r,), r = min(out_features, in_features); absent layer = ones

class Transformer2Error(ValueError):
    """Something the caller can put right; the message is one sentence that says what and how."""

# ----------------------------------------------------------------------------------------------------------------------
# Section 3.1, singular value fine-tuning: W' = U diag(s * z) Vᵀ

def decompose(weight):
    """W (m, n) -> U (m, r), s (r,) descending, Vh (r, n) in float32, W = U diag(s) Vh, r = min(m, n).

    The eigenvectors V of WᵀW are the right singular vectors, and W = (W V) Vᵀ for any orthogonal V: exact, at the
    price of one r x r eigenproblem. It squares the condition number, hence float64.
    """
    W = weight.detach().double()
    if W.shape[0] < W.shape[1]:  # work on the small side: Wᵀ = V diag(s) Uᵀ
        V, s, Uh = decompose(W.T)
        return Uh.T.contiguous(), s, V.T.contiguous()
    V = torch.linalg.eigh(W.T @ W).eigenvectors.flip(-1)  # (n, r); eigh counts upwards
    U = W @ V  # (m, r), columns of length s
    s = U.norm(dim=0)
    return (U / s.clamp(min=1e-12)).float(), s.float(), V.T.contiguous().float()

def decompose_cached(weight, cache_dir):
    """decompose, remembered in `cache_dir` under a hash of the weight's content."""
    if cache_dir is None or weight.is_meta:
        return decompose(weight)
    content = hashlib.sha256(weight.detach().contiguous().cpu().view(torch.uint8).numpy()).hexdigest()[:24]
    path = Path(cache_dir) / f"{content}-{weight.dtype}-{len(weight)}.safetensors"
    with contextlib.suppress(SafetensorError, FileNotFoundError):  # a damaged file is made again
        return tuple(load_file(path, device=str(weight.device))[part] for part in ("U", "s", "Vh"))
    factors = decompose(weight)
    write_whole(path, lambda tmp: save_file(dict(zip(("U", "s", "Vh"), factors)), tmp))
    return factors

def write_whole(path, write):
    """Has `write` fill a temporary file beside `path` and moves it there: readers see the whole file or none."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(tmp)
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)

class SVFLinear(nn.Module):
    """y = U diag(s * z) Vᵀ x + b in the place of a linear layer; z (r,) is the only Parameter that trains.

    Factored, never composed: autograd reaches z through ((x V) * s z) Uᵀ, so no dense W' and no dense gradient exist.
    x: (B, ..., in_features) -> (B, ..., out_features). s and z are float32 whatever the model's dtype.
    """
    def __init__(self, linear, cache_dir=None):
        super().__init__()
        self.is_conv1d = isinstance(linear, Conv1D)  # GPT-2's layer, which keeps W transposed
        weight = linear.weight.T if self.is_conv1d else linear.weight
        self.out_features, self.in_features = weight.shape
        U, s, Vh = decompose_cached(weight, cache_dir)
        self.register_buffer("U", U.to(weight.dtype))  # (out, r)
        self.register_buffer("s", s)  # (r,)
        self.register_buffer("Vh", Vh.to(weight.dtype))  # (r, in)
        self.bias = linear.bias
        self.z = nn.Parameter(torch.ones_like(s))
        self.using = None  # what use_expert puts in the place of z: (r,), or (B, 1, r) for one z per row

    @property
    def current(self):
        return self.z if self.using is None else self.using

    @property
    def weight(self):
        """W' composed, (out, in), for code that reads a layer's weight."""
        return ((self.U.float() * (self.s * self.current)) @ self.Vh.float()).to(self.U.dtype)

    def forward(self, x):
        scale = (self.s * self.current).to(x.dtype)
        if scale.dim() == 3 and (x.dim() != 3 or len(x) != len(scale)):
            raise Transformer2Error(f"{len(scale)} rows have experts of their own, but this model's layers see shape "
                                    f"{tuple(x.shape)}: use one expert for the whole batch")
        return F.linear(F.linear(x, self.Vh) * scale, self.U, self.bias)

TARGETS = {"mlp": r"(^|\.)(mlp|ffn|feed_forward|fc1|fc2|fc_in|fc_out)(\.|$)",
           "attention": r"(^|\.)(self_attn|attn|attention|self_attention)\.",
           "all": r""}
NOT_TEXT = re.compile(r"vision|visual|image|audio|multi_modal|projector|connector")

def apply_svf(model, targets="mlp", cache_dir=None):
    """In place: freezes everything and replaces every matching nn.Linear or Conv1D by an SVFLinear. Returns the model.

    targets: "mlp", "attention", "all", or a regular expression searched for in module names. The output head and the
    embeddings never match; a vision tower's layers match only an expression of your own.
    cache_dir: a folder for the decompositions. Raises Transformer2Error if nothing matches or a match is quantised.
    """
    try:
        pattern = re.compile(TARGETS.get(targets, targets))
    except re.error as e:
        raise Transformer2Error(f"targets {targets!r}: neither {', '.join(TARGETS)} nor a regular expression ({e})")
    linears = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))
               and m is not model.get_output_embeddings() and not name.endswith("lm_head")}
    found = {name: m for name, m in linears.items()
             if pattern.search(name) and (targets not in TARGETS or not NOT_TEXT.search(name))}
    if not found:
        example = next((name for name in linears if re.search(r"\.\d+\.", name)), "none")
        raise Transformer2Error(f"targets {targets!r} match no linear layer of this {type(model).__name__}: use "
                                f"{', '.join(TARGETS)} or a regular expression over names like {example}")
    for name, linear in found.items():
        if linear.weight.dim() != 2 or not linear.weight.is_floating_point():
            raise Transformer2Error(f"layer {name} is quantised: load the model in bfloat16 or float32")
    model.requires_grad_(False)
    for name, linear in tqdm(found.items(), desc="decomposing", leave=False, delay=2, disable=None):
        model.set_submodule(name, SVFLinear(linear, cache_dir))
    return model

def svf_layers(model):
    """Layer name -> SVFLinear, in the model's order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, SVFLinear)}

def get_expert(model):
    """A detached copy of the current z's: layer name -> (r,)."""
    return {name: layer.current.detach().clone() for name, layer in svf_layers(model).items()}

@contextlib.contextmanager
def use_expert(model, expert, rows=None):
    """`with use_expert(model, expert):` runs the model with these z's and puts back what was there before.

    expert: None, the base model (z = 1); an Expert; or a list with one Expert-or-None for each row of the batch, of
    which `rows` picks some.
    """
    layers = svf_layers(model)
    before = {name: layer.using for name, layer in layers.items()}
    per_row = [expert] if not isinstance(expert, list) else expert if rows is None else [expert[i] for i in rows]
    distinct = {id(e): e or {} for e in per_row}  # many rows, few experts
    for e in distinct.values():
        check_expert(e, layers, "the expert")
    index = torch.tensor([list(distinct).index(id(e)) for e in per_row])
    try:
        for name, layer in layers.items():
            ones = torch.ones_like(layer.s)
            z = torch.stack([e[name].to(ones) if name in e else ones for e in distinct.values()])
            layer.using = z[index.to(z.device), None] if isinstance(expert, list) else z[0]
        yield
    finally:
        for name, layer in layers.items():
            layer.using = before[name]

def check_expert(expert, layers, what):
    """Raises Transformer2Error unless every z of `expert` fits its layer."""
    for name, z in expert.items():
        have = tuple(layers[name].s.shape) if name in layers else "no such SVF layer"
        if have != tuple(z.shape):
            raise Transformer2Error(f"{what} is for another model or other targets: it has {tuple(z.shape)} for layer "
                                    f"{name}, this model has {have}")

def save_expert(expert, path, **about):
    """Writes a safetensors file (float32), whole or not at all; `about` goes into its header as text."""
    tensors = {name: z.detach().float().cpu().contiguous() for name, z in expert.items()}
    write_whole(path, lambda tmp: save_file(tensors, tmp, metadata={k: str(v) for k, v in about.items()}))

def load_expert(path, model=None):
    """Reads an expert; with `model`, raises Transformer2Error unless its names and shapes fit.

    Also reads the authors' checkpoints (.pt, which need `model`). They hold p with z = sigmoid(p), and their code
    multiplies W' by sum(s) / sum(s z), which keeps the nuclear norm: here both become part of z.
    """
    layers = None if model is None else svf_layers(model)
    theirs = str(path).endswith(".pt")
    if theirs and layers is None:
        raise Transformer2Error(f"{path}: what the authors' checkpoints mean depends on the model, give load_expert one")
    try:
        expert = torch.load(path, map_location="cpu", weights_only=True) if theirs else load_file(path)
    except Exception as e:  # a damaged file raises many kinds
        raise Transformer2Error(f"cannot read the expert {path}: {type(e).__name__}, {e}".splitlines()[0])
    if theirs:  # learnable_params*.pt has names; policy_params*.pt numbers the MLP weights in the model's order
        mlps = [name for name in layers if "mlp" in name]
        named = {mlps[int(key.rpartition(".")[2])] if "module_list" in key else key.removesuffix(".weight"):
                 p.detach().float().sigmoid() for key, p in expert.items()}
        check_expert(named, layers, str(path))
        expert = {name: z * (s := layers[name].s.cpu()).sum() / (s * z).sum() for name, z in named.items()}
    if layers is not None:
        check_expert(expert, layers, str(path))
    return expert

def merge_svf(model):
    """In place: dense layers of their former class again, the current z folded in. Returns the model."""
    for name, layer in svf_layers(model).items():
        m, n, weight = layer.out_features, layer.in_features, layer.weight
        linear, weight = (Conv1D(m, n), weight.T) if layer.is_conv1d else (nn.Linear(n, m, device="meta"), weight)
        linear.weight, linear.bias = nn.Parameter(weight.contiguous(), requires_grad=False), layer.bias
        model.set_submodule(name, linear)
    return model

# ----------------------------------------------------------------------------------------------------------------------
# Prompts in; text, or probabilities, out

@dataclass
class Task:
    """What training and evaluation need to know of a task; a problem is a dict with `question` and `answer`."""
    name: str
    problems: Callable  # split ("train", "validation", "test") -> list of problems
    conversation: Callable  # problem -> list of {"role", "content"}
    reward: Callable  # (completion, problem) -> float: 1 right, negative wrong, in between partly right
    max_new_tokens: int = 256
    prefill: str = ""  # the start of the assistant's turn, as "Let's think step by step" on ARC
    choices: list | None = None  # completions to draw among by their probability, instead of generating freely
    category: str | None = None  # what pass 1 calls prompts of this kind
    hyper: dict = field(default_factory=dict)  # Hyperparameters that suit this task better than the paper's

PLAIN_TEMPLATE = ("{% for m in messages %}{{ m['role'] | capitalize }}: {{ m['content'] }}\n{% endfor %}"
                  "{% if add_generation_prompt %}Assistant:{% endif %}")

def tokenizer_of(processor):
    """The tokenizer of a processor, made ready: left padding, a pad token, a chat template."""
    tokenizer = getattr(processor, "tokenizer", processor)
    tokenizer.padding_side = "left"  # all completions of a batch start at the same column
    if tokenizer.pad_token is None:  # always masked, so any token will do
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    if not (getattr(processor, "chat_template", None) or tokenizer.chat_template):
        print("note: no chat template with this model; prompts read 'User: ...', then 'Assistant:'", file=sys.stderr)
        processor.chat_template = tokenizer.chat_template = PLAIN_TEMPLATE
    return tokenizer

def encode(model, processor, conversations, prefill=""):
    """Chat template, then left-padded tensors on the model's device: input_ids, attention_mask (B, P), and images.

    Raises Transformer2Error for a prompt longer than the context and for a picture shown to a text-only model.
    """
    tokenizer_of(processor)
    sees = hasattr(processor, "image_processor")
    if not sees and any(part["type"] == "image" for c in conversations for m in c for part in m["content"]
                        if isinstance(part, dict)):
        raise Transformer2Error("a conversation has a picture, but this model reads text only: take a vision-language "
                                "model and its AutoProcessor")
    turns = [[*c, {"role": "assistant", "content": prefill}] if prefill else c for c in conversations]
    if sees:  # these templates want lists of parts
        turns = [[{**m, "content": [{"type": "text", "text": m["content"]}]} if isinstance(m["content"], str) else m
                  for m in c] for c in turns]
    inputs = processor.apply_chat_template(turns, tokenize=True, return_dict=True, return_tensors="pt", padding=True,
                                           add_generation_prompt=not prefill, continue_final_message=bool(prefill))
    if not sees:  # some text tokenizers add token_type_ids, which decoders refuse
        inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    if inputs["input_ids"].shape[1] >= context_of(model):
        raise Transformer2Error(f"a prompt has {inputs['input_ids'].shape[1]} tokens and this model's context ends at "
                                f"{context_of(model)}: shorten it")
    return {key: value.to(model.device) for key, value in inputs.items()}

def context_of(model):
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30

def batches(model, processor, conversations, prefill, extra=0, budget=65536, desc="scoring"):
    """(row numbers, their encoded prompts): long rows first, each group padded to at most `budget` tokens, `extra` a
    row included."""
    if not conversations:
        return
    lengths = encode(model, processor, conversations, prefill)["attention_mask"].sum(1).cpu().numpy() + extra
    groups = [[]]
    for i in np.argsort(-lengths, kind="stable").tolist():
        if groups[-1] and (len(groups[-1]) + 1) * lengths[groups[-1][0]] > budget:
            groups.append([])
        groups[-1].append(i)
    for rows in tqdm(groups, desc=desc, leave=False, delay=3, disable=None):
        yield rows, encode(model, processor, [conversations[i] for i in rows], prefill)

@torch.no_grad()
def sample(model, processor, conversations, *, expert=None, max_new_tokens=256, temperature=0.0, prefill="",
           token_budget=65536):
    """Completions as lists of token ids, up to and with the end-of-turn token; the arguments are generate's."""
    tokenizer, completions = tokenizer_of(processor), [None] * len(conversations)
    end = model.generation_config.eos_token_id
    end = np.ravel(tokenizer.eos_token_id if end is None else end).tolist()
    for rows, inputs in batches(model, processor, conversations, prefill, max_new_tokens, token_budget, "generating"):
        P = inputs["input_ids"].shape[1]
        config = GenerationConfig(  # spells out all that would reshape the distribution: the model's own may differ
            max_new_tokens=min(max_new_tokens, context_of(model) - P), do_sample=temperature > 0, num_beams=1,
            repetition_penalty=1.0, no_repeat_ngram_size=0, eos_token_id=end, pad_token_id=tokenizer.pad_token_id,
            **(dict(temperature=temperature, top_k=0, top_p=1.0) if temperature > 0 else {}))
        with use_expert(model, expert, rows):
            ids = model.generate(**inputs, generation_config=config)[:, P:].tolist()
        for i, row in zip(rows, ids):
            completions[i] = row[: next((t + 1 for t, token in enumerate(row) if token in end), len(row))]
    return completions

def generate(model, processor, conversations, *, expert=None, max_new_tokens=256, temperature=0.0, **options):
    """Answers conversations in batches; returns the completions as text, without the prompt and the prefill.

    expert: None (the base model), an Expert, or a list with one Expert-or-None per conversation. temperature 0 is
    greedy. options: prefill="", token_budget=65536 (per batch, padding included). Raises as encode does.
    """
    ids = sample(model, processor, conversations, expert=expert, max_new_tokens=max_new_tokens,
                 temperature=temperature, **options)
    return [tokenizer_of(processor).decode(i, skip_special_tokens=True) for i in ids]

def log_policy(model, inputs, completions, temperature=1.0):
    """log π(· | prompt, earlier tokens) in float32 (B, T, V), the completions' tokens (B, T) and their mask (B, T).

    inputs: from encode; completions: B lists of token ids. Logits are made for the completions only.
    """
    T, device = max(map(len, completions)), inputs["input_ids"].device
    tokens = torch.tensor([c + [0] * (T - len(c)) for c in completions], device=device)
    mask = torch.tensor([[1] * len(c) + [0] * (T - len(c)) for c in completions], device=device)
    more = {"input_ids": tokens[:, :-1], "attention_mask": mask[:, :-1]}  # the last token is only predicted
    full = {key: torch.cat([value, more.get(key, torch.zeros_like(mask[:, :-1]))], 1)
            if value.shape == inputs["input_ids"].shape else value for key, value in inputs.items()}
    if len(full) == 2:  # positions count from the first real token; with pictures the model has a rule of its own
        full["position_ids"] = (full["attention_mask"].cumsum(1) - 1).clamp(min=0)
    logits = model(**full, logits_to_keep=T, use_cache=False).logits[:, -T:]
    return F.log_softmax(logits.float() / temperature, dim=-1), tokens, mask

def log_likelihood(model, inputs, completions):
    """Log-probability of each completion (a list of token ids), summed over its tokens, (B,)."""
    logp, tokens, mask = log_policy(model, inputs, completions)
    return (logp.gather(-1, tokens[..., None])[..., 0] * mask).sum(1)

def continuation(tokenizer, prefill, text):
    """The tokens of `text` after `prefill`; tokenizers disagree on where the space goes, so ask for both together."""
    stub = "".join(prefill.split()[-1:])
    joint = tokenizer(f"{stub} {text}".strip(), add_special_tokens=False)["input_ids"]
    return joint[len(tokenizer(stub, add_special_tokens=False)["input_ids"]) if stub else 0:]

def log_choices(model, processor, inputs, prefill, choices):
    """Log-probability of each choice among the choices, (B, C), rows normalised; differentiable.

    Choices count as far as it takes to tell them apart. Category names and answer letters differ in their first
    tokens: then the prompt's last position says it all, and scoring costs one forward pass over the prompt.
    """
    ids, B = [continuation(tokenizer_of(processor), prefill, choice) for choice in choices], len(inputs["input_ids"])
    depth = next((k for k in range(1, 1 + max(map(len, ids))) if len({tuple(i[:k]) for i in ids}) == len(ids)), None)
    if depth is None:
        raise Transformer2Error(f"this tokenizer cannot tell the choices {choices} apart: rename some")
    if depth == 1:
        scores = log_policy(model, inputs, [[0]] * B)[0][:, 0, [i[0] for i in ids]]
    else:
        scores = torch.stack([log_likelihood(model, inputs, [i[:depth]] * B) for i in ids], 1)
    return F.log_softmax(scores, dim=-1)

@torch.no_grad()
def score_choices(model, processor, conversations, prefill, choices, expert=None):
    """log_choices in batches and with experts, (len(conversations), C) on the CPU."""
    scores = torch.empty(len(conversations), len(choices))
    for rows, inputs in batches(model, processor, conversations, prefill):
        with use_expert(model, expert, rows):
            scores[rows] = log_choices(model, processor, inputs, prefill, choices).cpu()
    return scores

@torch.no_grad()
def rollout(model, processor, task, problems, *, expert=None, temperature=0.0):
    """One answer to each problem, a list of (token ids, text, reward); a choice's token id is its number.

    temperature 0 takes the likeliest tokens or choice, above 0 draws. expert: as for generate.
    """
    conversations = [task.conversation(p) for p in problems]
    if task.choices:
        logp = score_choices(model, processor, conversations, task.prefill, task.choices, expert)
        picked = torch.multinomial((logp / temperature).exp(), 1) if temperature > 0 else logp.argmax(1, keepdim=True)
        tokens, texts = picked.tolist(), [task.choices[i] for i in picked.flatten().tolist()]
    else:
        tokens = sample(model, processor, conversations, expert=expert, max_new_tokens=task.max_new_tokens,
                        temperature=temperature, prefill=task.prefill)
        texts = [tokenizer_of(processor).decode(i, skip_special_tokens=True) for i in tokens]
    return [(t, text, task.reward(text, p)) for t, text, p in zip(tokens, texts, problems)]

def evaluate(model, processor, task, problems, *, expert=None):
    """Mean accuracy of greedy answers in [0, 1]; a negative reward counts as 0. expert: as for generate."""
    answers = rollout(model, processor, task, problems, expert=expert)
    return float(np.mean([max(reward, 0.0) for _, _, reward in answers]))

# ----------------------------------------------------------------------------------------------------------------------
# Section 3.1, reinforcement learning: J(z) = E[ log π_W'(ŷ | x) r(ŷ, y) ] - λ KL(π_W' || π_W)                  (eq. 1)

@dataclass
class Hyperparameters:
    """Of reinforce; defaults are the paper's (appendix A.1) where it has one."""
    steps: int = 100  # updates of z
    batch_size: int = 256  # problems per update, one rollout each
    lr: float = 2e-3  # AdamW's, falling to 0 along a cosine
    kl_coef: float = 0.0  # λ; the paper picks among 0, 0.1, 0.2 and 0.3 on validation problems
    max_grad_norm: float = 1e-3  # over all z's together
    temperature: float = 1.0  # of the rollouts
    baseline: bool = True  # subtract the batch's mean reward: same gradient in expectation, less noise (not the paper's)
    validate_every: int = 10  # steps; the z of the best greedy accuracy on validation problems is the result
    validation_problems: int = 128
    token_budget: int = 8192  # tokens in one micro-batch of an update, padding included
    seed: int = 0  # of the choice of problems and of the rollouts

def policy_loss(logp, ref_logp, actions, mask, advantages, kl_coef):
    """-J of eq. 1 and the KL, both summed over the batch's rows.

    logp, ref_logp: (B, T, V), log π_W' and log π_W; actions, mask: (B, T); advantages: (B,), the rewards r.
    """
    taken = logp.gather(-1, actions[..., None])[..., 0]  # (B, T)
    kl = ((logp.exp() * (logp - ref_logp)).sum(-1) * mask).sum()  # over the whole vocabulary, at the steps taken
    return kl_coef * kl - ((taken * mask).sum(1) * advantages).sum(), kl

def accumulate_gradient(model, processor, task, problems, answers, hp):
    """Adds the gradient of the mean loss over `answers` (from rollout) to each z; returns the mean KL per answer."""
    conversations = [task.conversation(p) for p in problems]
    rewards = torch.tensor([reward for _, _, reward in answers])
    advantages = rewards - hp.baseline * rewards.mean()
    extra = np.array([0 if task.choices else len(tokens) for tokens, _, _ in answers])
    total_kl = 0.0
    for rows, inputs in batches(model, processor, conversations, task.prefill, extra, hp.token_budget, "updating"):
        tokens = [answers[i][0] for i in rows]
        def policy():
            if not task.choices:
                return log_policy(model, inputs, tokens, hp.temperature)
            logp = log_choices(model, processor, inputs, task.prefill, task.choices)  # one step over C "tokens"
            return logp[:, None], torch.tensor(tokens, device=logp.device), torch.ones_like(logp[:, :1])
        with torch.no_grad(), use_expert(model, None):  # the reference is the same model at z = 1
            ref_logp = policy()[0]
        logp, actions, mask = policy()
        loss, kl = policy_loss(logp, ref_logp, actions, mask, advantages[rows].to(logp.device), hp.kl_coef)
        (loss / len(answers)).backward()
        total_kl += kl.item() / len(answers)
    return total_kl

def reinforce(model, processor, task, *, checkpoint=None, verbose=True, **hyperparameters):
    """Trains the z's on a task with REINFORCE (eq. 1). Returns the Expert with the best validation accuracy.

    hyperparameters: fields of Hyperparameters. The z's start from the model's and are put back afterwards.
    checkpoint: a file for the state after every step; if it exists, training goes on from there, to the same end.
    verbose: print a line per step. Raises Transformer2Error for a checkpoint of another run.
    """
    hp = Hyperparameters(**hyperparameters)
    layers, start = svf_layers(model), get_expert(model)
    optimizer = torch.optim.AdamW([layer.z for layer in layers.values()], lr=hp.lr, weight_decay=0.0)
    problems, held_out = task.problems("train"), task.problems("validation")[: hp.validation_problems]
    state = {"step": 0, "best": start, "score": -1.0}
    if checkpoint and Path(checkpoint).exists():
        state = torch.load(checkpoint, map_location=model.device, weights_only=True)
        if state["hyperparameters"] != asdict(hp):
            raise Transformer2Error(f"{checkpoint} was begun with {state['hyperparameters']}: go on with the same")
        optimizer.load_state_dict(state["optimizer"])
    try:
        for name, layer in layers.items():
            layer.z.data.copy_(state.get("z", start)[name])
        for step in range(state["step"], hp.steps + 1):
            clock, line = time.time(), f"step {step:3d}"
            if step:
                torch.manual_seed(hp.seed * 100003 + step)  # a step depends on its number alone, so it can be resumed
                rng = np.random.default_rng([hp.seed, step])
                drawn = rng.choice(len(problems), min(hp.batch_size, len(problems)), replace=False)
                batch = [problems[i] for i in drawn]
                answers = rollout(model, processor, task, batch, expert=get_expert(model), temperature=hp.temperature)
                kl = accumulate_gradient(model, processor, task, batch, answers, hp)
                norm = torch.nn.utils.clip_grad_norm_([layer.z for layer in layers.values()], hp.max_grad_norm).item()
                optimizer.param_groups[0]["lr"] = hp.lr * (1 + math.cos(math.pi * (step - 1) / hp.steps)) / 2
                optimizer.step()
                optimizer.zero_grad()
                rewards = np.array([reward for _, _, reward in answers])
                line += (f"  reward {rewards.mean():+.3f}  accuracy {rewards.clip(0).mean():6.1%}  KL {kl:.4f}  "
                         f"gradient {norm:.2e}  {time.time() - clock:.1f} s")
            if step % hp.validate_every == 0 or step == hp.steps:
                score = evaluate(model, processor, task, held_out, expert=get_expert(model))
                line += f"  validation {score:.1%}"
                if score >= state["score"]:  # of equals the later one: it had more training
                    state.update(score=score, best=get_expert(model))
            if verbose:
                tqdm.write(line)
            state.update(step=step + 1, z=get_expert(model), optimizer=optimizer.state_dict(), hyperparameters=asdict(hp))
            if checkpoint:
                write_whole(checkpoint, lambda tmp: torch.save(state, tmp))
    finally:
        for name, layer in layers.items():
            layer.z.data.copy_(start[name])
    return state["best"]

# ----------------------------------------------------------------------------------------------------------------------
# Section 3.2, self-adaptation: pass 1 decides on z', pass 2 answers with it

CATEGORY_PREFILL = "The category of this question is"
CATEGORY_GUIDE = {"code": "asking for programming solutions", "math": "involving calculations", "other": "of any other kind",
                  "reasoning": "requiring logic or knowledge of science"}  # the paper's categories, explained as it does

def category_question(conversation, categories):
    """The conversation of pass 1: the last turn, after the request to say which category it belongs to."""
    ask = f"Classify the question into one of these categories: {', '.join(categories)}.\n"
    if set(categories) <= set(CATEGORY_GUIDE):
        ask += "".join(f"{i}. {c.capitalize()}: questions {CATEGORY_GUIDE[c]}.\n" for i, c in enumerate(categories, 1))
    *earlier, last = conversation
    text, parts = last["content"], [{"type": "text", "text": ask}]
    return [*earlier, {**last, "content": f"{ask}\n{text}" if isinstance(text, str) else [*parts, *text]}]

def classify(model, processor, conversations, categories, *, expert=None):
    """Pass 1: the likeliest category of each conversation. Strategy A; with expert=z^c, trained to classify, B."""
    questions = [category_question(c, categories) for c in conversations]
    scores = score_choices(model, processor, questions, CATEGORY_PREFILL, list(categories), expert)
    return [categories[i] for i in scores.argmax(1).tolist()]

def two_pass(model, processor, conversations, experts, *, classifier=None, **options):
    """Classifies each conversation, then answers all in one batch, every row with its expert: [(category, answer)].

    experts: category -> Expert or None (the base weights); "other" is added for prompts of no category.
    classifier: z^c for strategy B, None for A. options: as for generate.
    """
    categories = list(dict.fromkeys([*experts, "other"]))
    chosen = classify(model, processor, conversations, categories, expert=classifier)
    return list(zip(chosen, generate(model, processor, conversations, expert=[experts.get(c) for c in chosen], **options)))

def mix(model, experts, alphas):
    """z' = 1 + sum_k α_k (z_k - 1), the paper's sum with the base model taking the weight that is left over from 1.

    alphas: (K, 1), or (K, number of blocks) for a weight of each expert in each block of the network.
    """
    block = {name: re.search(r"\.(\d+)\.", name) for name in svf_layers(model)}
    z = {}
    for name, layer in svf_layers(model).items():
        a = alphas[:, int(block[name][1]) if alphas.shape[1] > 1 and block[name] else 0]
        z[name] = 1 + sum(a_k * (e[name].cpu() - 1) for a_k, e in zip(a.tolist(), experts) if name in e)
    return z

@torch.no_grad()
def solution_likelihood(model, processor, task, problems, expert):
    """Log-likelihood of the right answers, one number per problem; expert: as for generate."""
    conversations, likelihood = [task.conversation(p) for p in problems], np.zeros(len(problems))
    ids = [continuation(tokenizer_of(processor), task.prefill, str(p.get("solution", p["answer"]))) for p in problems]
    for rows, inputs in batches(model, processor, conversations, task.prefill, np.array([len(i) for i in ids]), 16384):
        with use_expert(model, expert, rows):
            likelihood[rows] = log_likelihood(model, inputs, [ids[i] for i in rows]).cpu()
    return likelihood

def few_shot(model, processor, task, problems, experts, *, population=32, iterations=20, elite=0.2, per_layer=False,
             seed=0):
    """Strategy C: the cross-entropy method (CEM) searches α for the best mixture on a few `problems`.

    experts: name -> Expert. Candidates are ranked by accuracy, ties by the mean log-likelihood of the right answers;
    all run in one batch, each row under its own z. The first population holds the base model and every single expert.
    Returns the best Expert and its α, (K, 1) or with per_layer (K, blocks).
    """
    layers, K = svf_layers(model), len(experts)
    blocks = [int(m[1]) + 1 for name in layers if (m := re.search(r"\.(\d+)\.", name))]
    G = max(blocks, default=1) if per_layer else 1
    rng, n_elite = np.random.default_rng(seed), max(2, round(elite * population))
    mean, std = np.full((K, G), 1 / K), np.full((K, G), 0.5)
    known = np.concatenate([np.zeros((1, K, G)), np.repeat(np.eye(K)[:, :, None], G, 2)])  # base, single experts
    for i in tqdm(range(iterations), desc="CEM", leave=False, delay=3, disable=None):
        alphas = np.concatenate([known, mean + std * rng.standard_normal((population - len(known), K, G))])
        candidates = [mix(model, list(experts.values()), torch.tensor(a, dtype=torch.float32)) for a in alphas]
        rows, many = [c for c in candidates for _ in problems], list(problems) * population
        right = [max(r, 0.0) for _, _, r in rollout(model, processor, task, many, expert=rows)]
        likely = solution_likelihood(model, processor, task, many, rows)
        right, likely = (np.reshape(x, (population, -1)).mean(1) for x in (right, likely))
        best = np.lexsort((-likely, -right))[:n_elite]
        mean, std, known = alphas[best].mean(0), alphas[best].std(0), alphas[best[:1]]
        std = std + 0.2 * (1 - i / iterations)  # without added noise CEM narrows down too early (Szita & Lőrincz, 2006)
    alphas = torch.tensor(known[0], dtype=torch.float32)
    return mix(model, list(experts.values()), alphas), alphas
