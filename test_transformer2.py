"""
The mathematics and the promises of transformer2.py, on small random models: no network, no GPU.

    pytest                                                    # half a minute on two cores
    python test_transformer2.py [--model DIR] [--json FILE]   # the benchmark: speed and memory
"""
import argparse, contextlib, copy, json, math, os, random, re, subprocess, sys, tempfile, time, weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, GemmaConfig, GPT2Config, LlamaConfig, Phi3Config, Qwen2Config

import adapt
import rewards
import train_expert
import transformer2 as t2

WORDS = "Classify the question into one of these categories: red, green, blue, other. The category of this question is"
TOKENIZER = train_expert.tiny_tokenizer([WORDS, "What is 1 plus 2? Hello", "0123456789ABCDEFGH"])
SMALL = dict(vocab_size=len(TOKENIZER), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
             max_position_embeddings=64, bos_token_id=None, eos_token_id=TOKENIZER.eos_token_id, pad_token_id=0)
FAMILIES = {
    "llama": LlamaConfig(**SMALL, intermediate_size=48, num_key_value_heads=2, initializer_range=0.2),
    "qwen2": Qwen2Config(**SMALL, num_key_value_heads=2, intermediate_size=48, initializer_range=0.2),  # has biases
    "gpt2": GPT2Config(vocab_size=len(TOKENIZER), n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2,
                       bos_token_id=None, eos_token_id=TOKENIZER.eos_token_id),  # Conv1D
    "phi3": Phi3Config(**SMALL, intermediate_size=48, initializer_range=0.2),  # fused qkv and gate-up
    "gemma": GemmaConfig(**SMALL, num_key_value_heads=2, intermediate_size=48, head_dim=8,  # tied embeddings
                         initializer_range=0.2),
}

def make(family="llama", seed=0):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]).float().eval()
    for p in model.parameters():  # biases start at zero, which would hide a lost bias
        if p.dim() == 1:
            nn.init.normal_(p, 1.0 if p.mean() == 1 else 0.0, 0.2)
    return model

def random_expert(model, seed=0, size=0.5):
    torch.manual_seed(seed)
    return {name: 1 + size * torch.randn_like(layer.s) for name, layer in t2.svf_layers(model).items()}

def say(text):
    return [{"role": "user", "content": text}]

def logits(model, ids=torch.tensor([[5, 6, 7, 8, 9, 10]])):
    with torch.no_grad():
        return model(input_ids=ids).logits

def relative(a, b):
    return ((a - b).norm() / b.norm()).item()

def toy(reward, **more):
    problems = [{"question": f"What is {a} plus {b}?", "answer": "B"} for a in range(10) for b in range(10)]
    return t2.Task("toy", lambda split: problems[:80] if split == "train" else problems[80:],
                   lambda p: say(p["question"]), reward, **more)

# --- singular value fine-tuning

@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6)])
def test_decomposition_is_the_svd(shape):
    torch.manual_seed(0)
    W = torch.randn(shape)
    U, s, Vh = t2.decompose(W)
    assert torch.allclose(U * s @ Vh, W, atol=1e-5)
    assert torch.allclose(s, torch.linalg.svdvals(W), atol=1e-5)
    for side in (U.T @ U, Vh @ Vh.T):
        assert torch.allclose(side, torch.eye(len(s)), atol=1e-5)

def test_decomposition_of_a_singular_matrix_is_exact():
    W = torch.outer(torch.arange(1.0, 6), torch.arange(1.0, 8))
    U, s, Vh = t2.decompose(W)
    assert torch.allclose(U * s @ Vh, W, atol=1e-4) and torch.isfinite(U).all()

def test_cache_is_by_content_and_heals(tmp_path):
    A, B = torch.randn(6, 4), torch.randn(6, 4)
    first = t2.decompose_cached(A, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    path = next(tmp_path.iterdir())
    save_file({"U": first[0], "s": first[1] * 2, "Vh": first[2]}, path)  # so that a hit can be told from a miss
    assert torch.equal(t2.decompose_cached(A, tmp_path)[1], first[1] * 2)
    assert torch.allclose(t2.decompose_cached(B, tmp_path)[1], torch.linalg.svdvals(B), atol=1e-5)
    path.write_bytes(b"damaged")
    assert torch.equal(t2.decompose_cached(A, tmp_path)[1], first[1])

@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", ["mlp", "all"])
def test_z_of_ones_is_the_base_model_and_merged_is_factored(family, targets):
    model = make(family)
    before, names = logits(model), set(dict(model.named_parameters()))
    classes = {name: type(m) for name, m in model.named_modules()}
    t2.apply_svf(model, targets)
    assert relative(logits(model), before) < 1e-4
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [f"{n}.z" for n in t2.svf_layers(model)]
    expert = random_expert(model)
    with t2.use_expert(model, expert):
        changed = logits(model)
        assert relative(changed, before) > 1e-2
        t2.merge_svf(model)
    assert relative(logits(model), changed) < 1e-4
    assert {name: type(m) for name, m in model.named_modules()} == classes
    assert set(dict(model.named_parameters())) == names

def test_merged_model_reloads(tmp_path):
    for family in ("llama", "gpt2"):
        model = t2.apply_svf(make(family), "all")
        with t2.use_expert(model, random_expert(model)):
            t2.merge_svf(model)
        model.save_pretrained(tmp_path / family)
        assert relative(logits(AutoModelForCausalLM.from_pretrained(tmp_path / family)), logits(model)) < 1e-5

def test_bfloat16():
    model = make().to(torch.bfloat16)
    before = logits(model).float()
    t2.apply_svf(model)
    layer = next(iter(t2.svf_layers(model).values()))
    assert layer.z.dtype == layer.s.dtype == torch.float32 and layer.U.dtype == torch.bfloat16
    assert relative(logits(model).float(), before) < 0.05

def test_weight_and_targets():
    model = make("llama")
    dense = model.model.layers[0].mlp.up_proj.weight.clone()
    t2.apply_svf(model, r"layers\.0\.mlp\.up_proj$")
    assert list(t2.svf_layers(model)) == ["model.layers.0.mlp.up_proj"]
    assert torch.allclose(model.model.layers[0].mlp.up_proj.weight, dense, atol=1e-5)
    assert not any("lm_head" in n for n in t2.svf_layers(t2.apply_svf(make("llama"), "all")))

def test_gradient_of_z_is_the_finite_difference():
    model = t2.apply_svf(make("llama"), "all").double()
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    loss = lambda: F.cross_entropy(model(input_ids=ids).logits[0, :-1].double(), ids[0, 1:])
    loss().backward()
    for name in ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.k_proj"):
        z = t2.svf_layers(model)[name].z
        for i in (0, 3, 7):
            ends = []
            for step in (1e-3, -1e-3):
                with torch.no_grad():
                    z[i] += step
                    ends.append(loss().item())
                    z[i] -= step
            assert z.grad[i].item() == pytest.approx((ends[0] - ends[1]) / 2e-3, rel=5e-3, abs=1e-5)

def test_parameter_counts_at_llama_3_8b():
    config = LlamaConfig(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                         num_attention_heads=32, num_key_value_heads=8)
    def count(targets):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
            lora = sum(16 * sum(m.weight.shape) for n, m in model.named_modules() if n.endswith(("q_proj", "v_proj")))
            t2.apply_svf(model, targets)
        return sum(p.numel() for p in model.parameters() if p.requires_grad), lora
    assert count("mlp") == (393_216, 6_815_744)
    assert count(r"(q|v)_proj$")[0] == 163_840

# --- experts

def test_experts_nest_and_rows_have_their_own():
    model = t2.apply_svf(make(), "all")
    a, b = random_expert(model, 1), random_expert(model, 2)
    base = logits(model)
    with t2.use_expert(model, a):
        alone_a = logits(model)
        with t2.use_expert(model, None):
            assert relative(logits(model), base) < 1e-6
        assert torch.equal(t2.get_expert(model)["model.layers.0.mlp.up_proj"], a["model.layers.0.mlp.up_proj"])
    with t2.use_expert(model, b):
        alone_b = logits(model)
    with t2.use_expert(model, [a, None, b, a]):
        mixed = logits(model, torch.tensor([[5, 6, 7, 8, 9, 10]] * 4))
    for row, alone in zip(mixed, (alone_a, base, alone_b, alone_a)):
        assert relative(row, alone[0]) < 1e-5
    assert relative(logits(model), base) < 1e-6

@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_batch_says_what_each_expert_says_alone(family):
    model = t2.apply_svf(make(family), "all")
    experts = [random_expert(model, 1, size=2.0), None, random_expert(model, 2, size=2.0)]
    conversations = [say("What is 1 plus 2?"), say("Hello ABC"), say("Hello")]  # of different lengths: padding counts
    mixed = t2.generate(model, TOKENIZER, conversations, expert=experts, max_new_tokens=8)
    alone = [t2.generate(model, TOKENIZER, [c], expert=e, max_new_tokens=8)[0] for c, e in zip(conversations, experts)]
    assert mixed == alone and len(set(mixed)) > 1

@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_have_ended_leave_the_batch(family):
    model = t2.apply_svf(make(family), "all")
    conversations = [say("Hello"), say("What is 1 plus 2?")] * 3
    experts = [random_expert(model, i, 2.0) for i in range(6)]
    say_all = lambda segment: t2.generate(model, TOKENIZER, conversations, expert=experts, max_new_tokens=12,
                                          return_tokens=True, segment=segment)
    model.generation_config.eos_token_id = say_all(99)[0][0][2]  # so that the first row ends early
    rows, answers, whole = [], {}, model.forward
    for segment in (99, 1, 3):
        with mock.patch.object(model, "forward", lambda *a, **k: rows.append(len(k["input_ids"])) or whole(*a, **k)):
            answers[segment] = say_all(segment)
        rows, answers[segment] = [], (answers[segment], sum(rows))
    assert answers[99][0] == answers[1][0] == answers[3][0] and len({len(ids) for ids, _ in answers[1][0]}) > 1
    assert answers[1][1] == sum(len(ids) for ids, _ in answers[1][0]) <= answers[3][1] < answers[99][1]

def test_save_and_load(tmp_path):
    model = t2.apply_svf(make())
    expert = random_expert(model)
    t2.save_expert(expert, tmp_path / "e.safetensors", task="toy", seed=3)
    loaded = t2.load_expert(tmp_path / "e.safetensors", model)
    assert loaded.keys() == expert.keys() and all(torch.equal(loaded[k], expert[k]) for k in expert)
    assert adapt.read_experts(tmp_path, "x")["e"] == {"task": "toy", "seed": "3"}
    with pytest.raises(t2.Transformer2Error, match="another model"):
        t2.load_expert(tmp_path / "e.safetensors", t2.apply_svf(make(), "attention"))
    with pytest.raises(t2.Transformer2Error, match="cannot read"):
        t2.load_expert(tmp_path / "none.safetensors")
    with pytest.raises(TypeError):  # an interrupted write leaves neither a half file nor a temporary one
        t2.write_whole(tmp_path / "f", lambda tmp: tmp.write_text(None))
    assert [p.name for p in tmp_path.iterdir()] == ["e.safetensors"]

def test_authors_checkpoints(tmp_path):
    model = t2.apply_svf(make())
    p = {name: torch.randn_like(layer.s) for name, layer in t2.svf_layers(model).items()}
    torch.save({f"{name}.weight": x for name, x in p.items()}, tmp_path / "learnable_params.pt")
    numbered = {f"learnable_params_module_list.{i}": x for i, x in enumerate(p.values())}
    torch.save(numbered, tmp_path / "policy_params.pt")
    name, layer = next(iter(t2.svf_layers(model).items()))
    z = torch.sigmoid(p[name])
    theirs = (layer.U * (layer.s * z)) @ layer.Vh * layer.s.sum() / (layer.s * z).sum()  # their compose_new_params
    for file in ("learnable_params.pt", "policy_params.pt"):
        with t2.use_expert(model, t2.load_expert(tmp_path / file, model)):
            assert relative(layer.weight, theirs) < 1e-5

# --- the policy gradient

def test_policy_loss_by_hand():
    """One step, two actions, π = (p, 1 - p): J = r log p(a) - λ KL, both worked out on paper."""
    x = torch.tensor(0.3, requires_grad=True)
    p, q = torch.sigmoid(x).item(), 0.5
    logp = torch.stack([x, torch.zeros(())]).log_softmax(0).view(1, 1, 2)
    loss, kl = t2.policy_loss(logp, torch.tensor([[[math.log(q), math.log(1 - q)]]]), torch.tensor([[[0]]]),
                              torch.ones(1, 1, 1), torch.tensor([[-1.0]]), kl_coef=0.2)
    loss.backward()
    by_hand = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert kl.item() == pytest.approx(by_hand, rel=1e-5)
    assert loss.item() == pytest.approx(math.log(p) + 0.2 * by_hand, rel=1e-5)
    # d/dx: log p -> 1 - p;  KL -> p (1 - p) log[p (1 - q) / ((1 - p) q)]
    assert x.grad.item() == pytest.approx((1 - p) + 0.2 * p * (1 - p) * math.log(p / (1 - p)), rel=1e-4)

def test_masked_steps_do_not_count():
    logp = torch.randn(2, 3, 5).log_softmax(-1)
    ref, actions, adv = torch.randn(2, 3, 5).log_softmax(-1), torch.randint(5, (2, 3, 1)), torch.tensor([[1.0], [-1.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 0]])[..., None]
    full = t2.policy_loss(logp, ref, actions, mask, adv, 0.1)
    short = t2.policy_loss(logp[:, :2], ref[:, :2], actions[:, :2], mask[:, :2], adv, 0.1)
    assert torch.allclose(full[0], short[0]) and torch.allclose(full[1], short[1])

@pytest.mark.parametrize("stretch", [1, 1 << 24])
def test_log_policy_is_the_unpadded_models(stretch):  # logits step by step, or all at once
    model = make("gpt2")  # absolute positions: left padding would show
    inputs = t2.encode(model, TOKENIZER, [say("Hello"), say("What is 1 plus 2?")])
    completions = [[7, 8, 9], [10]]
    hidden, head, stretches, tokens, mask = t2.token_policy(model, inputs, completions, stretch)
    likely = sum((head(hidden[:, t]).gather(-1, tokens[:, t]) * mask[:, t]).sum((1, 2)) for t in stretches)
    for i, text in enumerate(["Hello", "What is 1 plus 2?"]):
        prompt = t2.encode(model, TOKENIZER, [say(text)])["input_ids"][0].tolist()
        logp = logits(model, torch.tensor([prompt + completions[i]]))[0].log_softmax(-1)
        alone = sum(logp[len(prompt) - 1 + t, token] for t, token in enumerate(completions[i]))
        assert likely[i].item() == pytest.approx(alone.item(), abs=1e-4)

def test_micro_batches_add_up_to_the_batch():
    model = t2.apply_svf(make())
    task = toy(lambda c, p: 1.0, max_new_tokens=4)
    problems = task.problems("train")[:6]
    answers = [([5, 6, 7][: 1 + i % 3], "", (-1.0) ** i) for i in range(6)]
    gradients = []
    for budget in (10 ** 6, 1):
        model.zero_grad()
        hp = t2.Hyperparameters(token_budget=budget)
        *_, kl = t2.accumulate_gradient(model, TOKENIZER, task, problems, answers, hp)
        gradients.append(torch.cat([layer.z.grad for layer in t2.svf_layers(model).values()]))
        assert kl == pytest.approx(0, abs=1e-6)  # z = 1 is the reference
    assert relative(gradients[1], gradients[0]) < 1e-4

def test_checkpointing_gives_the_same_gradient_in_less_memory():
    task, answers = toy(None, max_new_tokens=4), [([5, 6, 7], "", 1.0), ([8], "", -1.0)]
    gradients, peaks = [], []
    for checkpointing in (False, True):
        model = t2.apply_svf(make(), "all", checkpointing=checkpointing)
        with t2.use_expert(model, random_expert(model)), Peak(model) as peak:
            z = {name: layer.using.requires_grad_() for name, layer in t2.svf_layers(model).items()}
            hp = t2.Hyperparameters(kl_coef=0.1)
            t2.accumulate_gradient(model, TOKENIZER, task, task.problems("train")[:2], answers, hp)
        gradients.append(torch.cat([x.grad for x in z.values()]))
        peaks.append(peak.most)
    assert relative(*gradients) < 1e-4 and gradients[0].norm() > 1e-3 and peaks[1] < 0.8 * peaks[0]

def test_draws_follow_the_distribution_and_not_the_batch():
    model, n, how = make(), 4000, dict(max_new_tokens=1, temperature=2.0, return_tokens=True)
    drawn = t2.generate(model, TOKENIZER, [say("Hello")] * n, uniforms=torch.linspace(0, 1 - 1e-6, n)[:, None], **how)
    p = (logits(model, t2.encode(model, TOKENIZER, [say("Hello")])["input_ids"])[0, -1] / 2.0).softmax(0)
    assert torch.allclose(torch.bincount(torch.tensor([t for [t], _ in drawn]), minlength=len(p)) / n, p, atol=1e-3)
    conversations, u = [say("Hello"), say("What is 1 plus 2?"), say("A" * 9)], torch.rand(3, 8)
    together = t2.generate(model, TOKENIZER, conversations, max_new_tokens=8, temperature=2.0, uniforms=u)
    assert together == [t2.generate(model, TOKENIZER, [c], max_new_tokens=8, temperature=2.0, uniforms=u[i : i + 1])[0]
                        for i, c in enumerate(conversations)]

def train_two_tasks(path):
    """What test_two_processes_train_as_one runs in each process."""
    if t2.WORLD > 1:
        meet = dict(init_method=f"file://{path}.meet", rank=t2.RANK, world_size=t2.WORLD)
        torch.distributed.init_process_group("gloo", **meet)
    model, experts = t2.apply_svf(make()), {}
    for task in (toy(lambda c, p: 1.0 if c.strip()[:1].isdigit() else -1.0, max_new_tokens=3),
                 toy(lambda c, p: 1.0 if c == "blue" else -1.0, choices=["red", "blue"], prefill="The category is")):
        expert = t2.reinforce(model, TOKENIZER, task, steps=3, batch_size=31, lr=3e-2, kl_coef=0.2, validate_every=3)
        experts |= {f"{len(task.prefill)} {name}": z for name, z in expert.items()}
    if t2.RANK == 0:
        t2.save_expert(experts, path)

def test_two_processes_train_as_one(tmp_path):
    code = f"import sys, test_transformer2; test_transformer2.train_two_tasks({str(tmp_path / 'two')!r})"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}  # as torchrun would set
    both = [subprocess.Popen([sys.executable, "-c", code], env={**env, "RANK": str(rank)}, cwd=Path(__file__).parent,
                             stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for rank in range(2)]
    for process in both:
        errors = process.communicate(timeout=120)[1].decode()
        assert process.returncode == 0, errors[-3000:]
    train_two_tasks(tmp_path / "one")
    one, two = t2.load_expert(tmp_path / "one"), t2.load_expert(tmp_path / "two")
    assert all(torch.allclose(one[k], two[k], atol=1e-5) and (one[k] - 1).abs().max() > 0.01 for k in one | two)

@pytest.mark.parametrize("choices", [["red", "green", "blue"], None])
def test_reinforce_learns_and_resumes(choices, tmp_path, capsys):
    model = t2.apply_svf(make())
    if choices:  # one of three, by probability
        task = toy(lambda c, p: 1.0 if c == "blue" else -1.0, choices=choices, prefill="The category is")
    else:  # a first token out of the whole vocabulary
        task = toy(lambda c, p: 1.0 if c.strip()[:1].isdigit() else -1.0, max_new_tokens=1)
    hyper = dict(steps=24, batch_size=64, lr=3e-2, validate_every=8)
    before = t2.evaluate(model, TOKENIZER, task, task.problems("test"))
    expert = t2.reinforce(model, TOKENIZER, task, **hyper)
    after = t2.evaluate(model, TOKENIZER, task, task.problems("test"), expert=expert)
    assert before < 0.6 and after > 0.9
    assert all((layer.z == 1).all() for layer in t2.svf_layers(model).values())  # the model is as it was
    original, calls = task.reward, iter(range(10 ** 9))  # stop midway; going on gives the same expert, bit by bit
    def failing(c, p):
        if next(calls) > 64 * 9:
            raise KeyboardInterrupt
        return original(c, p)
    task.reward = failing
    with pytest.raises(KeyboardInterrupt):
        t2.reinforce(model, TOKENIZER, task, checkpoint=tmp_path / "state", **hyper)
    task.reward = original
    resumed = t2.reinforce(model, TOKENIZER, task, checkpoint=tmp_path / "state", **hyper)
    assert all(torch.equal(resumed[k], expert[k]) for k in expert)
    for other in (dict(lr=1.0), {}):
        if not other:
            model = t2.apply_svf(make(), "all")
        with pytest.raises(t2.Transformer2Error, match="begun with other settings"):
            t2.reinforce(model, TOKENIZER, task, checkpoint=tmp_path / "state", **{**hyper, **other})

def test_gradient_for_choices_is_that_of_the_exact_expectation():
    model, names = t2.apply_svf(make()).double(), ["red", "green", "blue"]
    task = toy(lambda c, p: {"red": 1.0, "green": -1.0, "blue": -0.1}[c], choices=names, prefill="The category is")
    problems, layer = task.problems("train")[:5], t2.svf_layers(model)["model.layers.0.mlp.down_proj"]
    with torch.no_grad():
        layer.z[2] = 1.5  # away from the reference, where the KL has a gradient
    def J():
        inputs = t2.encode(model, TOKENIZER, [task.conversation(p) for p in problems], task.prefill)
        with torch.no_grad():
            logp = t2.choice_policy(model, TOKENIZER, inputs, task.prefill, names)[0][:, 0].double()
            with t2.use_expert(model, None):
                ref = t2.choice_policy(model, TOKENIZER, inputs, task.prefill, names)[0][:, 0].double()
        return (logp.exp() * (torch.tensor([1.0, -1.0, -0.1]) - 0.3 * (logp - ref))).sum(1).mean().item()
    hp = t2.Hyperparameters(kl_coef=0.3, token_budget=1)
    t2.accumulate_gradient(model, TOKENIZER, task, problems, [], hp)
    for i in (2, 5):
        ends = []
        for step in (1e-2, -1e-2):
            with torch.no_grad():
                layer.z[i] += step
                ends.append(J())
                layer.z[i] -= step
        assert -layer.z.grad[i].item() == pytest.approx((ends[0] - ends[1]) / 2e-2, rel=1e-2, abs=2e-5)

def test_kl_holds_the_policy_back():
    model = t2.apply_svf(make())
    task = toy(lambda c, p: 1.0 if c == "blue" else -1.0, choices=["red", "green", "blue"], prefill="The category is")
    distance = []
    for kl_coef in (0.0, 10.0):
        expert = t2.reinforce(model, TOKENIZER, task, steps=10, batch_size=64, lr=2e-2, kl_coef=kl_coef,
                              validate_every=100)
        distance.append(sum(((z - 1) ** 2).sum() for z in expert.values()))
    assert distance[1] < 0.7 * distance[0]

# --- self-adaptation

def test_choices_are_scored_by_their_own_probability():
    model = make()
    conversations = [say("Hello"), say("What is 1 plus 2?")]
    prefill = "The category is"
    for choices, counted, passes in (  # told apart at once, later, and later in two places: by how many tokens, passes
            (["red", "green", "other"], [1, 1, 1], 1), (["4 5", "4 6", "7"], [4, 4, 2], 1),
            (["4 5", "4 6", "7 8", "7"], [4, 4, 3, 3], 2)):
        inputs = t2.encode(model, TOKENIZER, conversations, prefill)
        with torch.no_grad(), mock.patch.object(t2, "token_policy", wraps=t2.token_policy) as seen:
            scores = t2.choice_policy(model, TOKENIZER, inputs, prefill, choices)[0][:, 0]
        assert seen.call_count == passes
        assert torch.allclose(scores.exp().sum(1), torch.ones(2), atol=1e-5)
        end = TOKENIZER.eos_token_id
        ids = [TOKENIZER(f" {choice}")["input_ids"] + [end] for choice in choices]
        for row, c in zip(scores, conversations):
            prompt, alone = t2.encode(model, TOKENIZER, [c], prefill)["input_ids"][0].tolist(), []
            for i, count in zip(ids, counted):
                logp = logits(model, torch.tensor([prompt + i]))[0].log_softmax(-1)
                alone.append(sum(logp[len(prompt) - 1 + t, i[t]] for t in range(count)))
            assert torch.allclose(row, torch.stack(alone).log_softmax(0), atol=1e-4)

def test_two_pass_answers_with_the_chosen_expert():
    model = t2.apply_svf(make(), "all")
    experts = {"red": random_expert(model, 1), "green": None, "blue": random_expert(model, 2)}
    conversations = [say(f"What is {a} plus {b}?") for a in (1, 2) for b in (1, 2, 0)]
    classifier = random_expert(model, 3, size=2.0)
    answers = t2.two_pass(model, TOKENIZER, conversations, experts, classifier=classifier, max_new_tokens=6)
    chosen = t2.classify(model, TOKENIZER, conversations, [*experts, "other"], expert=classifier)
    assert [c for c, _ in answers] == chosen
    for conversation, (category, text) in zip(conversations, answers):
        expert = experts.get(category)
        assert [text] == t2.generate(model, TOKENIZER, [conversation], expert=expert, max_new_tokens=6)

@pytest.mark.parametrize("per_layer", [False, True])
def test_cem_finds_a_known_optimum(per_layer, monkeypatch):
    model = t2.apply_svf(make())
    experts = {"a": random_expert(model, 1), "b": random_expert(model, 2)}
    best = torch.tensor([[1.3, 0.2], [-0.6, 0.5]])[:, : 2 if per_layer else 1]
    target = t2.mix(list(experts.values()), best)
    far = lambda e: sum(((e[k] - target[k]) ** 2).sum().item() for k in target)
    monkeypatch.setattr(t2, "rollout", lambda *a, expert, **k: [([], "", 1.0 if far(e) < 9 else -1.0) for e in expert])
    monkeypatch.setattr(t2, "solution_likelihood", lambda *args: np.array([-far(e) for e in args[-1]]))
    z, alphas = t2.few_shot(model, TOKENIZER, toy(None), [{"answer": ""}], experts, iterations=30, per_layer=per_layer)
    assert torch.allclose(alphas, best, atol=0.1)
    assert all(torch.allclose(z[k], t2.mix(list(experts.values()), alphas)[k]) for k in z)

def test_mix_of_one_expert_is_that_expert():
    model = t2.apply_svf(make())
    a, b = random_expert(model, 1), random_expert(model, 2)
    z = t2.mix([a, b], torch.tensor([[1.0], [0.0]]))
    assert all(torch.allclose(z[k], a[k]) for k in a)
    with t2.use_expert(model, t2.mix([a, b], torch.zeros(2, 1))):
        assert relative(logits(model), logits(make())) < 1e-4

# --- prompts, tasks, command lines

def test_no_chat_template_and_no_pad_token(capsys):
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = tokenizer.pad_token = None
    texts = t2.generate(make(), tokenizer, [say("Hello"), say("What is 1 plus 2?")], max_new_tokens=3, prefill="The")
    assert len(texts) == 2 and "no chat template" in capsys.readouterr().err

def test_end_tokens():
    model, tokenizer = make(), copy.deepcopy(TOKENIZER)
    for models, tokenizers, end in (([3, 0], "<end>", [3, 0]), (None, "<pad>", [0]), (None, None, None)):
        model.generation_config.eos_token_id, tokenizer.eos_token = models, tokenizers
        with mock.patch.object(model, "generate", wraps=model.generate) as asked:
            assert len(t2.generate(model, tokenizer, [say("Hello")], max_new_tokens=3)) == 1
        assert asked.call_args.kwargs["eos_token_id"] == end

def test_prompts_that_cannot_be_answered():
    model = make()
    with pytest.raises(t2.Transformer2Error, match="context ends at 64"):
        t2.generate(model, TOKENIZER, [say("A" * 80)])
    with pytest.raises(t2.Transformer2Error, match="reads only text"):
        t2.generate(model, TOKENIZER, [[{"role": "user", "content": [{"type": "image", "image": None}]}]])
    assert t2.generate(model, TOKENIZER, []) == []
    assert len(TOKENIZER(t2.generate(model, TOKENIZER, [say("A" * 50)], max_new_tokens=99)[0])["input_ids"]) <= 12

def test_sampling_ignores_the_models_own_generation_settings():
    model = make()
    plain = t2.generate(model, TOKENIZER, [say("Hello")], max_new_tokens=12)
    model.generation_config.repetition_penalty, model.generation_config.top_k = 5.0, 1
    assert t2.generate(model, TOKENIZER, [say("Hello")], max_new_tokens=12) == plain
    torch.manual_seed(0)
    assert len(set(t2.generate(model, TOKENIZER, [say("Hello")] * 20, max_new_tokens=5, temperature=2.0))) > 5

def test_one_file_is_enough(tmp_path):
    (tmp_path / "transformer2.py").write_text(Path(t2.__file__).read_text())
    code = "import transformer2, sys; assert not {'train_expert', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env={**os.environ, "PYTHONPATH": ""})

def test_llama_3_8b_trains_on_a_24_gb_card():
    dense, factored, step = counted_memory(SHAPES["Llama-3-8B"])
    assert (dense, factored) == pytest.approx((14.96, 17.96), abs=0.01) and step < 23

# --- the benchmark: python test_transformer2.py [--model DIR] [--json FILE]

class Peak(TorchDispatchMode):
    """The most bytes of tensors alive at a time inside; fake tensors, which are only shapes, count like real ones."""
    def __init__(self, *models):
        super().__init__()
        self.alive, self.now, self.most = set(), 0, 0
        self.count([t for model in models for t in (*model.parameters(), *model.buffers())])

    def count(self, made):
        for storage in (t.untyped_storage() for t in tree_leaves(made) if isinstance(t, torch.Tensor)):
            if (key := storage._cdata) not in self.alive:
                self.change(self.alive.add, key, storage.nbytes())
                weakref.finalize(storage, self.change, self.alive.discard, key, -storage.nbytes())

    def change(self, note, key, size):
        note(key)
        self.now += size
        self.most = max(self.most, self.now)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count(made := function(*args, **kwargs or {}))
        return made

def our_step(model, inputs, completions, rewards, micro=16, **hyper):
    """accumulate_gradient on given tokens; 16 rows of 128 tokens are its micro-batch by default."""
    groups = [list(range(i, min(i + micro, len(rewards)))) for i in range(0, len(rewards), micro)]
    parts = [(rows, {key: value[rows] for key, value in inputs.items()}) for rows in groups]
    answers = [(c, "", r) for c, r in zip(completions, rewards)]
    with mock.patch.object(t2, "batches", lambda *_: parts):
        problems = [{"question": ""}] * len(answers)
        t2.accumulate_gradient(model, None, toy(None), problems, answers, t2.Hyperparameters(**hyper))

def textbook_step(model, inputs, completions, rewards, micro=16, pairs=(), lean=False):
    """The same by autograd through whole rows with all their logits. pairs: (dense layer, SVFLinear) of the composed
    form as in the released code: W' = U diag(s z) Vᵀ goes into the dense model, and is made once more to pull its
    gradient back to z. lean: the shortest arithmetic for that."""
    compose = lambda layer: layer.U @ torch.diag(layer.s * layer.z) @ layer.Vh
    for linear, layer in pairs:
        linear.weight = nn.Parameter((layer.weight if lean else compose(layer)).detach())
    ids, T = torch.cat([inputs["input_ids"], torch.tensor(completions, device=model.device)], 1), len(completions[0])
    advantages = torch.tensor(rewards, device=model.device) - np.mean(rewards)
    for i in range(0, len(ids), micro):
        logp = F.log_softmax(model(input_ids=ids[i : i + micro]).logits[:, -T - 1 : -1].float(), -1)
        taken = logp.gather(-1, ids[i : i + micro, -T:, None]).sum((1, 2))
        (-(taken * advantages[i : i + micro]).sum() / len(ids)).backward()
    for linear, layer in pairs:
        if lean:
            layer.z.grad = ((layer.U.T @ linear.weight.grad) * layer.Vh).sum(1) * layer.s
        else:
            compose(layer).backward(linear.weight.grad)

def llama(vocabulary, width, inner, layers, heads, groups, tied=True):
    return LlamaConfig(vocab_size=vocabulary, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
                       num_attention_heads=heads, num_key_value_heads=groups, tie_word_embeddings=tied)

SHAPES = {"Qwen2.5-0.5B": llama(151936, 896, 4864, 24, 14, 2), "Qwen2.5-1.5B": llama(151936, 1536, 8960, 28, 12, 2),
          "Qwen2.5-3B": llama(151936, 2048, 11008, 36, 16, 2),
          "Llama-3-8B": llama(128256, 4096, 14336, 32, 32, 8, False)}

def counted_memory(config):
    """GiB of dense and of factored weights, and at the peak of a step on one row of 1,024 tokens, with the KL and
    checkpointing, in bfloat16: the step itself runs, on fake tensors."""
    with FakeTensorMode(), contextlib.suppress(DataDependentOutputException):  # of the means that it returns
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        half = torch.ones(1, 512, dtype=torch.long)
        sizes = [Peak(model).now, Peak(t2.apply_svf(model, checkpointing=True)).now]
        with Peak(model) as peak:
            our_step(model, {"input_ids": half, "attention_mask": half}, [[5] * 512], [1.0], kl_coef=0.1)
    return [size / 2**30 for size in (*sizes, peak.most)]

TESTS = "f = remote('f')\nassert f(2) == 4\nassert f(-3) == 9\nassert f(0.5) == 0.25"  # as MBPP's are

def benchmark():
    parser = argparse.ArgumentParser(description="Speed and memory, each as a ratio to something real in the same run.")
    parser.add_argument("--model", default="tiny", help="as for train_expert.py")
    parser.add_argument("--json", help="also write the table to this file")
    parser.add_argument("--repeats", type=int, default=3, help="each figure is the median of so many")
    args, table = parser.parse_args(), []
    cuda = torch.cuda.is_available()

    def rows(title, unit, values):  # ratios are to the first
        for name, value in values.items():
            ratio = value / [*values.values()][0]
            table.append({"what": f"{title}: {name}", "unit": unit, "value": value, "ratio": ratio})
            print(f"{ratio:8.2f} x {value:12.3f} {unit:9} {title}: {name}", flush=True)

    def seconds(ways, repeats=args.repeats):  # in turns, so that a slow moment of the machine meets them all
        times = np.zeros((repeats + 1, len(ways)))
        for i, j in np.ndindex(*times.shape):
            start = time.time()
            [*ways.values()][j]()
            torch.cuda.synchronize() if cuda else None
            times[i, j] = time.time() - start
        return dict(zip(ways, np.median(times[1:], 0).tolist()))  # the first round warms up

    def memory(way, *models):
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        with Peak(*models) as peak:
            way()
        return (torch.cuda.max_memory_allocated() if cuda else peak.most) / 2**30

    dense, processor = train_expert.load_model(args.model)
    machine = torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} CPU threads"
    print(f"{args.model} on {machine}, medians of {args.repeats}")
    weights = [m.weight for name, m in dense.named_modules()
               if re.search(t2.TARGETS["mlp"], name) and hasattr(m, "weight")]
    with tempfile.TemporaryDirectory() as cache:
        rows("decompose the MLPs", "s", seconds({
            "torch.linalg.svd": lambda: [torch.linalg.svd(W.float(), full_matrices=False) for W in weights],
            "apply_svf": lambda: t2.apply_svf(copy.deepcopy(dense)),
            "apply_svf, cached": lambda: t2.apply_svf(copy.deepcopy(dense), "mlp", cache)}))

    torch.manual_seed(0)
    model, composed = t2.apply_svf(copy.deepcopy(dense)), copy.deepcopy(dense).requires_grad_(False)
    saving = t2.apply_svf(copy.deepcopy(dense), checkpointing=True)
    pairs = [(composed.get_submodule(name), layer) for name, layer in t2.svf_layers(model).items()]
    ids = torch.randint(min(1000, dense.config.vocab_size), (64, 128), device=dense.device)
    def step(way, model, count=8, **more):
        inputs = {"input_ids": ids[:count, :64], "attention_mask": torch.ones_like(ids[:count, :64])}
        return lambda: way(model, inputs, ids[:count, 64:].tolist(), [(-1.0) ** i for i in range(count)], **more)
    ways = {"composed form": step(textbook_step, composed, pairs=pairs), "ours": step(our_step, model),
            "ours, checkpointing": step(our_step, saving), "ours, with the KL": step(our_step, model, kl_coef=0.1),
            "composed form, one row at a time": step(textbook_step, composed, pairs=pairs, micro=1),
            "composed form, lean": step(textbook_step, composed, pairs=pairs, lean=True),
            "ours, one row at a time": step(our_step, model, micro=1)}
    models = [(composed, model), (model,), (saving,), (model,), (composed, model), (composed, model), (model,)]
    try:
        from peft import LoraConfig, get_peft_model
        config = LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"])
        models.append((get_peft_model(copy.deepcopy(dense), config),))
        ways["PEFT LoRA, rank 16 on q and v"] = step(textbook_step, *models[-1])
    except ImportError:
        print("no PEFT LoRA to compare with: pip install peft")
    rows("training step, 8 rows of 128 tokens", "s", seconds(ways))
    rows("its peak memory", "GiB", {name: memory(way, *used) for (name, way), used in zip(ways.items(), models)})
    rows("training step, 64 rows", "s", seconds({"composed form": step(textbook_step, composed, 64, pairs=pairs),
                                                 "ours": step(our_step, model, 64)}, 1))

    for m in (dense, model):
        m.generation_config.eos_token_id = 1 << 40  # every answer has its full length
    asked = [say(f"What is {i} plus {i + 1}?") for i in range(24)]
    experts = [random_expert(model, i, 0.05) for i in range(3)]
    with t2.use_expert(model, experts[0]):
        folded = t2.merge_svf(copy.deepcopy(model))
    answer = lambda expert, m=model, **how: lambda: t2.generate(m, processor, asked, expert=expert, **how)
    plain = dict(max_new_tokens=100, do_sample=False, pad_token_id=0)
    times = seconds({"plain transformers": lambda: dense.generate(**t2.encode(dense, processor, asked), **plain),
                     "one expert, folded": answer(None, folded, max_new_tokens=100),
                     "one expert": answer(experts[0], max_new_tokens=100),
                     "three experts and none, mixed": answer([*experts, None] * 6, max_new_tokens=100)})
    rows("generate 24 x 100 tokens", "tokens/s", {name: 2400 / t for name, t in times.items()})
    passes = {"pass 2, 150-token answers": answer([*experts, None] * 6, max_new_tokens=150),
              "pass 1": lambda: t2.classify(model, processor, asked, ["reasoning", "math", "code", "other"])}
    rows("two passes over 24 prompts", "s", seconds(passes))
    seen = []
    with mock.patch.object(model.base_model, "forward", lambda *a, run=model.base_model.forward, **k: seen.append(
            k["input_ids"].numel()) or run(*a, **k)):
        counts = {name: (seen.clear(), way(), sum(seen))[-1] for name, way in passes.items()}
    rows("token-forwards", "", counts)

    task, found = toy(lambda text, p: float(len(text) % 3 == 0), max_new_tokens=8), []
    population = 32 if args.model == "tiny" else 16
    def search():
        found.append(t2.few_shot(model, processor, task, task.problems("train")[:10], dict(enumerate(experts)),
                                 population=population, iterations=2)[1])
    def one_by_one(way, join):
        return lambda m, p, t, many, *rows, **how: join([
            way(m, p, t, many[i : i + 10], *[r[i] for r in rows], **{key: r[i] for key, r in how.items()})
            for i in range(0, len(many), 10)])
    def slow_search():
        with mock.patch.object(t2, "rollout", one_by_one(t2.rollout, lambda parts: sum(parts, []))), \
             mock.patch.object(t2, "solution_likelihood", one_by_one(t2.solution_likelihood, np.concatenate)):
            search()
    rows(f"cross-entropy search, 2 x {population} candidates", "s",
         seconds({"one at a time": slow_search, "in batches": search}))
    assert all(torch.allclose(alphas, found[0]) for alphas in found), "both ways must find the same"
    if os.environ.get("HF_ALLOW_CODE_EVAL") == "1":
        with ThreadPoolExecutor(16) as pool:
            tried = lambda: list(pool.map(rewards.run_tests, ["def f(x):\n    return x * x"] * 64, [TESTS] * 64))
            rows("64 programs in the sandbox, 16 at once", "s", seconds({"tests passed": tried}))
    for name, config in SHAPES.items():
        counts = dict(zip(("dense", "factored", "training step"), counted_memory(config)))
        rows(f"GiB of {name}, counted", "GiB", counts)
    if args.json:
        Path(args.json).write_text(json.dumps(table, indent=1))

if __name__ == "__main__":
    benchmark()
