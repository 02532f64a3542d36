"""What is alive is counted to the byte, with values and without."""

from __future__ import annotations

import pytest
import torch

from meta_peft.estimate.live_memory import LiveMemory


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_storages_count_once_until_they_are_freed(device: str):
    weight = torch.ones(4, 8, device=device, requires_grad=True)  # made before: it does not count
    with LiveMemory(lambda function, given, tensor: f"{tensor.dim()}-D") as memory:
        rows = torch.ones(16, 8, device=device)
        view = rows.view(8, 16).T
        assert memory.now == 16 * 8 * 4
        product = rows @ weight.T
        graph = product.sin()  # keeps the product
        del product
        assert memory.now == (16 * 8 + 2 * 16 * 4) * 4
        del graph, rows
        assert memory.now == 16 * 8 * 4  # the view keeps it
        del view
        assert memory.now == 0
    assert memory.fullest == {"2-D": (16 * 8 + 2 * 16 * 4) * 4}


def test_the_fullest_moment_without_some_kinds_is_another():
    with LiveMemory(lambda function, given, tensor: "large" if tensor.numel() > 50 else "small", ("large",)) as memory:
        large = torch.ones(100)
        del large
        small = torch.ones(30)
        assert memory.now == small.nbytes
    assert (+memory.fullest, +memory.without) == ({"large": 400}, {"small": 120})


def test_where_labels_meet_what_has_no_values():
    with LiveMemory():
        logits, labels = torch.empty(3, 5, device="meta"), torch.tensor([[0], [1], [2]])
        assert logits.gather(1, labels).device.type == "meta"
        assert (logits == logits).all()  # transformers asks so whether rows are whole
        with pytest.raises(RuntimeError, match="meta"):
            float(logits[0, 0])


@pytest.mark.parametrize("grouped", [False, True])
def test_attention_without_values_is_the_kernel_that_a_device_would_run(grouped: bool):
    def most(device: str) -> int:
        q = torch.ones(2, 4, 64, 8, device=device, requires_grad=True)
        k = torch.ones(2, 2 if grouped else 4, 64, 8, device=device)
        own = torch.nn.functional.scaled_dot_product_attention
        with LiveMemory() as memory:
            attention = torch.nn.functional.scaled_dot_product_attention
            torch.autograd.grad(attention(q, k, k, is_causal=True, enable_gqa=grouped).sum(), q)
        assert torch.nn.functional.scaled_dot_product_attention is own
        return sum(memory.fullest.values())

    assert most("meta") == most("cpu") < 2 * 4 * 64 * 64 * 4  # less than the scores alone
