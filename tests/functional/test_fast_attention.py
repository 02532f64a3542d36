"""Which attention runs through `ops.attention`, for how long, and that all else is transformers' own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, base_of, lora, rows_for
from derivatives import randn, up_to_second
from tiny_models import assert_equal
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from meta_peft.functional import fast_attention as module
from meta_peft.functional.adapter_loss import AdapterLoss
from meta_peft.functional.fast_attention import twice_differentiable_attention
from meta_peft.ops.attention import attention
from meta_peft.params import gradients, leaves


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shape of the queries of each attention that goes through `ops.attention`."""
    seen: list[tuple[int, ...]] = []

    def noted(query: Tensor, *others: Any) -> Tensor:
        seen.append(tuple(query.shape))
        return attention(query, *others)

    monkeypatch.setattr(module, "attention", noted)
    return seen


def loss_of(kind: str, **options: Any) -> tuple[AdapterLoss, dict[str, Tensor], Any]:
    model = lora(base_of(kind), ARCHITECTURES[kind].targets)
    loss_fn = AdapterLoss(model, **options)
    return loss_fn, leaves(dict(loss_fn.weights.parameters())), rows_for(model.get_base_model())


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gemma3_text", "gpt2", "gpt_neox", "bert"])
def test_one_operation_for_every_layer(kind: str, ours: list[tuple[int, ...]]):
    loss_fn, weights, rows = loss_of(kind)
    loss_fn(weights, rows)
    assert len(ours) == 2


def test_without_padding_too(ours: list[tuple[int, ...]]):
    """Then models give no mask and say that it is causal."""
    loss_fn, weights, rows = loss_of("llama")
    rows.inputs["attention_mask"].fill_(1)
    loss_fn(weights, rows)
    assert len(ours) == 2


def test_encoders_and_attention_to_them(ours: list[tuple[int, ...]]):
    loss_fn, weights, rows = loss_of("whisper")
    loss_fn(weights, rows)
    assert len(ours) == 6


def test_the_position_bias_of_t5_is_not_covered(ours: list[tuple[int, ...]]):
    loss_fn, weights, rows = loss_of("t5")
    assert loss_fn.model.config._attn_implementation == "sdpa"
    loss_fn(weights, rows)
    assert not ours


def test_eager_attention_stays_eager(ours: list[tuple[int, ...]]):
    loss_fn, weights, rows = loss_of("gemma2")
    loss_fn(weights, rows)
    assert not ours


def test_only_where_two_derivatives_are_needed(ours: list[tuple[int, ...]]):
    loss_fn, weights, rows = loss_of("llama", second_order=False)
    loss_fn(weights, rows)
    loss_fn, weights, rows = loss_of("llama")
    loss_fn.scores(weights, rows)
    assert not ours


def test_layers_computed_again_in_backward(ours: list[tuple[int, ...]]):
    loss_fn, weights, rows = loss_of("llama", checkpoint=True)
    loss = loss_fn(weights, rows).sum()
    assert len(ours) == 2
    again = gradients(loss, weights)
    assert len(ours) > 2
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
    loss_fn, weights, rows = loss_of("llama")
    assert_equal(again, gradients(loss_fn(weights, rows).sum(), weights), 0)


def test_transformers_is_as_it_was_afterwards():
    before = dict(ALL_ATTENTION_FUNCTIONS)
    assert before["sdpa"] is sdpa_attention_forward
    with twice_differentiable_attention():
        with twice_differentiable_attention():
            assert ALL_ATTENTION_FUNCTIONS["sdpa"] is module._attention_forward
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is module._attention_forward
        assert not torch.backends.cuda.flash_sdp_enabled()
    assert dict(ALL_ATTENTION_FUNCTIONS) == before
    assert torch.backends.cuda.flash_sdp_enabled()


def test_transformers_is_as_it_was_after_an_error():
    with pytest.raises(ZeroDivisionError), twice_differentiable_attention():
        raise ZeroDivisionError
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward


def test_attention_that_somebody_registered_is_left_alone():
    def own(*args: Any, **kwargs: Any) -> Any:
        return sdpa_attention_forward(*args, **kwargs)

    AttentionInterface.register("sdpa", own)
    try:
        with twice_differentiable_attention():
            assert ALL_ATTENTION_FUNCTIONS["sdpa"] is own
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is own
    finally:
        AttentionInterface.register("sdpa", sdpa_attention_forward)


BOOL = torch.ones(2, 1, 3, 3, dtype=torch.bool).tril()
COVERED: dict[str, dict[str, Any]] = {
    "causal as a rule": {},
    "causal as the module says": {"module": {"is_causal": True}},
    "not causal as the module says": {"module": {"is_causal": False}},
    "not causal": {"is_causal": False},
    "a scale": {"scaling": 0.7},
    "boolean mask": {"attention_mask": BOOL},
    "additive mask": {"attention_mask": torch.randn(2, 1, 3, 3, dtype=torch.float64)},
    "heads in groups": {"module": {"num_key_value_groups": 2}, "kv_heads": 2},
    "heads in groups, masked": {"module": {"num_key_value_groups": 2}, "kv_heads": 2, "attention_mask": BOOL},
    "one query": {"n_queries": 1},
    "other numbers of keys": {"n_queries": 2, "is_causal": False},
    "arguments for others": {"position_ids": torch.arange(3), "sliding_window": 2, "use_cache": False},
    "absent arguments": {"position_bias": None, "output_attentions": False, "softcap": None},
}
NOT_COVERED: dict[str, dict[str, Any]] = {
    "position bias": {"position_bias": torch.randn(1, 4, 3, 3, dtype=torch.float64)},
    "causal with other numbers of keys": {"n_queries": 2},
    "a mask with a gradient": {"attention_mask": torch.zeros(2, 1, 3, 3, dtype=torch.float64, requires_grad=True)},
    "a batch of keys for one query": {"n_batch": 1},
}


@pytest.mark.parametrize("case", [*COVERED, *NOT_COVERED])
def test_equals_transformers(case: str, ours: list[tuple[int, ...]]):
    options = dict((COVERED | NOT_COVERED)[case])
    layer = SimpleNamespace(**options.pop("module", {}))
    query = randn(options.pop("n_batch", 2), 4, options.pop("n_queries", 3), 4)
    kv_heads = options.pop("kv_heads", 4)
    given = [query, randn(2, kv_heads, 3, 4, seed=1), randn(2, kv_heads, 3, 4, seed=2)]
    mask = options.pop("attention_mask", None)
    with twice_differentiable_attention():
        registered = ALL_ATTENTION_FUNCTIONS["sdpa"]
        found, expected = (
            up_to_second(lambda *t, f=f: f(layer, *t, mask, **options)[0], given)
            for f in (registered, sdpa_attention_forward)
        )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    assert bool(ours) is (case in COVERED)


@pytest.mark.parametrize("options", [{"dropout": 0.5}, {"output_attentions": True}])
def test_dropout_and_what_transformers_warns_of_fall_back(options: dict[str, Any], ours: list[tuple[int, ...]]):
    with twice_differentiable_attention():
        module._attention_forward(SimpleNamespace(), *(randn(1, 1, 3, 4) for _ in range(3)), None, **options)
    assert not ours


def test_softcap_is_left_to_transformers(ours: list[tuple[int, ...]]):
    """Which refuses it from some version on."""
    given = (SimpleNamespace(), *(randn(1, 1, 3, 4) for _ in range(3)), None)
    try:
        expected = sdpa_attention_forward(*given, softcap=2.0)[0]
    except ValueError:
        with twice_differentiable_attention(), pytest.raises(ValueError, match="softcap"):
            module._attention_forward(*given, softcap=2.0)
    else:
        with twice_differentiable_attention():
            torch.testing.assert_close(module._attention_forward(*given, softcap=2.0)[0], expected)
    assert not ours


def test_autocast_is_left_to_torch(ours: list[tuple[int, ...]]):
    """It would round the products inside of ours, and not the rest."""
    given = [randn(1, 1, 3, 4, dtype=torch.float32) for _ in range(3)]
    with twice_differentiable_attention(), torch.autocast("cpu", torch.bfloat16):
        module._attention_forward(SimpleNamespace(), *given, None)
    assert not ours
