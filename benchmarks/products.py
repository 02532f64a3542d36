"""The matrix products that a meta-gradient cannot avoid, counted, and how long the machine takes for them alone.

What is counted, for a second-order step; K is the number of inner steps, W a frozen weight, A and B the LoRA matrices:

- A frozen linear layer ``y = x W^T`` on the support, per step: forward and backward, and the same two again for the
  second derivative along the adjoint. On the query: forward and backward.
- A product of two factors that both depend on the adapter (a LoRA matrix with its input, queries with keys, attention
  weights with values) gives one product forward and two backward, and the second derivative has each of these with
  either factor replaced: 9 in all, 3 of each shape. On the query 3.
- The input of the first adapted layer needs no gradient. Its query, key and value projections go forward once per
  episode, however many steps there are, and have no backward; their A matrices have 4 products instead of 9. Layers
  below go forward once on support and query. The embedding is no product.
- The head, at labelled positions only; its input depends on the adapter.

First order has no second derivatives: 2, 3 and 3 products where second order has 4, 9 and 9.

Positions after the last one that predicts anything are not counted, nor is the last layer's feed-forward part but at
the labelled positions, as many in each row as in the row with most. Attention is counted as the full square of
positions. Counted, though a program could leave it out: the last layer's queries at other positions.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from workload import LINEARS, SHAPES, Workload, parts

from meta_peft.types import EpisodeBatch, Rows

FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
READS_THE_LAYERS_INPUT = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Product:
    """A kind of product that occurs many times: ``batch`` products ``[m, k] x [k, n]``.

    `layout` says which operand is stored transposed: "nt" is ``x W^T`` as in a forward, "nn" is ``g W`` as in the
    gradient of an input, "tn" is ``g^T x`` as in the gradient of a weight.
    """

    part: str
    rows: str
    layout: str
    m: int
    k: int
    n: int
    batch: int = 1

    @property
    def gflop(self) -> float:
        return 2e-9 * self.batch * self.m * self.k * self.n


def count(
    model: PeftModel,
    batch: EpisodeBatch,
    workload: Workload,
    tasks_per_forward: int | None,
    *,
    every_position: bool = False,
) -> Counter[Product]:
    """How often each product occurs in one meta-gradient; with `every_position`, needed or not, but for the head."""
    total: Counter[Product] = Counter()
    for chunk in parts(batch, tasks_per_forward):
        for rows, phase in ((chunk.support, _Support(workload)), (chunk.query, _Query(workload))):
            for product, times in _of_rows(model, rows, phase, workload, every_position):
                total[product] += times
    return Counter({product: times for product, times in total.items() if times})


@dataclass(frozen=True)
class _Support:
    workload: Workload
    name: str = "support"

    @property
    def frozen(self) -> int:
        """Forwards, and as many backwards."""
        return (2 if self.workload.second_order else 1) * self.workload.steps

    @property
    def both_vary(self) -> int:
        """Products of each of the three shapes."""
        return (3 if self.workload.second_order else 1) * self.workload.steps

    one_varies = frozen  # of each of the two shapes that are left


@dataclass(frozen=True)
class _Query:
    workload: Workload
    name: str = "query"
    frozen: int = 1
    both_vary: int = 1
    one_varies: int = 1


def _of_rows(
    model: PeftModel, rows: Rows, phase: _Support | _Query, workload: Workload, every_position: bool
) -> Iterator[tuple[Product, int]]:
    sizes, rank, name = SHAPES[workload.shapes], workload.rank, phase.name
    predicts = rows.labels_BL[:, 1:] != -100
    n_rows, length = len(predicts), int(predicts.nonzero()[:, 1].max()) + 1
    n_read = n_rows * int(predicts.sum(1).max())  # positions of the last layer's feed-forward part
    if every_position:
        length = rows.labels_BL.shape[1]
        n_read = n_rows * length
    heads, head_dim = sizes["num_attention_heads"], sizes["head_dim"]
    first = workload.adapted_layers[0]
    labelled, layers = int(predicts.sum()), _decoder_layers(model)
    for index, layer in enumerate(layers):
        adapted = index >= first
        for kind, (n_out, n_in) in layer.items():
            n_tokens = n_read if index == len(layers) - 1 and kind in FEED_FORWARD else n_rows * length
            constant = index == first and kind in READS_THE_LAYERS_INPUT
            forward = Product("frozen linear", name, "nt", n_tokens, n_in, n_out)
            if not adapted or constant:
                yield forward, 1
            else:
                yield forward, phase.frozen
                yield Product("frozen linear", name, "nn", n_tokens, n_out, n_in), phase.frozen
            if adapted:
                stack = (n_tokens // rows.n_tasks, rows.n_tasks)
                yield from _both_vary("LoRA", name, *stack, n_in, rank, phase, constant=constant)
                yield from _both_vary("LoRA", name, *stack, rank, n_out, phase)
        for n_in, n_out in ((head_dim, length), (length, head_dim)):  # scores, then weighted values
            if adapted:
                yield from _both_vary("attention", name, length, n_rows * heads, n_in, n_out, phase)
            else:
                yield Product("attention", name, "nt", length, n_in, n_out, n_rows * heads), 1
    yield Product("head", name, "nt", labelled, sizes["hidden_size"], sizes["vocab_size"]), phase.frozen
    yield Product("head", name, "nn", labelled, sizes["vocab_size"], sizes["hidden_size"]), phase.frozen


def _both_vary(
    part: str, name: str, m: int, batch: int, n_in: int, n_out: int, phase: _Support | _Query, *, constant: bool = False
) -> Iterator[tuple[Product, int]]:
    """``y = x W^T`` where x, unless it is `constant`, and W depend on the adapter."""
    times = phase.one_varies if constant else phase.both_vary
    yield Product(part, name, "nt", m, n_in, n_out, batch), times
    yield Product(part, name, "tn", n_out, m, n_in, batch), times
    if not constant:
        yield Product(part, name, "nn", m, n_out, n_in, batch), times


def _decoder_layers(model: PeftModel) -> list[dict[str, tuple[int, int]]]:
    """By decoder layer: kinds of linear layers with their ``(out, in)``."""
    layers = model.get_base_model().model.layers
    return [
        {
            kind: (module.out_features, module.in_features)
            for path, module in layer.named_modules()
            if (kind := path.rpartition(".")[2]) in LINEARS
        }
        for layer in layers
    ]


class Roof:
    """The time that each kind of product takes here, measured with weights that are not in the cache already."""

    def __init__(self, model: PeftModel, products: list[Product], repeats: int = 10):
        self._repeats = repeats
        self._dense = _dense_weights(model)
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        self._kinds = {product: replace(product, rows="any") for product in products}  # one shape, measured once
        self._calls = {kind: self._calls_of(kind, random) for kind in self._kinds.values()}

    def seconds(self) -> dict[Product, float]:
        """Of one product of each kind, the mean over one pass."""
        found = {}
        for kind, calls in self._calls.items():
            start = time.perf_counter()
            for call in calls:
                call()
            found[kind] = (time.perf_counter() - start) / len(calls)
        return {product: found[kind] for product, kind in self._kinds.items()}

    def _calls_of(self, product: Product, random: Callable[..., Tensor]) -> list[Callable[[], Tensor]]:
        if product.part in ("frozen linear", "head"):
            shape = (product.n, product.k) if product.layout == "nt" else (product.k, product.n)
            x, weights = random(product.m, product.k), self._dense[shape]
            if product.layout == "nt":
                return [lambda weight=weight: F.linear(x, weight) for weight in weights]
            return [lambda weight=weight: x @ weight for weight in weights]
        left, right = (product.batch, product.m, product.k), (product.batch, product.k, product.n)
        if product.layout == "tn":
            a, b = random(product.batch, product.k, product.m).mT, random(*right)
        elif product.layout == "nt":
            a, b = random(*left), random(product.batch, product.n, product.k).mT
        else:
            a, b = random(*left), random(*right)
        return [lambda: torch.bmm(a, b)] * self._repeats


def _dense_weights(model: PeftModel) -> dict[tuple[int, int], list[Tensor]]:
    """Float32 weights by shape, each layer its own; where the base is quantised, random ones of the same shapes."""
    found: dict[tuple[int, int], list[Tensor]] = {}
    base = model.get_base_model()
    linears = [m.get_base_layer() if isinstance(m, LoraLayer) else m for m in base.modules()]
    for linear in {id(m): m for m in linears if isinstance(m, nn.Linear) and m.out_features > 1}.values():
        shape = (linear.out_features, linear.in_features)
        dense = linear.weight.detach()
        if dense.dtype != torch.float32 or tuple(dense.shape) != shape:
            dense = torch.randn(shape)
        found.setdefault(shape, []).append(dense)
    return found
