"""
The mathematics and the promises of transformer2.py, on small random models: no network, no GPU, no files from elsewhere.

    pytest                 # half a minute on two cores
"""
import copy
import math
import os
import random
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from transformers import (AutoModelForCausalLM, GemmaConfig, GPT2Config, LlamaConfig, LlavaConfig, Phi3Config,
                          Qwen2Config)

import adapt
import train_expert
import transformer2 as t2

WORDS = "Classify the question into one of these categories: red, green, blue, other. The category of this question is"
TOKENIZER = train_expert.tiny_tokenizer([WORDS, "What is 1 plus 2? Hello", "0123456789ABCDEFGH"])
SMALL = dict(vocab_size=len(TOKENIZER), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
             max_position_embeddings=64, bos_token_id=None, eos_token_id=TOKENIZER.eos_token_id, pad_token_id=0)
FAMILIES = {
    "llama": LlamaConfig(**SMALL, intermediate_size=48, num_key_value_heads=2, initializer_range=0.2),
    "qwen2": Qwen2Config(**SMALL, num_key_value_heads=2, intermediate_size=48, initializer_range=0.2),  # biases on q, k and v
    "gpt2": GPT2Config(vocab_size=len(TOKENIZER), n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2,
                       bos_token_id=None, eos_token_id=TOKENIZER.eos_token_id),  # Conv1D
    "phi3": Phi3Config(**SMALL, intermediate_size=48, initializer_range=0.2),  # fused qkv and gate-up
    "gemma": GemmaConfig(**SMALL, num_key_value_heads=2, intermediate_size=48, head_dim=8, initializer_range=0.2),  # tied embeddings
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

def test_vision_towers_are_left_alone():
    config = LlavaConfig(vision_config=dict(model_type="clip_vision_model", hidden_size=16, intermediate_size=16,
                         num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4),
                         text_config=FAMILIES["llama"].to_dict(), image_token_index=3)
    from transformers import LlavaForConditionalGeneration
    names = list(t2.svf_layers(t2.apply_svf(LlavaForConditionalGeneration(config), "all")))
    assert names and not any("vision" in n or "projector" in n for n in names)

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
    conversations = [say("What is 1 plus 2?"), say("Hello ABC"), say("Hello")]  # of different lengths: padding counts too
    mixed = t2.generate(model, TOKENIZER, conversations, expert=experts, max_new_tokens=8)
    alone = [t2.generate(model, TOKENIZER, [c], expert=e, max_new_tokens=8)[0] for c, e in zip(conversations, experts)]
    assert mixed == alone and len(set(mixed)) > 1

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
    torch.save({f"learnable_params_module_list.{i}": x for i, x in enumerate(p.values())}, tmp_path / "policy_params.pt")
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
def test_log_policy_is_the_unpadded_models(stretch, monkeypatch):
    monkeypatch.setattr(t2, "STRETCH", stretch)  # logits step by step, or all at once
    model = make("gpt2")  # absolute positions: left padding would show
    inputs = t2.encode(model, TOKENIZER, [say("Hello"), say("What is 1 plus 2?")])
    completions = [[7, 8, 9], [10]]
    hidden, head, stretches, tokens, mask = t2.network(model, inputs, completions)
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
        *_, kl = t2.accumulate_gradient(model, TOKENIZER, task, problems, answers, t2.Hyperparameters(token_budget=budget))
        gradients.append(torch.cat([layer.z.grad for layer in t2.svf_layers(model).values()]))
        assert kl == pytest.approx(0, abs=1e-6)  # z = 1 is the reference
    assert relative(gradients[1], gradients[0]) < 1e-4

@pytest.mark.parametrize("choices", [["red", "green", "blue"], None])
def test_reinforce_learns_and_resumes(choices, tmp_path, capsys):
    model = t2.apply_svf(make())
    if choices:  # one of three, by probability
        task = toy(lambda c, p: 1.0 if c == "blue" else -1.0, choices=choices, prefill="The category of this question is")
    else:  # a first token out of the whole vocabulary
        task = toy(lambda c, p: 1.0 if c.strip()[:1].isdigit() else -1.0, max_new_tokens=1)
    hyper = dict(steps=24, batch_size=64, lr=3e-2, validate_every=8)
    before = t2.evaluate(model, TOKENIZER, task, task.problems("test"))
    expert = t2.reinforce(model, TOKENIZER, task, **hyper)
    after = t2.evaluate(model, TOKENIZER, task, task.problems("test"), expert=expert)
    assert before < 0.6 and after > 0.9
    assert all((layer.z == 1).all() for layer in t2.svf_layers(model).values())  # the model is as it was
    if choices:  # stop in the middle; going on gives the same expert to the last bit
        original, calls = task.reward, iter(range(10 ** 9))
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
        with pytest.raises(t2.Transformer2Error, match="begun with"):
            t2.reinforce(model, TOKENIZER, task, checkpoint=tmp_path / "state", **{**hyper, "lr": 1.0})

def test_gradient_for_choices_is_that_of_the_exact_expectation():
    model, names = t2.apply_svf(make()).double(), ["red", "green", "blue"]
    task = toy(lambda c, p: {"red": 1.0, "green": -1.0, "blue": -0.1}[c], choices=names, prefill="The category is")
    problems, layer = task.problems("train")[:5], t2.svf_layers(model)["model.layers.0.mlp.down_proj"]
    with torch.no_grad():
        layer.z[2] = 1.5  # away from the reference, where the KL has a gradient
    def J():
        inputs = t2.encode(model, TOKENIZER, [task.conversation(p) for p in problems], task.prefill)
        with torch.no_grad():
            logp = t2.log_choices(model, TOKENIZER, inputs, task.prefill, names)[0][:, 0].double()
            with t2.use_expert(model, None):
                ref = t2.log_choices(model, TOKENIZER, inputs, task.prefill, names)[0][:, 0].double()
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
    for choices in (["red", "green", "other"], ["4 5", "4 6", "7 8", "7"]):  # told apart at once, and later
        inputs = t2.encode(model, TOKENIZER, conversations, prefill)
        with torch.no_grad():
            scores = t2.log_choices(model, TOKENIZER, inputs, prefill, choices)[0][:, 0]
        assert torch.allclose(scores.exp().sum(1), torch.ones(2), atol=1e-5)
        end = TOKENIZER.eos_token_id
        ids = [TOKENIZER(f" {choice}")["input_ids"] + [end] for choice in choices]
        needed = [[0], [0], [0]] if choices[0] == "red" else [range(4), range(4), range(3), range(3)]
        for row, c in zip(scores, conversations):
            prompt, alone = t2.encode(model, TOKENIZER, [c], prefill)["input_ids"][0].tolist(), []
            for i, steps in zip(ids, needed):
                logp = logits(model, torch.tensor([prompt + i]))[0].log_softmax(-1)
                alone.append(sum(logp[len(prompt) - 1 + t, i[t]] for t in steps))
            assert torch.allclose(row, torch.stack(alone).log_softmax(0), atol=1e-4)

def test_two_pass_answers_with_the_chosen_expert():
    model = t2.apply_svf(make(), "all")
    experts = {"red": random_expert(model, 1), "green": None, "blue": random_expert(model, 2)}
    conversations = [say(f"What is {a} plus {b}?") for a in (1, 2) for b in (1, 2, 0)]
    classifier = random_expert(model, 3, size=2.0)
    answers = t2.two_pass(model, TOKENIZER, conversations, experts, classifier=classifier, max_new_tokens=6)
    assert [c for c, _ in answers] == t2.classify(model, TOKENIZER, conversations, [*experts, "other"], expert=classifier)
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

# --- rewards

@pytest.mark.parametrize("text, number", [
    ("so 3 + 4 = 7. The answer is 1,234.", 1234), ("#### -5", -5), (r"\boxed{18.00}", 18), ("it costs $7", 7),
    ("The answer is 5 + 3 = 8 eggs.", 8), ("Answer: 2.5 kg\nChecked 3 times.", 2.5), ("16-3", 3), ("2 or 3", 3),
    ("it is −4", -4), (r"\boxed{1{,}200}", 1200), ("The answer is: .5", 0.5), ("The answer is 3 of the 10", 3)])
def test_numeric_answers(text, number):
    assert train_expert.numeric_answer(text) == number != train_expert.numeric_answer("none")

@pytest.mark.parametrize("text, letter", [
    ("B", "B"), ("(B)", "B"), ("I think.\nThe answer is (B).", "B"), ("the answer is B because A is not", "B"),
    ("Answer: **B**", "B"), (r"\boxed{B}", "B"), ("(A) rusts, so the answer is (C)", "C"), ("The answer is iron ore.", "B"),
    ("The correct option is D.", "D"), ("The answer is iron.", "A"), ("Iron ore", "B"), ("(A) iron or (B)", ""),
    ("The answer is A heavy one", ""), ("Iron or tin?", ""), ("Iron or tin?\nA", "A"), ("the answer is the tin", "C")])
def test_letter_answers(text, letter):
    choices = {"text": ["iron", "iron ore", "tin", "None of these."], "label": list("ABCD")}
    assert train_expert.letter_answer(text, {"question": "Iron or tin?", "choices": choices}) == letter

@pytest.mark.parametrize("right, said, same", [
    (r"\frac{1}{2}", r"so \boxed{\dfrac12}", True), ("0.5", r"\boxed{\frac{2}{4}}", True), ("5", "It is 5", False),
    (r"90^\circ", r"\boxed{90}", True), ("5", r"\boxed{5\text{ cm}^2}", True), ("5", "The answer is 5 cm.", True),
    ("1000", r"\boxed{\$1,\!000}", True), ("[0,1)", r"\boxed{\left[0, 1\right)}", True), ("x=4", r"\boxed{4}", True),
    ("[0,1)", r"\boxed{[0,1]}", False), (r"\frac{\sqrt{3}}{2}", r"\boxed{\frac{\sqrt3}2}", True), ("5", r"\boxed{5", True),
    (r"\text{east}", r"\boxed{east}", True), ("x+1", r"\boxed{1+x}", False), ("1", r"\boxed{1/0}", False)])
def test_math_answers(right, said, same):
    assert (train_expert.math_answer(said) == train_expert.math_form(right)) == same

linux = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox for code runs on Linux")
SQ = "def f(x):\n    return x * x\n"
HEADER = {"prompt": 'import math\n\ndef f(x):\n    """Squares."""\n', "entry_point": "f"}
BODY = "    y = math.fabs(x)\n    return y * y\n"

def score(completion, problem={}, timeout=10):
    code = train_expert.extract_code(completion, problem)
    return train_expert.run_tests(code, "assert remote('f')(-2) == 4", timeout)

@linux
def test_programs_are_found_as_models_write_them(monkeypatch):
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    for text in (SQ, f"Sure:\n```python\n{SQ}```\nDone, for all x.", f"\n{SQ}```\nExplanation.", f"Here:\n{SQ}\nIt is easy.",
                 f"```\ndef f(x):\n    return 0\n```\nBetter:\n```py\n{SQ}", f"TWO = 2\n{SQ}\ndef g(x:",
                 f"from collections import Counter\nCounter('aab').most_common(1)\n{SQ}"):
        assert score(text), text
    for text in (BODY, BODY.lstrip(), f"```python\n{BODY}```", HEADER["prompt"] + BODY, SQ, f"\n{SQ}```", f"{SQ}\nf(0)"):
        assert score(text, HEADER), text
    for text, problem in [("", {}), ("I cannot.", {}), ("", HEADER), ("```python\n```", HEADER), ("def f(x:", {})]:
        assert not score(text, problem), text

HOSTILE = """while 1: pass | y = bytearray(20 << 30) | import os; [os.fork() for _ in range(99)] | y = open("PLACE/victim")
 | y = open("PLACE/new", "w") | y = open("here", "w") | import os; os.remove("PLACE/victim") | import os; os.environ["HOME"]
 | import os; os.listdir(os.path.expanduser("~")) | import shutil | import socket | import _socket | import subprocess
 | import _posixsubprocess | import os; os.system("touch PLACE/new") | y = "y" * 9 ** 7\nwhile 1: print(y)
 | g = lambda: g(); g() | import sys; sys.setrecursionlimit(10 ** 9); g = lambda: g(); g() | import gc; gc.get_objects()
 | import os; os.kill(os.getppid(), 9) | import os; os.killpg(0, 9) | import ctypes | import _ctypes | import threading
 | import sys; sys.modules["posix"].mkfifo("PLACE/new") | import sys; sys.modules["_thread"].start_new_thread(print, ())
 | import sys; sys.modules["_frozen_importlib"]._builtin_from_name("posix") | import time; time.clock_settime(0, 0)
 | import resource; resource.setrlimit(0, (-1, -1)) | import sys; sys.exit(0) | import os; os._exit(0) | y = input()
 | y = (lambda: 0).__code__.replace(co_code=b"") | import time; time.sleep(99) | y = 1; raise SystemExit"""
FAKES = ["class Equal:\n    __eq__ = lambda a, b: True\ndef f(x):\n    return Equal()", "def f(x):\n    print('4\\nOK')",
         "import os\ndef f(x):\n    os._exit(0)", "import builtins\nbuiltins.ascii = lambda v: 'x'\ndef f(x):\n    return 0",
         "import sys\ndef f(x):\n    sys.modules['__main__'].writer.write('True')\n    return True", "def f(x):\n    exit()",
         "class Pass:\n    __repr__ = lambda self: 'posix._exit(0)'\ndef f(x):\n    return Pass()",
         "def f(x):\n    return " + "(" * 9999, f"y = '\0'\n{SQ}", f"y = {'-' * 19000}1\n{SQ}", "def remote(f):\n    return f"]

@linux
def test_hostile_and_broken_programs_score_nothing_and_leave_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "homes"))
    for name in ("homes", "place"):
        (tmp_path / name).mkdir()
    (tmp_path / "place/victim").write_text("whole")
    attacks = HOSTILE.replace("PLACE", str(tmp_path / "place")).split("|")
    programs = [*(f"```\nx = 0\n{attack.strip()}\n{SQ}```" for attack in attacks), *FAKES]  # a right f after each
    assert len(programs) > 40 and score("x = 0\n" + SQ)
    with ThreadPoolExecutor(16) as pool:
        passed = [p for p, ok in zip(programs, pool.map(lambda p: score(p, timeout=3), programs)) if ok]
    assert passed == [] and os.listdir(tmp_path / "homes") == [] and os.listdir(tmp_path / "place") == ["victim"]
    assert (tmp_path / "place/victim").read_text() == "whole"
    processes = [p for p in Path("/proc").glob("[0-9]*/cwd") if os.access(p, os.R_OK)]
    assert not any(str(tmp_path / "homes") in os.readlink(p) for p in processes)

def test_code_runs_only_with_leave(monkeypatch):
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    for name in ("mbpp", "humaneval"):  # at once, not after the first answers
        with pytest.raises(t2.Transformer2Error, match="HF_ALLOW_CODE_EVAL=1"):
            train_expert.get_task(name)

def test_datasets_are_split_and_their_faults_are_said(monkeypatch, capsys):
    import datasets
    def task(name, **splits):
        made = {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}
        monkeypatch.setattr("datasets.load_dataset", lambda *args: made)
        return train_expert.get_task(name)
    rows = [{"question": "?", "answer": f"#### {i}"} for i in range(40)]
    gsm8k = task("gsm8k", train=rows[:9] + [{"question": "?", "answer": "#### many"}], test=rows[9:])
    assert [[p["answer"] for p in gsm8k.problems(s)] for s in ("train", "validation")] == [list("02468"), list("1357")]
    assert "1 of 5 problems left out" in capsys.readouterr().err and len(gsm8k.problems("test")) == 31
    math500 = task("math", test=[{"problem": "?", "answer": str(i), "solution": ""} for i in range(40)])
    assert [len(math500.problems(s)) for s in ("train", "validation", "test")] == [3, 2, 35]
    with pytest.raises(t2.Transformer2Error, match="no column 'question'"):
        task("arc-easy", train=[{"choices": {"label": ["A"], "text": ["x"]}, "answerKey": "A"}]).problems("train")
    monkeypatch.setattr("datasets.load_dataset", lambda *args: open("/no/such/file"))
    with pytest.raises(t2.Transformer2Error, match="cannot be loaded .FileNotFoundError."):
        gsm8k.problems("test")

@linux
def test_references_of_the_real_datasets_are_right(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    if (shared := Path("../shared/data/datasets")).exists():
        shutil.copytree(shared, tmp_path / "datasets")
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    def rewards(name, completion, splits=("test",)):
        task = train_expert.get_task(name)
        problems = [p for split in splits for p in task.problems(split)]
        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(lambda p: task.reward(completion(p), p), problems))
    try:
        assert rewards("gsm8k", lambda p: p["solution"]) == [1.0] * 1319
    except t2.Transformer2Error as error:
        pytest.skip(str(error))
    assert rewards("gsm8k", lambda p: f"The answer is {train_expert.numeric_answer(p['answer']) + 1}") == [-1.0] * 1319
    assert rewards("arc-challenge", lambda p: p["solution"]) == [1.0] * 1172
    assert rewards("arc-challenge", lambda p: p["question"]) == [-1.0] * 1172
    clock = time.time()
    assert rewards("humaneval", lambda p: p["solution"], ("train", "validation", "test")) == [1.0] * 164
    assert rewards("humaneval", lambda p: "", ("train", "validation", "test")) == [-1.0] * 164
    assert rewards("mbpp", lambda p: p["solution"], ("train",)) == [1.0] * 185  # of 187, two are left out
    assert 513 / (time.time() - clock) > 20

# --- prompts, tasks, command lines

def test_no_chat_template_and_no_pad_token(capsys):
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = tokenizer.pad_token = None
    texts = t2.generate(make(), tokenizer, [say("Hello"), say("What is 1 plus 2?")], max_new_tokens=3, prefill="The")
    assert len(texts) == 2 and "no chat template" in capsys.readouterr().err

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

def test_tiny_tasks_are_split_by_question():
    seen = {split: {p["question"] for p in train_expert.get_task("addition").problems(split)} for split in
            ("train", "validation", "test")}
    assert not (seen["train"] & seen["test"] or seen["train"] & seen["validation"] or seen["validation"] & seen["test"])
    corpus = {prompt for prompt, _ in train_expert.tiny_corpus(2000, random.Random(0))}
    assert not any(q in prompt for q in seen["test"] for prompt in corpus)
    for name in train_expert.TINY_CATEGORY:
        task = train_expert.get_task(name)
        for p in task.problems("test")[:50]:
            assert task.reward(p["answer"], p) == 1.0 and task.reward("nonsense", p) == -1.0

@pytest.mark.parametrize("command, says", [
    (["train_expert", "--model", "tiny", "--task", "nonsense"], "unknown task 'nonsense'"),
    (["train_expert", "--model", "no/such-model", "--task", "addition"], "neither 'tiny' nor a folder"),
    (["train_expert", "--model", "MODEL", "--task", "addition", "--targets", "nothing"], "match no linear layer"),
    (["train_expert", "--model", "MODEL", "--task", "addition", "--targets", "(["], "or a regular expression"),
    (["adapt", "--model", "MODEL", "--experts", "EMPTY", "Hello"], "no experts in"),
    (["adapt", "--model", "MODEL", "--experts", "OTHERS", "Hello"], "for another model"),
    (["adapt", "--model", "MODEL", "--experts", "OWN", "A" * 80], "context ends at 64"),
])
def test_bad_input_is_one_sentence_and_exit_code_2(command, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = make()
    for part in (model, TOKENIZER):
        part.save_pretrained(tmp_path / "MODEL")
    (tmp_path / "EMPTY").mkdir()
    t2.save_expert({"model.layers.0.mlp.up_proj": torch.ones(7)}, tmp_path / "OTHERS/x.safetensors")
    t2.save_expert(random_expert(t2.apply_svf(model)), tmp_path / "OWN/x.safetensors")
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train_expert.guarded({"adapt": adapt, "train_expert": train_expert}[command[0]].main)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and says in error and "Traceback" not in error
    assert error.strip().count("\n") == 0 and not (tmp_path / "experts").exists()

def test_one_file_is_enough(tmp_path):
    (tmp_path / "transformer2.py").write_text(Path(t2.__file__).read_text())
    code = "import transformer2, sys; assert not {'train_expert', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env={**os.environ, "PYTHONPATH": ""})
