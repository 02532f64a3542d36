"""One contract for every architecture: a stack of tasks is its tasks, and the meta-gradient is the derivative it claims.

Models are in float64 throughout (`architectures.in_float64` says what is replaced for that), so that "equal" means 1e-12
and a finite difference is good to 1e-6.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, base_of, batch_for, lora, plain_loss, rows_for
from peft import PeftModel
from tiny_models import assert_equal, fingerprint

from meta_peft.adapters.adapter_files import load_adapter
from meta_peft.adapters.hub import save_adapted
from meta_peft.algorithms import MAML
from meta_peft.functional.adapter_loss import AdapterLoss
from meta_peft.inner_loop.inner_loop import adapt
from meta_peft.inner_optimizers import InnerRule
from meta_peft.inner_optimizers.rule import RATES
from meta_peft.outer_loop.outer_loop import LearnedRates, meta_gradient
from meta_peft.params import expand, gradients, leaves
from meta_peft.preflight.base import ROUTED_BY_TOKEN
from meta_peft.types import EpisodeBatch, MetaGradient, Params

RULE = InnerRule(lr=0.05, steps=2, learn_rates=True, rates_per_step=True)


@dataclass(frozen=True)
class Case:
    """LoRA on some layers of an architecture, and whether a stack of tasks can go through them at once."""

    kind: str
    targets: tuple[str, ...] | str = ()
    at_once: bool = True
    options: dict[str, Any] = field(default_factory=dict)

    def model(self) -> PeftModel:
        how = ARCHITECTURES[self.kind]
        return lora(base_of(self.kind), self.targets or how.targets, **self.options)


CASES = {kind: Case(kind) for kind in ARCHITECTURES} | {
    "llama, DoRA": Case("llama", options={"use_dora": True}),
    "gpt2, DoRA": Case("gpt2", options={"use_dora": True}),
    "phi, DoRA": Case("phi", options={"use_dora": True}),
    "opt, DoRA": Case("opt", ("fc1", "fc2", "v_proj"), at_once=False, options={"use_dora": True}),
    "llama, rank-stabilised": Case("llama", options={"use_rslora": True, "rank": 3}),
    "t5, decoder only": Case("t5", r".*decoder\..*\.(q|k|v|o|wi|wo)"),
    "whisper, decoder only": Case("whisper", r".*decoder\..*\.(q_proj|v_proj|fc1)"),
    # One task after the other:
    "llama, embedding": Case("llama", ("embed_tokens", "q_proj"), at_once=False),
    "gemma, embedding": Case("gemma", ("embed_tokens",), at_once=False),  # it scales what it embeds
    "t5, embeddings": Case("t5", ("embed_tokens", "q"), at_once=False),
    "bert, embeddings": Case("bert", ("word_embeddings", "position_embeddings", "query"), at_once=False),
    "llama, head": Case("llama", ("lm_head", "down_proj"), at_once=False),
    "whisper, head": Case("whisper", ("proj_out", "v_proj"), at_once=False),
    "opt, feed-forward": Case("opt", ("fc1", "fc2", "q_proj"), at_once=False),  # flattened to [B * L, H]
    "qwen2_moe, shared expert": Case("qwen2_moe", ("up_proj", "q_proj"), at_once=False),  # likewise
}


@dataclass(frozen=True)
class Trained:
    """A case, the meta-gradient of one batch in training mode, and what the model looked like before."""

    loss_fn: AdapterLoss
    batch: EpisodeBatch
    rates: LearnedRates
    gradient: MetaGradient
    before: tuple[dict[str, str], list[str]]

    @property
    def adapter(self) -> Params:
        return {n: p.detach() for n, p in self.loss_fn.weights.parameters().items()}


def look(model: PeftModel) -> tuple[dict[str, str], list[str]]:
    return fingerprint(model), list(model.state_dict())


@cache
def trained(case: str) -> Trained:
    model = CASES[case].model().train()
    before, batch = look(model), batch_for(model.get_base_model())
    loss_fn = AdapterLoss(model)
    rates = LearnedRates(RULE, dict(loss_fn.weights.parameters()))
    noise = torch.randn(rates.log_rates.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    rates.log_rates.data += 0.3 * noise
    return Trained(loss_fn, batch, rates, meta_gradient(loss_fn, batch, MAML(RULE), rates), before)


@pytest.mark.parametrize("pad", ["left", "right"])
@pytest.mark.parametrize("case", CASES)
def test_a_stack_equals_its_tasks_one_at_a_time(case: str, pad: str):
    """Loss and gradient, each task from a start of its own, against PEFT's own forward with all logits."""
    model = CASES[case].model().train()
    rows = rows_for(model.get_base_model(), n_tasks=3, pad=pad)
    loss_fn, reference = AdapterLoss(model), copy.deepcopy(model).eval()
    generator = torch.Generator().manual_seed(4)
    stack = expand(dict(loss_fn.weights.parameters()), 3)
    stack = leaves({n: p + 0.05 * torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in stack.items()})
    loss_T = loss_fn(stack, rows)
    grads = gradients(loss_T.sum(), stack)
    scores = loss_fn.scores(stack, rows)
    for t in range(3):
        fast = leaves({n: p[t] for n, p in stack.items()})
        loss = plain_loss(reference, fast, rows.tasks(t, t + 1))
        assert loss_T[t].item() == pytest.approx(loss.item(), rel=1e-12)
        assert scores.loss_T[t].item() == pytest.approx(loss.item(), rel=1e-12)
        assert_equal({n: g[t] for n, g in grads.items()}, gradients(loss, fast), 1e-12)
    assert loss_fn._at_once is CASES[case].at_once


@pytest.mark.parametrize("case", CASES)
def test_meta_gradient_equals_finite_differences(case: str):
    """Along one random direction of all LoRA matrices and all rates; fourth-order central differences."""
    run = trained(case)
    start = {**run.adapter, RATES: run.rates.log_rates.detach()}
    grads = {**run.gradient.grads.adapter, **run.gradient.grads.hyper}
    generator = torch.Generator().manual_seed(3)
    direction = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in start.items()}

    def objective(h: float) -> float:
        moved = {n: p + h * direction[n] for n, p in start.items()}
        hyper = {RATES: moved.pop(RATES)}
        fast = adapt(run.loss_fn, moved, hyper, run.batch.support, RULE)
        return run.loss_fn.scores(fast, run.batch.query).loss_T.mean().item()

    # Small enough to stay on one side of every kink of a ReLU and of every choice of a router.
    h, stencil = 1e-6, {-2: 1 / 12, -1: -8 / 12, 1: 8 / 12, 2: -1 / 12}
    slope = sum(weight * objective(k * h) for k, weight in stencil.items()) / h
    assert slope == pytest.approx(sum((grads[n] * d).sum().item() for n, d in direction.items()), rel=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_meta_gradient_equals_plain_unrolled_autograd(case: str):
    """MAML written out: one task at a time, PEFT's ordinary forwards, autograd through everything."""
    run = trained(case)
    reference = copy.deepcopy(run.loss_fn.model).eval()
    adapter, log_rates = leaves(run.adapter), run.rates.log_rates.detach().requires_grad_()
    losses = []
    for task in range(run.batch.n_tasks):
        support, query = (rows.tasks(task, task + 1) for rows in (run.batch.support, run.batch.query))
        fast = dict(adapter)
        for step in range(RULE.steps):
            grads = gradients(plain_loss(reference, fast, support), fast, create_graph=True)
            fast = {n: p - log_rates[step, i].exp() * grads[n] for i, (n, p) in enumerate(fast.items())}
        losses.append(plain_loss(reference, fast, query))
    loss_T = torch.stack(losses)
    expected = gradients(loss_T.mean(), {**adapter, RATES: log_rates})
    assert_equal({"loss": run.gradient.metrics["loss"]}, {"loss": loss_T.detach()}, 1e-12)
    assert_equal({**run.gradient.grads.adapter, **run.gradient.grads.hyper}, expected, 1e-11)


@pytest.mark.parametrize("case", CASES)
def test_second_order_terms_are_no_small_print(case: str):
    """Else the two tests before this one would also pass without them."""
    run = trained(case)
    first_order = meta_gradient(run.loss_fn, run.batch, MAML(RULE, first_order=True), run.rates).grads.adapter
    exact = run.gradient.grads.adapter
    assert max((first_order[n] - g).abs().max() / g.abs().max() for n, g in exact.items()) > 0.02


@pytest.mark.parametrize("case", CASES)
def test_training_leaves_the_model_as_it_was(case: str):
    run = trained(case)
    assert look(run.loss_fn.model) == run.before
    assert all(module.training for module in run.loss_fn.model.modules())


@pytest.mark.parametrize("case", CASES)
def test_what_is_saved_is_an_adapter_of_stock_peft(case: str, tmp_path: Path):
    """Moved weights, installed here, and saved and loaded on a fresh base without this library, and with it."""
    model = CASES[case].model().eval()
    loss_fn, rows = AdapterLoss(model), rows_for(model.get_base_model(), n_tasks=1)
    weights = {n: p.detach() * 1.5 for n, p in loss_fn.weights.parameters().items()}
    save_adapted(weights, model.peft_config["default"], "some/base", tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
        stock = PeftModel.from_pretrained(base_of(CASES[case].kind), tmp_path).eval()
        ours = load_adapter(base_of(CASES[case].kind), tmp_path, tuple(weights)).eval()
    with loss_fn.weights.installed(weights):
        mine = model(**rows.inputs).logits
    assert torch.equal(stock(**rows.inputs).logits, mine)
    assert torch.equal(ours(**rows.inputs).logits, mine)
    assert not torch.equal(model(**rows.inputs).logits, mine)


@pytest.mark.parametrize("kernel", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("kind", sorted(ROUTED_BY_TOKEN))
def test_other_kernels_for_experts_have_the_same_second_derivative(kind: str, kernel: str):
    """Those that `transformers` chooses by default know no float64, so they are held against a loop over experts."""
    batch, grads = batch_for(base_of(kind)), {}
    for implementation in ("eager", kernel):
        base = base_of(kind, dtype=torch.float32, experts_implementation=implementation)
        result = meta_gradient(lora(base, ARCHITECTURES[kind].targets), batch, MAML(RULE))
        grads[implementation] = {**result.grads.adapter, **result.grads.hyper}
    assert_equal(grads[kernel], grads["eager"], 1e-4)


def test_nothing_random_is_left_of_training():
    """Dropout, LayerDrop and SpecAugment, each of which would change the loss from call to call."""
    model = CASES["whisper"].model().train()
    loss_fn, rows = AdapterLoss(model), rows_for(model.get_base_model())
    weights = dict(loss_fn.weights.parameters())
    features = rows.inputs["input_features"].clone()
    losses = [loss_fn(weights, rows) for _ in range(3)]
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2])
    assert torch.equal(rows.inputs["input_features"], features)  # SpecAugment writes to its input
    copied = {n: t.clone() for n, t in rows.inputs.items()}
    assert not torch.equal(model(**copied).logits, model(**copied).logits)
