from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from meta_peft.errors import MetaPeftError
from meta_peft.tasks.prompt import PromptFormat, example_columns

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
SPECIAL = ["<unk>", "<eos>", "<bos>", "<pad>", "<user>", "<assistant>", "<end>"]
WORDS = [*SPECIAL, "->", "one", "two", "three", "four", "five", "six"]


def tokenizer(**special) -> PreTrainedTokenizerFast:
    model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": "<eos>", "bos_token": "<bos>", "pad_token": "<pad>", "unk_token": "<unk>"} | special
    made = PreTrainedTokenizerFast(tokenizer_object=model, **{k: v for k, v in special.items() if v})
    made.chat_template = TEMPLATE
    return made


def words(encoded: dict[str, list[int]]) -> tuple[str, str]:
    """All tokens, and those with a label."""
    ids, labels = encoded["input_ids"], encoded["labels"]
    assert len(ids) == len(labels)
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    return " ".join(WORDS[i] for i in ids), " ".join(WORDS[i] for i in labels if i != -100)


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"prompt": "one two", "completion": "three"}, "<bos> one two three <eos>"),
        ({"input": "one two", "target": "three"}, "<bos> one two -> three <eos>"),
        ({"text": "one two", "label": "three"}, "<bos> one two -> three <eos>"),
        ({"question": "one two", "answer": "three"}, "<bos> one two -> three <eos>"),
    ],
)
def test_column_forms(row: dict, text: str):
    """Only the completion, end of sequence included, is learned. Other columns are left alone."""
    assert words(PromptFormat().encode({"id": 7, **row}, tokenizer(), 99)) == (text, "three <eos>")


def test_conversations_go_through_the_chat_template():
    turns = [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four five")]
    messages = [{"role": role, "content": content} for role, content in turns]
    text, learned = words(PromptFormat().encode({"messages": messages}, tokenizer(), 99))
    assert text == "<user> one <end> <assistant> two <end> <user> three <end> <assistant> four five <end>"
    assert learned == "four five <end>"  # the last turn; the template has its own end


def test_templates():
    own = PromptFormat("five {input} six", " {target} four")
    assert words(own.encode({"input": "one", "target": "two"}, tokenizer(), 99)) == (
        "<bos> five one six two four <eos>",
        "two four <eos>",
    )
    assert PromptFormat(**own.to_dict()) == own
    # braces in the data are data
    assert own.render({"input": "{target}", "target": "{input} {x}"}) == ("five {target} six", " {input} {x} four")


def test_numbers_become_text():
    assert PromptFormat().render({"text": "a", "label": 0}) == ("a ->", " 0")


def test_without_a_token_for_the_beginning_the_end_token_stands_first():
    text, _ = words(PromptFormat().encode({"input": "one", "target": "two"}, tokenizer(bos_token=None), 99))
    assert text == "<eos> one -> two <eos>"


@pytest.mark.parametrize(
    ("max_length", "text"),
    [
        (9, "<bos> one two three four -> five six <eos>"),
        (8, "<bos> two three four -> five six <eos>"),
        (5, "<bos> -> five six <eos>"),
        (4, "<bos> five six <eos>"),
    ],
)
def test_a_long_prompt_is_cut_at_its_start(max_length: int, text: str):
    """The first token and the whole completion stay."""
    row = {"input": "one two three four", "target": "five six"}
    assert words(PromptFormat().encode(row, tokenizer(), max_length)) == (text, "five six <eos>")


def test_a_completion_that_does_not_fit():
    with pytest.raises(MetaPeftError, match="A completion of 3 tokens does not fit max_length=3: raise max_length"):
        PromptFormat().encode({"input": "one", "target": "five six"}, tokenizer(), 3)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input": "", "target": "x"}, r"Column 'input' is empty in the row \{'input': ''"),
        ({"input": "x", "target": None}, "Column 'target' is empty"),
        ({"prompt": "x", "completion": ""}, "Column 'completion' is empty"),
        (
            {"inputs": "x", "target": "y"},
            r"Expected columns prompt \+ completion, .*columns are \['inputs', 'target'\]",
        ),
        ({"messages": []}, "must end with an assistant turn, got"),
        ({"messages": [{"role": "user", "content": "x"}]}, "must end with an assistant turn"),
    ],
)
def test_unusable_rows(row: dict, message: str):
    with pytest.raises(MetaPeftError, match=message):
        PromptFormat().encode(row, tokenizer(), 99)


TURN = {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]}


def test_conversations_without_a_chat_template():
    plain = tokenizer()
    plain.chat_template = None
    with pytest.raises(MetaPeftError, match="tokenizer has no chat template: use an instruct model"):
        PromptFormat().encode(TURN, plain, 99)


def test_a_chat_template_that_rewrites_its_own_prompt():
    """Some templates drop a part of the prompt once the answer is there: the prompt of training was never seen."""
    odd = tokenizer()
    odd.chat_template = TEMPLATE.replace("<assistant> {% endif", "<assistant> six {% endif")
    with pytest.raises(MetaPeftError, match="does not continue its own prompt"):
        PromptFormat().encode(TURN, odd, 99)


@pytest.mark.parametrize("template", [{"prompt_template": "x"}, {"completion_template": "{input}"}])
def test_templates_without_their_field(template: dict):
    with pytest.raises(MetaPeftError, match=rf"{next(iter(template))} must contain \{{"):
        PromptFormat(**template)


def test_the_first_known_form_wins():
    assert example_columns(["label", "text", "prompt", "completion"]) == ("prompt", "completion")
    assert example_columns(["task", "messages"]) == ("messages",)
