"""Products with the Hessian of the tasks' losses, exact and by differences, against autograd on PEFT's own forward."""

from __future__ import annotations

import pytest
import torch
from tiny_models import assert_equal, plain_loss, random_rows, reference_model, tiny
from torch import Tensor

from meta_peft.functional.adapter_loss import AdapterLoss
from meta_peft.inner_loop.hessian import GradientGraph, difference_product
from meta_peft.params import dot, expand, gradients, leaves
from meta_peft.types import LossFn, Params, Rows

SLOW = {"none": lambda name: False, "A": lambda name: "lora_A" in name, "lower layer": lambda name: "layers.0" in name}


class Problem:
    """A point of a tiny model, each task at its own, and a vector for each task."""

    def __init__(self, slow: str, dtype: torch.dtype = torch.float64):
        self.model = tiny("llama", dtype, layers=2)
        self.loss_fn, self.rows = AdapterLoss(self.model), random_rows()
        own = {n: p.detach() for n, p in self.loss_fn.weights.parameters().items()}
        self.slow = {n: p for n, p in own.items() if SLOW[slow](n)}
        generator = torch.Generator().manual_seed(4)

        def noise(params: Params, size: float) -> Params:
            return {
                n: size * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
                for n, p in params.items()
            }

        fast = expand({n: p for n, p in own.items() if n not in self.slow}, 3)
        self.fast = {n: fast[n] + moved for n, moved in noise(fast, 0.05).items()}
        self.u = noise(fast, 1.0)

    def by_hand(self) -> tuple[Params, Params, Params]:
        """The gradient and the two products, one task after the other."""
        reference, parts, total = (
            reference_model(self.model),
            [],
            {n: torch.zeros_like(p) for n, p in self.slow.items()},
        )
        for t in range(3):
            fast, slow = leaves({n: p[t] for n, p in self.fast.items()}), leaves(self.slow)
            loss = plain_loss(reference, {**slow, **fast}, self.rows.tasks(t, t + 1))
            grads = gradients(loss, fast, create_graph=True)
            found = gradients(sum((grads[n] * self.u[n][t]).sum() for n in grads), {**fast, **slow})
            parts.append(({n: g.detach() for n, g in grads.items()}, {n: found[n] for n in fast}))
            total = {n: p + found[n] for n, p in total.items()}
        grads, products = ({n: torch.stack([part[i][n] for part in parts]) for n in self.fast} for i in (0, 1))
        return grads, products, total


def distances(a: Params, b: Params) -> Tensor:
    gap = {n: a[n] - b[n] for n in a}
    return (dot(gap, gap) / dot(b, b)).sqrt()


@pytest.mark.parametrize("slow", SLOW)
def test_the_exact_product_is_that_of_autograd(slow: str):
    problem = Problem(slow)
    graph = GradientGraph(problem.loss_fn, problem.fast, problem.slow, problem.rows)
    grads, of_fast, of_slow = problem.by_hand()
    assert_equal(graph.values, grads, 1e-12)
    found = graph.product(problem.u)
    assert_equal(found[0], of_fast, 1e-11)
    assert_equal(found[1], of_slow, 1e-11)
    assert not any(p.requires_grad for part in (graph.values, *found) for p in part.values())


def test_a_graph_gives_several_products_and_the_last_one_frees_it():
    problem = Problem("A")
    graph = GradientGraph(problem.loss_fn, problem.fast, problem.slow, problem.rows)
    twice = {n: 2 * p for n, p in problem.u.items()}
    single, double = graph.product(problem.u, last=False), graph.product(twice, last=False)
    for once, both in zip(single, double, strict=True):
        assert_equal(both, {n: 2 * p for n, p in once.items()}, 1e-13)
    for again, once in zip(graph.product(problem.u), single, strict=True):
        assert_equal(again, once, 1e-14)
    assert graph._grads == {}


def test_the_hessian_is_symmetric_and_tasks_do_not_mix():
    problem = Problem("none")
    graph = GradientGraph(problem.loss_fn, problem.fast, problem.slow, problem.rows)
    other = {n: p.flip(0) for n, p in problem.u.items()}
    hu, hv = (graph.product(vector, last=False)[0] for vector in (problem.u, other))
    torch.testing.assert_close(dot(hu, other), dot(hv, problem.u), rtol=1e-10, atol=1e-12)
    alone = {n: p * torch.tensor([0.0, 1, 0]).view(3, 1, 1) for n, p in problem.u.items()}
    product = graph.product(alone)[0]
    assert all((p[0] == 0).all() and (p[2] == 0).all() for p in product.values())
    assert_equal({n: p[1] for n, p in product.items()}, {n: p[1] for n, p in hu.items()}, 1e-12)


def linear(adapter: Params, rows: Rows) -> Tensor:
    return (3 * adapter["a"]).sum((1, 2)) + (adapter["b"] ** 2).sum((1, 2)) + 0 * adapter["s"].sum()


@pytest.mark.parametrize("product", ["exact", "differences"])
def test_what_the_gradient_does_not_depend_on_gets_zeros(product: str):
    """Weights that the loss is linear in, or does not depend on at all."""
    rows = Rows({}, torch.zeros(2, 1), 2)
    fast = {n: torch.full((2, 1, 3), 0.5, dtype=torch.float64) for n in ("a", "b")}
    slow, u = {"s": torch.ones(2, dtype=torch.float64)}, {n: torch.ones_like(p) for n, p in fast.items()}
    if product == "exact":
        of_fast, of_slow = GradientGraph(linear, fast, slow, rows).product(u)
    else:
        of_fast, of_slow = difference_product(linear, fast, slow, rows, u)
    torch.testing.assert_close(of_fast["a"], torch.zeros(2, 1, 3, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(of_fast["b"], torch.full((2, 1, 3), 2.0, dtype=torch.float64), rtol=1e-9, atol=0)
    assert (of_slow["s"] == 0).all()


def test_a_gradient_that_is_constant_altogether_gets_zeros():
    rows, fast = Rows({}, torch.zeros(2, 1), 2), {"a": torch.ones(2, 1, 3)}
    loss_fn: LossFn = lambda adapter, rows: (3 * adapter["a"]).sum((1, 2))  # noqa: E731
    graph = GradientGraph(loss_fn, fast, {}, rows)
    assert (graph.values["a"] == 3).all()
    assert (graph.product({"a": torch.ones(2, 1, 3)})[0]["a"] == 0).all()


@pytest.mark.parametrize("slow", SLOW)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-7), (torch.float32, 1e-2)])
def test_differences_are_close_to_the_product(slow: str, dtype: torch.dtype, tolerance: float):
    problem = Problem(slow, dtype)
    at = (problem.loss_fn, problem.fast, problem.slow, problem.rows)
    exact, found = GradientGraph(*at).product(problem.u), difference_product(*at, problem.u)
    assert (distances(found[0], exact[0]) < tolerance).all()
    for name, product in exact[1].items():
        assert (found[1][name] - product).norm() < 10 * tolerance * product.norm(), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_gap_to_a_wider_difference_tells_the_error(dtype: torch.dtype):
    """A central difference of width h is off by c h^2, one of 2 h by 4 c h^2: their gap, which is what `hessian_error`
    reports, is 3 times the error. Where h is so small that rounding is all of the error, r / h and half of that, the gap
    is of the size of the error."""
    for slow in SLOW:
        problem = Problem(slow, dtype)
        at = (problem.loss_fn, problem.fast, problem.slow, problem.rows)
        exact, _ = GradientGraph(*at).product(problem.u)

        def ratios(width: float, at: tuple = at, u: Params = problem.u, exact: Params = exact) -> Tensor:
            narrow, wide = (difference_product(*at, u, wider=w)[0] for w in (width, 2 * width))
            return distances(narrow, wide) / distances(narrow, exact)

        truncated = ratios(100.0)  # at 30 rounding is part of the error, on some machines
        assert ((truncated > 2.5) & (truncated < 3.5)).all(), truncated
        rounded = ratios(0.1)
        assert ((rounded > 0.5) & (rounded < 2)).all(), rounded
        reported = ratios(1.0)
        assert ((reported > 0.5) & (reported < 4)).all(), reported


def test_a_vector_of_any_length_is_differenced_as_well():
    """The step is relative to its length, for each task its own; a vector of zeros gives zeros."""
    problem = Problem("A")
    at = (problem.loss_fn, problem.fast, problem.slow, problem.rows)
    scale = torch.tensor([1e-20, 0.0, 1e20], dtype=torch.float64).view(3, 1, 1)
    exact, _ = GradientGraph(*at).product(problem.u)
    found, of_slow = difference_product(*at, {n: scale * p for n, p in problem.u.items()})
    for n, product in exact.items():
        assert (found[n][1] == 0).all()
        for t in (0, 2):
            assert (found[n][t] - scale[t] * product[t]).norm() <= 1e-6 * (scale[t] * product[t]).norm()
    assert all(p.isfinite().all() for p in of_slow.values())
