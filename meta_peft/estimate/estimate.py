"""How much memory a run takes, and for what, without loading a weight.

The base's share is added up from the shapes of its layers. The share of a meta-gradient is not a formula: the code that
trains runs on a model without values (see `weightless`), and what is alive is counted (see `live_memory`). So graphs,
replay, checkpoints, layers that are run once and what lives for a moment only are in it as they are.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from meta_peft.algorithms import MAML
from meta_peft.base.base_config import base_config
from meta_peft.config import MetaLoraConfig, ModelArguments
from meta_peft.errors import MetaPeftError
from meta_peft.estimate.live_memory import LiveMemory
from meta_peft.estimate.weightless import weightless_model
from meta_peft.frozen.linear import COPY, quantised_layers, scale_bytes
from meta_peft.functional.adapter_loss import AdapterLoss
from meta_peft.lora.fast_weights import LAYER_NUMBER, lora_layers
from meta_peft.outer_loop.memory_plan import SHARE, MemoryPlan
from meta_peft.outer_loop.outer_loop import LearnedRates, bind, in_chunks
from meta_peft.types import EpisodeBatch, Meta, Params, Rows
from meta_peft.utils.words import counted

SUPPORT, QUERY, BACK = "support rows, forward", "query rows, forward", "gradients on the way back"
SCORES, LOGITS, DENSE, FAST = "attention scores", "logits", "dequantised weights", "fast weights"
FEW = (2, 3)  # layers of the models that are run in place of one with many
CUDA_GB = 1.0  # an allowance for the context and the libraries' workspaces: not measured


@dataclass
class EstimateArguments:
    """What an estimate has to know besides the options of the run."""

    estimate: bool = field(
        default=False, metadata={"help": "Print where the memory of a run goes; no weight is loaded."}
    )
    row_tokens: int | None = field(default=None, metadata={"help": "Tokens of a row; max_length by default."})
    labelled_tokens: int = field(default=8, metadata={"help": "Of these, tokens of the completion, which are learned."})
    device_gb: float | None = field(
        default=None, metadata={"help": "Memory of one GPU, in GB, to plan for: the estimate says what fits into it."}
    )
    alternatives: bool = field(default=True, metadata={"help": "Also estimate the other memory modes and first order."})

    def __post_init__(self) -> None:
        for option in ("row_tokens", "labelled_tokens"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise MetaPeftError(f"{option} must be 1 or more; got {value}.")
        if self.device_gb is not None and not self.device_gb > 0:
            raise MetaPeftError(f"device_gb must be positive; got {self.device_gb}.")
        if self.row_tokens is not None:
            self.row_length(self.row_tokens)

    def row_length(self, max_length: int) -> int:
        """Tokens of a row in a run with this `max_length`."""
        length = self.row_tokens or max_length
        if self.labelled_tokens >= length:
            raise MetaPeftError(
                f"A row of {length} tokens cannot have {self.labelled_tokens} labelled ones: its first token"
                " is predicted by none. Give more row_tokens (max_length by default), or fewer labelled_tokens."
            )
        return length


@dataclass(frozen=True)
class Line:
    """One entry of the account."""

    what: str
    how: str
    n_bytes: int


@dataclass(frozen=True)
class Estimate:
    """`resting` is there all the time, `working` at the fullest moment of a meta-gradient.

    `tasks` go through the model at once, of the `batch` that a process computes the meta-gradient of.
    """

    tasks: int
    batch: int
    resting: list[Line]
    working: list[Line]

    @property
    def at_work(self) -> int:
        return sum(line.n_bytes for line in self.working)

    @property
    def total(self) -> int:
        return sum(line.n_bytes for line in self.resting) + self.at_work


def estimate(model_args: ModelArguments, args: MetaLoraConfig, given: EstimateArguments) -> Estimate:
    """The account of one process of a run with these options."""
    algorithm, batch = args.algorithm_object(), whole_rows(args, given)
    config = base_config(model_args)
    model = weightless_model(model_args, copy.deepcopy(config))
    loss_fn = bind(model, algorithm, checkpoint=args.gradient_checkpointing)
    adapter: Params = dict(loss_fn.weights.parameters())
    rates = LearnedRates(args.inner_rule(), adapter)
    resting = [*base_lines(model), *_trained(loss_fn, rates, args)]
    plan = args.memory_plan()
    if plan.budget is None:
        left = math.inf if given.device_gb is None else given.device_gb * 1e9 - sum(line.n_bytes for line in resting)
        plan.budget = max(SHARE["cuda"] * (left - CUDA_GB * 1e9), 1.0)
    with LiveMemory():  # which answers what has no values
        algorithm, tasks = plan.settle(algorithm, loss_fn, Meta(adapter, rates.values()), batch)
    alike = _alike(model, model_args.lora_target_modules)
    settled = _Settled(algorithm, args.gradient_checkpointing, batch.part(0, tasks), alike)
    at_most = _of_all_layers(model_args, config, settled)
    working = [Line(kind, _how(kind, settled, loss_fn), n) for kind, n in at_most.most_common() if n]
    if plan.spare and (copies := _dense_copies(loss_fn, plan.spare)):
        working.append(Line("dense copies", "of quantised weights, where the budget leaves room", copies))
    if (parts := math.ceil(batch.n_tasks / tasks)) > 1:
        own = sum(p.nbytes for p in loss_fn.weights.parameters().values())
        working.append(Line("meta-gradients", f"of {parts} parts of the batch", parts * own))
    return Estimate(tasks, batch.n_tasks, resting, working)


@dataclass(frozen=True)
class _Settled:
    algorithm: Any
    checkpoint: bool
    batch: EpisodeBatch
    alike: bool = True  # whether a few layers with LoRA tell what one more takes


def _of_all_layers(model_args: ModelArguments, config: Any, settled: _Settled) -> Counter[str]:
    """What is alive at most, by kind.

    Layers are alike, so what is alive at a moment grows by the same bytes with each of them. Where there are many, two
    models with a few say how much. The fullest moment may be another one in a model of many layers than in one of few,
    where logits are the larger part: so the moment that is the fullest without them is followed too.
    """
    n_layers = int(config.num_hidden_layers)
    adapted = sorted(range(n_layers) if model_args.lora_layers is None else model_args.lora_layers)
    kinds = set(getattr(config, "layer_types", None) or ())
    whole = len(adapted) <= FEW[1] or adapted != list(range(adapted[0], n_layers)) or len(kinds) > 1
    if whole or not settled.alike:
        return max(_alive(model_args, config, settled), key=Counter.total)
    one, two = (_alive(*_with_layers(n, adapted[0] > 0, model_args, config), settled) for n in FEW)
    return max((_line(a, b, len(adapted)) for a, b in zip(one, two, strict=True)), key=Counter.total)


def _alike(model: Any, targets: Any) -> bool:
    """Whether all layers with LoRA have it in the same places, and by targets that a model of fewer layers has too."""
    if any(LAYER_NUMBER.search(target) for target in targets):  # a whole path
        return False
    places: dict[str, set[str]] = {}
    for path, _ in lora_layers(model, "default"):
        if found := LAYER_NUMBER.search(path):
            places.setdefault(found[1], set()).add(path[found.end() :])
    return len(set(map(frozenset, places.values()))) == 1


def _with_layers(n: int, below: bool, model_args: ModelArguments, config: Any) -> tuple[ModelArguments, Any]:
    """A model of `n` layers with LoRA, and one without below them if the whole has such."""
    config = copy.deepcopy(config)
    total = n + int(below)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:total]
    config.num_hidden_layers = total
    if model_args.lora_layers is not None:  # else what is in no layer may have LoRA too
        model_args = replace(model_args, lora_layers=list(range(total - n, total)))
    return model_args, config


def _line(one: Counter[str], two: Counter[str], n: int) -> Counter[str]:
    """The line through the counts for the two numbers of layers, at `n`."""
    few, more = FEW
    return Counter({kind: two[kind] + (two[kind] - one[kind]) * (n - more) // (more - few) for kind in {*one, *two}})


def _alive(model_args: ModelArguments, config: Any, settled: _Settled) -> tuple[Counter[str], Counter[str]]:
    loss_fn = bind(
        weightless_model(model_args, copy.deepcopy(config)), settled.algorithm, checkpoint=settled.checkpoint
    )
    return count_alive(loss_fn, settled.algorithm, settled.batch)


def count_alive(loss_fn: AdapterLoss, algorithm: Any, batch: EpisodeBatch) -> tuple[Counter[str], Counter[str]]:
    """Run a meta-gradient, with or without values, and count by kind: see `LiveMemory.fullest` and `without`."""
    adapter: Params = dict(loss_fn.weights.parameters())
    rates = LearnedRates(algorithm.inner, adapter)
    kinds = _Kinds(loss_fn, batch)
    meta = Meta(dict(loss_fn.weights.parameters()), rates.values())
    with kinds.watching(), LiveMemory(kinds, apart=(LOGITS, DENSE)) as memory:
        in_chunks(algorithm, loss_fn, meta, batch, MemoryPlan(batch.n_tasks, math.inf))
    return memory.fullest, memory.without


def _dense_copies(loss_fn: AdapterLoss, n_bytes: float) -> int:
    with loss_fn.dense_copies(n_bytes):
        copied: list[Any] = [layer for layer in quantised_layers(loss_fn.model) if COPY in layer.__dict__]
    size = loss_fn.model.get_base_model().dtype.itemsize
    return sum(size * int(layer.in_features) * int(layer.out_features) for layer in copied)


def whole_rows(args: MetaLoraConfig, given: EstimateArguments) -> EpisodeBatch:
    """One batch of rows without padding. Labels have values, since what is computed depends on where they are.

    Tokens are 0 in support rows and 1 in query rows, which tells them apart.
    """
    (_, n_tasks), length, ways = _batches(args), given.row_length(args.max_length), args.ways or 1

    def rows(of_a_class: int, token: int) -> Rows:
        ids = torch.full((n_tasks * ways * of_a_class, length), token)
        labels = ids.index_fill(1, torch.arange(length - given.labelled_tokens), -100)
        return Rows({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels, n_tasks)

    return EpisodeBatch(rows(args.shots, 0), rows(args.query_size, 1), [str(t) for t in range(n_tasks)])


def _batches(args: MetaLoraConfig) -> tuple[int, int]:
    """How many batches a process has in an outer step, and tasks in the largest of them (see `processes.step_shares`)."""
    shares = args.gradient_accumulation_steps
    n_tasks = math.ceil(args.tasks_in_a_step / (args.world_size * shares))
    return (shares * n_tasks, 1) if args.deterministic_reduction else (shares, n_tasks)


class _Kinds:
    """What a tensor is: by its shape, else by the part of the work in which it was made."""

    def __init__(self, loss_fn: AdapterLoss, batch: EpisodeBatch):
        self._base = loss_fn.model.get_base_model()
        self._adapter = {tuple(p.shape) for p in loss_fn.weights.parameters().values()}
        self._adapter |= {shape[::-1] for shape in self._adapter}
        layers: list[Any] = quantised_layers(self._base)
        self._weights = {(int(layer.out_features), int(layer.in_features)) for layer in layers}
        self._vocabulary = int(self._base.config.get_text_config().vocab_size)
        length = batch.support.labels_BL.shape[1]
        self._scores = {(length, length), (length - 1, length - 1)}  # the last token predicts nothing
        self._part = BACK

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside this context the parts of the work are told apart."""

        def begins(_: Any, __: Any, inputs: dict[str, Tensor]) -> None:
            self._part = QUERY if int(inputs["input_ids"][0, 0]) else SUPPORT

        def ends(*_: Any) -> None:
            self._part = BACK

        hooks = (
            self._base.register_forward_pre_hook(begins, with_kwargs=True),
            self._base.register_forward_hook(ends),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def __call__(self, function: Any, given: list[Tensor], tensor: Tensor) -> str:
        shape = tuple(tensor.shape)
        if shape in self._weights and (
            given[0].dim() < 2 or not given[0].is_floating_point() or shape == given[0].shape
        ):
            return DENSE
        if shape[-1:] == (self._vocabulary,):
            return LOGITS
        if len(shape) > 2 and shape[-2:] in self._scores:
            return SCORES
        return FAST if shape[-2:] in self._adapter else self._part


def base_lines(model: Any) -> list[Line]:
    """The frozen base, by kinds of weights."""
    base = model.get_base_model()
    quantised = {id(layer.weight): layer for layer in quantised_layers(base)}
    of_lora = {id(p) for name, p in model.named_parameters() if "lora_" in name}
    inner, outer = base.get_input_embeddings(), base.get_output_embeddings()
    places = {id(outer.weight): "output head", id(inner.weight): "embeddings"}
    sums: dict[tuple[str, str], list[int]] = {}
    for parameter in base.parameters():
        if id(parameter) in of_lora:
            continue
        layer: Any = quantised.get(id(parameter))
        what = "base: " + ("quantised layers" if layer is not None else places.get(id(parameter), "other weights"))
        if layer is not None:
            n = int(layer.in_features) * int(layer.out_features)
            bits, scales = (8 * parameter.nbytes) // n, scale_bytes(layer)
            _add(sums, (what, f"codes of {bits} bits"), n, parameter.nbytes)
            _add(sums, ("base: their scales", "and code tables"), 0, scales)
        else:
            _add(sums, (what, str(parameter.dtype).removeprefix("torch.")), parameter.numel(), parameter.nbytes)
    return [Line(what, f"{n:,} x {how}" if n else how, size) for (what, how), (n, size) in sums.items()]


def _add(sums: dict[tuple[str, str], list[int]], key: tuple[str, str], *more: int) -> None:
    sums[key] = [a + b for a, b in zip(sums.get(key, [0] * len(more)), more, strict=True)]


def _trained(loss_fn: AdapterLoss, rates: LearnedRates, args: MetaLoraConfig) -> list[Line]:
    adapter = loss_fn.weights.parameters()
    own, learned = sum(p.nbytes for p in adapter.values()), rates.log_rates.nbytes * rates.log_rates.requires_grad
    lines = [
        Line("LoRA", f"{len(adapter)} matrices of rank {_rank(loss_fn)} in float32, and inner rates", own + learned),
        Line("outer optimizer", "two moments of these, as AdamW has", 2 * (own + learned)),
    ]
    earlier = _batches(args)[0] - 1
    if earlier:
        sums = earlier if args.deterministic_reduction else 1
        lines.append(Line("outer gradient", "of the earlier batches of a step", sums * (own + learned)))
    return lines


def _rank(loss_fn: AdapterLoss) -> int:
    _, layer = next(lora_layers(loss_fn.model, loss_fn.weights.adapter))
    return int(layer.r[loss_fn.weights.adapter])


def _how(kind: str, settled: _Settled, loss_fn: AdapterLoss) -> str:
    """In words, where a number comes from."""
    algorithm, second = settled.algorithm, settled.algorithm.second_order
    layers, frozen, slow = loss_fn.stack(algorithm.inner)
    if kind in (SUPPORT, QUERY):
        labels = (settled.batch.support if kind == SUPPORT else settled.batch.query).labels_BL
        graphs = max(algorithm.kept_graphs, 1) if kind == SUPPORT and second and isinstance(algorithm, MAML) else 1
        tasks, inputs = settled.batch.n_tasks, "layer inputs" if settled.checkpoint else "activations"
        rows = f"{tasks} x {labels.shape[0] // tasks} rows of {labels.shape[1]} tokens"
        return f"{rows}: {inputs} of {layers - frozen - slow} of {layers} layers, {counted(graphs, 'graph')}"
    return {
        BACK: "what backward passes make" + (", kept for second derivatives" if second else ""),
        SCORES: "rows x heads x tokens x tokens" + (", kept for second derivatives" if second else ""),
        LOGITS: "at labelled tokens, with probabilities and gradients",
        DENSE: "for the time of a product",
        FAST: "weights of each task, gradients, adjoints, inner optimizer",
    }[kind]
