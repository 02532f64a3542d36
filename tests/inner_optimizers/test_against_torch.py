"""SGD and Adam take the steps that torch's own take, and can be differentiated through."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from meta_peft.inner_optimizers import SGD, Adam, InnerRule
from meta_peft.params import gradients, leaves

PAIRS = {
    "sgd": (SGD(), lambda p, lr: torch.optim.SGD(p, lr)),
    "momentum": (SGD(momentum=0.9), lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9)),
    "adam": (Adam(eps_root=0), lambda p, lr: torch.optim.Adam(p, lr)),
    "other betas": (
        Adam(beta1=0.5, beta2=0.7, eps=1e-3, eps_root=0),
        lambda p, lr: torch.optim.Adam(p, lr, betas=(0.5, 0.7), eps=1e-3),
    ),
    "weight decay": (Adam(eps_root=0, weight_decay=3.0), lambda p, lr: torch.optim.AdamW(p, lr, weight_decay=3.0)),
}


def start():
    g = torch.Generator().manual_seed(0)
    return {n: torch.randn(2, 3, generator=g, dtype=torch.float64) for n in ("a", "b")}


@pytest.mark.parametrize("name", PAIRS)
def test_same_trajectory_as_torch(name: str):
    """Ten steps on Rosenbrock's valley, where gradients change size and sign."""
    optimizer, torchs = PAIRS[name]
    rule = InnerRule(optimizer, lr=2e-4, steps=10)
    fast, own = start(), leaves({n: p.clone() for n, p in start().items()})
    reference, state, hyper = torchs(own.values(), rule.lr), optimizer.init(fast), rule.initial_rates(fast)

    def loss(p):
        return ((1 - p["a"]) ** 2 + 100 * (p["b"] - p["a"] ** 2) ** 2).sum()

    for step in range(10):
        fast = leaves(fast)
        fast, state = rule.step(step, fast, gradients(loss(fast), fast), state, hyper)
        reference.zero_grad()
        loss(own).backward()
        reference.step()
        for n in fast:
            torch.testing.assert_close(fast[n], own[n].detach(), rtol=1e-12, atol=1e-15)
    assert all((fast[n] - start()[n]).abs().min() > 1e-4 for n in fast)


@pytest.mark.parametrize("optimizer", [SGD(), SGD(momentum=0.9), Adam(eps_root=1e-2)])
def test_directions_are_differentiable_twice(optimizer):
    """In the gradients of two steps, so that what is carried from step to step is differentiated as well."""

    def second_direction(*grads):
        state = optimizer.init({"w": grads[0]})
        for step, g in enumerate(grads):
            direction, state = optimizer.direction(step, {"w": g}, {"w": g}, state)
        return direction["w"] ** 2

    grads = [torch.randn(2, 2, dtype=torch.float64).requires_grad_() for _ in range(2)]
    assert gradcheck(second_direction, grads)
    assert gradgradcheck(second_direction, grads)


@pytest.mark.parametrize(("eps_root", "finite"), [(0.0, False), (1e-10, True), (Adam().eps_root, True)])
def test_eps_root_keeps_the_derivative_finite_at_a_gradient_of_zero(eps_root: float, finite: bool):
    """As every LoRA A matrix has while B is zero."""
    adam, g = Adam(eps_root=eps_root), torch.zeros(1, 1, requires_grad=True)
    direction, _ = adam.direction(0, {"w": g}, {"w": g}, adam.init({"w": g}))
    (derivative,) = torch.autograd.grad(direction["w"].sum(), g)
    assert torch.isfinite(derivative).all() == finite


@pytest.mark.parametrize("optimizer", [SGD(momentum=0.9), Adam()])
def test_stack_is_each_task_alone(optimizer):
    stack = torch.randn(3, 2, 2)
    together, _ = optimizer.direction(0, {"w": stack}, {"w": stack}, optimizer.init({"w": stack}))
    for t in range(3):
        alone, _ = optimizer.direction(0, {"w": stack[t]}, {"w": stack[t]}, optimizer.init({"w": stack[t]}))
        assert torch.equal(alone["w"], together["w"][t])
