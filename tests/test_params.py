from __future__ import annotations

import torch

from meta_peft.params import expand, flatten, gradients, leaves, take_task, unflatten, weighted_sum

PARAMS = {"a": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "b": torch.tensor([[5.0, 6.0, 7.0]])}


def test_gradients_are_zero_where_the_loss_does_not_depend():
    params = leaves(PARAMS)
    grads = gradients((params["a"] ** 2).sum(), params)
    assert torch.equal(grads["a"], 2 * PARAMS["a"])
    assert torch.equal(grads["b"], torch.zeros(1, 3))
    assert not grads["a"].requires_grad


def test_gradients_can_be_differentiated_again():
    params = leaves(PARAMS)
    first = gradients((params["a"] ** 3).sum(), params, create_graph=True)
    second = gradients(first["a"].sum(), params)
    assert torch.equal(second["a"], 6 * PARAMS["a"])


def test_expand_makes_equal_copies_without_memory():
    stack = expand(PARAMS, 3)
    assert stack["b"].shape == (3, 1, 3)
    assert all(torch.equal(copy, PARAMS["b"]) for copy in stack["b"])
    assert stack["b"].data_ptr() == PARAMS["b"].data_ptr()


def test_leaves_are_cut_off_from_the_graph_they_came_from():
    source = leaves(PARAMS)
    fresh = leaves({name: 2 * p for name, p in source.items()})
    assert all(p.is_leaf and p.requires_grad for p in fresh.values())
    assert torch.equal(gradients(fresh["b"].sum(), fresh)["b"], torch.ones(1, 3))
    assert source["b"].grad is None


def test_take_task_is_a_copy():
    stack = {"a": torch.arange(12.0).view(3, 2, 2).requires_grad_()}
    taken = take_task(stack, 1)
    assert torch.equal(taken["a"], torch.tensor([[4.0, 5.0], [6.0, 7.0]]))
    taken["a"].zero_()
    assert stack["a"][1, 0, 0] == 4
    assert not taken["a"].requires_grad


def test_weighted_sum():
    total = weighted_sum([(0.25, PARAMS), (2.0, PARAMS)])
    assert all(torch.allclose(total[n], 2.25 * PARAMS[n]) for n in PARAMS)
    assert weighted_sum([]) == {}


def test_unflatten_is_the_inverse_of_flatten():
    vector = flatten(PARAMS)
    assert vector.tolist() == [1, 2, 3, 4, 5, 6, 7]
    back = unflatten(vector, PARAMS)
    assert list(back) == list(PARAMS)
    assert all(torch.equal(back[n], PARAMS[n]) for n in PARAMS)
