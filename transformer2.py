"""
Transformer²: self-adaptive language models, in one file to be read beside the paper: Sun, Cetin, Tang,
"Transformer-Squared: Self-adaptive LLMs", ICLR 2025, https://arxiv.org/abs/2501.06252

Each weight matrix is split once into its singular components, W = U diag(s) Vᵀ. A vector z, one number per component,
rescales them: W' = U diag(s * z) Vᵀ. The z's of all matrices together are an *expert*; it is all that ever trains, by
reinforcement learning, on the answers the model itself gives to a task. At inference a first pass over the prompt
decides which expert (or which mixture) it needs, and a second pass answers with it.

A conversation is a list of {"role", "content"} dicts; a processor is what AutoTokenizer or AutoProcessor gives.
Shapes: B rows of a batch, P prompt tokens, T completion tokens, V vocabulary, C choices, r singular values.
"""
import contextlib, hashlib, inspect, itertools, os, re, sys, time
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import distributed, nn
from torch.utils.checkpoint import checkpoint as recompute
from tqdm import tqdm
from transformers import GenerationConfig
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
    if weight.shape[0] < weight.shape[1]:  # work on the small side: Wᵀ = V diag(s) Uᵀ
        V, s, Uh = decompose(weight.T)
        return Uh.T.contiguous(), s, V.T.contiguous()
    W = weight.detach().to(torch.float32 if weight.device.type == "mps" else torch.float64)  # which Apple's lacks
    V = torch.linalg.eigh(W.T @ W).eigenvectors.flip(-1)  # (n, r); eigh counts upwards
    U = W @ V  # (m, r), columns of length s
    s = U.norm(dim=0)
    return (U / s.clamp(min=1e-12)).to(weight.dtype), s.float(), V.T.contiguous().to(weight.dtype)

def decompose_cached(weight, cache_dir):
    """decompose, remembered in `cache_dir` under a hash of the weight's content."""
    if cache_dir is None or weight.is_meta:
        return decompose(weight)
    content = hashlib.sha256(weight.detach().contiguous().cpu().view(torch.uint8).numpy()).hexdigest()[:24]
    path = Path(cache_dir) / f"{content}-{weight.dtype}-{len(weight)}.safetensors"
    with contextlib.suppress(Exception):  # not there yet, or damaged: then it is made
        factors = load_file(path, device=str(weight.device))
        return factors["U"], factors["s"], factors["Vh"]
    U, s, Vh = decompose(weight)
    write_whole(path, lambda tmp: save_file({"U": U, "s": s, "Vh": Vh}, tmp))
    return U, s, Vh

def write_whole(path, write):
    """Has `write` fill a temporary file beside `path` and moves it there: readers see the whole file or none."""
    tmp = Path(f"{path}.{os.getpid()}")
    tmp.parent.mkdir(parents=True, exist_ok=True)
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
        for name, factor in zip(("U", "s", "Vh"), decompose_cached(weight, cache_dir)):
            self.register_buffer(name, factor)  # (out, r), (r,), (r, in)
        self.bias = linear.bias
        self.z = nn.Parameter(torch.ones_like(self.s))
        self.using = None  # what use_expert puts in the place of z: (r,), or (B, 1, r) for one z per row
        self.folded = None  # W' composed (out, in), while use_expert folds

    def scale(self):
        return self.s * (self.z if self.using is None else self.using)

    @property
    def weight(self):
        """W' composed, (out, in), for code that reads a layer's weight."""
        return ((self.U.float() * self.scale()) @ self.Vh.float()).to(self.U.dtype)

    def forward(self, x):
        if self.folded is not None:
            return F.linear(x, self.folded, self.bias)
        scale = self.scale()  # float32, so that small steps of z are not rounded away in bfloat16
        if scale.dim() == 3 and (x.dim() != 3 or len(x) != len(scale)):
            raise Transformer2Error("this model's layers do not see rows apart: use one expert for the whole batch")
        return F.linear((F.linear(x, self.Vh) * scale).to(x.dtype), self.U, self.bias)

TEXT = r"^(?!.*(vision|visual|image|audio|multi_modal|projector|connector)).*"
TARGETS = {"mlp": TEXT + r"\b(mlp|ffn|feed_forward|fc1|fc2|fc_in|fc_out)(\.|$)",
           "attention": TEXT + r"\b(self_attn|attn|attention|self_attention)\.", "all": TEXT}

def apply_svf(model, targets="mlp", cache_dir=None):
    """In place: freezes everything and replaces every matching nn.Linear or Conv1D by an SVFLinear. Returns the model.
    targets: "mlp", "attention", "all" (these spare a vision tower), or a regular expression over module names; the
    output head and embeddings never match. cache_dir: for the factors. Raises Transformer2Error if nothing matches."""
    linears = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))
               and m is not model.get_output_embeddings() and not name.endswith("lm_head")}
    found = {}
    with contextlib.suppress(re.error):  # what is no regular expression matches nothing
        pattern = re.compile(TARGETS.get(targets, targets))
        found = {name: m for name, m in linears.items() if pattern.search(name) and m.weight.element_size() > 1}
    if not found:
        raise Transformer2Error(f"targets {targets!r} match no linear layer (quantised ones do not count): use "
                                f"{', '.join(TARGETS)} or a regular expression over names like {[*linears, 'none'][0]}")
    model.requires_grad_(False)
    for name, linear in tqdm(found.items(), desc="decomposing", leave=False, delay=2, disable=None):
        model.set_submodule(name, SVFLinear(linear, cache_dir))
    return model.eval()

def svf_layers(model):
    """Layer name -> SVFLinear, in the model's order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, SVFLinear)}

def get_expert(model):
    """A detached copy of the current z's: layer name -> (r,)."""
    return {name: (layer.z if layer.using is None else layer.using).detach().clone()
            for name, layer in svf_layers(model).items()}

@contextlib.contextmanager
def use_expert(model, expert, rows=None, fold=False):
    """`with use_expert(model, expert):` runs the model with these z's and puts back what was there before.
    expert: None, the base model (z = 1); an Expert; or a list with one Expert-or-None for each row of the batch, of
    which `rows` picks some. fold: compose each W' once, for a base model's speed without gradients; not for a list.
    Raises Transformer2Error for an expert that does not fit the model."""
    layers = svf_layers(model)
    before = [(layer.using, layer.folded) for layer in layers.values()]
    per_row = [expert] if not isinstance(expert, list) else expert if rows is None else [expert[i] for i in rows]
    distinct = {id(e): e or {} for e in per_row}  # many rows, few experts
    index = [list(distinct).index(id(e)) for e in per_row]
    for e in distinct.values():
        check_expert(e, layers, "the expert")
    try:
        for name, layer in layers.items():
            ones = torch.ones_like(layer.s)
            z = torch.stack([e.get(name, ones).to(ones) for e in distinct.values()])
            layer.using = z[index, None] if isinstance(expert, list) else z[0]
            layer.folded = layer.weight if fold else None
        yield
    finally:
        for layer, state in zip(layers.values(), before):
            layer.using, layer.folded = state

def folding_pays(model, tokens):
    """Whether `tokens` tokens are many enough to compose every W' for them, and half the free memory can hold those."""
    layers = svf_layers(model).values()
    size = sum(layer.out_features * layer.in_features * layer.U.element_size() for layer in layers)
    free = (torch.cuda.mem_get_info()[0] if model.device.type == "cuda" else
            os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") if sys.platform == "linux" else 0)
    return size < free / 2 and any(tokens > layer.in_features for layer in layers)

def check_expert(expert, layers, what):
    """Raises Transformer2Error unless every z of `expert` fits its layer."""
    for name, z in expert.items():
        if name not in layers or layers[name].s.shape != z.shape:
            raise Transformer2Error(f"{what} is for another model or other targets: {name} {[*z.shape]} does not fit")

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
    if theirs:  # learnable_params*.pt has names; policy_params*.pt numbers the MLP weights in the model's order
        mlps = dict(enumerate(name for name in layers if "mlp" in name))
        expert = {mlps.get(int(key.rpartition(".")[2])) if "module_list" in key else key.removesuffix(".weight"): p
                  for key, p in expert.items()}
    if theirs or model is not None:
        check_expert(expert, layers, str(path))
    for name, p in expert.items() if theirs else ():
        s, z = layers[name].s.cpu(), p.detach().float().sigmoid()
        expert[name] = z * s.sum() / (s * z).sum()
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

def tokenizer_of(processor):
    """The tokenizer of a processor, made ready: left padding, a pad token, a chat template."""
    tokenizer = getattr(processor, "tokenizer", processor)
    tokenizer.padding_side = "left"  # all completions of a batch start at the same column
    if tokenizer.pad_token is None:  # always masked, so any token will do
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    if not (getattr(processor, "chat_template", None) or tokenizer.chat_template):
        print("note: no chat template with this model; prompts read 'User: ...', then 'Assistant:'", file=sys.stderr)
        processor.chat_template = tokenizer.chat_template = (
            "{{ bos_token or '' }}{% for m in messages %}{{ m['role'] | capitalize }}: {{ m['content'] }}\n{% endfor %}"
            "{% if add_generation_prompt %}Assistant:{% endif %}")
    return tokenizer

def encode(model, processor, conversations, prefill=""):
    """Chat template, then left-padded tensors on the model's device: input_ids, attention_mask (B, P), and images.
    Raises Transformer2Error for a prompt longer than the context and for a picture shown to a text-only model."""
    tokenizer_of(processor)
    turns = [[*c, {"role": "assistant", "content": prefill}] if prefill else c for c in conversations]
    sees = hasattr(processor, "image_processor")
    look = lambda part: {**part, "image": part["image"]()} if callable(part.get("image")) else part
    if sees:  # these templates want lists of parts
        parts = lambda content: [{"type": "text", "text": content}] if isinstance(content, str) else content
        turns = [[{**m, "content": list(map(look, parts(m["content"])))} for m in c] for c in turns]
    elif any(isinstance(part, dict) and part["type"] == "image" for c in turns for m in c for part in m["content"]):
        raise Transformer2Error("a prompt has a picture, but the model reads only text: take a vision-language model")
    padding = {"processor_kwargs": {"padding": True}} if sees else {"padding": True}
    try:
        inputs = processor.apply_chat_template(turns, tokenize=True, return_dict=True, return_tensors="pt", **padding,
                                               add_generation_prompt=not prefill, continue_final_message=bool(prefill))
    except Exception as e:  # a picture that does not load, a role that the chat template refuses: of many kinds
        raise Transformer2Error(f"a prompt cannot be encoded for this model: {e}".splitlines()[0])
    if not sees:  # some text tokenizers add token_type_ids, which decoders refuse
        inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    if (P := inputs["input_ids"].shape[1]) >= context_of(model):
        raise Transformer2Error(f"a prompt has {P} tokens, but the model's context ends at {context_of(model)}: cut it")
    return {key: value.to(model.device) for key, value in inputs.items()}

def context_of(model):
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30

def batches(model, processor, conversations, prefill, extra=0, budget=16384):
    """(row numbers, encoded prompts) of groups of at most `budget` tokens, padding and `extra` per row counted."""
    if not conversations:
        return
    chunks = (conversations[i : i + 256] for i in range(0, len(conversations), 256))  # not all pictures at once
    lengths = [encode(model, processor, chunk, prefill)["attention_mask"].sum(1).cpu().numpy() for chunk in chunks]
    lengths, groups = np.concatenate(lengths) + extra, [[]]
    for i in np.argsort(-lengths, kind="stable").tolist():
        if groups[-1] and (len(groups[-1]) + 1) * lengths[groups[-1][0]] > budget:
            groups.append([])
        groups[-1].append(i)
    for rows in tqdm(groups, leave=False, delay=3, disable=None):
        yield rows, encode(model, processor, [conversations[i] for i in rows], prefill)

def extend(model, inputs, completions):
    """The model's arguments for prompts (from encode) and completions (B lists of token ids) without their last token,
    which is only predicted; the completions' tokens and mask, both (B, T, 1)."""
    T, device = max(map(len, completions)), inputs["input_ids"].device
    tokens = torch.tensor([c + [0] * (T - len(c)) for c in completions], device=device)
    mask = torch.tensor([[1] * len(c) + [0] * (T - len(c)) for c in completions], device=device)
    more = {"input_ids": tokens[:, :-1], "attention_mask": mask[:, :-1]}
    full = {key: torch.cat([value, more.get(key, torch.zeros_like(mask[:, :-1]))], 1)
            if value.shape == inputs["input_ids"].shape else value for key, value in inputs.items()}
    if len(full) == 2 and "position_ids" in inspect.signature(model.forward).parameters:
        full["position_ids"] = (full["attention_mask"].cumsum(1) - 1).clamp(min=0)  # from the first real token on
    return {**full, "use_cache": False}, tokens[..., None], mask[..., None]

STRETCH = 1 << 24  # numbers in a (B, t, V) tensor, 64 MB: vocabularies are large, so t steps have logits at a time

def log_policy(model, inputs, completions):
    """log π(· | prompt, earlier tokens), float32 (B, t, V), stretch by stretch of the completions' T steps: a generator
    of these and their steps (a slice); the completions' tokens and mask, (B, T, 1). A loss's gradient reaches the model
    if `backward` is called on each stretch's share of the loss before the next stretch is taken."""
    trunk = getattr(model.base_model, "decoder", model.base_model)  # all but the output head; OPT's is further down
    full, tokens, mask = extend(model, inputs, completions)
    outputs, (B, T, _) = trunk(**full), tokens.shape
    hidden = outputs.last_hidden_state[:, -T:]  # (B, T, d), where the completions are predicted
    def stretches():
        leaf = hidden.detach().requires_grad_(hidden.requires_grad)  # gathers the stretches' gradients
        t = max(1, STRETCH // (B * model.config.get_text_config().vocab_size))
        for steps in (slice(i, i + t) for i in range(0, T, t)):
            part = replace(outputs, last_hidden_state=leaf[:, steps])
            with mock.patch.object(trunk, "forward", lambda *_, **__: part):  # the rest of the model, whatever it does
                logits = model(use_cache=False).logits
            yield F.log_softmax(logits.float(), dim=-1).to(tokens.device), steps
        if leaf.grad is not None:
            hidden.backward(leaf.grad)
    return stretches(), tokens, mask

def continuation(processor, prefill, text):
    """The tokens of `text` after `prefill`; tokenizers disagree on where the space goes, so ask for both together."""
    ids = lambda text: tokenizer_of(processor)(text, add_special_tokens=False)["input_ids"]
    stub = "".join(prefill.split()[-1:])
    return ids(f"{stub} {text}")[len(ids(stub)):] if stub else ids(text)

def log_choices(model, processor, inputs, prefill, choices):
    """Log-probability of each choice among the choices, (B, C), rows normalised; differentiable.
    Choices count up to the token that tells them apart, so what is asked is the next token after each beginning that
    several share. Mostly that is the empty one: category names and answer letters cost one pass over the prompt."""
    end = tokenizer_of(processor).eos_token_id or 0  # tells "math" from "mathematics"
    ids = [(*continuation(processor, prefill, choice), end) for choice in choices]
    starts = [i[:t] for i in ids for t in range(len(i))]
    scores = torch.zeros(len(inputs["input_ids"]), len(ids), device=model.device)
    for start in dict.fromkeys(s for s in starts if starts.count(s) > 1 or not s):
        among = [c for c, i in enumerate(ids) if i[: len(start)] == start]
        logits = model(**extend(model, inputs, [[*start, end]] * len(scores))[0], logits_to_keep=1).logits[:, -1]
        scores[:, among] += F.log_softmax(logits.float(), -1)[:, [ids[c][len(start)] for c in among]].to(scores.device)
    return F.log_softmax(scores, dim=-1)

def draw(scores, uniform):
    """Draws from softmax(scores), (B, V), by one random number a row, (B, 1): the first that the cumulated sum passes."""
    cumulated = scores.float().softmax(-1).cumsum(-1)
    return (cumulated > uniform.to(scores.device) * cumulated[:, -1:]).int().argmax(-1, keepdim=True)

@torch.no_grad()
def generate(model, processor, conversations, *, expert=None, max_new_tokens=256, temperature=0.0, prefill="",
             choices=None, uniforms=None, return_tokens=False):
    """Answers conversations in batches: a list of completions, without the prompt and the prefill.
    expert: None (the base model), an Expert, or a list with one Expert-or-None per conversation. temperature: 0 is
    greedy, above 0 draws. choices: take one of these instead. uniforms: (len(conversations), max_new_tokens), what draws
    each token, so that an answer does not depend on its batch; made here if absent. return_tokens: (token ids, text)
    of each, where the token of a choice is its number. Raises Transformer2Error as encode and use_expert do."""
    tokenizer, answers = tokenizer_of(processor), [None] * len(conversations)
    end = np.ravel(model.generation_config.eos_token_id or tokenizer.eos_token_id).tolist()
    how = GenerationConfig(do_sample=False, num_beams=1, repetition_penalty=1.0, eos_token_id=end,
                           no_repeat_ngram_size=0, pad_token_id=tokenizer.pad_token_id)  # whatever the model's own says
    if temperature and uniforms is None:
        uniforms = torch.rand(len(conversations), max_new_tokens)
    for rows, inputs in batches(model, processor, conversations, prefill, 0 if choices else max_new_tokens):
        P = inputs["input_ids"].shape[1]
        def drawn(ids, scores):  # all but the drawn token are ruled out
            token = draw(scores / temperature, uniforms[rows, ids.shape[1] - P, None])
            return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)
        fold = not choices and not isinstance(expert, list) and folding_pays(model, len(rows) * max_new_tokens)
        with use_expert(model, expert, rows, fold):
            if choices:
                logp = log_choices(model, processor, inputs, prefill, choices)  # (B, C)
                tokens = draw(logp / temperature, uniforms[rows, :1]) if temperature else logp.argmax(1, keepdim=True)
                texts = [choices[c] for c in tokens]
            else:
                how.max_new_tokens = min(max_new_tokens, context_of(model) - P)
                tokens = model.generate(**inputs, generation_config=how,
                                        logits_processor=[drawn] if temperature else [])[:, P:]
                texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        for i, row, text in zip(rows, tokens.tolist(), texts):
            stop = next((t + 1 for t, token in enumerate(row) if token in end and not choices), len(row))
            answers[i] = (row[:stop], text) if return_tokens else text
    return answers

def rollout(model, processor, task, problems, **how):
    """One answer to each problem: [(token ids, text, reward)]. how: expert, temperature, uniforms as for generate."""
    answers = generate(model, processor, [task.conversation(p) for p in problems], prefill=task.prefill,
                       max_new_tokens=task.max_new_tokens, choices=task.choices, return_tokens=True, **how)
    return [(tokens, text, task.reward(text, p)) for (tokens, text), p in zip(answers, problems)]

def evaluate(model, processor, task, problems, *, expert=None):
    """Mean accuracy of greedy answers in [0, 1]; a negative reward counts as 0. expert: as for generate."""
    mine = expert[share()] if isinstance(expert, list) else expert
    right = [max(reward, 0.0) for *_, reward in rollout(model, processor, task, problems[share()], expert=mine)]
    return all_sum(torch.tensor(sum(right), device=model.device)).item() / len(problems)

def share():
    """The part of all rows that is this process's; more than one process is started by torchrun."""
    return slice(distributed.get_rank(), None, distributed.get_world_size()) if distributed.is_initialized() else slice(None)

def all_sum(x):
    """The sum of a tensor over the processes, in place."""
    if distributed.is_initialized():
        distributed.all_reduce(x)
    return x

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
    checkpointing: bool = False  # blocks forget their activations and compute them again: less memory, more time
    seed: int = 0  # of the choice of problems and of the rollouts

def policy_loss(logp, ref_logp, actions, mask, advantages, kl_coef):
    """-J of eq. 1 and the KL, both summed over the batch's rows.
    logp, ref_logp: (B, T, V), log π_W' and log π_W (may be None where λ = 0). actions: (B, T, A), the one taken at each
    step (A = 1), or all that were possible. mask: (B, T, 1), 1 where a row has a step. advantages: (B, A), rewards r."""
    taken = (logp.gather(-1, actions) * mask).sum(1)  # (B, A)
    if ref_logp is None:
        return -(taken * advantages).sum(), torch.zeros(())
    kl = ((logp.exp() * (logp - ref_logp)).sum(-1, keepdim=True) * mask).sum()  # over the whole vocabulary
    return kl_coef * kl - (taken * advantages).sum(), kl

@contextlib.contextmanager
def checkpointed(model, on=True):
    """Inside, each block of the network keeps only its input for the backward pass."""
    with contextlib.ExitStack() as stack:
        for block in model.modules() if on else ():
            if isinstance(block, GradientCheckpointingLayer):
                again = partial(recompute, block.forward, use_reentrant=False)
                stack.enter_context(mock.patch.object(block, "forward", again))
        yield

def accumulate_gradient(model, processor, task, problems, answers, hp):
    """Adds the gradient of the problems' mean loss to each z; returns mean reward, accuracy and KL, (3,).
    Of several processes each has its own problems: the means are over all, the gradients are still to be summed.
    answers: from rollout; none for a task with choices. These are one step over a vocabulary of C actions, so few that
    the expectation of eq. 1 is taken exactly: every action counts as often as its probability says."""
    conversations, device = [task.conversation(p) for p in problems], model.device
    rewards = torch.tensor([[task.reward(choice, p) for choice in task.choices] for p in problems] if task.choices else
                           [[reward] for *_, reward in answers], dtype=torch.float32, device=device)  # (B, A)
    n, total = all_sum(torch.tensor([len(rewards), rewards.sum()], device=device)).tolist()
    baseline, sums = total / n if hp.baseline and not task.choices else 0.0, torch.zeros(3, device=device)
    lengths = [len(tokens) for tokens, *_ in answers] or 0
    for rows, inputs in batches(model, processor, conversations, task.prefill, lengths, hp.token_budget):
        def policy():  # stretches of log π, actions, mask
            if not task.choices:
                return log_policy(model, inputs, [answers[i][0] for i in rows])
            logp = log_choices(model, processor, inputs, task.prefill, task.choices)[:, None]  # (B, 1, C)
            actions = torch.arange(logp.shape[2], device=device).expand(logp.shape)
            return iter([(logp, slice(None))]), actions, torch.ones_like(logp[..., :1])
        with torch.no_grad(), use_expert(model, None):  # the reference is the same model at z = 1
            reference = policy()[0] if hp.kl_coef else itertools.repeat((None, None))
        stretches, actions, mask = policy()
        for (logp, steps), (ref_logp, _) in zip(stretches, reference):
            chance = logp[:, 0].detach().exp() if task.choices else 1.0
            loss, kl = policy_loss(logp, ref_logp, actions[:, steps], mask[:, steps],
                                   chance * (rewards[rows] - baseline), hp.kl_coef)
            (loss / n).backward()
            sums[2] += kl / n
        seen = chance * rewards[rows]
        sums[:2] += torch.stack([seen.sum(), seen.clamp(min=0).sum()]) / n
    return all_sum(sums).tolist()

def reinforce(model, processor, task, *, checkpoint=None, **hyperparameters):
    """Trains an Expert on a task with REINFORCE (eq. 1), from the model's current z on; the model stays as it is.
    Returns the Expert with the best validation accuracy. hyperparameters: fields of Hyperparameters.
    checkpoint: a file for the state after every step; if it exists, training goes on from there, to the same end.
    Prints a line per step. Raises Transformer2Error for a checkpoint of another run."""
    hp = Hyperparameters(**hyperparameters)
    problems, held_out = task.problems("train"), task.problems("validation")[: hp.validation_problems]
    run = {"task": task.name, **asdict(hp)}
    state = {"step": 0, "z": get_expert(model), "score": -1.0, "run": run}
    if checkpoint and Path(checkpoint).exists():
        state = torch.load(checkpoint, map_location=model.device, weights_only=True)
        if state.get("run") != run:
            raise Transformer2Error(f"{checkpoint} was begun with {state.get('run')}: go on with the same")
    z = {name: x.clone().requires_grad_() for name, x in state["z"].items()}
    optimizer = torch.optim.AdamW(z.values(), weight_decay=0.0)
    optimizer.load_state_dict(state.get("optimizer", optimizer.state_dict()))
    copy = lambda: {name: x.detach().clone() for name, x in z.items()}
    for step in range(state["step"], hp.steps + 1):  # step 0 only validates the start
        clock, line = time.time(), f"step {step:3d}"
        if step > 0:
            torch.manual_seed(hp.seed * 100003 + step)  # a step depends on its number alone, so it can be resumed
            batch = [problems[i] for i in torch.randperm(len(problems))[: hp.batch_size]]
            uniforms = torch.rand(len(batch), task.max_new_tokens)
            batch, uniforms = batch[share()], uniforms[share()]
            answers = [] if task.choices else rollout(model, processor, task, batch, expert=copy(), temperature=1.0,
                                                      uniforms=uniforms)
            with use_expert(model, z), checkpointed(model, hp.checkpointing):
                reward, accuracy, kl = accumulate_gradient(model, processor, task, batch, answers, hp)
            for x in z.values():
                x.grad = all_sum(torch.zeros_like(x) if x.grad is None else x.grad)
            norm = torch.nn.utils.clip_grad_norm_(z.values(), hp.max_grad_norm)
            optimizer.param_groups[0]["lr"] = hp.lr * (1 + float(np.cos(np.pi * (step - 1) / hp.steps))) / 2
            optimizer.step()
            optimizer.zero_grad()
            line += (f"  reward {reward:+.3f}  accuracy {accuracy:6.1%}  KL {kl:.4f}  gradient {norm:.2e}"
                     f"  {time.time() - clock:.1f} s")
        if step % hp.validate_every == 0 or step == hp.steps:
            score = evaluate(model, processor, task, held_out, expert=z)
            line += f"  validation {score:.1%}"
            if not score < state["score"]:  # of equals the later one: it had more training
                state.update(score=score, best=copy())
        state.update(step=step + 1, z=copy(), optimizer=optimizer.state_dict())
        if share().start:  # only one of several processes speaks and writes
            continue
        tqdm.write(line)
        if checkpoint:
            write_whole(checkpoint, lambda tmp: torch.save(state, tmp))
    return state["best"]

# ---- Section 3.2, self-adaptation: pass 1 decides on z', pass 2 answers with it ----
CATEGORY_PREFILL = "The category of this question is"
CATEGORY_GUIDE = {"code": "asking for programming solutions", "math": "involving calculations",  # as the paper has it
                  "reasoning": "requiring logic or knowledge of science", "other": "of any other kind"}

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
    return generate(model, processor, [category_question(c, categories) for c in conversations], expert=expert,
                    prefill=CATEGORY_PREFILL, choices=list(categories))

def two_pass(model, processor, conversations, experts, *, classifier=None, **options):
    """Classifies each conversation, then answers all in one batch, every row with its expert: [(category, answer)].
    experts: category -> Expert or None (the base weights); "other" is added for prompts of no category.
    classifier: z^c for strategy B, None for A. options: as for generate."""
    chosen = classify(model, processor, conversations, dict.fromkeys([*experts, "other"]), expert=classifier)
    per_row = [experts.get(category) for category in chosen]
    return list(zip(chosen, generate(model, processor, conversations, expert=per_row, **options)))

def mix(experts, alphas):
    """z' = 1 + sum_k α_k (z_k - 1): the paper's sum, with the base model taking the weight that is left over from 1.
    experts: K of them; alphas: (K, 1), or (K, blocks) for a weight of each expert in each block of the network."""
    alphas, mixed = torch.as_tensor(alphas, dtype=torch.float32), {}
    for k, expert in enumerate(experts):
        for name, z in expert.items():
            block = int((re.findall(r"\.(\d+)\.", name) or [0])[0])
            mixed[name] = mixed.get(name, 1) + alphas[k, block % alphas.shape[1]].item() * (z.cpu() - 1)
    return mixed

def solution_likelihood(model, processor, task, problems, expert):
    """Log-likelihood of the right answers, one number per problem; expert: as for generate."""
    conversations, likelihood = [task.conversation(p) for p in problems], np.zeros(len(problems))
    ids = [continuation(processor, task.prefill, str(p.get("solution", p["answer"]))) for p in problems]
    for rows, inputs in batches(model, processor, conversations, task.prefill, np.array([len(i) for i in ids])):
        with torch.no_grad(), use_expert(model, expert, rows):
            stretches, tokens, mask = log_policy(model, inputs, [ids[i] for i in rows])
            for logp, steps in stretches:
                likelihood[rows] += (logp.gather(-1, tokens[:, steps]) * mask[:, steps]).sum((1, 2)).cpu().numpy()
    return likelihood

def few_shot(model, processor, task, problems, experts, *, population=32, iterations=20, per_layer=False, seed=0):
    """Strategy C: the cross-entropy method (CEM) searches α for the best mixture on a few `problems`.
    experts: name -> Expert. Candidates are ranked by accuracy, ties by the mean log-likelihood of the right answers;
    all run in one batch, each row under its own z. The first population holds the base model and every single expert.
    Returns the best Expert and its α, (K, 1) or with per_layer (K, blocks)."""
    experts = list(experts.values())
    shape = len(experts), model.config.get_text_config().num_hidden_layers if per_layer else 1
    rng, population = np.random.default_rng(seed), max(population, len(experts) + 1)
    mean, std = np.full(shape, 1 / len(experts)), np.full(shape, 0.5)
    fresh = np.stack([np.zeros(shape), *(np.tile(row[:, None], shape[1]) for row in np.eye(len(experts)))])
    kept, scores = fresh[:0], np.zeros((0, 2))  # the best so far, and its accuracy and likelihood
    for i in tqdm(range(iterations), desc="CEM", leave=False, delay=3, disable=None):
        draws = mean + std * rng.standard_normal((population - len(kept) - len(fresh), *shape))
        fresh = np.concatenate([fresh, draws])
        rows = [candidate for candidate in (mix(experts, a) for a in fresh) for _ in problems]
        many = list(problems) * len(fresh)
        right = [max(reward, 0.0) for *_, reward in rollout(model, processor, task, many, expert=rows)]
        likely = solution_likelihood(model, processor, task, many, rows)
        measured = np.reshape([right, likely], (2, len(fresh), -1)).mean(2).T  # (fresh, 2)
        alphas, scores = np.concatenate([kept, fresh]), np.concatenate([scores, measured])
        best = np.lexsort((-scores[:, 1], -scores[:, 0]))[: max(2, round(0.2 * population))]
        mean, std = alphas[best].mean(0), alphas[best].std(0)
        std = std + 0.2 * (1 - i / iterations)  # without added noise CEM narrows down too early (Szita & Lőrincz, 2006)
        kept, scores, fresh = alphas[best[:1]], scores[best[:1]], fresh[:0]
    return mix(experts, kept[0]), torch.tensor(kept[0], dtype=torch.float32)
