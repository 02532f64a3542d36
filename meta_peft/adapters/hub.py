"""Save, load and push meta-learned adapters: a folder that stock PEFT loads, with a sidecar that `adapt` reads."""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors.torch import save_file

from meta_peft import preflight
from meta_peft.adapters.adapter_files import CONFIG, WEIGHTS, base_revision, load_adapter, undone_on_error
from meta_peft.adapters.base_identity import BaseIdentity
from meta_peft.adapters.card_file import CARD, may_replace
from meta_peft.adapters.hub_errors import explained
from meta_peft.adapters.sidecar import JSON, TENSORS, Sidecar
from meta_peft.base.base_model import load_base
from meta_peft.base.tokenizers import agree_on_padding, load_tokenizer, tokenizer_for
from meta_peft.config import ModelArguments
from meta_peft.errors import MetaPeftError
from meta_peft.inner_optimizers.rule import RATES
from meta_peft.lora.fast_weights import FastWeights, active_adapter, meta_learned_adapter
from meta_peft.objectives import CLASSIFYING, objective_name
from meta_peft.tasks.encoding import Encoding, tokenizer_of
from meta_peft.types import Params

LABELS = "label_names.json"  # names of classes, which neither PEFT nor transformers reads by itself
NOTE = "adaptation.json"  # beside an adapter of `adapt_folder`: of what it was made; written last


@dataclass(frozen=True)
class MetaLearned:
    """What a loaded or trained model carries as ``model.meta_peft``: the sidecar, the tokenizer and the adapter's name.

    For speech `tokenizer` is a processor, which has one.
    """

    sidecar: Sidecar
    tokenizer: Any
    adapter: str

    @property
    def encoding(self) -> Encoding:
        """How rows of this adapter's tasks are encoded."""
        return self.sidecar.encoding(self.tokenizer)


def save(
    model: PeftModel, sidecar: Sidecar, folder: str | Path, *, card: str | None = None, adapter: str | None = None
) -> None:
    """Write an adapter, its sidecar and, if given, a model card.

    Each file is whole or not there. A card that meta_peft made does not replace a README of your own.

    Args:
        adapter: the name of the adapter; by default the meta-learned one of a model that carries one, whichever is active
            (`adapt` makes another one active), else the active one.

    Raises:
        MetaPeftError: the sidecar is one of other weights, so that `load` would refuse the two.
    """
    adapter = adapter or meta_learned_adapter(model) or active_adapter(model)
    own = FastWeights(model, adapter)
    _check_sidecar(sidecar, own)
    weights: Params = {n: p.detach() for n, p in own.parameters().items()}
    with _replacing_files(Path(folder)) as partial:
        write_adapter(weights, model.peft_config[adapter], sidecar.base.name, partial)
        sidecar.write(partial)
        _write_card(card, partial, Path(folder))


def save_adapted(
    weights: Params,
    config: Any,
    base_name: str,
    folder: str | Path,
    *,
    label_names: tuple[str, ...] = (),
    card: str | None = None,
) -> None:
    """Write adapted weights as an ordinary PEFT adapter, and names of classes beside it as `transformers` calls them.

    What an earlier adapter left beside it goes first: the note of what that was made of, and its names of classes.
    """
    if (Path(folder) / JSON).is_file():
        raise MetaPeftError(
            f"{folder} holds a meta-learned adapter, which an adapted one would replace: choose another folder."
        )
    with _replacing_files(Path(folder)) as partial:
        write_adapter(weights, config, base_name, partial)
        _write_card(card, partial, Path(folder))
        if label_names:
            names = {"id2label": dict(enumerate(label_names)), "label2id": {n: i for i, n in enumerate(label_names)}}
            (partial / LABELS).write_text(json.dumps(names, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_adapter(weights: Params, config: Any, base_name: str, folder: Path) -> None:
    """The two files of a PEFT adapter."""
    written = copy.copy(config)
    written.base_model_name_or_path, written.inference_mode = base_name, True
    if isinstance(written.target_modules, set):  # the order of a set differs from run to run
        written.target_modules = sorted(written.target_modules)
    if written.modules_to_save:  # to which PEFT adds the names of heads each time
        written.modules_to_save = list(dict.fromkeys(written.modules_to_save))
    written.save_pretrained(str(folder))
    tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def load(
    base: Any,
    adapter: str | Path,
    *,
    tokenizer: Any = None,
    revision: str | None = None,
    token: str | None = None,
    **model_options: Any,
) -> PeftModel:
    """A base model with a meta-learned adapter, ready for `meta_peft.adapt`.

    Args:
        base: a loaded model, the name of one, or None for the one that the adapter names.
        adapter: a folder, or an id on the hub.
        tokenizer: the base's tokenizer; found by the base's name if not given.
        revision: branch, tag or commit of the adapter on the hub.
        token: of the hub, for an adapter that not everybody may read; by default the one you are logged in with.
        model_options: if the base is named, how to load it: fields of `ModelArguments`, such as ``load_in_4bit=True``. Its
            revision is that of the training, if nothing else is said; where LoRA goes the adapter says.

    Raises:
        MetaPeftError: the hub does not give the adapter, or it has no sidecar, or belongs to another base model.
    """
    folder = fetch(adapter, revision, token=token)
    sidecar = Sidecar.read(folder)
    if base is None and model_options.get("trust_remote_code"):
        raise MetaPeftError(
            f"trust_remote_code would run code of {sidecar.base.name!r}, which only the adapter names: name the base model"
            " yourself if you trust it."
        )
    how = None
    if base is None or isinstance(base, (str, Path)):
        name = str(base or sidecar.base.name)
        made: dict[str, Any] = {"objective": sidecar.objective}
        if sidecar.objective in CLASSIFYING:
            made["num_labels"] = sidecar.facts.num_labels
        if name == sidecar.base.name:
            made["model_revision"] = base_revision(folder)
        how = ModelArguments(model_name_or_path=name, **{**made, **model_options})
        base = load_base(how)
    elif model_options:
        raise MetaPeftError(f"{sorted(model_options)} say how to load a base model, but a loaded one was given.")
    preflight.check_bare(base)
    sidecar.base.check(BaseIdentity.of(base))
    if objective_name(base) != sidecar.objective:
        raise MetaPeftError(
            f"The adapter was learned for {sidecar.objective}, and {type(base).__name__} is made for"
            f" {objective_name(base)}: load the base with the class that fits, or name it."
        )
    if tokenizer is None:
        tokenizer = tokenizer_for(how) if how else load_tokenizer(base.name_or_path, objective=sidecar.objective)
    sidecar.check_tokenizer(tokenizer_of(tokenizer))
    agree_on_padding(base, sidecar.objective, tokenizer_of(tokenizer))
    training = base.training
    with undone_on_error(base):
        model = load_adapter(base, folder, sidecar.names)
        model.train(training)
        preflight.check_model(model, second_order=False)
        attach(model, sidecar, tokenizer)
    return model


def attach(model: PeftModel, sidecar: Sidecar, tokenizer: Any, adapter: str | None = None) -> None:
    """Mark an adapter of `model`, by default the active one, as meta-learned, with what `adapt` needs."""
    weights = FastWeights(model, adapter)
    _check_sidecar(sidecar, weights)
    model.meta_peft = MetaLearned(sidecar, tokenizer, weights.adapter)


def _check_sidecar(sidecar: Sidecar, weights: FastWeights) -> None:
    """Raise unless the rates are those of these weights."""
    names = tuple(weights.parameters())
    if names != sidecar.names:
        raise MetaPeftError(
            f"The sidecar has rates for {len(sidecar.names)} LoRA matrices, the adapter has {len(names)} (first"
            f" {sidecar.names[:1]} and {names[:1]}): they do not belong together."
        )
    expected = sidecar.inner.initial_rates(dict(weights.parameters()))[RATES].shape[1]
    if sidecar.log_rates.shape[1] != expected:
        raise MetaPeftError(
            f"The sidecar has {sidecar.log_rates.shape[1]} rates, the adapter's fast weights need {expected}: they do not"
            " belong together."
        )


def meta_learned(model: Any) -> MetaLearned:
    """What `attach` stored, or an error that says how to get it."""
    found = getattr(model, "meta_peft", None)
    if not isinstance(found, MetaLearned):
        raise MetaPeftError(
            "The model carries no meta-learned adapter: get one from meta_peft.load(base, folder), or from a"
            " MetaTrainer after train()."
        )
    return found


def fetch(adapter: str | Path, revision: str | None = None, *, token: str | None = None) -> Path:
    """The folder of `adapter`, downloaded if it is an id on the hub.

    Raises:
        MetaPeftError: it is neither, or the hub does not give it to this user.
    """
    from huggingface_hub import snapshot_download

    nothing = f"{str(adapter)!r} is neither a folder nor an adapter the hub gives"
    try:
        if Path(adapter).is_dir():
            return Path(adapter)
    except OSError as error:  # no name that a file can have
        raise MetaPeftError(f"{nothing} ({error}).") from error
    files = [CONFIG, WEIGHTS, JSON, TENSORS]
    with explained(nothing):
        return Path(snapshot_download(str(adapter), revision=revision, allow_patterns=files, token=token))


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
) -> str:
    """Upload a saved adapter folder, meta-learned or adapted, to the hub; returns the address of the commit.

    The adapter, its sidecar, the card and the results beside them go, checkpoints of the training do not. A repository that
    is not there is made.

    Args:
        folder: what `save`, `MetaTrainer.save_model` or `Adapted.save` wrote.
        repo_id: ``user/name``.
        private: whether a new repository is private; by default as your account has it.
        token: of the hub; by default the one you are logged in with.
        revision: the branch to write to, which has to be there; by default main.

    Raises:
        MetaPeftError: the folder holds no adapter, or the hub refuses it.
    """
    from huggingface_hub import HfApi

    missing = [name for name in (CONFIG, WEIGHTS) if not (Path(folder) / name).is_file()]
    if missing:
        raise MetaPeftError(f"{folder} has no {' and no '.join(missing)}: give the folder of a saved adapter.")
    api = HfApi(token=token)
    with explained(f"The hub does not take {folder} as {repo_id!r}", writing=True):
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=str(folder),
            allow_patterns=[CONFIG, WEIGHTS, JSON, TENSORS, LABELS, CARD, "results.*"],
            commit_message="LoRA adapter of meta_peft",
            revision=revision,
        )
    return str(commit)


def push_checkpoint(
    folder: Path, repo_id: str, *, step: int, whole: str | None, token: str | None, revision: str | None
) -> None:
    """Upload the adapter, sidecar and card of a checkpoint; and all of it into the folder `whole`, if one is named."""
    from huggingface_hub import HfApi

    api, message = HfApi(token=token), f"Training in progress, step {step}"
    to: dict[str, Any] = {"repo_id": repo_id, "folder_path": str(folder), "revision": revision}
    api.upload_folder(**to, commit_message=message, allow_patterns=[CONFIG, WEIGHTS, JSON, TENSORS, CARD])
    if whole is not None:
        api.upload_folder(**to, commit_message=f"{message}, checkpoint", path_in_repo=whole)


def _write_card(card: str | None, partial: Path, folder: Path) -> None:
    """The card among the new files of `folder`, unless there is none, or somebody's own README has its place."""
    if card is not None and may_replace(folder, card):
        (partial / CARD).write_text(card, encoding="utf-8")


@contextmanager
def _replacing_files(folder: Path) -> Iterator[Path]:
    """A folder to write into; its files then replace those of `folder` one by one, each by a rename.

    The sidecar goes first and comes last. Whoever is killed in between leaves an adapter without one, which is refused,
    and not one whose files do not belong together. What says something of the adapter that is replaced goes first too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder))
    try:
        yield partial
        files = sorted(partial.iterdir(), key=lambda file: (file.name == JSON, file.name))
        if files and files[-1].name == JSON:
            (folder / JSON).unlink(missing_ok=True)
        for name in (NOTE, LABELS):
            (folder / name).unlink(missing_ok=True)
        for file in files:
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
