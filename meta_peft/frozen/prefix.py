"""What lies below the first adapted layer, run once per stack of rows instead of once per inner step.

Neither fast nor meta weights reach it, so it is a constant of the inner loop: the lower layers of a decoder, or the
whole encoder of an encoder-decoder whose adapter is in the decoder. The first forward of a `Rows` object remembers what
it returns; later forwards of the same object are given that. This needs layers that depend on each other through what
they return alone, which holds for the model types in `PLAIN_STACKS`, each of them tested; other models run all their
layers each time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from meta_peft.types import Rows
from meta_peft.utils.forwards import replaced_forwards

DECODERS = (
    "gemma",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "llama",
    "mistral",
    "opt",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
)
MIXTURES_OF_EXPERTS = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
ENCODERS = ("bert", "distilbert", "roberta")
ENCODER_DECODERS = ("t5", "whisper")
ONE_INPUT = frozenset({*DECODERS, *ENCODERS})  # all activations of three dimensions have its rows and positions
PLAIN_STACKS = frozenset({*DECODERS, *MIXTURES_OF_EXPERTS, *ENCODERS, *ENCODER_DECODERS})


class Run(NamedTuple):
    """Modules called one after the other that no adapted module comes before, and how many layers they are."""

    modules: list[nn.Module]
    n_layers: int


class Prefix:
    """What a forward runs before it comes to the first of some weights: everything, if there are none."""

    def __init__(self, model: nn.Module, model_type: str, weights: list[str]):
        self._runs = _runs_before(model, weights) if model_type in PLAIN_STACKS else []

    @property
    def n_layers(self) -> int:
        """How many layers they are."""
        return sum(run.n_layers for run in self._runs)

    def modules(self) -> list[nn.Module]:
        """Each layer, or each half of a model, that belongs to it."""
        return [module for run in self._runs for module in run.modules]

    @contextmanager
    def noted(self, known: dict[int, Any], change: Callable[[Any], Any] = lambda output: output) -> Iterator[None]:
        """Forwards inside this context write what each run returns to `known`, after `change`; what is there is not run."""
        skipped = {module: known[i] for i, run in enumerate(self._runs) if i in known for module in run.modules}
        with ExitStack() as stack:
            stack.enter_context(replaced_forwards((m, partial(_return, value)) for m, value in skipped.items()))
            for i, run in enumerate(self._runs):
                if i not in known:
                    stack.callback(run.modules[-1].register_forward_hook(_noting(known, i, change)).remove)
            yield


class FrozenPrefix(Prefix):
    """Remembers, for each live `Rows`, what the constant parts of a model return."""

    def __init__(self, model: nn.Module, model_type: str, adapted: list[str]):
        super().__init__(model, model_type, adapted)
        self._known: WeakKeyDictionary[Rows, dict[int, Any]] = WeakKeyDictionary()

    def reused(self, rows: Rows, recalled: Callable[[Rows], Any] = lambda rows: None) -> AbstractContextManager[None]:
        """A forward of `rows` inside this context skips what an earlier one has computed.

        Args:
            recalled: gives what the one run there is returns for rows that are new, or None (see `frozen.cache`).
        """
        known = self._known.setdefault(rows, {})
        if not known and len(self._runs) == 1 and (value := recalled(rows)) is not None:
            known[0] = value
        return self.noted(known, detached)

    def output(self, forward: Callable[[], object]) -> Any:
        """What the first run returns in `forward`, which goes no further."""

        def stop(_: nn.Module, __: Any, output: Any) -> None:
            raise _ReachedError(detached(output))

        hook = self._runs[0].modules[-1].register_forward_hook(stop)
        try:
            with torch.no_grad():
                forward()
        except _ReachedError as reached:
            return reached.output
        finally:
            hook.remove()
        raise AssertionError("the forward does not come through its first layers")


class _ReachedError(Exception):
    """A forward has come to where it was to stop."""

    def __init__(self, output: Any):
        super().__init__()
        self.output = output


def _noting(known: dict[int, Any], i: int, change: Callable[[Any], Any]) -> Callable[[nn.Module, Any, Any], Any]:
    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        known[i] = change(output)
        return known[i]

    return hook


def _return(value: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward of every module of a run: what the last of them returned the first time.

    A causal model is given rows only up to the last label, and a value that came from elsewhere may be longer.
    """
    given = args[0] if args else kwargs.get("hidden_states")
    if isinstance(value, Tensor) and isinstance(given, Tensor) and value.dim() == given.dim() == 3:
        return value[:, : given.shape[1]]
    return value


def detached(output: Any) -> Any:
    """What a module returned, without its graph."""
    if isinstance(output, Tensor):
        return output.detach()
    if isinstance(output, tuple):
        return tuple(detached(part) for part in output)
    if isinstance(output, dict):  # as the outputs of `transformers` are
        return type(output)(**{name: detached(part) for name, part in output.items()})
    return output


def layer_list(module: nn.Module) -> list[nn.Module]:
    """The layers of an encoder or a decoder."""
    parts = (*module.children(), *module.modules())  # in BERT and its kin one module further down
    return next((list(part) for part in parts if isinstance(part, nn.ModuleList)), [])


def layers_of(base: Any) -> list[nn.Module]:
    """All layers of a model, those of an encoder first."""
    halves = [base.get_encoder()] if base.config.is_encoder_decoder else []
    found = [layer for half in (*halves, base.get_decoder()) for layer in layer_list(half)]
    return found or layer_list(base.base_model)  # ModernBERT calls its head of tokens a decoder


def _runs_before(model: Any, adapted: list[str]) -> list[Run]:
    base = model.get_base_model()
    if not base.config.is_encoder_decoder:
        return _lower_layers(model, adapted)
    paths = {module: path for path, module in model.named_modules()}
    encoder, decoder = base.get_encoder(), base.get_decoder()
    if not adapted:
        return [Run([encoder], len(layer_list(encoder))), Run(layer_list(decoder), len(layer_list(decoder)))]
    in_encoder = [name for name in adapted if _below(paths[encoder], name)]
    in_decoder = [name for name in adapted if _below(paths[decoder], name)]
    if len(in_encoder) + len(in_decoder) < len(adapted):
        return []
    if in_encoder:
        return _lower_layers(model, in_encoder)  # all of the decoder reads what comes after them
    return [Run([encoder], len(layer_list(encoder))), *_lower_layers(model, in_decoder)]


def _lower_layers(model: nn.Module, adapted: list[str]) -> list[Run]:
    """What comes before the first adapted layer in the one list of layers that holds every adapted module."""
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and all(_below(path, name) for name in adapted):
            is_adapted = (any(_below(f"{path}.{i}", name) for name in adapted) for i in range(len(module)))
            first = next((i for i, found in enumerate(is_adapted) if found), len(module))
            return [Run(list(module)[:first], first)] if first else []
    return []


def _below(path: str, name: str) -> bool:
    return name.startswith(f"{path}.")
