from __future__ import annotations

import torch

from meta_peft.tasks.sampling.gradient_sketch import GradientSketch


def params(seed: int, shared: float = 0.0) -> dict[str, torch.Tensor]:
    generators = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    shapes = {"a": (30, 40), "b": (500,)}
    common, own = ({n: torch.randn(s, generator=g) for n, s in shapes.items()} for g in generators)
    return {name: shared * common[name] + own[name] for name in shapes}


def flat(values: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([v.flatten() for v in values.values()]).double()


def test_inner_products_of_sketches_are_those_of_gradients():
    """Each cosine is right to some 1 / sqrt(256), and inner products on average over sketches."""
    sketch = GradientSketch(256, seed=0)
    gradients = [params(seed, shared) for seed in range(1, 7) for shared in (0.0, 1.0, 3.0)]
    for i, one in enumerate(gradients):
        for other in gradients[:i]:
            exact = torch.cosine_similarity(flat(one), flat(other), dim=0)
            assert abs(torch.cosine_similarity(sketch(one), sketch(other), dim=0) - exact) < 4.5 / 256**0.5

    one, other = gradients[1], gradients[4]
    sketches = [GradientSketch(256, seed) for seed in range(200)]
    products = torch.stack([sketch(one) @ sketch(other) for sketch in sketches])
    assert abs(products.mean() - flat(one) @ flat(other)) < 4 * products.std() / 200**0.5


def test_it_is_linear_and_a_function_of_the_seed():
    one, other = params(1), params(2)
    total = {name: one[name].double() + 2 * other[name].double() for name in one}
    sketch = GradientSketch(64, seed=0)
    torch.testing.assert_close(sketch(total), sketch(one) + 2 * sketch(other))
    assert torch.equal(sketch(one), GradientSketch(64, seed=0)(one))
    assert not torch.equal(sketch(one), GradientSketch(64, seed=1)(one))
