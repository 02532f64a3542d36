from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from meta_peft.errors import MetaPeftError
from meta_peft.tasks.prompt import PromptFormat, answer_length, example_columns, read_columns

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
        ({"input": "x", "target": float("nan")}, "Column 'target' is empty"),
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


@pytest.mark.parametrize("turns", ["last", "all"])
@pytest.mark.parametrize("nothing", [{"role": "assistant", "content": ""}, {"role": "user", "content": None}])
def test_turns_without_content(turns: str, nothing: dict):
    """A template would write the word None, and an answer of no words would be learned."""
    said = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    messages = [*said[:1], nothing] if nothing["role"] == "assistant" else [nothing, said[1]]
    with pytest.raises(
        MetaPeftError, match=r"The turn \{.*\} has no content, in the conversation \[.*: fill it, or leave"
    ):
        PromptFormat(assistant_turns=turns).encode({"messages": messages}, tokenizer(), 99)


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


# ---- questions with a context


@pytest.mark.parametrize(
    ("row", "prompt", "completion"),
    [
        ({"question": "one", "answer": "two"}, "one ->", " two"),
        ({"question": "one", "context": "six", "answer": "two"}, "six\none ->", " two"),
        ({"question": "one", "context": None, "answer": "two"}, "one ->", " two"),
        ({"question": "one", "context": "", "answers": ["two", "three"]}, "one ->", " two"),
        (
            {"question": "one", "context": "six", "answers": {"text": ["two"], "answer_start": [4]}},
            "six\none ->",
            " two",
        ),
        (
            {"question": "one", "context": "six", "answers": {"text": [], "answer_start": []}},
            "six\none ->",
            " unanswerable",
        ),
        ({"question": "{context}", "context": "{question}", "answer": "two"}, "{question}\n{context} ->", " two"),
    ],
)
def test_questions(row: dict, prompt: str, completion: str):
    """With their context in front of them; the first of several answers is learned."""
    assert PromptFormat().render({"id": 1, **row}) == (prompt, completion)


def test_the_context_has_a_template():
    own = PromptFormat("{input} =", context_template="five {question} six {context}")
    row = {"question": "one", "context": "two", "answer": "three"}
    assert own.render(row)[0] == "five one six two ="
    assert PromptFormat(**own.to_dict()) == own
    with pytest.raises(MetaPeftError, match=r"context_template must contain \{question\}"):
        PromptFormat(context_template="{context}")
    assert read_columns(["question", "answers", "context"]) == ("question", "answers", "context")
    assert read_columns(["text", "label", "context"]) == ("text", "label")


@pytest.mark.parametrize("answers", [3, {"texts": ["a"]}, None])
def test_answers_of_another_form(answers):
    with pytest.raises(MetaPeftError, match="Column 'answers' must hold a list of texts, or SQuAD's"):
        PromptFormat().render({"question": "one", "answers": answers})


@pytest.mark.parametrize(
    "row", [{"audio": "a.wav", "sentence": "x"}, {"audio": "a.wav", "text": "x"}, {"tokens": ["a"], "ner_tags": [0]}]
)
def test_rows_that_are_no_text(row: dict):
    assert set(example_columns(row)) == set(row)
    with pytest.raises(MetaPeftError, match="are no prompt and completion: choose the objective"):
        PromptFormat().render(row)


# ---- every turn of the assistant

TURNS = [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four five")]
CHAT = {"messages": [{"role": role, "content": content} for role, content in TURNS]}


def test_all_turns_of_the_assistant():
    """What it wrote, and the ends of its turns; what it was told is not learned."""
    text, learned = words(PromptFormat(assistant_turns="all").encode(CHAT, tokenizer(), 99))
    assert text == "<user> one <end> <assistant> two <end> <user> three <end> <assistant> four five <end>"
    assert learned == "two <end> four five <end>"


def test_a_long_conversation_is_cut_at_its_start():
    encoded = PromptFormat(assistant_turns="all").encode(CHAT, tokenizer(), 10)
    assert words(encoded) == (
        "<user> two <end> <user> three <end> <assistant> four five <end>",
        "two <end> four five <end>",
    )
    assert words(PromptFormat(assistant_turns="all").encode(CHAT, tokenizer(), 6)) == (
        "<user> <end> <assistant> four five <end>",
        "four five <end>",
    )
    assert answer_length(encoded["labels"]) == 3


def test_turns_that_a_template_rewrites():
    """Some templates drop earlier thoughts: then only the last turn can be learned."""
    odd = tokenizer()
    odd.chat_template = TEMPLATE.replace(
        "{{ m.content }}", "{{ m.content if loop.last or m.role == 'user' else 'six' }}"
    )
    assert words(PromptFormat().encode(CHAT, odd, 99))[1] == "four five <end>"
    with pytest.raises(MetaPeftError, match=r"does not continue its own prompt.* or assistant_turns: last"):
        PromptFormat(assistant_turns="all").encode(CHAT, odd, 99)


def test_turns_must_be_known():
    with pytest.raises(MetaPeftError, match=r"assistant_turns must be one of last, all; got 'al'. Did you mean 'all'"):
        PromptFormat(assistant_turns="al")


# ---- another answer


def test_another_label():
    """As if the row had had it from the start."""
    own, row = PromptFormat("five {input} six", " {target} four"), {"text": "one two", "label": "three"}
    encoded = {"weight": 7, **own.encode(row, tokenizer(), 99)}
    expected = own.encode({**row, "label": "two two"}, tokenizer(), 99)
    assert own.with_label(encoded, "two two", tokenizer(), 64) == {"weight": 7, **expected}
    cut = own.with_label(encoded, "two two", tokenizer(), len(expected["input_ids"]) - 1)
    assert cut == {"weight": 7, **own.encode({**row, "label": "two two"}, tokenizer(), len(expected["input_ids"]) - 1)}
