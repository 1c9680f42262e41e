"""Transformer²: self-adaptive language models, in one file to be read beside the paper: Sun, Cetin, Tang,
"Transformer-Squared: Self-adaptive LLMs", ICLR 2025, https://arxiv.org/abs/2501.06252

Each weight matrix is split once into singular components, W = U diag(s) Vᵀ; a vector z, one number for each, rescales
them: W' = U diag(s * z) Vᵀ. The z's of all matrices are an *expert*, all that trains, by reinforcement learning on the
model's own answers. At inference a first pass decides which expert or mixture a prompt needs; a second answers with it.
Shapes: B rows, P prompt and T completion tokens, d width, V vocabulary, A actions, C choices, r singular values.
"""
import contextlib, functools, hashlib, inspect, os, re, sys, tempfile, time
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import distributed, nn
from tqdm import tqdm
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

Expert = dict[str, torch.Tensor]  # layer name -> z (r,), r = min(out_features, in_features); absent layer = ones
class Transformer2Error(ValueError):
    """Something the caller can put right; the message is one sentence that says what and how."""

# ---- Section 3.1, singular value fine-tuning: W' = U diag(s * z) Vᵀ ----
def decompose(weight):
    """W (m, n) -> U (m, r), s (r,) descending and in float32, Vh (r, n): W = U diag(s) Vh, r = min(m, n).
    The eigenvectors V of WᵀW are the right singular vectors, and W = (W V) Vᵀ for any orthogonal V: exact, but for
    rounding to the weight's dtype. One r x r eigenproblem; it squares the condition number, hence float64."""
    wide = weight.shape[0] < weight.shape[1]  # then Wᵀ is taken apart: the small side decides
    W = (weight.T if wide else weight).detach().to(torch.float32 if weight.device.type == "mps" else torch.float64)
    V = torch.linalg.eigh(W.T @ W).eigenvectors.flip(-1)  # (n, r); eigh counts upwards
    U = W @ V  # (m, r), columns of length s
    s = U.norm(dim=0)
    U, V = (x.to(weight.dtype).contiguous() for x in (U / s.clamp(min=1e-12), V))
    return (V, s.float(), U.T.contiguous()) if wide else (U, s.float(), V.T.contiguous())

def decompose_cached(weight, cache_dir):
    """decompose, remembered in `cache_dir` under a hash of the weight's content."""
    content = hashlib.sha256(weight.detach().contiguous().cpu().view(torch.uint8).numpy()).hexdigest()[:24]
    path, names = Path(cache_dir) / f"{content}-{weight.dtype}-{len(weight)}.safetensors", ("U", "s", "Vh")
    with contextlib.suppress(Exception):  # not there yet, or damaged: then it is made
        return [*map(load_file(path, device=str(weight.device)).__getitem__, names)]
    factors = decompose(weight)
    write_whole(path, lambda tmp: save_file(dict(zip(names, factors)), tmp))
    return factors
def write_whole(path, write):
    """Has `write` fill a temporary file beside `path` and moves it there: readers see the whole file or none."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=Path(path).parent) as folder:
        write(Path(folder, "new"))
        os.replace(Path(folder, "new"), path)

class SVFLinear(nn.Module):
    """y = U diag(s * z) Vᵀ x + b in the place of a linear layer; z (r,) is the only Parameter that trains.
    Factored, never composed: autograd reaches z through ((x V) * s z) Uᵀ, so no dense W' and no dense gradient exist.
    x: (B, ..., in_features) -> (B, ..., out_features). s and z are float32 whatever the model's dtype."""
    def __init__(self, linear, cache_dir=None):
        super().__init__()
        self.dense = [linear]  # in a list, so that it is no submodule; without its weight
        weight = linear.weight.T if isinstance(linear, Conv1D) else linear.weight  # GPT-2's layer keeps W transposed
        self.out_features, self.in_features = weight.shape
        factors = decompose(weight) if cache_dir is None else decompose_cached(weight, cache_dir)
        for name, factor in zip(("U", "s", "Vh"), factors):
            self.register_buffer(name, factor)  # (out, r), (r,), (r, in)
        self.bias, linear.weight = linear.bias, None
        self.z = nn.Parameter(torch.ones_like(self.s))
        self.using = None  # what use_expert puts in the place of z: (r,), or (B, 1, r) for one z per row

    def current(self):
        return self.z if self.using is None else self.using
    @property
    def weight(self):
        """W' composed, (out, in), for code that reads a layer's weight."""
        return ((self.U.float() * (self.s * self.current())) @ self.Vh.float()).to(self.U.dtype)

    def forward(self, x):
        scale = self.s * self.current()  # float32, so that small steps of z are not rounded away in bfloat16
        if scale.dim() == 3 and (x.dim() != 3 or len(x) != len(scale)):
            raise Transformer2Error("no expert for each row, or layers that do not see rows apart: use one for all")
        return F.linear((F.linear(x, self.Vh) * scale).to(x.dtype), self.U, self.bias)

TEXT = r"^(?!.*(vision|visual|image|audio|multi_modal|projector|connector)).*"
TARGETS = {"mlp": TEXT + r"\b(mlp|ffn|feed_forward|fc1|fc2|fc_in|fc_out)(\.|$)",
           "attention": TEXT + r"\b(self_attn|attn|attention|self_attention)\.", "all": TEXT}
def apply_svf(model, targets="mlp", cache_dir=None, checkpointing=False):
    """In place: freezes all, replaces matching nn.Linear and Conv1D layers by SVFLinear; returns the model. targets:
    "mlp", "attention", "all" (not a vision tower), or a regular expression over names; never the head or embeddings.
    checkpointing: blocks keep only their input for the backward pass. Raises Transformer2Error if nothing matches."""
    linears = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))
               and m is not model.get_output_embeddings() and not name.endswith("lm_head")}
    found, pattern = [], TARGETS.get(targets, targets)
    with contextlib.suppress(re.error):  # what is no regular expression matches nothing
        found = [name for name, m in linears.items() if re.search(pattern, name) and m.weight.element_size() > 1]
    if not found:
        raise Transformer2Error(f"targets {targets!r} match no linear layer (quantised ones do not count): use "
                                f"{', '.join(TARGETS)} or a regular expression over names like {[*linears, 'none'][0]}")
    model.requires_grad_(False)
    for name in tqdm(found, desc="decomposing", leave=False, delay=2, disable=None):
        model.set_submodule(name, SVFLinear(linears.pop(name), cache_dir))
    for block in (m for m in model.modules() if checkpointing and isinstance(m, GradientCheckpointingLayer)):
        block.forward = functools.partial(torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False)
    return model.eval()

def svf_layers(model):
    """Layer name -> SVFLinear, in the model's order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, SVFLinear)}
def get_expert(model):
    """A detached copy of the current z's: layer name -> (r,)."""
    return {name: layer.current().detach().clone() for name, layer in svf_layers(model).items()}

@contextlib.contextmanager
def use_expert(model, expert, rows=None):
    """`with use_expert(model, expert):` runs the model with these z's and then puts back what was there. expert: None,
    the base model (z = 1); an Expert; or a list with one Expert-or-None for each row of the batch (rows: which of the
    list these are, if not all). Raises Transformer2Error for an expert that does not fit the model."""
    layers, mixed = svf_layers(model), isinstance(expert, list)
    experts = [expert[i] for i in rows or range(len(expert))] if mixed else [expert]
    experts = [check_expert(e or {}, layers, "the expert") for e in experts]
    with contextlib.ExitStack() as patches:
        for name, layer in layers.items():
            z = torch.stack([e.get(name, torch.ones_like(layer.s)).to(layer.s) for e in experts])  # (B, r)
            patches.enter_context(mock.patch.object(layer, "using", z[:, None] if mixed else z[0]))
        yield
def check_expert(expert, layers, what):
    """The expert; raises Transformer2Error unless every z of it fits its layer."""
    for name, z in expert.items():
        if name not in layers or layers[name].s.shape != z.shape:
            raise Transformer2Error(f"{what} is for another model or other targets: {name} {[*z.shape]} does not fit")
    return expert

def save_expert(expert, path, **about):
    """Writes a safetensors file (float32), whole or not at all; `about` goes into its header as text."""
    tensors = {name: z.detach().float().cpu().contiguous() for name, z in expert.items()}
    write_whole(path, lambda tmp: save_file(tensors, tmp, metadata={k: str(v) for k, v in about.items()}))

def load_expert(path, model=None):
    """Reads an expert; with `model`, raises Transformer2Error unless its names and shapes fit.
    Also reads the authors' checkpoints (.pt, which need `model`). They hold p with z = sigmoid(p), and their code
    multiplies W' by sum(s) / sum(s z), which keeps the nuclear norm: here both become part of z."""
    theirs, layers = str(path).endswith(".pt"), svf_layers(model) if model is not None else {}
    try:
        expert = torch.load(path, map_location="cpu", weights_only=True) if theirs else load_file(path)
    except Exception as e:  # a damaged file raises many kinds
        raise Transformer2Error(f"cannot read the expert {path}: {type(e).__name__}, {e}".splitlines()[0])
    if not theirs:
        return expert if model is None else check_expert(expert, layers, path)
    mlps = dict(enumerate(name for name in layers if "mlp" in name))  # policy_params*.pt numbers these, in this order,
    expert = {mlps.get(int(key.rpartition(".")[2])) if "module_list" in key else key.removesuffix(".weight"):
              p.detach().float().sigmoid() for key, p in expert.items()}  # and learnable_params*.pt has the names
    return {k: z * (s := layers[k].s.to(z)).sum() / (s @ z) for k, z in check_expert(expert, layers, path).items()}

def merge_svf(model):
    """In place: dense layers of their former class again, the current z folded in. Returns the model."""
    for name, layer in svf_layers(model).items():
        [dense], weight = layer.dense, layer.weight.T if isinstance(layer.dense[0], Conv1D) else layer.weight
        dense.weight = nn.Parameter(weight.detach().contiguous(), requires_grad=False)
        model.set_submodule(name, dense)
    return model

# ---- Prompts in; text, or probabilities, out ----
@dataclass
class Task:
    """What training and evaluation need to know of a task; a problem is a dict with `question` and `answer`."""
    name: str
    problems: callable  # split ("train", "validation", "test") -> list of problems
    conversation: callable  # problem -> list of {"role", "content"}
    reward: callable  # (completion, problem) -> float: 1 right, negative wrong, in between partly right
    max_new_tokens: int = 256
    prefill: str = ""  # the start of the assistant's turn, as "Let's think step by step" on ARC
    choices: list | None = None  # the possible completions: the likeliest is taken, nothing generated
    category: str | None = None  # what pass 1 calls prompts of this kind
    hyper: dict = field(default_factory=dict)  # Hyperparameters that suit this task better than the paper's

def tokenizer_of(processor):
    """The tokenizer of what AutoProcessor or AutoTokenizer gives, ready: left padding, a pad token, a chat template."""
    tokenizer = getattr(processor, "tokenizer", processor)
    tokenizer.padding_side = "left"  # all completions of a batch start at the same column
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    if not (processor.chat_template or tokenizer.chat_template):
        print("note: no chat template with this model; prompts read 'User: ...', then 'Assistant:'", file=sys.stderr)
        processor.chat_template = tokenizer.chat_template = (
            "{{ bos_token or '' }}{% for m in messages %}{{ m['role'] | capitalize }}: {{ m['content'] }}\n{% endfor %}"
            "{% if add_generation_prompt %}Assistant:{% endif %}")
    return tokenizer
def context_of(model):
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30

def encode(model, processor, conversations, prefill=""):
    """Chat template, then left-padded tensors on the model's device: input_ids, attention_mask (B, P), images; of text
    no token_type_ids. Raises Transformer2Error for a prompt longer than the context or a picture it cannot show."""
    tokenizer_of(processor)
    turns = [[*c, {"role": "assistant", "content": prefill}] if prefill else c for c in conversations]
    sees, how = hasattr(processor, "image_processor"), {"padding": True}
    if not sees and any(not isinstance(m["content"], str) for c in turns for m in c):
        raise Transformer2Error("a prompt has a picture, but the model reads only text: take a vision-language model")
    def parts(content):  # as vision-language models' templates want it; a picture may be a function that loads it
        content = [{"type": "text", "text": content}] if isinstance(content, str) else content
        return [{**part, "image": part["image"]()} if callable(part.get("image")) else part for part in content]
    try:
        if sees:
            turns, how = [[{**m, "content": parts(m["content"])} for m in c] for c in turns], {"processor_kwargs": how}
        inputs = processor.apply_chat_template(turns, tokenize=True, return_dict=True, return_tensors="pt", **how,
                                               add_generation_prompt=not prefill, continue_final_message=bool(prefill))
    except Exception as e:  # a picture that does not load, a role that the template does not know: of many kinds
        raise Transformer2Error(f"a prompt cannot be encoded, check its roles and pictures: {e}".splitlines()[0])
    if (P := inputs["input_ids"].shape[1]) >= context_of(model):
        raise Transformer2Error(f"a prompt has {P} tokens, but the model's context ends at {context_of(model)}: cut it")
    return {key: x.to(model.device) for key, x in inputs.items() if sees or key in ("input_ids", "attention_mask")}

def batches(model, processor, conversations, prefill, extra=0, budget=16384):
    """(row numbers, encoded prompts) of groups of at most `budget` tokens, padding and `extra` per row counted."""
    masks = (encode(model, processor, conversations[i : i + 256], prefill)["attention_mask"]  # not all pictures at once
             for i in range(0, len(conversations), 256))
    lengths = np.array([length for mask in masks for length in mask.sum(1).tolist()])
    groups, order, extra = [], np.argsort(-(lengths + extra), kind="stable"), np.broadcast_to(extra, lengths.shape)
    while len(order):
        width = np.maximum.accumulate(lengths[order]) + np.maximum.accumulate(extra[order])  # of the first 1, 2, … rows
        n = max(1, int((width * np.arange(1, len(order) + 1) <= budget).sum()))
        groups, order = [*groups, order[:n].tolist()], order[n:]
    for rows in tqdm(groups, leave=False, delay=3, disable=None):
        yield rows, encode(model, processor, [conversations[i] for i in rows], prefill)

def token_policy(model, inputs, completions, stretch=1 << 24):
    """π of the next token over prompts (of encode) and completions (B lists of token ids). Returns features of T steps,
    here hidden states (B, T, d); head, which makes log π of those of t steps, float32 (B, t, V); slices of t steps, of
    `stretch` numbers, 64 MB, in log π; actions, here the completions' tokens; their mask, both (B, T, 1)."""
    (B, P), T, device = inputs["input_ids"].shape, max(map(len, completions)), inputs["input_ids"].device
    tokens = torch.tensor([c + [0] * (T - len(c)) for c in completions], device=device)[..., None]  # (B, T, 1)
    mask = torch.tensor([[1] * len(c) + [0] * (T - len(c)) for c in completions], device=device)[..., None]
    full = {key: F.pad(value, (0, T - 1)) if value.shape == (B, P) else value for key, value in inputs.items()}
    full["input_ids"][:, P:], full["attention_mask"][:, P:] = tokens[:, :-1, 0], mask[:, :-1, 0]  # not the last
    if len(full) == 2 and "position_ids" in inspect.signature(model.forward).parameters:  # text only
        full["position_ids"] = (full["attention_mask"].cumsum(1) - 1).clamp(min=0)  # from the first real token on
    trunk = getattr(model.base_model, "decoder", model.base_model)  # OPT's is one level down
    outputs = trunk(**full, use_cache=False)
    def head(hidden):  # runs the model with `hidden` in the place of what its trunk returns: whatever comes after that
        with mock.patch.object(trunk, "forward", lambda *_, **__: replace(outputs, last_hidden_state=hidden)):
            return F.log_softmax(model(use_cache=False).logits.float(), dim=-1).to(device)
    t = max(1, stretch // (B * model.config.get_text_config().vocab_size))
    return outputs.last_hidden_state[:, -T:], head, [slice(i, i + t) for i in range(0, T, t)], tokens, mask

def continuation(processor, prefill, text):
    """The tokens of `text` after `prefill`; tokenizers disagree on where the space goes, so ask for both together."""
    ids = lambda both: tokenizer_of(processor)(both, add_special_tokens=False)["input_ids"]
    stub = "".join(prefill.split()[-1:])
    return ids((stub + " " * (not text[:1].isspace()) + text).lstrip())[len(ids(stub)):]
def choice_policy(model, processor, inputs, prefill, choices):
    """π of C choices in token_policy's form: one step, its features log π itself, (B, 1, C), all choices as actions.
    Asked is the next token after every beginning that choices share: they count up to the token that tells them apart
    (the end tells "math" from "mathematics"). One pass over the prompt serves all beginnings on its way."""
    ids = [(*continuation(processor, prefill, c), tokenizer_of(processor).eos_token_id or 0) for c in choices]
    starts = [i[:t] for i in ids for t in range(len(i))]
    shared = {start for start in starts if starts.count(start) > 1 or not start}
    scores = torch.zeros(len(inputs["input_ids"]), 1, len(ids), device=model.device)
    while shared:  # mostly once; again for choices that part, and part again elsewhere
        way = max(shared, key=len)
        hidden, head, *_ = token_policy(model, inputs, [[*way, 0]] * len(scores))  # 0: the last is not read
        for t in (t for t in range(len(way) + 1) if way[:t] in shared):
            asked = {c: i[t] for c, i in enumerate(ids) if i[:t] == way[:t]}
            scores[:, :, [*asked]] += head(hidden[:, t, None])[:, :, [*asked.values()]]
            shared.remove(way[:t])
    logp = F.log_softmax(scores, dim=-1)
    every = torch.arange(len(ids), device=logp.device).expand(logp.shape)
    return logp, lambda logp: logp, [slice(None)], every, torch.ones_like(logp[:, :, :1])

@torch.no_grad()
def generate(model, processor, conversations, *, expert=None, max_new_tokens=256, temperature=0.0, prefill="",
             choices=None, uniforms=None, return_tokens=False, segment=32):
    """Completions of conversations (lists of {"role", "content"}). expert: None (the base model), an Expert, or a list,
    one for each. temperature: 0 is greedy. choices: answers with the likeliest of these. uniforms: numbers (len(
    conversations), max_new_tokens) that draw the tokens, so that no answer depends on its batch. return_tokens: (token
    ids, text) of each. segment: tokens, after which rows that have ended leave their batch. Raises as encode does."""
    tokenizer, answers = tokenizer_of(processor), [None] * len(conversations)
    uniforms = torch.rand(len(conversations), max_new_tokens) if uniforms is None else uniforms
    end = [int(t) for t in np.ravel(model.generation_config.eos_token_id or tokenizer.eos_token_id) if t is not None]
    picture = getattr(processor, "image_token_id", None)  # were it drawn, it would ask for one more picture
    def draw(ids, scores):  # (B, V): rules out all but the first token where the running sum of π passes a row's number
        reached = (scores.float() / temperature).softmax(-1).cumsum(-1)
        passed = reached > uniforms[rows, ids.shape[1] - P, None].to(model.device) * reached[:, -1:]
        return torch.full_like(scores, -torch.inf).scatter(1, passed.int().argmax(-1, keepdim=True), 0.0)
    how = dict(do_sample=False, num_beams=1, repetition_penalty=1.0, no_repeat_ngram_size=0,  # not the model's settings
               eos_token_id=end or None, pad_token_id=tokenizer.pad_token_id, suppress_tokens=picture and [picture],
               logits_processor=[draw] if temperature else [], cache_implementation=None, return_dict_in_generate=True)
    for rows, inputs in batches(model, processor, conversations, prefill, 0 if choices else max_new_tokens):
        if choices:
            with use_expert(model, expert, rows):
                likeliest = choice_policy(model, processor, inputs, prefill, choices)[0][:, 0].argmax(1).tolist()
            for i, c in zip(rows, likeliest):
                answers[i] = [], choices[c]
            continue
        P, room, context, cache = inputs["input_ids"].shape[1], max_new_tokens, context_of(model), None
        while rows:
            n = min(room if picture else segment, room, context - int(inputs["attention_mask"].sum(1).max()))
            room = 0 if picture else room - n  # pictures are shown in the first run only: it has to be the last
            with use_expert(model, expert, rows):
                made = model.generate(**inputs, **how, past_key_values=cache, max_new_tokens=n)
            for i, row in zip(rows, made.sequences[:, P:].tolist()):
                row = row[: next((t + 1 for t, token in enumerate(row) if token in end), len(row))]
                answers[i] = row, tokenizer.decode(row, skip_special_tokens=True)
            mask = F.pad(inputs["attention_mask"], (0, n), value=1)
            left = [j for j, i in enumerate(rows) if room and mask[j].sum() < context and answers[i][0][-1] not in end]
            if (cache := made.past_key_values) is not None:
                cache.reorder_cache(torch.tensor(left, dtype=torch.long, device=model.device))
            rows, inputs = [rows[j] for j in left], {"input_ids": made.sequences[left], "attention_mask": mask[left]}
    return answers if return_tokens else [text for _, text in answers]

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
MINE = slice(RANK, None, WORLD)  # this process's share of all rows
def all_sum(x):  # over torchrun's processes, in place
    return x if WORLD == 1 else distributed.all_reduce(x) or x

def rollout(model, processor, task, problems, **how):
    """One answer to each problem: [(token ids, text, reward)]. how: expert, temperature, uniforms as for generate."""
    answers = generate(model, processor, [task.conversation(p) for p in problems], prefill=task.prefill,
                       max_new_tokens=task.max_new_tokens, choices=task.choices, return_tokens=True, **how)
    return [(tokens, text, task.reward(text, p)) for (tokens, text), p in zip(answers, problems)]
def evaluate(model, processor, task, problems, *, expert=None):
    """Mean accuracy of greedy answers in [0, 1]; a negative reward counts as 0. expert: as for generate."""
    mine = expert[MINE] if isinstance(expert, list) else expert
    right = [max(reward, 0.0) for *_, reward in rollout(model, processor, task, problems[MINE], expert=mine)]
    return (all_sum(torch.tensor(right, dtype=torch.float32, device=model.device).sum()) / len(problems)).item()

# ---- Section 3.1, reinforcement learning: J(z) = E[ log π_W'(ŷ | x) r(ŷ, y) ] - λ KL(π_W' || π_W)  (eq. 1) ----
@dataclass
class Hyperparameters:
    """Of reinforce; defaults are the paper's (appendix A.1) where it has one."""
    steps: int = 100  # updates of z
    batch_size: int = 256  # problems per update, one rollout each
    lr: float = 2e-3  # AdamW's, falling to 0 along a cosine
    kl_coef: float = 0.0  # λ; the paper picks among 0, 0.1, 0.2 and 0.3 on validation problems
    max_grad_norm: float = 1e-3  # over all z's together
    baseline: bool = True  # subtract the batch's mean reward: same direction on average, less noise (not in the paper)
    validate_every: int = 10  # steps; the z of the best greedy accuracy on validation problems is the result
    validation_problems: int = 128
    token_budget: int = 2048  # tokens in one micro-batch of an update, padding included
    seed: int = 0  # of the choice of problems and of the rollouts

def policy_loss(logp, ref_logp, actions, mask, advantages, kl_coef):
    """-J of eq. 1 and the KL, both summed over the batch's rows.
    logp, ref_logp: (B, T, V), log π_W' and log π_W (or None, λ = 0). actions: (B, T, A), the one taken at each step
    (A = 1), or all that were possible. mask: (B, T, 1), 1 where a row has a step. advantages: (B, A), r less a mean."""
    taken = (logp.gather(-1, actions) * mask).sum(1)  # (B, A)
    kl = logp.new_zeros(1) if ref_logp is None else (logp.exp() * (logp - ref_logp)).sum(-1, keepdim=True) * mask
    return kl_coef * kl.sum() - (taken * advantages).sum(), kl.sum().detach()

def accumulate_gradient(model, processor, task, problems, answers, hp):
    """Adds the gradient of the problems' mean loss to each z; returns mean reward, accuracy and KL. Processes bring
    their own problems: means are over all, gradients still to be summed. answers: from rollout; none for a task with
    choices, actions so few that eq. 1's expectation is exact: each counts as often as its probability says."""
    rewards = torch.tensor([[task.reward(choice, p) for choice in task.choices] for p in problems] if task.choices else
                           [[reward] for *_, reward in answers], dtype=torch.float32, device=model.device)  # (B, A)
    n, sums = all_sum(torch.tensor(float(len(rewards)), device=model.device)), torch.zeros(3, device=model.device)
    baseline = all_sum(rewards.sum()) / n if hp.baseline and not task.choices else 0.0
    conversations, lengths = [task.conversation(p) for p in problems], [len(tokens) for tokens, *_ in answers] or 0
    for rows, inputs in batches(model, processor, conversations, task.prefill, lengths, hp.token_budget):
        policy = lambda: (choice_policy(model, processor, inputs, task.prefill, task.choices) if task.choices else
                          token_policy(model, inputs, [answers[i][0] for i in rows]))
        with torch.no_grad(), use_expert(model, None):  # the reference is the same model at z = 1
            reference = policy()[0] if hp.kl_coef else None
        features, head, stretches, actions, mask = policy()
        leaf = features.detach().requires_grad_()  # backward as far as here for every stretch, once for the rest
        chance = leaf[:, 0].detach().exp() if task.choices else 1.0  # (B, C), or the one action that was drawn
        advantages = chance * (rewards[rows] - baseline)
        for t in stretches:
            logp, ref_logp = head(leaf[:, t]), None if reference is None else head(reference[:, t])
            loss, kl = policy_loss(logp, ref_logp, actions[:, t], mask[:, t], advantages, hp.kl_coef)
            (loss / n).backward()
            sums[2] += kl
        features.backward(leaf.grad)
        sums[:2] += torch.stack([(chance * r).sum() for r in (rewards[rows], rewards[rows].clamp(min=0))])
    return (all_sum(sums) / n).tolist()

def reinforce(model, processor, task, *, checkpoint=None, **hyperparameters):
    """Trains an Expert with REINFORCE (eq. 1), from the model's current z on, and returns that of the best validation
    accuracy; the model stays as it is. hyperparameters: fields of Hyperparameters. checkpoint: a file for the state
    after every step; one that exists is resumed, to the same end. Raises Transformer2Error if it is of another run."""
    hp = Hyperparameters(**hyperparameters)
    problems, held_out = task.problems("train"), task.problems("validation")[: hp.validation_problems]
    run = repr((task.name, task.max_new_tokens, hp, [*svf_layers(model)]))
    state = {"step": 0, "z": get_expert(model), "score": -1.0, "run": run}
    if checkpoint and Path(checkpoint).exists():
        state = torch.load(checkpoint, map_location=model.device, weights_only=True)
    if state.get("run") != run:
        raise Transformer2Error(f"{checkpoint} was begun with other settings: go on with the same, or delete it")
    z = {name: x.clone().requires_grad_() for name, x in state["z"].items()}
    optimizer = torch.optim.AdamW(z.values(), weight_decay=0.0)
    optimizer.load_state_dict(state.get("optimizer", optimizer.state_dict()))
    for step in range(state["step"], hp.steps + 1):  # step 0 only validates the start
        clock = time.time()
        if step > 0:
            torch.manual_seed(hp.seed * 100003 + step)  # a step depends on its number alone, so it can be resumed
            batch = [problems[i] for i in torch.randperm(len(problems))[: hp.batch_size]]
            how = dict(expert=z, temperature=1.0, uniforms=torch.rand(len(batch), task.max_new_tokens)[MINE])
            answers = [] if task.choices else rollout(model, processor, task, batch[MINE], **how)
            with use_expert(model, z):
                reward, accuracy, kl = accumulate_gradient(model, processor, task, batch[MINE], answers, hp)
            for x in z.values():
                x.grad = all_sum(torch.zeros_like(x) if x.grad is None else x.grad)
            norm = torch.nn.utils.clip_grad_norm_(z.values(), hp.max_grad_norm)
            optimizer.param_groups[0]["lr"] = hp.lr * (1 + float(np.cos(np.pi * (step - 1) / hp.steps))) / 2
            optimizer.step()
            optimizer.zero_grad()
            line = f"step {step:3}  reward {reward:+.3f}  accuracy {accuracy:6.1%}  gradient {norm:.2e}"
            tqdm.write(line + f"  KL {kl:.4f}" * bool(hp.kl_coef) + f"  {time.time() - clock:.1f} s")
        state.update(step=step + 1, z={n: x.detach().clone() for n, x in z.items()}, optimizer=optimizer.state_dict())
        if step % hp.validate_every == 0 or step == hp.steps:
            score = evaluate(model, processor, task, held_out, expert=state["z"])
            tqdm.write(f"step {step:3}  validation {score:.1%}")
            if not score < state["score"]:  # of equals the later one: it had more training
                state.update(score=score, best=state["z"])
        if RANK == 0 and checkpoint:
            write_whole(checkpoint, lambda tmp: torch.save(state, tmp))
    return state["best"]

# ---- Section 3.2, self-adaptation: pass 1 decides on z', pass 2 answers with it ----
CATEGORY_PREFILL = "The category of this question is"
CATEGORY_GUIDE = {"code": "asking for programming solutions", "math": "involving calculations",  # as the paper has it
                  "reasoning": "requiring logic or knowledge of science", "other": "of any other kind"}
def category_question(conversation, categories):
    """The conversation of pass 1: the last turn, after the request to say which category it belongs to."""
    *earlier, last = conversation
    ask, content = f"Classify the question into one of these categories: {', '.join(categories)}.\n", last["content"]
    if set(categories) <= set(CATEGORY_GUIDE):
        ask += "".join(f"{i}. {c.capitalize()}: questions {CATEGORY_GUIDE[c]}.\n" for i, c in enumerate(categories, 1))
    both = f"{ask}\n{content}" if isinstance(content, str) else [{"type": "text", "text": ask}, *content]
    return [*earlier, {**last, "content": both}]

def classify(model, processor, conversations, categories, *, expert=None):
    """Pass 1: the likeliest category of each conversation. Strategy A; with expert=z^c, trained to classify, B."""
    return generate(model, processor, [category_question(c, categories) for c in conversations], expert=expert,
                    prefill=CATEGORY_PREFILL, choices=list(categories))
def two_pass(model, processor, conversations, experts, *, classifier=None, **options):
    """[(category, answer)]: classifies each conversation, then answers all in one batch, every row under its expert.
    experts: category -> Expert or None (the base weights); "other" is added. classifier: z^c for B, None for A."""
    chosen = classify(model, processor, conversations, dict.fromkeys([*experts, "other"]), expert=classifier)
    return list(zip(chosen, generate(model, processor, conversations, expert=[*map(experts.get, chosen)], **options)))

def mix(experts, alphas):
    """z' = 1 + sum_k α_k (z_k - 1): the paper's sum, with the base model taking the weight that is left over from 1.
    experts: K of them; alphas: (K, 1), or (K, blocks) for a weight of each expert in each block of the network."""
    mixed = {}
    for alpha, expert in zip(torch.as_tensor(alphas, dtype=torch.float32), experts):  # alpha (1,) or (blocks,)
        for name, z in expert.items():
            block = int((re.findall(r"\.(\d+)\.", name) or [0])[0])
            mixed[name] = mixed.get(name, 1) + alpha[block % len(alpha)] * (z.cpu() - 1)
    return mixed

def solution_likelihood(model, processor, task, problems, expert):
    """Log-likelihood of the right answers, one number per problem; expert: as for generate."""
    conversations, likelihood = [task.conversation(p) for p in problems], np.zeros(len(problems))
    ids = [continuation(processor, task.prefill, str(p.get("solution", p["answer"]))) for p in problems]
    for rows, inputs in batches(model, processor, conversations, task.prefill, [*map(len, ids)]):
        with torch.no_grad(), use_expert(model, expert, rows):
            hidden, head, stretches, tokens, mask = token_policy(model, inputs, [ids[i] for i in rows])
            for t in stretches:
                likelihood[rows] += (head(hidden[:, t]).gather(-1, tokens[:, t]) * mask[:, t]).sum((1, 2)).tolist()
    return likelihood

def few_shot(model, processor, task, problems, experts, *, population=32, iterations=20, per_layer=False, seed=0):
    """Strategy C: the cross-entropy method (CEM) searches the mixture of experts (name -> Expert) that is best on a few
    problems: by accuracy, ties by the mean log-likelihood of the right answers. All candidates run in one batch, each
    row under its own z. Returns the best Expert and its α, not clipped, (K, 1) or with per_layer (K, blocks)."""
    experts, K, rng, best = list(experts.values()), len(experts), np.random.default_rng(seed), []
    shape = K, model.config.get_text_config().num_hidden_layers if per_layer else 1
    mean, std, population = np.full(shape, 1 / K), np.full(shape, 0.5), max(population, K + 1)
    elite, fresh = [mean], [*(np.eye(K + 1, K, -1)[..., None] * np.ones(shape))]  # base model, each expert
    for i in tqdm(range(iterations), desc="CEM", leave=False, delay=3, disable=None):
        fresh += [*(mean + std * rng.standard_normal((population - len(best + fresh), *shape)))]
        rows, many = [z for z in (mix(experts, a) for a in fresh) for _ in problems], list(problems) * len(fresh)
        right = [max(reward, 0.0) for *_, reward in rollout(model, processor, task, many, expert=rows)]
        likely = solution_likelihood(model, processor, task, many, rows)
        scores = np.reshape([right, likely], (2, len(fresh), -1)).mean(2).T.tolist()  # [accuracy, likelihood] of each
        ranked = sorted([*best, *zip(scores, fresh)], key=lambda pair: pair[0], reverse=True)
        elite = [alphas for _, alphas in ranked[: max(2, round(0.2 * population))]]
        best, fresh, mean = ranked[:1], [], np.mean(elite, 0)  # the best so far stays, with its score
        std = np.std(elite, 0) + 0.2 * (1 - i / iterations)  # or CEM narrows down too early (Szita & Lőrincz, 2006)
    return mix(experts, elite[0]), torch.tensor(elite[0], dtype=torch.float32)
