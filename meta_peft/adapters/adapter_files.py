"""The files of a PEFT adapter read as data: a config of known fields, and tensors in safetensors. PEFT gets nothing else.

Left alone, PEFT would unpickle an ``adapter_model.bin``, write any tensor whose name fits over the base's weights, import
the module that a config names, allocate what a rank of a billion asks for, and match regular expressions without end.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper
from safetensors import SafetensorError, safe_open

from meta_peft.errors import MetaPeftError
from meta_peft.lora.fast_weights import HEADS, WITH_HEAD, FastWeights, is_lora
from meta_peft.utils.checked import flag, is_number, read_object, shown, text, whole
from meta_peft.utils.patterns import matches

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TASK_TYPES = (None, "CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION", *WITH_HEAD)
INITS = (True, False, "true", "false", "gaussian", "orthogonal")
FLAGS = ("use_rslora", "use_dora", "fan_in_fan_out", "inference_mode")
TEXTS = ("base_model_name_or_path", "revision", "peft_version")
USUAL_RANK = 1024
MOST, LONGEST = 100_000, 2000  # names in a list, characters of a name
# Names of modules to import. PEFT's own AutoPeftModel uses one, Megatron's layers the other; here nothing does.
LEFT_OUT = ("auto_mapping", "megatron_core", "runtime_config")


def load_adapter(base: Any, folder: Path, names: Sequence[str]) -> PeftModel:
    """`base` with the LoRA adapter in `folder`, whose matrices are called `names`.

    Raises:
        MetaPeftError: the config or the tensors are not those of a LoRA adapter for `base`; no weight of it was touched.
    """
    shapes = tensor_shapes(folder, names)
    config = read_config(folder, shapes)
    _check_patterns(base, config)
    _check_head(base, config, shapes, folder)
    try:
        model = PeftModel.from_pretrained(base, str(folder), is_trainable=True, config=config)
    except Exception as error:  # whatever PEFT makes of fields that do not go together
        raise MetaPeftError(
            f"PEFT cannot load the adapter in {folder} into {type(base).__name__}: {shown(str(error))}."
        ) from error
    if tuple(names) == tuple(FastWeights(model).parameters()):
        for name, value in FastWeights(model).parameters().items():
            if not value.isfinite().all():
                raise MetaPeftError(f"{folder / WEIGHTS} holds {name} with values that are not finite: it is damaged.")
    return model


def tensor_shapes(folder: Path, names: Sequence[str]) -> dict[str, list[int]]:
    """Shapes by name, from the header of the weights; their names must be `names`, all and no others."""
    path = folder / WEIGHTS
    if not path.is_file():
        raise MetaPeftError(
            f"{folder} has no {WEIGHTS}. Weights in other files, such as adapter_model.bin, are never loaded: they may run"
            " code. Ask whoever made the adapter for safetensors."
        )
    try:
        with safe_open(path, framework="pt") as tensors:
            found = {name: list(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise MetaPeftError(f"{path} is damaged or not in safetensors ({shown(str(error))}).") from error
    if set(found) != set(names):
        more, fewer = sorted(set(found) - set(names)), sorted(set(names) - set(found))
        raise MetaPeftError(
            f"The sidecar has rates for {len(names)} LoRA matrices, the adapter has {len(found)} tensors, of which"
            f" {len(more)} are others{f' ({more[0][:200]!r})' if more else ''} and {len(fewer)} are missing"
            f"{f' ({fewer[0][:200]!r})' if fewer else ''}: they do not belong together ({path})."
        )
    return found


def base_revision(folder: Path) -> str | None:
    """Which branch, tag or commit of its base an adapter was learned on; None is the default one."""
    found = read_object(folder / CONFIG, "the config of a PEFT adapter").get("revision")
    return None if found is None else text(f"{folder / CONFIG}: revision", found, LONGEST)


def read_config(folder: Path, shapes: dict[str, list[int]]) -> LoraConfig:
    """The LoRA config in `folder`. What meta_peft does not support must have PEFT's default, or be null or false."""
    path = folder / CONFIG
    if not path.is_file():
        raise MetaPeftError(f"{folder} has no {CONFIG}: it is no PEFT adapter, or the file was not copied.")
    values = read_object(path, "the config of a PEFT adapter")
    if values.get("peft_type") != "LORA":
        raise MetaPeftError(f"{path}: expected a LoRA adapter, peft_type is {shown(values.get('peft_type'))}.")
    largest = max(
        (shape[0] for name, shape in shapes.items() if shape and "_A" in name.rsplit("lora", 1)[-1]), default=0
    )
    known = {field.name: field for field in dataclasses.fields(LoraConfig) if field.init}
    given = {key: value for key, value in values.items() if key in known and key not in LEFT_OUT}
    default = dataclasses.asdict(LoraConfig())
    for key, value in given.items():
        option = f"{path}: {key}"
        if key in ("r", "rank_pattern"):
            # With a pattern each matrix may have a smaller one than r.
            most = max(largest, USUAL_RANK) if key == "r" and values.get("rank_pattern") else largest
            for rank in _values(option, value) if key == "rank_pattern" else [value]:
                whole(option, rank, 1, most)
        elif key in ("lora_alpha", "alpha_pattern"):
            for alpha in _values(option, value) if key == "alpha_pattern" else [value]:
                _expect(option, alpha, is_number(alpha), "a finite number")
        elif key == "lora_dropout":
            _expect(option, value, is_number(value) and 0 <= value <= 1, "a number from 0 to 1")
        elif key in FLAGS:
            flag(option, value)
        elif key in TEXTS:
            _expect(option, value, value is None or _is_name(value), "a text or null")
        elif key == "task_type":
            _expect(option, value, _one_of(value, TASK_TYPES), f"one of {TASK_TYPES}")
        elif key == "modules_to_save" and _one_of(values.get("task_type"), WITH_HEAD):
            right = value is None or (_are_names(value) and set(value) <= set(HEADS))
            _expect(option, value, right, f"null or some of {HEADS}: nothing else is supported")
        elif key == "init_lora_weights":
            _expect(option, value, _one_of(value, INITS), f"one of {INITS}")
        elif key in ("target_modules", "exclude_modules"):
            nothing = value is None and key == "exclude_modules"
            _expect(option, value, nothing or _is_name(value) or _are_names(value), "a text or a list of texts")
        elif key == "layers_pattern":
            plain = [value] if isinstance(value, str) else value or []
            right = (value is None or _are_names(plain)) and all(p.replace("_", "").isalnum() for p in plain)
            _expect(option, value, right, "names of lists of layers, such as 'layers'")
        elif key == "layers_to_transform":
            layers = [value] if isinstance(value, int) else value or []
            right = isinstance(layers, list) and all(_one_of(type(layer), (int,)) for layer in layers)
            _expect(option, value, right, "a whole number or a list of them")
        elif key == "target_parameters" and value == []:
            pass  # PEFT writes it for every mixture of experts
        elif key != "peft_type":
            same = value == default[key] and type(value) is type(default[key])
            _expect(
                option,
                value,
                same or value is None or value is False,
                f"{shown(default[key])}: nothing else is supported",
            )
    if "target_modules" not in given:
        raise MetaPeftError(f"{path} has no target_modules: it does not say where LoRA goes.")
    try:
        return LoraConfig(**{key: value for key, value in given.items() if key != "peft_type"})
    except (TypeError, ValueError, ImportError) as error:
        raise MetaPeftError(f"{path} is no config that PEFT takes: {shown(str(error))}.") from error


@contextmanager
def undone_on_error(base: Any) -> Iterator[None]:
    """If what runs inside raises, what PEFT put around layers of `base` meanwhile is taken off again."""
    before, had_config = set(map(id, base.modules())), hasattr(base, "peft_config")
    try:
        yield
    except Exception:
        around = (LoraLayer, ModulesToSaveWrapper)
        put_on = [(p, m) for p, m in base.named_modules() if isinstance(m, around) and id(m) not in before]
        for path, layer in put_on:
            parent, _, name = path.rpartition(".")
            inside = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer.original_module
            setattr(base.get_submodule(parent), name, inside)
        if not had_config and hasattr(base, "peft_config"):
            del base.peft_config
        raise


def _check_patterns(base: Any, config: LoraConfig) -> None:
    """Match what PEFT will match as regular expressions on the same names, with a limit on time."""
    modules = tuple(path for path, _ in base.named_modules())
    for option in ("target_modules", "exclude_modules"):
        pattern = getattr(config, option)
        if isinstance(pattern, str) and pattern.lower() != "all-linear":
            matches(option, pattern, modules, "fullmatch")
    for option in ("rank_pattern", "alpha_pattern"):
        keys = list(getattr(config, option))
        if keys:  # all in one go, since each would need a process of its own
            matches(option, "|".join(rf"(?:(.*\.)?({key})$)" for key in keys), modules, "match")


def _check_head(base: Any, config: LoraConfig, shapes: dict[str, list[int]], folder: Path) -> None:
    """Raise unless the tensors that are no LoRA matrices are the weights of the head that PEFT will copy, and all of them.

    It would write any other over the base's own weights.
    """
    own: dict[str, list[int]] = {}
    if config.task_type in WITH_HEAD:
        for path, module in base.named_modules():
            if path.endswith(HEADS) and "modules_to_save" not in path and "original_module" not in path:
                module = getattr(module, "original_module", module)
                own |= {f"base_model.model.{path}.{name}": list(p.shape) for name, p in module.named_parameters()}
    found = {name: shape for name, shape in shapes.items() if not is_lora(name)}
    if found != own or (config.task_type in WITH_HEAD and not own):
        raise MetaPeftError(
            f"The head in {folder / WEIGHTS} has weights {shown(found)}, that of {type(base).__name__} {shown(own)}: load"
            " the base with the objective and the num_labels that the adapter was learned with."
        )


def _values(option: str, value: Any) -> list[Any]:
    _expect(option, value, isinstance(value, dict) and _are_names(list(value)), "an object by names of layers")
    return list(value.values())


def _expect(option: str, value: Any, right: bool, what: str) -> None:
    if not right:
        raise MetaPeftError(f"{option} should be {what}; got {shown(value)}.")


def _one_of(value: Any, choices: tuple[Any, ...]) -> bool:
    return any(value is choice or (isinstance(value, str) and value == choice) for choice in choices)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= LONGEST and value.isprintable()


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= MOST and all(map(_is_name, value))
