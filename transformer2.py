"""
Transformer²: self-adaptive language models, in one file to be read beside the paper: Sun, Cetin, Tang,
"Transformer-Squared: Self-adaptive LLMs", ICLR 2025, https://arxiv.org/abs/2501.06252

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
import contextlib, hashlib, inspect, math, os, re, sys, time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm
from transformers import GenerationConfig
from transformers.pytorch_utils import Conv1D

Expert = dict[str, torch.Tensor]  # layer name -> z (r,), r = min(out_features, in_features); absent layer = ones

class Transformer2Error(ValueError):
    """Something the caller can put right; the message is one sentence that says what and how."""

# ---- Section 3.1, singular value fine-tuning: W' = U diag(s * z) Vᵀ ----

def decompose(weight):
    """W (m, n) -> U (m, r), s (r,) descending, Vh (r, n) in float32, W = U diag(s) Vh, r = min(m, n).
    The eigenvectors V of WᵀW are the right singular vectors, and W = (W V) Vᵀ for any orthogonal V: exact, at the
    price of one r x r eigenproblem. It squares the condition number, hence float64."""
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
    with contextlib.suppress(Exception):  # not there yet, or damaged: then it is made
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
    x: (B, ..., in_features) -> (B, ..., out_features). s and z are float32 whatever the model's dtype."""
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
            raise Transformer2Error("this model's layers do not see rows apart: use one expert for the whole batch")
        return F.linear(F.linear(x, self.Vh) * scale, self.U, self.bias)

TARGETS = {"mlp": r"(^|\.)(mlp|ffn|feed_forward|fc1|fc2|fc_in|fc_out)(\.|$)",
           "attention": r"(^|\.)(self_attn|attn|attention|self_attention)\.",
           "all": r""}
NOT_TEXT = re.compile(r"vision|visual|image|audio|multi_modal|projector|connector")

def apply_svf(model, targets="mlp", cache_dir=None):
    """In place: freezes everything and replaces every matching nn.Linear or Conv1D by an SVFLinear. Returns the model.
    targets: "mlp", "attention", "all", or a regular expression searched for in module names. The output head and the
    embeddings never match; a vision tower's layers match only an expression of your own.
    cache_dir: a folder for the decompositions. Raises Transformer2Error if nothing matches or a match is quantised."""
    try:
        pattern = re.compile(TARGETS.get(targets, targets))
    except re.error as e:
        raise Transformer2Error(f"targets {targets!r}: neither {', '.join(TARGETS)} nor a regular expression ({e})")
    linears = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))
               and m is not model.get_output_embeddings() and not name.endswith("lm_head")}
    found = {name: m for name, m in linears.items()
             if pattern.search(name) and (targets not in TARGETS or not NOT_TEXT.search(name))}
    if not found:
        raise Transformer2Error(f"targets {targets!r} match no linear layer of this {type(model).__name__}: use "
                                f"{', '.join(TARGETS)} or a regular expression over names like {[*linears, 'none'][0]}")
    if not all(m.weight.dim() == 2 and m.weight.is_floating_point() for m in found.values()):
        raise Transformer2Error("this model's layers are quantised: load it in bfloat16 or float32")
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
    which `rows` picks some."""
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
            raise Transformer2Error(f"{what} is for another model or other targets: {name} is {tuple(z.shape)}, not {have}")

def save_expert(expert, path, **about):
    """Writes a safetensors file (float32), whole or not at all; `about` goes into its header as text."""
    tensors = {name: z.detach().float().cpu().contiguous() for name, z in expert.items()}
    write_whole(path, lambda tmp: save_file(tensors, tmp, metadata={k: str(v) for k, v in about.items()}))

def load_expert(path, model=None):
    """Reads an expert; with `model`, raises Transformer2Error unless its names and shapes fit.
    Also reads the authors' checkpoints (.pt, which need `model`). They hold p with z = sigmoid(p), and their code
    multiplies W' by sum(s) / sum(s z), which keeps the nuclear norm: here both become part of z."""
    layers = None if model is None else svf_layers(model)
    theirs = str(path).endswith(".pt")
    if theirs and layers is None:
        raise Transformer2Error(f"{path} is of the authors' code, where z depends on the model: give load_expert one")
    try:
        expert = torch.load(path, map_location="cpu", weights_only=True) if theirs else load_file(path)
    except Exception as e:  # a damaged file raises many kinds
        raise Transformer2Error(f"cannot read the expert {path}: {type(e).__name__}, {e}".splitlines()[0])
    if theirs:  # learnable_params*.pt has names; policy_params*.pt numbers the MLP weights in the model's order
        mlps = [name for name in layers if "mlp" in name]
        expert = {mlps[int(key.rpartition(".")[2])] if "module_list" in key else key.removesuffix(".weight"):
                  p.detach().float().sigmoid() for key, p in expert.items()}
    if layers is not None:
        check_expert(expert, layers, str(path))
    if theirs:
        expert = {name: z * (s := layers[name].s.cpu()).sum() / (s * z).sum() for name, z in expert.items()}
    return expert

def merge_svf(model):
    """In place: dense layers of their former class again, the current z folded in. Returns the model."""
    for name, layer in svf_layers(model).items():
        m, n, weight = layer.out_features, layer.in_features, layer.weight
        linear, weight = (Conv1D(m, n), weight.T) if layer.is_conv1d else (nn.Linear(n, m, device="meta"), weight)
        linear.weight, linear.bias = nn.Parameter(weight.contiguous(), requires_grad=False), layer.bias
        model.set_submodule(name, linear)
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
    Raises Transformer2Error for a prompt longer than the context and for a picture shown to a text-only model."""
    tokenizer_of(processor)
    sees = hasattr(processor, "image_processor")
    turns = [[*c, {"role": "assistant", "content": prefill}] if prefill else c for c in conversations]
    if not sees and any(isinstance(part, dict) and part["type"] == "image" for c in turns for m in c for part in m["content"]):
        raise Transformer2Error("a prompt has a picture, but the model reads only text: take a vision-language model")
    if sees:  # these templates want lists of parts
        parts = lambda content: [{"type": "text", "text": content}] if isinstance(content, str) else content
        turns = [[{**m, "content": parts(m["content"])} for m in c] for c in turns]
    inputs = processor.apply_chat_template(turns, tokenize=True, return_dict=True, return_tensors="pt", padding=True,
                                           add_generation_prompt=not prefill, continue_final_message=bool(prefill))
    if not sees:  # some text tokenizers add token_type_ids, which decoders refuse
        inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    if (P := inputs["input_ids"].shape[1]) >= context_of(model):
        raise Transformer2Error(f"a prompt has {P} tokens, but this model's context ends at {context_of(model)}: shorten it")
    return {key: value.to(model.device) for key, value in inputs.items()}

def context_of(model):
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30

def batches(model, processor, conversations, prefill, extra=0, budget=16384):
    """(row numbers, encoded prompts) of groups of at most `budget` tokens, padding and `extra` per row counted."""
    if not conversations:
        return
    lengths = encode(model, processor, conversations, prefill)["attention_mask"].sum(1).cpu().numpy() + extra
    groups = [[]]
    for i in np.argsort(-lengths, kind="stable").tolist():
        if groups[-1] and (len(groups[-1]) + 1) * lengths[groups[-1][0]] > budget:
            groups.append([])
        groups[-1].append(i)
    for rows in tqdm(groups, leave=False, delay=3, disable=None):
        yield rows, encode(model, processor, [conversations[i] for i in rows], prefill)

def log_policy(model, inputs, completions, temperature=1.0):
    """log π(· | prompt, earlier tokens) in float32 (B, T, V), the completions' tokens (B, T) and their mask (B, T).
    inputs: from encode; completions: B lists of token ids. Logits are made for the completions only."""
    T, device = max(map(len, completions)), inputs["input_ids"].device
    tokens = torch.tensor([c + [0] * (T - len(c)) for c in completions], device=device)
    mask = torch.tensor([[1] * len(c) + [0] * (T - len(c)) for c in completions], device=device)
    more = {"input_ids": tokens[:, :-1], "attention_mask": mask[:, :-1]}  # the last token is only predicted
    full = {key: torch.cat([value, more.get(key, torch.zeros_like(mask[:, :-1]))], 1)
            if value.shape == inputs["input_ids"].shape else value for key, value in inputs.items()}
    options = {"logits_to_keep": T}
    if len(full) == 2:  # positions count from the first real token; with pictures the model has a rule of its own
        options["position_ids"] = (full["attention_mask"].cumsum(1) - 1).clamp(min=0)
    known = inspect.signature(model.forward).parameters  # a few architectures know neither
    logits = model(**full, use_cache=False, **{k: v for k, v in options.items() if k in known}).logits[:, -T:]
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
    tokens: then the prompt's last position says it all, and scoring costs one forward pass over the prompt."""
    ids, B = [continuation(tokenizer_of(processor), prefill, choice) for choice in choices], len(inputs["input_ids"])
    depth = next((k for k in range(1, 1 + max(map(len, ids))) if len({tuple(i[:k]) for i in ids}) == len(ids)), None)
    if depth is None:
        raise Transformer2Error(f"this tokenizer cannot tell the choices {choices} apart: rename some")
    if depth == 1:
        scores = log_policy(model, inputs, [[0]] * B)[0][:, 0, [i[0] for i in ids]]
    else:
        scores = torch.stack([log_likelihood(model, inputs, [i[:depth]] * B) for i in ids], 1)
    return F.log_softmax(scores, dim=-1)

def sample(model, tokenizer, inputs, max_new_tokens, temperature):
    """Generates from encoded prompts: a list of token ids per row, up to and with the end-of-turn token."""
    P, end = inputs["input_ids"].shape[1], model.generation_config.eos_token_id
    end = np.ravel(tokenizer.eos_token_id if end is None else end).tolist()
    config = GenerationConfig(  # spells out all that would reshape the distribution: the model's own config may differ
        max_new_tokens=min(max_new_tokens, context_of(model) - P), do_sample=temperature > 0, num_beams=1,
        repetition_penalty=1.0, no_repeat_ngram_size=0, eos_token_id=end, pad_token_id=tokenizer.pad_token_id,
        **(dict(temperature=temperature, top_k=0, top_p=1.0) if temperature > 0 else {}))
    rows = model.generate(**inputs, generation_config=config)[:, P:].tolist()
    return [row[: next((t + 1 for t, token in enumerate(row) if token in end), len(row))] for row in rows]

@torch.no_grad()
def rollout(model, processor, task, problems, *, expert=None, temperature=0.0, token_budget=16384):
    """One answer to each problem, a list of (token ids, text, reward); the token id of a choice is its number.
    temperature 0 takes the likeliest, above 0 draws. expert: as for generate."""
    conversations, tokenizer = [task.conversation(p) for p in problems], tokenizer_of(processor)
    tokens, new = [None] * len(problems), 0 if task.choices else task.max_new_tokens
    for rows, inputs in batches(model, processor, conversations, task.prefill, new, token_budget):
        with use_expert(model, expert, rows):
            if task.choices:
                logp = log_choices(model, processor, inputs, task.prefill, task.choices).cpu()  # (B, C)
                drawn = torch.multinomial((logp / temperature).exp(), 1) if temperature else logp.argmax(1, keepdim=True)
            else:
                drawn = sample(model, tokenizer, inputs, new, temperature)
        for i, row in zip(rows, drawn):
            tokens[i] = list(map(int, row))
    texts = [task.choices[t[0]] if task.choices else tokenizer.decode(t, skip_special_tokens=True) for t in tokens]
    return [(t, text, task.reward(text, p)) for t, text, p in zip(tokens, texts, problems)]

def generate(model, processor, conversations, *, expert=None, max_new_tokens=256, temperature=0.0, prefill=""):
    """Answers conversations in batches; returns the completions as text, without the prompt and the prefill.
    expert: None (the base model), an Expert, or a list with one Expert-or-None per conversation; temperature 0 is greedy.
    Raises as encode does."""
    task = Task("", None, lambda c: c, lambda text, c: 0.0, max_new_tokens, prefill)
    return [text for _, text, _ in rollout(model, processor, task, conversations, expert=expert, temperature=temperature)]

def evaluate(model, processor, task, problems, *, expert=None):
    """Mean accuracy of greedy answers in [0, 1]; a negative reward counts as 0. expert: as for generate."""
    answers = rollout(model, processor, task, problems, expert=expert)
    return float(np.mean([max(reward, 0.0) for _, _, reward in answers]))

# ---- Section 3.1, reinforcement learning: J(z) = E[ log π_W'(ŷ | x) r(ŷ, y) ] - λ KL(π_W' || π_W)  (eq. 1) ----

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
    token_budget: int = 2048  # tokens in one micro-batch of an update, padding included
    seed: int = 0  # of the choice of problems and of the rollouts

def policy_loss(logp, ref_logp, actions, mask, advantages, kl_coef):
    """-J of eq. 1 and the KL, both summed over the batch's rows.
    logp, ref_logp: (B, T, V), log π_W' and log π_W; actions, mask: (B, T); advantages: (B,), the rewards r."""
    taken = logp.gather(-1, actions[..., None])[..., 0]  # (B, T)
    kl = ((logp.exp() * (logp - ref_logp)).sum(-1) * mask).sum()  # over the whole vocabulary, at the steps taken
    return kl_coef * kl - ((taken * mask).sum(1) * advantages).sum(), kl

def accumulate_gradient(model, processor, task, problems, answers, hp):
    """Adds the gradient of the problems' mean loss to each z; returns mean reward, accuracy and KL, (3,).
    answers: from rollout; None for a task with choices, where the expectation of eq. 1 is a sum over so few answers that
    it is taken exactly instead of drawing one."""
    conversations, totals = [task.conversation(p) for p in problems], np.zeros(3)
    if answers:
        rewards = torch.tensor([reward for _, _, reward in answers])
        baseline = rewards.mean() if hp.baseline else 0.0
    lengths = np.array([len(tokens) for tokens, _, _ in answers]) if answers else 0
    for rows, inputs in batches(model, processor, conversations, task.prefill, lengths, hp.token_budget):
        def policy():
            if answers:
                return log_policy(model, inputs, [answers[i][0] for i in rows], hp.temperature)
            return [log_choices(model, processor, inputs, task.prefill, task.choices)]
        with torch.no_grad(), use_expert(model, None):  # the reference is the same model at z = 1
            ref_logp = policy()[0]
        logp, *drawn = policy()
        if answers:
            r, p = rewards[rows].to(logp.device), 1.0
            loss, kl = policy_loss(logp, ref_logp, *drawn, r - baseline, hp.kl_coef)
        else:
            r, p = torch.tensor([[task.reward(c, problems[i]) for c in task.choices] for i in rows]).to(logp), logp.exp()
            kl = (p * (logp - ref_logp)).sum()
            loss = hp.kl_coef * kl - (p * r).sum()
        (loss / len(problems)).backward()
        totals += [x.detach().sum().item() for x in (p * r, p * r.clamp(min=0), kl)]
    return totals / len(problems)

def reinforce(model, processor, task, *, checkpoint=None, verbose=True, **hyperparameters):
    """Trains the z's on a task with REINFORCE (eq. 1). Returns the Expert with the best validation accuracy.
    hyperparameters: fields of Hyperparameters. The z's start from the model's and are put back afterwards.
    checkpoint: a file for the state after every step; if it exists, training goes on from there, to the same end.
    verbose: print a line per step. Raises Transformer2Error for a checkpoint of another run."""
    hp, start = Hyperparameters(**hyperparameters), get_expert(model)
    zs = {name: layer.z for name, layer in svf_layers(model).items()}
    optimizer = torch.optim.AdamW(zs.values(), weight_decay=0.0)
    problems, held_out = task.problems("train"), task.problems("validation")[: hp.validation_problems]
    state = {"step": 0, "z": start, "best": start, "score": -1.0, "hyperparameters": asdict(hp)}
    if checkpoint and Path(checkpoint).exists():
        state = torch.load(checkpoint, map_location=model.device, weights_only=True)
        if state["hyperparameters"] != asdict(hp):
            raise Transformer2Error(f"{checkpoint} was begun with {state['hyperparameters']}: go on with the same")
        optimizer.load_state_dict(state["optimizer"])
    try:
        for name, z in zs.items():
            z.data.copy_(state["z"][name])
        for step in range(state["step"], hp.steps + 1):  # step 0 only validates the start
            clock, line = time.time(), f"step {step:3d}"
            if step > 0:
                torch.manual_seed(hp.seed * 100003 + step)  # a step depends on its number alone, so it can be resumed
                rng = np.random.default_rng([hp.seed, step])
                batch = [problems[i] for i in rng.permutation(len(problems))[: hp.batch_size]]
                answers = None if task.choices else rollout(model, processor, task, batch, expert=get_expert(model),
                                                            temperature=hp.temperature)
                reward, accuracy, kl = accumulate_gradient(model, processor, task, batch, answers, hp)
                norm = torch.nn.utils.clip_grad_norm_(zs.values(), hp.max_grad_norm).item()
                optimizer.param_groups[0]["lr"] = hp.lr * (1 + math.cos(math.pi * (step - 1) / hp.steps)) / 2
                optimizer.step()
                optimizer.zero_grad()
                line += (f"  reward {reward:+.3f}  accuracy {accuracy:6.1%}  KL {kl:.4f}  gradient {norm:.2e}  "
                         f"{time.time() - clock:.1f} s")
            if step % hp.validate_every == 0 or step == hp.steps:
                score = evaluate(model, processor, task, held_out, expert=get_expert(model))
                line += f"  validation {score:.1%}"
                if score >= state["score"]:  # of equals the later one: it had more training
                    state.update(score=score, best=get_expert(model))
            if verbose:
                tqdm.write(line)
            state.update(step=step + 1, z=get_expert(model), optimizer=optimizer.state_dict())
            if checkpoint:
                write_whole(checkpoint, lambda tmp: torch.save(state, tmp))
    finally:
        for name, z in zs.items():
            z.data.copy_(start[name])
    return state["best"]

# ---- Section 3.2, self-adaptation: pass 1 decides on z', pass 2 answers with it ----

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
    task = Task("", None, lambda c: category_question(c, categories), lambda text, c: 0.0, prefill=CATEGORY_PREFILL,
                choices=list(categories))
    return [category for _, category, _ in rollout(model, processor, task, conversations, expert=expert)]

def two_pass(model, processor, conversations, experts, *, classifier=None, **options):
    """Classifies each conversation, then answers all in one batch, every row with its expert: [(category, answer)].
    experts: category -> Expert or None (the base weights); "other" is added for prompts of no category.
    classifier: z^c for strategy B, None for A. options: as for generate."""
    categories = list(dict.fromkeys([*experts, "other"]))
    chosen = classify(model, processor, conversations, categories, expert=classifier)
    return list(zip(chosen, generate(model, processor, conversations, expert=[experts.get(c) for c in chosen], **options)))

def mix(experts, alphas):
    """z' = 1 + sum_k α_k (z_k - 1): the paper's sum, with the base model taking the weight that is left over from 1.
    experts: K of them; alphas: (K, 1), or (K, blocks) for a weight of each expert in each block of the network."""
    def weights(name):
        block = re.search(r"\.(\d+)\.", name) if alphas.shape[1] > 1 else None
        return alphas[:, int(block[1]) if block else 0].tolist()
    names = dict.fromkeys(name for e in experts for name in e)
    return {n: 1 + sum(a * (e[n].cpu() - 1) for a, e in zip(weights(n), experts) if n in e) for n in names}

@torch.no_grad()
def solution_likelihood(model, processor, task, problems, expert):
    """Log-likelihood of the right answers, one number per problem; expert: as for generate."""
    conversations, likelihood = [task.conversation(p) for p in problems], np.zeros(len(problems))
    ids = [continuation(tokenizer_of(processor), task.prefill, str(p.get("solution", p["answer"]))) for p in problems]
    for rows, inputs in batches(model, processor, conversations, task.prefill, np.array([len(i) for i in ids])):
        with use_expert(model, expert, rows):
            likelihood[rows] = log_likelihood(model, inputs, [ids[i] for i in rows]).cpu()
    return likelihood

def few_shot(model, processor, task, problems, experts, *, population=32, iterations=20, elite=0.2, per_layer=False,
             seed=0):
    """Strategy C: the cross-entropy method (CEM) searches α for the best mixture on a few `problems`.
    experts: name -> Expert. Candidates are ranked by accuracy, ties by the mean log-likelihood of the right answers;
    all run in one batch, each row under its own z. The first population holds the base model and every single expert.
    Returns the best Expert and its α, (K, 1) or with per_layer (K, blocks)."""
    layers, K = svf_layers(model), len(experts)
    blocks = [int(m[1]) + 1 for name in layers if (m := re.search(r"\.(\d+)\.", name))]
    G = max(blocks, default=1) if per_layer else 1
    rng, n_elite = np.random.default_rng(seed), max(2, round(elite * population))
    mean, std = np.full((K, G), 1 / K), np.full((K, G), 0.5)
    known = np.concatenate([np.zeros((1, K, G)), np.repeat(np.eye(K)[:, :, None], G, 2)])  # base, single experts
    for i in tqdm(range(iterations), desc="CEM", leave=False, delay=3, disable=None):
        alphas = np.concatenate([known, mean + std * rng.standard_normal((population - len(known), K, G))])
        candidates = [mix(list(experts.values()), torch.tensor(a, dtype=torch.float32)) for a in alphas]
        rows, many = [c for c in candidates for _ in problems], list(problems) * population
        right = [max(r, 0.0) for _, _, r in rollout(model, processor, task, many, expert=rows)]
        likely = solution_likelihood(model, processor, task, many, rows)
        right, likely = (np.reshape(x, (population, -1)).mean(1) for x in (right, likely))
        best = np.lexsort((-likely, -right))[:n_elite]
        mean, std, known = alphas[best].mean(0), alphas[best].std(0), alphas[best[:1]]
        std = std + 0.2 * (1 - i / iterations)  # without added noise CEM narrows down too early (Szita & Lőrincz, 2006)
    alphas = torch.tensor(known[0], dtype=torch.float32)
    return mix(list(experts.values()), alphas), alphas
