"""The complete meta-gradient through real LoRA layers, against finite differences and against plain autograd."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from surface import letter_rows, trained_folder
from tiny_models import (
    QUANTISED,
    assert_equal,
    dense_twin,
    fingerprint,
    plain_loss,
    random_batch,
    reference_model,
    repeated,
    tiny,
    tolerance,
)
from torch import nn

from meta_peft import adapt as adapt_to_task
from meta_peft import load
from meta_peft.algorithms import MAML, ImplicitMAML, MultiTask, Reptile
from meta_peft.errors import MetaPeftError
from meta_peft.functional.adapter_loss import AdapterLoss
from meta_peft.inner_loop.inner_loop import adapt
from meta_peft.inner_optimizers import SGD, Adam, InnerRule
from meta_peft.inner_optimizers.rule import RATES
from meta_peft.lora.fast_weights import FastWeights
from meta_peft.outer_loop.outer_loop import LearnedRates, assign_gradient, meta_gradient
from meta_peft.params import take_task
from meta_peft.types import EpisodeBatch, Params

RULE = InnerRule(lr=0.05, steps=1)
MODELS = ["llama", "gpt2", "float32", "nf4", "int8"]
OPTIMIZERS = {"sgd": SGD(), "momentum": SGD(momentum=0.9), "adam": Adam(eps_root=1e-2)}


def own_rates(rule: InnerRule, loss_fn: AdapterLoss) -> LearnedRates:
    """Rates that differ by matrix and by step, so that a mixed-up index shows."""
    rates = LearnedRates(rule, dict(loss_fn.weights.parameters()))
    noise = torch.randn(rates.log_rates.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    rates.log_rates.data += 0.3 * noise.to(rates.log_rates.dtype)
    return rates


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_equals_finite_differences(kind: str, optimizer: str, steps: int):
    """One random direction for each LoRA matrix and for the rates of each step; fourth-order central differences."""
    model, batch = tiny(kind), random_batch(n_tasks=2, support=2, query=1)
    loss_fn = AdapterLoss(model)
    rule = InnerRule(OPTIMIZERS[optimizer], lr=0.02, steps=steps, learn_rates=True, rates_per_step=True)
    rates = own_rates(rule, loss_fn)
    grads = meta_gradient(loss_fn, batch, MAML(rule), rates).grads
    adapter = {name: p.detach() for name, p in loss_fn.weights.parameters().items()}
    generator = torch.Generator().manual_seed(3)
    h, stencil = 1e-4, {-2: 1 / 12, -1: -8 / 12, 1: 8 / 12, 2: -1 / 12}

    def values(starts: list[Params], hyper: Params) -> list[float]:
        """The objective at each start, by `adapt`, which builds no graph. All starts go through as one stack."""
        stack = {n: torch.stack([s[n] for s in starts for _ in range(batch.n_tasks)]) for n in adapter}
        support, query = repeated(batch.support, len(starts)), repeated(batch.query, len(starts))
        fast = adapt(loss_fn, stack, hyper, support, rule, stacked=True)
        return loss_fn(fast, query).view(len(starts), -1).mean(1).tolist()

    directions = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in adapter.items()}
    starts = [{**adapter, n: adapter[n] + k * h * d} for n, d in directions.items() for k in stencil]
    found = torch.tensor(values(starts, rates.values()), dtype=torch.float64).view(len(adapter), len(stencil))
    slopes = found @ torch.tensor([*stencil.values()], dtype=torch.float64) / h
    for slope, (name, direction) in zip(slopes.tolist(), directions.items(), strict=True):
        assert slope == pytest.approx((grads.adapter[name] * direction).sum().item(), rel=1e-6), name

    log_rates = rates.log_rates.detach()
    assert grads.hyper[RATES].shape == (steps, len(adapter))
    for step in range(steps):
        direction = torch.zeros_like(log_rates)
        direction[step] = torch.randn(len(adapter), generator=generator, dtype=torch.float64)
        slope = sum(w * values([adapter], {RATES: log_rates + k * h * direction})[0] for k, w in stencil.items()) / h
        assert slope == pytest.approx((grads.hyper[RATES] * direction).sum().item(), rel=1e-6), f"rates of step {step}"


def unrolled(model, batch: EpisodeBatch, rule: InnerRule, adapter: Params, log_rates: torch.Tensor):
    """MAML written out: one task at a time, PEFT's ordinary forwards, autograd through everything."""
    adapter = {n: p.detach().clone().requires_grad_() for n, p in adapter.items()}
    log_rates = log_rates.detach().clone().requires_grad_()
    losses = []
    for task in range(batch.n_tasks):
        fast, m, v = dict(adapter), {}, {}
        for step in range(rule.steps):
            loss = plain_loss(model, fast, batch.support.tasks(task, task + 1))
            grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
            for i, (name, g) in enumerate(zip(list(fast), grads, strict=True)):
                if isinstance(rule.optimizer, Adam):
                    o = rule.optimizer
                    m[name] = o.beta1 * m.get(name, 0) + (1 - o.beta1) * g
                    v[name] = o.beta2 * v.get(name, 0) + (1 - o.beta2) * g**2
                    m_hat, v_hat = m[name] / (1 - o.beta1 ** (step + 1)), v[name] / (1 - o.beta2 ** (step + 1))
                    move = m_hat / ((v_hat + o.eps_root) ** 0.5 + o.eps)
                else:
                    move = m[name] = rule.optimizer.momentum * m.get(name, 0) + g
                fast[name] = fast[name] - log_rates[step, i].exp() * move
        losses.append(plain_loss(model, fast, batch.query.tasks(task, task + 1)))
    loss_T = torch.stack(losses)
    grads = torch.autograd.grad(loss_T.mean(), [*adapter.values(), log_rates])
    return loss_T.detach(), dict(zip(adapter, grads, strict=False)), grads[-1]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_equals_plain_unrolled_autograd(model_of, name: str, optimizer: str):
    model, batch = model_of(name), random_batch()
    loss_fn = AdapterLoss(model)
    rule = InnerRule(OPTIMIZERS[optimizer], lr=0.02, steps=2, learn_rates=True, rates_per_step=True)
    rates = own_rates(rule, loss_fn)
    result = meta_gradient(loss_fn, batch, MAML(rule), rates)
    reference, adapter = reference_model(model), dict(loss_fn.weights.parameters())
    loss_T, grads, rate_grads = unrolled(reference, batch, rule, adapter, rates.log_rates)
    assert_equal({"loss": result.metrics["loss"]}, {"loss": loss_T}, tolerance(name))
    assert_equal(result.grads.adapter, grads, tolerance(name))
    assert_equal(result.grads.hyper, {RATES: rate_grads}, tolerance(name))


@pytest.mark.parametrize("name", MODELS)
def test_does_not_depend_on_tasks_per_forward(model_of, name: str):
    loss_fn, batch = AdapterLoss(model_of(name)), random_batch(n_tasks=3)
    rule = InnerRule(lr=0.05, steps=2, learn_rates=True)
    whole = meta_gradient(loss_fn, batch, MAML(rule))
    for size in (1, 2, 7):
        parts = meta_gradient(loss_fn, batch, MAML(rule), tasks_per_forward=size)
        assert_equal(parts.grads.adapter, whole.grads.adapter, tolerance(name))
        assert_equal(parts.grads.hyper, whole.grads.hyper, tolerance(name))
        assert_equal(parts.metrics, whole.metrics, tolerance(name))
        assert parts.n_tasks == whole.n_tasks == 3


@pytest.mark.parametrize(
    "algorithm", [MAML(InnerRule(lr=0.05), first_order=True), Reptile(InnerRule(lr=0.05)), MultiTask()]
)
def test_does_not_depend_on_tasks_per_forward_whatever_the_algorithm(algorithm):
    model, batch = tiny(), random_batch(n_tasks=3)
    whole = meta_gradient(model, batch, algorithm)
    assert_equal(meta_gradient(model, batch, algorithm, tasks_per_forward=2).grads.adapter, whole.grads.adapter, 1e-12)


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_base_equals_its_dequantised_twin(model_of, name: str):
    model, batch = model_of(name), random_batch()
    algorithm = MAML(InnerRule(lr=0.05, steps=2, learn_rates=True))
    quantised, dense = meta_gradient(model, batch, algorithm), meta_gradient(dense_twin(model), batch, algorithm)
    assert_equal(quantised.metrics, dense.metrics, 1e-5)
    assert_equal(quantised.grads.adapter, dense.grads.adapter, 1e-4)
    assert_equal(quantised.grads.hyper, dense.grads.hyper, 1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_training_leaves_the_base_as_it_was(model_of, name: str):
    """Every byte of it, over meta-gradients, outer steps and a forward without gradients; and the PEFT model too."""
    model = model_of(name).train()
    before, keys, modes = (
        fingerprint(model),
        list(model.state_dict()),
        {n: m.training for n, m in model.named_modules()},
    )
    attributes = {n: set(m.__dict__) for n, m in model.named_modules()}
    loss_fn, algorithm = AdapterLoss(model), MAML(InnerRule(lr=0.05, steps=2, learn_rates=True))
    rates = LearnedRates(algorithm.inner, dict(loss_fn.weights.parameters()))
    start = {n: p.detach().clone() for n, p in loss_fn.weights.parameters().items()}
    outer = torch.optim.AdamW([*loss_fn.weights.parameters().values(), rates.log_rates], lr=1e-2)
    for seed in range(3):
        gradient = meta_gradient(loss_fn, random_batch(seed=seed), algorithm, rates)
        assign_gradient(gradient, loss_fn, rates)
        outer.step()
    loss_fn.scores(start, random_batch().query)
    assert fingerprint(model) == before
    assert list(model.state_dict()) == keys
    assert {n: m.training for n, m in model.named_modules()} == modes
    # bitsandbytes notes the state of a layer (`support_avx512bf16_for_cpu`) beside its weights
    assert {n: set(m.__dict__) - {"support_avx512bf16_for_cpu"} for n, m in model.named_modules()} == {
        n: a - {"support_avx512bf16_for_cpu"} for n, a in attributes.items()
    }
    assert {type(m) for n, m in model.named_modules() if "lora_A." in n or "lora_B." in n} == {nn.Linear}
    assert all((p.detach() != start[n]).any() for n, p in loss_fn.weights.parameters().items())


def test_more_training_lowers_the_loss():
    model, batch = tiny(), random_batch()
    loss_fn, algorithm = AdapterLoss(model), MAML(InnerRule(lr=0.1, steps=1))
    outer = torch.optim.Adam(loss_fn.weights.parameters().values(), lr=0.05)
    losses = []
    for _ in range(8):
        gradient = meta_gradient(loss_fn, batch, algorithm)
        losses.append(gradient.metrics["loss"].mean().item())
        assign_gradient(gradient, loss_fn)
        outer.step()
    assert losses[-1] < 0.8 * losses[0]


def test_gradients_of_rates_only_where_they_are_learned():
    model, batch = tiny(), random_batch()
    rule = InnerRule(lr=0.05, steps=1)
    rates = LearnedRates(rule, dict(AdapterLoss(model).weights.parameters()))
    assert not rates.log_rates.requires_grad
    gradient = meta_gradient(model, batch, MAML(rule), rates)
    assert gradient.grads.hyper == {}
    assign_gradient(gradient, model, rates)
    assert rates.log_rates.grad is None
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_" in n)
    assert all(p.grad is None for n, p in model.named_parameters() if "lora_" not in n)


def test_a_first_order_loss_is_refused_by_second_order_maml():
    """Its checks did not rule out attention kernels that have no second derivative."""
    loss_fn = AdapterLoss(tiny(), second_order=False)
    with pytest.raises(MetaPeftError, match="second_order=True"):
        meta_gradient(loss_fn, random_batch(), MAML())
    meta_gradient(loss_fn, random_batch(), MAML(first_order=True))


@pytest.mark.parametrize(
    "algorithm",
    [
        MAML(InnerRule(lr=0.05, steps=2), memory="finite_differences"),
        ImplicitMAML(InnerRule(lr=0.05, steps=2, proximal=5.0), memory="finite_differences"),
    ],
)
def test_finite_differences_do_with_fused_attention(algorithm):
    """Nothing is differentiated twice, so a loss that was checked for first derivatives only will do."""
    model, batch = tiny(), random_batch()
    fused, plain = (AdapterLoss(model, second_order=second_order) for second_order in (False, True))
    found, exact = (
        meta_gradient(fused, batch, algorithm),
        meta_gradient(plain, batch, replace(algorithm, memory="auto")),
    )
    assert_equal(found.grads.adapter, exact.grads.adapter, 1e-6)


def test_finite_differences_are_refused_on_a_coarse_base():
    model, batch = tiny("llama", torch.float32), random_batch()
    model.get_base_model().lm_head.to(torch.bfloat16)
    algorithm = MAML(InnerRule(lr=0.05), memory="finite_differences")
    with pytest.raises(
        MetaPeftError, match=r"activations are in torch\.bfloat16: nothing but rounding.*memory='replay'"
    ):
        meta_gradient(model, batch, algorithm)


def test_a_gradient_can_be_assigned_under_attention_without_a_second_derivative():
    model, batch = tiny(), random_batch()
    gradient = meta_gradient(model, batch, MAML(first_order=True))
    model.get_base_model().config._attn_implementation = "flash_attention_2"
    assign_gradient(gradient, model)
    weights = AdapterLoss(model, second_order=False).weights.parameters()
    assert all(p.grad is gradient.grads.adapter[n] for n, p in weights.items())


# ---- which adapter is learned


def of_two_adapters():
    model = tiny()
    model.add_adapter("second", model.peft_config["default"])
    return model


def has_gradients(model, adapter: str) -> bool:
    return any(p.grad is not None for p in FastWeights(model, adapter).parameters().values())


def test_a_gradient_goes_to_the_adapter_that_it_is_of():
    """The names of weights are the same in both."""
    model = of_two_adapters()
    gradient = meta_gradient(model, random_batch(), MAML(RULE))
    assert gradient.of_adapter == "default"
    model.set_adapter("second")
    assign_gradient(gradient, model)
    assert has_gradients(model, "default")
    assert not has_gradients(model, "second")
    with pytest.raises(
        MetaPeftError, match="is of the adapter 'default', and the AdapterLoss of 'second': give the one"
    ):
        assign_gradient(gradient, AdapterLoss(model))
    assert not has_gradients(model, "second")


def test_a_sum_of_gradients_has_no_adapter_and_goes_to_the_active_one():
    model = of_two_adapters()
    gradient = meta_gradient(model, random_batch(), MAML(RULE))
    model.set_adapter("second")
    assign_gradient(replace(gradient, of_adapter=None), model)
    assert has_gradients(model, "second")
    model.meta_peft = SimpleNamespace(adapter="default")
    with pytest.raises(MetaPeftError, match="which of them is to be learned"):
        assign_gradient(replace(gradient, of_adapter=None), model)


def test_after_adapt_a_model_is_not_learned_from_unless_the_adapter_is_named():
    """Else the start would stay as it is, and the adapted weights would get its gradients."""
    model, _ = adapt_to_task(load(None, trained_folder()), letter_rows("p")[:2])
    batch, algorithm = random_batch(), MAML(RULE)
    start = dict(FastWeights(model, "default").parameters())
    with pytest.raises(MetaPeftError, match="'adapted', and the meta-learned one is 'default': which of them"):
        meta_gradient(model, batch, algorithm)
    named = meta_gradient(AdapterLoss(model, adapter="default"), batch, algorithm)
    model.set_adapter("default")
    again = meta_gradient(model, batch, algorithm)
    assert_equal(again.grads.adapter, named.grads.adapter, 0)
    assign_gradient(again, model)
    assert all(p.grad is again.grads.adapter[name] for name, p in start.items())
    other = meta_gradient(AdapterLoss(model, adapter="adapted"), batch, algorithm)
    assert (other.of_adapter, named.of_adapter) == ("adapted", "default")


@pytest.mark.parametrize(
    ("fixed", "message"),
    [
        ("score", "fixed must be a set or a list of names of weights; got the text 'score'"),
        (("nonsense",), "fixed has 'nonsense', which is the name of no weight of the adapter"),
    ],
)
def test_fixed_weights_that_there_are_not(fixed, message: str):
    loss_fn = AdapterLoss(tiny())
    gradient = meta_gradient(loss_fn, random_batch(), MAML(RULE))
    with pytest.raises(MetaPeftError, match=message):
        assign_gradient(gradient, loss_fn, fixed=fixed)
    assert not has_gradients(loss_fn.model, "default")


def test_fixed_weights_get_no_gradient():
    loss_fn = AdapterLoss(tiny())
    gradient = meta_gradient(loss_fn, random_batch(), MAML(RULE))
    first, *others = loss_fn.weights.parameters()
    with pytest.raises(MetaPeftError, match=f"Did you mean '{first}'"):
        assign_gradient(gradient, loss_fn, fixed=[first.replace("layers.0", "layer.0")])
    assign_gradient(gradient, loss_fn, fixed=[first])
    weights = loss_fn.weights.parameters()
    assert weights[first].grad is None
    assert all(weights[name].grad is not None for name in others)


# ---- rates of another rule


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            InnerRule(learn_rates=True, fast="lora_B"),
            r"it has 1 of .*lora_A\.weight, where .* rule has 1 of .*lora_B\.",
        ),
        (
            InnerRule(learn_rates=True),
            r"it has 1 of .*lora_A\.weight, where .* rule has 1 of .*lora_B\.",
        ),
        (InnerRule(learn_rates=True, fast="q_proj.lora_A"), "it has 1 of .*k_proj.*, where .* rule has nothing"),
        (InnerRule(learn_rates=True, fast="lora_A", rates_per_entry=True), "it has 1 of .*, where .* rule has 32 of"),
    ],
    ids=["as many others", "more", "fewer", "for each entry"],
)
def test_rates_of_another_rule(other: InnerRule, message: str):
    """With as many weights they would be mixed up, without an error."""
    loss_fn, batch = AdapterLoss(tiny()), random_batch()
    rates = LearnedRates(InnerRule(learn_rates=True, fast="lora_A"), loss_fn.weights.parameters())
    with pytest.raises(MetaPeftError, match=f"made for another rule or another adapter: {message}"):
        meta_gradient(loss_fn, batch, MAML(other), rates)
    meta_gradient(loss_fn, batch, MAML(InnerRule(steps=1, fast="lora_A")), rates)
    meta_gradient(loss_fn, batch, MultiTask(other), rates)  # which has no inner loop


def test_rates_of_what_is_no_adapter():
    model = tiny()
    with pytest.raises(MetaPeftError, match=r"adapter must be the LoRA matrices by name, .*; got a generator"):
        LearnedRates(InnerRule(), model.named_parameters())
    with pytest.raises(MetaPeftError, match="inner must be an InnerRule"):
        LearnedRates(SGD(), AdapterLoss(model).weights.parameters())
    of_all = LearnedRates(InnerRule(), dict(model.named_parameters()))
    with pytest.raises(MetaPeftError, match="made for another rule or another adapter"):
        meta_gradient(model, random_batch(), MAML(RULE), of_all)


def test_rates_that_are_no_module():
    loss_fn, batch = AdapterLoss(tiny()), random_batch()
    rule = InnerRule(lr=0.05, steps=2, learn_rates=True)
    rates = LearnedRates(rule, loss_fn.weights.parameters())
    gradient = meta_gradient(loss_fn, batch, MAML(rule), rates)
    for wrong in (rates.log_rates, rates.values()):
        with pytest.raises(
            MetaPeftError, match=r"rates must be a LearnedRates, or None; got a .*Give the module itself"
        ):
            meta_gradient(loss_fn, batch, MAML(rule), wrong)
        with pytest.raises(MetaPeftError, match="rates must be a LearnedRates, or None"):
            assign_gradient(gradient, loss_fn, wrong)
    of_steps = LearnedRates(replace(rule, rates_per_step=True), loss_fn.weights.parameters())
    with pytest.raises(
        MetaPeftError, match=r"rates of shape \[1, 14\], and LearnedRates holds some of shape \[2, 14\]"
    ):
        assign_gradient(gradient, loss_fn, of_steps)
    assert not has_gradients(loss_fn.model, "default")


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_gradients_where_the_caller_asks_for_none(without):
    """As `adapt` does it; the rows are made there too."""
    model, algorithm = tiny(), MAML(InnerRule(lr=0.05, steps=2, learn_rates=True, fast="o_proj"))
    expected = meta_gradient(model, random_batch(), algorithm)
    with without():
        found = meta_gradient(model, random_batch(), algorithm)
        assign_gradient(found, model)
    assert_equal(found.grads.adapter, expected.grads.adapter, 0)
    assert_equal(found.grads.hyper, expected.grads.hyper, 0)
    assert has_gradients(model, "default")


def test_one_task_with_plain_matrices_is_a_stack_of_one():
    loss_fn, batch = AdapterLoss(tiny()), random_batch(n_tasks=1)
    rule, adapter = InnerRule(lr=0.1, steps=2), {n: p.detach() for n, p in loss_fn.weights.parameters().items()}
    hyper = rule.initial_rates(adapter)
    stacked = adapt(loss_fn, {n: p.unsqueeze(0) for n, p in adapter.items()}, hyper, batch.support, rule)
    single = adapt(loss_fn, adapter, hyper, batch.support, rule)
    assert_equal(single, take_task(stacked, 0), 1e-12)


def test_what_is_no_batch():
    batch = random_batch()
    with pytest.raises(MetaPeftError, match=r"episode_batch must be an EpisodeBatch, .* got a list"):
        meta_gradient(tiny(), [batch], MAML())


@pytest.mark.parametrize("size", [0, -1, 1.5, True])
def test_no_tasks_per_forward(size: int):
    with pytest.raises(MetaPeftError, match="tasks_per_forward must be 1 or more"):
        meta_gradient(tiny(), random_batch(), MAML(), tasks_per_forward=size)
