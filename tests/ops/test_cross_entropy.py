from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from derivatives import noting_saved_tensors, randn, third_derivative, up_to_second
from torch.autograd import gradcheck, gradgradcheck

from meta_peft.ops.cross_entropy import cross_entropy

LABELS = torch.tensor([0, 2, 3])


def by_torch(logits: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, LABELS, reduction="none")


def ours(logits: torch.Tensor) -> torch.Tensor:
    return cross_entropy(logits, LABELS)


def test_first_and_second_derivatives():
    assert gradcheck(ours, randn(3, 4))
    assert gradgradcheck(ours, randn(3, 4))


def test_equals_torch():
    torch.testing.assert_close(
        up_to_second(ours, [randn(3, 4)]), up_to_second(by_torch, [randn(3, 4)]), rtol=1e-13, atol=1e-15
    )


@pytest.mark.parametrize("height", [300.0, -300.0])
def test_logits_too_large_for_an_exponential(height: float):
    logits = torch.zeros(3, 4, dtype=torch.float64)
    logits[:, 0] = height
    logits.requires_grad_()
    found = up_to_second(ours, [logits])
    assert all(t.isfinite().all() for t in found)
    torch.testing.assert_close(found, up_to_second(by_torch, [logits]), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_in_float32_at_least_and_its_gradient_in_the_precision_of_the_logits(dtype: torch.dtype):
    """As in transformers, which takes the loss of logits rounded up to float32."""
    logits = randn(3, 4, dtype=dtype)
    found, expected = up_to_second(ours, [logits]), up_to_second(lambda z: by_torch(z.float()), [logits])
    assert [t.dtype for t in found] == [torch.float32, dtype, dtype]
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found, expected, rtol=4 * eps, atol=eps)
    torch.testing.assert_close(found[0], expected[0])


def test_no_labelled_position_at_all():
    logits = torch.zeros(0, 4, dtype=torch.float64, requires_grad=True)
    loss = cross_entropy(logits, torch.zeros(0, dtype=torch.long))
    assert loss.shape == (0,)
    assert torch.autograd.grad(loss.sum(), logits)[0].shape == (0, 4)


def test_the_logits_and_their_probabilities_are_all_that_is_kept_of_their_size():
    logits = randn(3, 50)
    with noting_saved_tensors() as saved:
        (first,) = torch.autograd.grad(ours(logits * 1).sum(), logits, create_graph=True)
        torch.autograd.grad((first**2).sum(), logits)
    kept = {t.data_ptr(): t for t in saved if t.numel() == 150}
    del kept[first.data_ptr()]  # saved by the square
    assert len(kept) == 2
    assert sum(torch.equal(t, logits) for t in kept.values()) == 1
    assert sum(torch.allclose(t, logits.softmax(-1), rtol=1e-12) for t in kept.values()) == 1


def test_a_third_derivative_raises():
    with pytest.raises(RuntimeError, match="no third one"):
        third_derivative(ours, randn(3, 4))
