"""Against stock PEFT, against the forward that the loss runs, and one task at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures import base_of, rows_for
from architectures import lora as with_lora
from peft import PeftModel
from tiny_models import VOCAB, random_rows, tiny, tiny_base
from torch import Tensor

from meta_peft import MetaPeftError
from meta_peft.adapters import hub
from meta_peft.evaluation.predictions import MARGIN, choice_scores, references, with_choices, written
from meta_peft.functional.adapter_loss import AdapterLoss
from meta_peft.inner_loop.inner_loop import adapt
from meta_peft.inner_optimizers import SGD, InnerRule
from meta_peft.params import take_task
from meta_peft.types import Params, Rows

WRITERS = {"llama": "q_proj", "gpt2": "c_attn", "gemma2": "q_proj", "t5": "q", "whisper": "q_proj"}
END = 5  # a token that tiny models write now and then


def adapted(loss_fn: AdapterLoss, rows: Rows, lr: float = 2.0) -> Params:
    """Weights that differ from task to task, so that a mistaken task shows."""
    rule = InnerRule(SGD(), lr=lr, steps=2)
    own = dict(loss_fn.weights.parameters())
    return adapt(loss_fn, own, rule.initial_rates(own), rows, rule)


def model_of(kind: str, dtype: torch.dtype = torch.float64) -> AdapterLoss:
    targets = [WRITERS[kind], *(["v"] if kind == "t5" else ["c_proj"] if kind == "gpt2" else ["v_proj"])]
    return AdapterLoss(with_lora(base_of(kind, dtype=dtype), targets), second_order=False)


def with_answers(rows: Rows, answers: list[list[int]], *, causal: bool) -> Rows:
    return with_choices(rows, [[answer] for answer in answers], causal=causal)[0]


def rows_of(loss_fn: AdapterLoss, n_tasks: int, per_task: int = 2) -> Rows:
    """Random rows; a decoder behind an encoder begins all answers at the same place, Whisper's behind a token more."""
    base = loss_fn.model.get_base_model()
    rows = rows_for(base, n_tasks, per_task)
    if loss_fn.causal:
        return rows
    before = [base.config.decoder_start_token_id, *([7] if base.config.model_type == "whisper" else [])]
    prompt = torch.tensor([before] * len(rows.labels_BL))
    blank = Rows({**rows.inputs, "decoder_input_ids": prompt}, torch.full_like(prompt, -100), n_tasks)
    blank.labels_BL[:, -1] = 4
    lengths = [1 + i // per_task for i in range(len(prompt))]
    return with_answers(blank, [[4] * n for n in lengths], causal=False)


def test_an_answer_is_the_last_run_of_labels():
    labels = [[-100, -100, 3, 4, -100], [-100, 5, -100, 6, 7], [8, 9, -100, -100, -100]]
    rows = Rows({}, torch.tensor(labels), 1)
    assert references(rows) == [[3, 4], [6, 7], [8, 9]]


@pytest.mark.parametrize("kind", WRITERS)
def test_a_row_matches_if_and_only_if_its_labels_are_written(kind: str):
    """The exact match of the loss's own forward, on rows that are right, wrong at the start and wrong at the end."""
    loss_fn = model_of(kind)
    rows = rows_of(loss_fn, n_tasks=2, per_task=3)
    fast = adapted(loss_fn, rows)
    found = written(loss_fn, fast, rows, stop=[END], max_new_tokens=4)
    assert any(len(answer) == 4 for answer in found)
    assert len({tuple(answer) for answer in found}) > 1, "all the same would hide rows in the wrong order"
    answers = [list(answer) for answer in found]
    answers[1][0] = 3 + (answers[1][0] + 1) % (VOCAB - 3)
    answers[5][-1] = 3 + (answers[5][-1] + 1) % (VOCAB - 3)
    labelled = with_answers(rows, answers, causal=loss_fn.causal)
    assert references(labelled) == answers
    again = written(loss_fn, fast, labelled, stop=[END], max_new_tokens=4)
    assert again == found
    matches = loss_fn.scores(fast, labelled).exact_match_T
    torch.testing.assert_close(matches, torch.full_like(matches, 2 / 3))


@pytest.mark.parametrize("kind", WRITERS)
def test_each_task_writes_with_its_own_weights(kind: str):
    """Together and alone the same: other tasks, their padding and their longer answers do not matter."""
    loss_fn = model_of(kind)
    rows = rows_of(loss_fn, n_tasks=3)
    fast = adapted(loss_fn, rows)
    together = written(loss_fn, fast, rows, stop=[END])
    apart = [
        answer for t in range(3) for answer in written(loss_fn, take_task(fast, t), rows.tasks(t, t + 1), stop=[END])
    ]
    assert together == apart
    assert len({tuple(answer) for answer in together}) > 1


def test_a_row_writes_what_it_writes_without_padding():
    loss_fn = model_of("llama")
    rows = random_rows(n_tasks=1, per_task=4)
    own = dict(loss_fn.weights.parameters())
    whole = written(loss_fn, own, rows, stop=[END], max_new_tokens=5)
    for i, answer in enumerate(whole):
        n = int((rows.labels_BL[i] == -100).logical_and(rows.inputs["attention_mask"][i] == 1).sum())
        ids = rows.inputs["input_ids"][i : i + 1, :n]
        for token in answer:
            with torch.no_grad():
                logits = loss_fn.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            assert int(logits[0, -1].argmax()) == token
            ids = torch.cat([ids, torch.tensor([[token]])], 1)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_stock_peft_writes_the_same(kind: str, tmp_path: Path):
    """Each task's adapter, saved and loaded by PEFT, its own `generate`: the same tokens."""
    loss_fn = model_of(kind, torch.float32)
    model = loss_fn.model
    rows = rows_of(loss_fn, n_tasks=2)
    fast = adapted(loss_fn, rows)
    found = written(loss_fn, fast, rows, stop=[END], max_new_tokens=6)
    for t in range(2):
        folder = tmp_path / str(t)
        hub.save_adapted(take_task(fast, t), model.peft_config["default"], "base", folder)
        stock = PeftModel.from_pretrained(base_of(kind, dtype=torch.float32), str(folder)).eval()
        part = rows.tasks(t, t + 1)
        if kind == "t5":
            inputs = {name: part.inputs[name] for name in ("input_ids", "attention_mask")}
            before = 1
        else:
            inputs = left_padded(part)
            before = inputs["input_ids"].shape[1]
        made = stock.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=END, pad_token_id=2)
        assert [up_to_end(row) for row in made[:, before:].tolist()] == found[2 * t : 2 * t + 2]


def left_padded(rows: Rows) -> dict[str, Tensor]:
    prompts = [
        [i for i, label, there in zip(*columns, strict=True) if there and label == -100]
        for columns in zip(
            rows.inputs["input_ids"].tolist(),
            rows.labels_BL.tolist(),
            rows.inputs["attention_mask"].tolist(),
            strict=True,
        )
    ]
    longest = max(map(len, prompts))
    ids = torch.tensor([[2] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def up_to_end(answer: list[int]) -> list[int]:
    return answer[: answer.index(END) + 1] if END in answer else answer


def test_answers_end_at_a_stop_token_or_at_the_limit():
    loss_fn = AdapterLoss(tiny(layers=2), second_order=False)
    rows, own = random_rows(n_tasks=2), dict(loss_fn.weights.parameters())
    never = written(loss_fn, own, rows, stop=[VOCAB - 1], max_new_tokens=6)
    assert [len(answer) for answer in never] == [6] * 4
    stop = never[0][2]
    stopped = written(loss_fn, own, rows, stop=[VOCAB - 1, stop], max_new_tokens=6)
    assert stopped[0] == never[0][: never[0].index(stop) + 1]
    assert stopped == [a[: a.index(stop) + 1] if stop in a else a for a in never]
    by_task = [max(map(len, references(rows.tasks(t, t + 1)))) + MARGIN for t in range(2)]
    lengths = [len(answer) for answer in written(loss_fn, own, rows, stop=[VOCAB - 1])]
    assert lengths == [by_task[0]] * 2 + [by_task[1]] * 2
    assert by_task[0] != by_task[1]


def test_the_models_own_generation_config_plays_no_part():
    loss_fn = AdapterLoss(tiny(layers=2), second_order=False)
    base, rows, own = loss_fn.model.get_base_model(), random_rows(), dict(loss_fn.weights.parameters())
    expected = written(loss_fn, own, rows, stop=[END], max_new_tokens=5)
    config = base.generation_config
    config.update(repetition_penalty=5.0, suppress_tokens=[expected[0][0]], do_sample=True, temperature=3.0)
    assert written(loss_fn, own, rows, stop=[END], max_new_tokens=5) == expected
    assert base.generation_config is config
    assert config.repetition_penalty == 5.0


def test_answers_that_begin_at_different_places_of_a_decoder_are_refused():
    loss_fn = model_of("t5")
    rows = rows_for(loss_fn.model.get_base_model(), n_tasks=2)
    assert len({row.index(next(x for x in row if x >= 0)) for row in rows.labels_BL.tolist()}) > 1
    with pytest.raises(MetaPeftError, match=r"begin at the decoder positions \[1, 2\]; to be written at once"):
        written(loss_fn, dict(loss_fn.weights.parameters()), rows, stop=[END])


def test_a_decoder_begins_in_the_same_way_where_rows_do_not_say_how():
    """As rows of `episode_batch` may: transformers makes what its decoder reads of the labels."""
    loss_fn = model_of("t5")
    rows, own = rows_of(loss_fn, n_tasks=2), loss_fn.own()
    bare = Rows({n: t for n, t in rows.inputs.items() if n != "decoder_input_ids"}, rows.labels_BL, rows.n_tasks)
    answers = [written(loss_fn, own, each, stop=[END], max_new_tokens=4) for each in (bare, rows)]
    assert answers[0] == answers[1]


def test_rows_without_a_prompt_are_refused():
    loss_fn = AdapterLoss(tiny(), second_order=False)
    ids = torch.tensor([[5, 6, 7]])
    rows = Rows({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids.clone(), 1)
    with pytest.raises(MetaPeftError, match="A row has no prompt, all of its tokens are to be learned"):
        written(loss_fn, dict(loss_fn.weights.parameters()), rows, stop=[END])


def test_sound_is_heard_in_the_precision_of_the_model():
    loss_fn = model_of("whisper")
    rows, own = rows_of(loss_fn, n_tasks=1), dict(loss_fn.weights.parameters())
    heard = rows.inputs["input_features"].float()
    found = [
        written(loss_fn, own, Rows({**rows.inputs, "input_features": sound}, rows.labels_BL, 1), stop=[END])
        for sound in (heard, heard.double())
    ]
    assert found[0] == found[1]


CHOICES = [[[4], [6, 7], [8, 9, 10]], [[4, 4], [5]], [[6], [7]], [[3, 8], [9], [10]]]


@pytest.mark.parametrize("kind", ["llama", "t5", "whisper"])
def test_likelihoods_are_those_of_each_answer_alone(kind: str):
    loss_fn = model_of(kind)
    model = loss_fn.model.eval()
    rows = rows_for(model.get_base_model(), n_tasks=2)
    fast = adapted(loss_fn, rows)
    each = with_choices(rows, CHOICES, causal=loss_fn.causal)
    assert len(each) == 3
    total, mean = (choice_scores(loss_fn, fast, each, mean=m) for m in (False, True))
    assert total.shape == mean.shape == (4, 3)
    for i, answers in enumerate(CHOICES):
        for c, answer in enumerate(answers):
            loss_fn.weights.load_(take_task(fast, i // 2))
            expected = log_likelihood(model, rows, i, answer)
            assert float(total[i, c]) == pytest.approx(expected, abs=1e-5 if kind == "whisper" else 1e-9)
            assert float(mean[i, c]) == pytest.approx(expected / len(answer), abs=1e-5)
        for again in total[i, len(answers) :].tolist():
            assert again == pytest.approx(float(total[i, 0]))


def log_likelihood(model: PeftModel, rows: Rows, i: int, answer: list[int]) -> float:
    """By an ordinary forward of this row alone, without padding."""
    start = next(p for p, label in enumerate(rows.labels_BL[i].tolist()) if label != -100)
    if "decoder_input_ids" in rows.inputs:
        before = rows.inputs["decoder_input_ids"][i, : start + 1].tolist()
        given = {n: t[i : i + 1] for n, t in rows.inputs.items() if n != "decoder_input_ids"}
        inputs = {**given, "decoder_input_ids": torch.tensor([before + answer[:-1]])}
        first = start
    else:
        mask = rows.inputs["attention_mask"][i, :start] == 1
        before = rows.inputs["input_ids"][i, :start][mask].tolist()
        inputs, first = {"input_ids": torch.tensor([before + answer])}, len(before) - 1
    with torch.no_grad():
        log_p = model.get_base_model()(**inputs).logits[0].log_softmax(-1)
    return sum(float(log_p[first + k, token]) for k, token in enumerate(answer))


def test_a_masked_language_model_fills_its_masks():
    """As many as an answer has tokens, all at once."""
    loss_fn = AdapterLoss(with_lora(base_of("bert"), ["query", "value"]), second_order=False)
    model = loss_fn.model.eval()
    ids = torch.tensor([[7, 3, 3, 9], [8, 3, 9, 2]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    labels = torch.tensor([[-100, 4, 5, -100], [-100, 6, -100, -100]])
    rows = Rows({"input_ids": ids, "attention_mask": mask}, labels, 1)
    own = dict(loss_fn.weights.parameters())

    def log_p(*tokens: int) -> Tensor:
        with torch.no_grad():
            return model.get_base_model()(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)

    first, one, second, two = log_p(7, 3, 3, 9), log_p(7, 3, 9), log_p(8, 3, 9), log_p(8, 3, 3, 9)
    expected = [[first[1, 4] + first[2, 5], one[1, 6]], [second[1, 6], two[1, 7] + two[2, 8]]]
    each = with_choices(rows, [[[4, 5], [6]], [[6], [7, 8]]], causal=False)
    torch.testing.assert_close(choice_scores(loss_fn, own, each), torch.tensor(expected, dtype=torch.float64))
    several = Rows(rows.inputs, torch.tensor([[4, -100, 5, -100]] * 2), 1)
    with pytest.raises(MetaPeftError, match="that have one run of masks; this row has several"):
        with_choices(several, [[[4]], [[6]]], causal=False)


def test_labels_and_their_probabilities_at_labelled_positions():
    loss_fn = AdapterLoss(with_lora(base_of("bert"), ["query", "value"]), second_order=False)
    rows = rows_for(loss_fn.model.get_base_model())
    with torch.no_grad():
        p = loss_fn.model.eval().get_base_model()(**rows.inputs).logits.softmax(-1)
    own, labelled = dict(loss_fn.weights.parameters()), rows.labels_BL != -100
    assert loss_fn.scores(own, rows).predicted_BL.tolist() == torch.where(labelled, p.argmax(-1), -100).tolist()
    expected = torch.where(labelled, p.amax(-1), 0).float()
    torch.testing.assert_close(loss_fn.scores(own, rows).confidence_BL, expected, atol=1e-6, rtol=0)


def test_the_model_is_as_it_was():
    loss_fn = AdapterLoss(tiny(layers=2).train(), second_order=False)
    before = {name: value.clone() for name, value in loss_fn.model.state_dict().items()}
    written(loss_fn, adapted(loss_fn, random_rows()), random_rows(), stop=[END])
    after = loss_fn.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert loss_fn.model.training
    assert not any("forward" in module.__dict__ for module in loss_fn.model.modules())


def test_tasks_go_one_by_one_where_they_cannot_be_stacked():
    """LoRA of an embedding has no stack."""
    base = tiny_base(layers=2)
    loss_fn = AdapterLoss(with_lora(base, ["embed_tokens", "q_proj"]), second_order=False)
    rows = random_rows(n_tasks=2)
    fast = adapted(loss_fn, rows)
    together = written(loss_fn, fast, rows, stop=[END], max_new_tokens=4)
    apart = [written(loss_fn, take_task(fast, t), rows.tasks(t, t + 1), stop=[END], max_new_tokens=4) for t in range(2)]
    assert together == apart[0] + apart[1]
