"""What a model answers, row by row, with each task's own weights in its layers.

Three ways: greedy decoding, by transformers' `generate` with its cache; the likelihood of each of a few answers; and
the most likely label at the labelled positions (`AdapterLoss.scores`). The tasks of a stack go through the model
together wherever their losses do.

A row's answer is its last run of labelled tokens, up to and with the token that ends it; its prompt is all that comes
before. So of a conversation the last labelled turn is written, with all earlier turns as they are in the row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, GenerationMixin

from meta_peft.errors import MetaPeftError
from meta_peft.functional.adapter_loss import AdapterLoss
from meta_peft.objectives.labelled_tokens import IGNORED
from meta_peft.objectives.seq2seq_lm import SEQ2SEQ_LM, TOKENS
from meta_peft.types import Params, Rows

MARGIN = 16  # tokens that an answer may be longer than the longest reference of its task, if no limit is given
Tokens = list[int]


def references(rows: Rows) -> list[Tokens]:
    """The tokens of each row's answer, ``[B]``."""
    return [labels[start:stop] for labels, (start, stop) in zip(rows.labels_BL.tolist(), _spans(rows), strict=True)]


def written(
    loss_fn: AdapterLoss, adapter: Params, rows: Rows, *, stop: Sequence[int], max_new_tokens: int | None = None
) -> list[Tokens]:
    """What greedy decoding writes after each row's prompt, ``[B]``, up to and with the first of the tokens in `stop`.

    Neither sampling nor penalties nor forced tokens of the model's own generation config play a part: each token is the
    most likely one given those before it, as in the loss.

    Args:
        adapter: LoRA weights, ``[out, in]`` for all tasks or ``[T, out, in]``.
        stop: tokens that end an answer.
        max_new_tokens: where an answer is cut; by default `MARGIN` tokens beyond the longest reference of its task.
    """
    limits = _limits(rows, max_new_tokens)
    use = _decode if loss_fn.causal else _decode_from_encoder
    ends = list(dict.fromkeys(stop))

    def decode(model: Any, part: Rows) -> list[Tokens]:
        with _plain_greedy(model):
            return use(model, part, _options(ends, max(_limits(part, max_new_tokens))))

    answers = [answer for part in loss_fn.with_model(decode, adapter, rows) for answer in part]
    return [_up_to(answer, ends, limit) for answer, limit in zip(answers, limits, strict=True)]


def choice_scores(loss_fn: AdapterLoss, adapter: Params, choices: Sequence[Rows], *, mean: bool = False) -> Tensor:
    """The log-likelihood of each answer of each row, ``[B, C]``: summed over its tokens, or their mean.

    Args:
        choices: from `with_choices`: one `Rows` for each number of an answer.
    """
    columns = []
    for rows in choices:
        total_B, count_B = loss_fn.log_likelihoods(adapter, rows)
        columns.append(total_B / count_B if mean else total_B)
    return torch.stack(columns, 1)


def with_choices(rows: Rows, choices: Sequence[Sequence[Tokens]], *, causal: bool) -> list[Rows]:
    """The same rows with their first answers to choose from, with their second ones, and so on.

    A row with fewer answers than others repeats its first one. For each number of an answer there is one forward of all
    rows, which takes as much memory as their loss does.
    """
    most = max(len(answers) for answers in choices)
    return [
        _answered(rows, [answers[c] if c < len(answers) else answers[0] for answers in choices], causal)
        for c in range(most)
    ]


def _spans(rows: Rows) -> list[tuple[int, int]]:
    """Where the last run of labels begins and ends in each row."""
    spans = []
    for labels in rows.labels_BL.tolist():
        stop = max(place for place, label in enumerate(labels) if label != IGNORED) + 1
        unlabelled = [place for place in range(stop) if labels[place] == IGNORED]
        spans.append((unlabelled[-1] + 1 if unlabelled else 0, stop))
    return spans


def _prompts(rows: Rows) -> list[Tokens]:
    """The tokens before each row's answer, without padding, for a model whose labels stand where its inputs do."""
    ids, mask = rows.inputs["input_ids"].tolist(), rows.inputs["attention_mask"].tolist()
    return [
        [token for token, there in zip(ids[i][:start], mask[i][:start], strict=True) if there]
        for i, (start, _) in enumerate(_spans(rows))
    ]


def _padded(sequences: Sequence[Tokens], padding: int, like: Tensor, side: str = "right") -> tuple[Tensor, Tensor]:
    """Sequences as one tensor ``[B, L]``, and a mask of where they are."""
    tokens = [like.new_tensor(sequence) for sequence in sequences]
    there = [torch.ones_like(sequence) for sequence in tokens]
    return pad_sequence(tokens, True, padding, side), pad_sequence(there, True, 0, side)


def _decode(model: Any, rows: Rows, options: GenerationConfig) -> list[Tokens]:
    """Prompts are padded on the left, so that all answers begin at the same place."""
    prompts = _prompts(rows)
    if not all(prompts):
        raise MetaPeftError(
            "A row has no prompt, all of its tokens are to be learned, so there is nothing to write an answer to: take a"
            " metric that needs none written, such as exact_match."
        )
    ids_BL, mask_BL = _padded(prompts, options.pad_token_id, rows.labels_BL, "left")
    _fit(options, model, ids_BL, rows)
    made: Any = GenerationMixin.generate(model, input_ids=ids_BL, attention_mask=mask_BL, generation_config=options)
    return made[:, ids_BL.shape[1] :].tolist()


def _decode_from_encoder(model: Any, rows: Rows, options: GenerationConfig) -> list[Tokens]:
    """Behind the decoder's start token and what else stands unlabelled before the answer."""
    starts = {start for start, _ in _spans(rows)}
    if len(starts) > 1:
        raise MetaPeftError(
            f"The answers of the rows begin at the decoder positions {sorted(starts)}; to be written at once they must"
            " begin at the same one."
        )
    inputs = dict(SEQ2SEQ_LM.inputs_of(model, rows))
    prompt_BL = inputs.pop(TOKENS)[:, : starts.pop() + 1]
    options.decoder_start_token_id = int(prompt_BL[0, 0])
    _fit(options, model, prompt_BL, rows)
    # Whisper's own `generate` has rules about timestamps and long sounds, and leaves the prompt out of what it returns.
    made: Any = GenerationMixin.generate(model, **inputs, decoder_input_ids=prompt_BL, generation_config=options)
    return made[:, prompt_BL.shape[1] :].tolist()


def _options(stop: list[int], max_new_tokens: int) -> GenerationConfig:
    return GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, eos_token_id=stop, pad_token_id=stop[0]
    )


def _fit(options: GenerationConfig, model: Any, prompt_BL: Tensor, rows: Rows) -> None:
    """Let nothing be written where the model has no positions, though as much as the references have."""
    positions = getattr(model.config, "max_target_positions", None) or getattr(
        model.config, "max_position_embeddings", None
    )
    if positions is not None:
        least = max(stop - start for start, stop in _spans(rows))
        options.max_new_tokens = min(options.max_new_tokens, max(least, positions - prompt_BL.shape[1]))


@contextmanager
def _plain_greedy(model: Any) -> Iterator[None]:
    """Nothing of the model's own generation config applies: it may have penalties, or tokens to suppress."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _limits(rows: Rows, max_new_tokens: int | None) -> list[int]:
    """How long each row's answer may be: it depends on no other task of the stack."""
    lengths = [stop - start for start, stop in _spans(rows)]
    per_task = len(lengths) // rows.n_tasks
    return [
        max_new_tokens or max(lengths[i - i % per_task : i - i % per_task + per_task]) + MARGIN
        for i in range(len(lengths))
    ]


def _up_to(answer: Tokens, stop: Sequence[int], limit: int) -> Tokens:
    end = next((place + 1 for place, token in enumerate(answer) if token in stop), len(answer))
    return answer[: min(end, limit)]


def _answered(rows: Rows, answers: Sequence[Tokens], causal: bool) -> Rows:
    """`rows` with other answers, one for each row."""
    if causal:
        prompts = _prompts(rows)
        ids_BL, mask_BL = _padded([p + a for p, a in zip(prompts, answers, strict=True)], 0, rows.labels_BL)
        labels = [[IGNORED] * len(p) + list(a) for p, a in zip(prompts, answers, strict=True)]
        labels_BL, _ = _padded(labels, IGNORED, rows.labels_BL)
        return Rows({"input_ids": ids_BL, "attention_mask": mask_BL}, labels_BL, rows.n_tasks)
    spans = _spans(rows)
    if "decoder_input_ids" in rows.inputs:
        ids = rows.inputs["decoder_input_ids"].tolist()
        before = [row[: start + 1] for row, (start, _) in zip(ids, spans, strict=True)]
        ids_BL, _ = _padded([b + list(a[:-1]) for b, a in zip(before, answers, strict=True)], 0, rows.labels_BL)
        labels = [[IGNORED] * start + list(a) for a, (start, _) in zip(answers, spans, strict=True)]
        labels_BL, _ = _padded(labels, IGNORED, rows.labels_BL)
        return Rows({**rows.inputs, "decoder_input_ids": ids_BL}, labels_BL, rows.n_tasks)
    return _filled_in(rows, answers)


def _filled_in(rows: Rows, answers: Sequence[Tokens]) -> Rows:
    """A masked language model's: the one run of masks of each row becomes as long as its answer."""
    all_ids, all_labels, spans = [], [], _spans(rows)
    there = rows.inputs["attention_mask"].sum(1).tolist()
    for i, (labels, answer) in enumerate(zip(rows.labels_BL.tolist(), answers, strict=True)):
        start, stop = spans[i]
        if any(label != IGNORED for label in labels[:start]) or set(rows.inputs) != {"input_ids", "attention_mask"}:
            raise MetaPeftError(
                "Answers can only be chosen for rows of tokens that have one run of masks; this row has several, or other"
                " inputs. Take exact_match or a metric of text."
            )
        ids = rows.inputs["input_ids"][i, : there[i]].tolist()
        all_ids.append([*ids[:start], *ids[start : start + 1] * len(answer), *ids[stop:]])
        all_labels.append([*[IGNORED] * start, *answer, *[IGNORED] * (len(ids) - stop)])
    ids_BL, mask_BL = _padded(all_ids, 0, rows.labels_BL)
    labels_BL, _ = _padded(all_labels, IGNORED, rows.labels_BL)
    return Rows({"input_ids": ids_BL, "attention_mask": mask_BL}, labels_BL, rows.n_tasks)
