from __future__ import annotations

import gc

import pytest
import torch
from architectures import ARCHITECTURES, base_of, batch_for, lora
from prefixes import ALGORITHM, count_runs, loss_on, loss_on_upper_layers
from tiny_models import assert_equal, random_batch, random_rows, tiny_base, with_lora
from transformers import AutoConfig, AutoModelForMaskedLM

from meta_peft.algorithms import MAML
from meta_peft.frozen.prefix import PLAIN_STACKS, FrozenPrefix, layers_of
from meta_peft.functional.adapter_loss import AdapterLoss
from meta_peft.inner_optimizers import InnerRule
from meta_peft.outer_loop.outer_loop import meta_gradient
from meta_peft.params import expand


def without_reuse(loss_fn: AdapterLoss) -> AdapterLoss:
    model, names = loss_fn.model, list(loss_fn.weights.parameters())
    loss_fn._prefix = FrozenPrefix(model, "a model type that is not known", names)
    assert loss_fn._prefix.n_layers == 0
    return loss_fn


def assert_same_training(mine: AdapterLoss, plain: AdapterLoss, pad: str = "right") -> None:
    batch = batch_for(mine.model.get_base_model(), pad=pad)
    with_reuse, without = meta_gradient(mine, batch, ALGORITHM), meta_gradient(plain, batch, ALGORITHM)
    assert_equal(with_reuse.metrics, without.metrics, 1e-12)
    assert_equal(with_reuse.grads.adapter, without.grads.adapter, 1e-12)
    assert_equal(with_reuse.grads.hyper, without.grads.hyper, 1e-12)


def test_every_known_model_type_is_tested():
    assert set(ARCHITECTURES) >= PLAIN_STACKS


@pytest.mark.parametrize("pad", ["left", "right"])
@pytest.mark.parametrize("kind", sorted(PLAIN_STACKS))
def test_changes_no_loss_and_no_gradient(kind: str, pad: str):
    with_reuse, without = loss_on_upper_layers(kind), without_reuse(loss_on_upper_layers(kind))
    runs, all_runs = count_runs(with_reuse), count_runs(without)
    assert_same_training(with_reuse, without, pad)
    # What lies below once for the support rows and once for the query rows.
    assert runs[-1] == [2, 2, 3]
    assert all_runs[-1] == [3, 3, 3]
    if len(runs) > 1:
        assert runs[0] == [2, 2, 2]
        assert all_runs[0] == [3, 3, 3]
    assert with_reuse.stack(InnerRule()) == (3 * len(runs), 3 * len(runs) - 1, 0)


@pytest.mark.parametrize("kind", ["t5", "whisper"])
@pytest.mark.parametrize(
    ("where", "runs"),
    [
        (r"encoder\.(block|layers)\.[12]\.", [[2, 3, 3], [3, 3, 3]]),
        (r"(block|layers)\.[12]\.", [[2, 3, 3], [3, 3, 3]]),  # of the decoder nothing is constant: it reads the encoder
        (r"decoder\.(block|layers)\.[12]\.", [[2, 2, 2], [2, 3, 3]]),
        (r"decoder\.", [[2, 2, 2], [3, 3, 3]]),
        (r"coder\.", [[3, 3, 3], [3, 3, 3]]),
    ],
)
def test_encoder_decoders(kind: str, where: str, runs: list):
    with_reuse, without = loss_on(kind, where), without_reuse(loss_on(kind, where))
    counted = count_runs(with_reuse)
    assert_same_training(with_reuse, without)
    assert counted == runs


def test_nothing_is_constant_above_an_adapted_embedding():
    """Encoder and decoder of T5 have an embedding layer each; the head stands outside both."""
    for targets, below in [
        (r".*decoder\..*(embed_tokens|block\.2\..*\.q)", 3),
        (r".*encoder\..*(embed_tokens|block\.2\..*\.q)", 0),
        (r".*decoder\.block\.2\..*\.q|lm_head", 0),
    ]:
        assert AdapterLoss(lora(base_of("t5", layers=3), targets)).stack(InnerRule()) == (6, below, 0)


def test_tasks_that_go_one_after_the_other_share_nothing_but_skip_the_same():
    """OPT's feed-forward layers see flattened rows, so a stack cannot go through them."""
    with_reuse, without = (loss_on_upper_layers("opt", names=("fc1",)) for _ in range(2))
    without_reuse(without)
    for loss_fn in (with_reuse, without):
        loss_fn(expand(dict(loss_fn.weights.parameters()), 2), random_rows(2))  # where this is found out
    runs, all_runs = count_runs(with_reuse), count_runs(without)
    assert_same_training(with_reuse, without)
    assert runs == [[4, 4, 6]]  # two tasks
    assert all_runs == [[6, 6, 6]]


@pytest.mark.parametrize("adapted", [(0,), (0, 1, 2), (1, 2), (1,), (2,)])
def test_skips_the_layers_below_the_first_adapted_one(adapted: tuple[int, ...]):
    loss_fn = loss_on_upper_layers("llama", adapted=adapted)
    runs, rows = count_runs(loss_fn), random_rows()
    weights = expand({n: p.detach() for n, p in loss_fn.weights.parameters().items()}, 3)
    losses = [loss_fn(weights, rows) for _ in range(3)]
    assert runs == [[1 if layer < adapted[0] else 3 for layer in range(3)]]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-14, atol=0)
    assert torch.equal(losses[2], losses[1])


def test_other_rows_with_the_same_content_are_not_mixed_up():
    loss_fn = loss_on_upper_layers("llama")
    weights = dict(loss_fn.weights.parameters())
    one, other = random_rows(seed=1), random_rows(seed=2)
    fresh = [loss_on_upper_layers("llama")(weights, rows) for rows in (one, other)]
    assert not torch.equal(*fresh)
    for _ in range(2):
        for rows, expected in zip((one, other), fresh, strict=True):
            torch.testing.assert_close(loss_fn(weights, rows), expected, rtol=1e-12, atol=0)


def test_what_is_remembered_goes_with_its_rows():
    loss_fn = loss_on_upper_layers("llama")
    rows = random_rows()
    loss_fn(dict(loss_fn.weights.parameters()), rows)
    known = loss_fn._prefix._known
    assert [{i: tuple(state.shape) for i, state in states.items()} for states in known.values()] == [{0: (6, 5, 16)}]
    assert not known[rows][0].requires_grad
    del rows
    gc.collect()
    assert len(known) == 0


def test_a_training_step_leaves_nothing_behind():
    loss_fn = loss_on_upper_layers("llama")
    meta_gradient(loss_fn, random_batch(), MAML(InnerRule(steps=1)), tasks_per_forward=2)
    gc.collect()
    assert len(loss_fn._prefix._known) == 0


def test_evaluation_and_training_may_share_what_is_remembered():
    """Whichever comes first: one computes it without gradients and with other attention kernels."""
    loss_fn, rows = loss_on_upper_layers("llama"), random_rows()
    weights = {n: p.detach().requires_grad_() for n, p in loss_fn.weights.parameters().items()}
    scores = loss_fn.scores(weights, rows)
    loss = loss_fn(weights, rows)
    torch.testing.assert_close(loss, scores.loss_T, rtol=1e-12, atol=0)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss.sum(), list(weights.values())))


def test_no_graph_hangs_on_what_is_remembered():
    """`enable_input_require_grads` makes the activations of frozen layers require gradients."""
    for kind in ("llama", "t5"):
        loss_fn = loss_on_upper_layers(kind)
        loss_fn.model.enable_input_require_grads()
        rows = batch_for(loss_fn.model.get_base_model()).support
        loss_fn(dict(loss_fn.weights.parameters()), rows)
        states = list(loss_fn._prefix._known[rows].values())
        tensors = [
            t
            for s in states
            for t in ([s] if isinstance(s, torch.Tensor) else s.values() if isinstance(s, dict) else s)
        ]
        assert tensors
        assert not any(t.requires_grad for t in tensors if t is not None)


def test_layers_of_a_model_that_calls_something_else_its_decoder():
    """Its head of tokens, in ModernBERT: once none of its layers was checkpointed, or counted."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 3}
    base = AutoModelForMaskedLM.from_config(AutoConfig.for_model("modernbert", vocab_size=40, pad_token_id=2, **sizes))
    assert layers_of(base) == list(base.model.layers)


def test_model_types_that_are_not_known_run_all_their_layers():
    loss_fn = AdapterLoss(with_lora(tiny_base("cohere", layers=3), layers_to_transform=[2]))
    runs, rows = count_runs(loss_fn), random_rows()
    for _ in range(2):
        loss_fn(dict(loss_fn.weights.parameters()), rows)
    assert runs == [[2, 2, 2]]
    assert loss_fn.stack(InnerRule()) == (3, 0, 0)
