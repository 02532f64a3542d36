from __future__ import annotations

from collections import Counter

import pytest
from surface import tiny_tokenizer

from meta_peft.errors import MetaPeftError
from meta_peft.tasks import Encoding, EpisodeDataset, Labelling, PromptFormat, TaskSet
from meta_peft.tasks.encoding import Facts
from meta_peft.tasks.labelling import large_enough, numbered_within


class Characters:
    """A tokenizer: one token a character."""

    eos_token_id, bos_token_id = 1, None

    def __call__(self, text: str, add_special_tokens: bool):
        return {"input_ids": [ord(c) for c in text]}

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


TOKENIZER = Characters()
CLASSES = "abcde"
ROWS = [{"text": f"{c}{x}{y}", "label": 2 * c, "domain": x} for c in CLASSES for x in "xyz" for y in "klmnop"]


def encoded(rows: list[dict] = ROWS, column: str = "label") -> TaskSet:
    return TaskSet.from_rows(rows, column).encoded(PromptFormat(), TOKENIZER, 32)


def episodes(words: str = "given", tasks: TaskSet | None = None, ways: int = 3, length: int = 40) -> EpisodeDataset:
    sizes = {"shots": 2, "query_size": 1, "seed": 3, "length": length}
    return EpisodeDataset(tasks or encoded(), **sizes, labels=Labelling(ways, words))


def read(row: dict) -> tuple[str, str]:
    """Input and answer."""
    answer = [token for token in row["labels"] if token != -100]
    prompt = row["input_ids"][1 : len(row["labels"]) - len(answer)]
    assert row["input_ids"][len(row["labels"]) - len(answer) :] == answer
    assert answer[-1] == TOKENIZER.eos_token_id
    return TOKENIZER.decode(prompt).removesuffix(" ->"), TOKENIZER.decode(answer[:-1]).removeprefix(" ")


def test_every_class_has_as_many_rows():
    for episode in (episodes()[i] for i in range(40)):
        support, query = ([read(row) for row in part] for part in (episode.support, episode.query))
        assert set(Counter(label for _, label in support).values()) == {2}
        assert sorted(label for _, label in query) == sorted({label for _, label in support})
        assert len({label for _, label in support}) == 3
        assert episode.task in {label for _, label in support}  # the class whose turn it is
        assert len({text for text, _ in support + query}) == 9
        assert all(label == 2 * text[0] for text, label in support + query)  # the words are the given ones


@pytest.mark.parametrize("words", ["permuted", "letters"])
def test_words_that_give_nothing_away(words: str):
    """One word for each class of the episode, in the support and the query alike, another one in other episodes."""
    called: dict[str, set[str]] = {}
    for episode in (episodes(words)[i] for i in range(40)):
        names: dict[str, str] = {}
        for text, label in (read(row) for row in episode.support + episode.query):
            assert names.setdefault(text[0], label) == label
        expected = set("ABC") if words == "letters" else {2 * c for c in names}
        assert set(names.values()) == expected
        for c, label in names.items():
            called.setdefault(c, set()).add(label)
    assert all(len(labels) >= 3 for labels in called.values())


def test_an_episode_is_a_function_of_the_seed_and_its_number():
    one, other = episodes("letters"), episodes("letters", length=99)
    assert [one[i] for i in range(20)] == [other[i] for i in reversed(range(20))][::-1]


def test_classes_of_each_task():
    """With a column that names the task, an episode has classes of one task only."""
    tasks = encoded(column="domain")
    for i in range(30):
        episode = episodes("letters", tasks)[i]
        assert {read(row)[0][1] for row in episode.support + episode.query} == {episode.task}


def test_splits_by_class():
    parts = TaskSet.from_rows(ROWS, "label").split([0.4, 0.2, 0.4], seed=1)
    assert [len(part) for part in parts] == [2, 1, 2]
    assert sorted(name for part in parts for name in part.names) == [2 * c for c in CLASSES]
    for part in parts:
        assert {row["label"] for name in part.names for row in part.rows(name)} == set(part.names)


def test_numbers_for_a_head():
    """Given classes are in the order of their labels; with other words in any order."""
    head = Encoding("sequence_classification", PromptFormat(), tiny_tokenizer(), 32, Facts(num_labels=3))
    tasks = TaskSet.from_rows(ROWS, "label").encoded(head)
    orders = {"given": set(), "letters": set()}
    for words, seen in orders.items():
        for episode in (episodes(words, tasks)[i] for i in range(40)):
            numbers = {
                head.tokenizer.decode(row["input_ids"], skip_special_tokens=True)[0]: row["labels"][0]
                for row in episode.support + episode.query
            }
            assert sorted(numbers.values()) == [0, 1, 2]
            seen.add(tuple(numbers[c] for c in sorted(numbers)))
    assert orders["given"] == {(0, 1, 2)}
    assert len(orders["letters"]) == 6


def test_smaller_classes_of_a_task_are_not_drawn():
    rows = [row for row in ROWS if row["label"] != "aa" or row["text"][2] == "k"]
    tasks = encoded(rows, "domain")
    labels = {read(row)[1] for i in range(30) for row in episodes(tasks=tasks)[i].support}
    assert labels == {"bb", "cc", "dd", "ee"}
    classes = Labelling(5).classes(tasks)
    with pytest.raises(
        MetaPeftError, match=r"Task 'x' has 4 classes with 3 distinct rows or more \(of 5 in all\), .* ways=5"
    ):
        classes.check_rows(2, 1)
    assert classes.enough(2, 1) == []
    assert classes.enough(1, 0) == ["x", "y", "z"]


def test_a_task_with_one_class():
    rows = [row for row in ROWS if row["domain"] != "x" or row["label"] == "aa"]
    tasks = TaskSet.from_rows(rows, "domain")
    with pytest.raises(MetaPeftError, match="Task 'x' has 1 classes"):
        episodes(tasks=tasks.encoded(PromptFormat(), TOKENIZER, 32), ways=2)
    assert Labelling(2).classes(tasks).enough(2, 1) == ["y", "z"]


def test_query_size_is_what_the_smallest_class_has_left():
    rows = [row for row in ROWS if row["label"] != "aa" or row["text"][2] in "klm"]
    assert Labelling(2).classes(TaskSet.from_rows(rows, "label")).query_size(4, 99) == 5  # 9 rows of class aa
    assert Labelling(4).classes(TaskSet.from_rows(rows, "domain")).query_size(2, 99) == 4  # four classes of 6 rows
    assert Labelling(5).classes(TaskSet.from_rows(rows, "domain")).query_size(2, 99) == 1
    assert Labelling(2).classes(TaskSet.from_rows(rows, "label")).query_size(4, 2) == 2


@pytest.mark.parametrize(
    ("labelling", "message"),
    [
        ({"ways": 1}, "ways must be a whole number of 2 or more; got 1"),
        ({"ways": 27, "words": "letters"}, "There are 26 letters for ways=27"),
        ({"ways": 2, "words": "letter"}, "label_words must be one of given, .*got 'letter'. Did you mean 'letters'"),
        ({"ways": 6}, "There are 5 classes, but an episode takes ways=6"),
        ({"ways": 2, "column": "sense"}, "Expected a column 'sense' with the label of each row"),
        ({"ways": 2, "column": "domain", "words": "letters"}, "rows must be text . label, .* label_column is domain"),
    ],
)
def test_what_cannot_be_drawn(labelling: dict, message: str):
    with pytest.raises(MetaPeftError, match=message):
        Labelling(**labelling).classes(TaskSet.from_rows(ROWS, "label")).check_rows(2, 1)


def test_a_class_with_too_few_rows():
    tasks = TaskSet.from_rows(ROWS[:20], "label")  # 18 of the first class, 2 of the next
    with pytest.raises(MetaPeftError, match="Class 'bb' has 2 distinct rows"):
        Labelling(2).classes(tasks).check_rows(2, 1)
    assert Labelling(2).classes(tasks).enough(2, 1) == ["aa"]


def test_words_are_put_into_encoded_rows():
    with pytest.raises(MetaPeftError, match=r"letters are put into encoded rows: give tasks.encoded"):
        episodes("letters", TaskSet.from_rows(ROWS, "label"))
    assert episodes("given", TaskSet.from_rows(ROWS, "label"))[0].support[0]["text"]


def test_labels_numbered_within_each_task():
    rows = [{"task": t, "text": f"{t}{n}", "label": label} for t in "ab" for n, label in enumerate([t, "x", "x", "0"])]
    rows.append(rows[1])  # a row that is repeated is none
    tasks = numbered_within(TaskSet.from_rows(rows))
    assert {t: [row["label"] for row in tasks.rows(t)] for t in tasks.names} == {"a": [1, 2, 2, 0], "b": [1, 2, 2, 0]}
    assert [row["text"] for row in tasks.rows("b")] == ["b0", "b1", "b2", "b3"]


def numbers_of(head: Encoding, tasks: TaskSet, ways: int) -> dict[str, dict[str, set[int]]]:
    """The numbers that each class has in episodes, by task; texts start with the letter of their class."""
    seen: dict[str, dict[str, set[int]]] = {}
    drawn = episodes("given", tasks.encoded(head), ways)
    for episode in (drawn[i] for i in range(len(drawn))):
        for row in episode.support + episode.query:
            text = head.tokenizer.decode(row["input_ids"], skip_special_tokens=True)
            seen.setdefault(episode.task, {}).setdefault(text[0], set()).add(row["labels"][0])
    return seen


def test_a_given_class_keeps_its_number_whichever_others_are_drawn():
    head = Encoding("sequence_classification", PromptFormat(), tiny_tokenizer(), 32, Facts(num_labels=5))
    numbers = {c: {n} for n, c in enumerate(CLASSES)}
    shared = head.naming(2 * c for c in CLASSES)
    assert numbers_of(shared, TaskSet.from_rows(ROWS, "domain"), 2) == dict.fromkeys("xyz", numbers)
    found = numbers_of(shared, TaskSet.from_rows(ROWS, "label"), 2)  # each task is a class
    assert all(numbers[c] == n for of_task in found.values() for c, n in of_task.items())
    coded = [{**row, "label": CLASSES.index(row["text"][0])} for row in ROWS]
    assert numbers_of(head, TaskSet.from_rows(coded, "domain"), 2) == dict.fromkeys("xyz", numbers)
    found = numbers_of(head, TaskSet.from_rows(coded, "label"), 2)
    assert all(numbers[c] == n for of_task in found.values() for c, n in of_task.items())


def test_a_given_class_of_one_task_keeps_its_number_in_it():
    """Names that not all tasks share are numbered within each."""
    rows = [{**row, "label": row["domain"] + row["label"]} for row in ROWS]
    head = Encoding("sequence_classification", PromptFormat(), tiny_tokenizer(), 32, Facts(num_labels=5))
    tasks = TaskSet.from_rows(rows, "domain")
    assert head.naming(row["label"] for row in rows) is head
    assert numbers_of(head, tasks, 2) == {t: {c: {n} for n, c in enumerate(CLASSES)} for t in "xyz"}


def test_numbers_for_a_head_are_in_the_order_of_whole_numbers():
    """Not of their digits, by which 10 comes before 2: a head is adapted to the numbers as they are."""
    letters = "abcdefghijkl"
    rows = [{"text": c + other, "label": i, "domain": "one"} for i, c in enumerate(letters) for other in "mno"]
    head = Encoding("sequence_classification", PromptFormat(), tiny_tokenizer(), 32, Facts(num_labels=12))
    drawn = episodes("given", TaskSet.from_rows(rows, "domain").encoded(head), ways=12, length=3)
    for episode in (drawn[i] for i in range(3)):
        for row in episode.support + episode.query:
            text = head.tokenizer.decode(row["input_ids"], skip_special_tokens=True)
            assert row["labels"] == [letters.index(text[0])]


# ---- labels that are missing


def sparse(empty: object, **options) -> TaskSet:
    """Every third row of two tasks has no category."""
    rows = [
        {"task": t, "input": f"{t}{i}", "target": "x", "category": empty if i % 3 == 0 else "pq"[i % 2]}
        for t in "ab"
        for i in range(12)
    ]
    return TaskSet.of(rows, **options)


@pytest.mark.parametrize("empty", [None, ""])
def test_a_row_without_a_label_is_an_empty_row(empty: str | None):
    """It is of no class; where it is not to be left out, it is an error."""
    labels = Labelling(2, column="category")
    message = r"Task 'a' has a row with nothing in the column 'category', \{.*'input': 'a0'.*empty_rows: leave_out"
    for refused in (labels.classes, lambda tasks: large_enough(tasks, labels, 1, 1)):
        with pytest.raises(MetaPeftError, match=message):
            refused(sparse(empty))
    tasks = sparse(empty, empty_rows="leave_out")
    assert {t: sorted(classes) for t, classes in labels.classes(tasks).within.items()} == {
        "a": ["p", "q"],
        "b": ["p", "q"],
    }
    left = large_enough(tasks, labels, 1, 1)
    assert (left.found["rows"], left.found["empty_rows"], len(left.table)) == (24, 8, 16)
    assert {row["category"] for name in left.names for row in left.rows(name)} == {"p", "q"}
    assert labels.classes(left).within["b"].keys() == {"p", "q"}
    assert large_enough(tasks, None, 1, 1) is tasks, "no row needs a category by itself"


def test_numbers_of_which_some_are_missing():
    rows = [{"task": "a", "input": f"{i}", "target": "x", "category": None if i == 3 else i % 2} for i in range(12)]
    classes = Labelling(2, column="category").classes(TaskSet.of(rows, empty_rows="leave_out"))
    assert {label: len(numbers) for label, numbers in classes.within["a"].items()} == {"0": 6, "1": 5}


def test_a_task_in_which_no_row_has_a_label():
    rows = [{"task": t, "input": f"{t}{i}", "target": "x", "category": "pq"[i % 2]} for t in "ab" for i in range(6)]
    rows = [{**row, "category": None} if row["task"] == "b" else row for row in rows]
    tasks, labels = TaskSet.of(rows, empty_rows="leave_out"), Labelling(2, column="category")
    with pytest.raises(MetaPeftError, match="Task 'b' has 0 classes"):
        labels.classes(tasks).check_rows(1, 1)
    assert large_enough(tasks, labels, 1, 1).names == ["a"]


# ---- what numbers are to a head


def test_a_head_that_learned_numbers_keeps_them_where_all_is_text():
    """And each task is a class, which has no number by its place among the names of its task."""
    head = Encoding("sequence_classification", PromptFormat(), tiny_tokenizer(), 32, Facts(num_labels=6)).naming([1, 5])
    coded = [{**row, "label": str(1 + CLASSES.index(row["text"][0]))} for row in ROWS]
    found = numbers_of(head, TaskSet.from_rows(coded, "label"), 2)
    assert all(n == {1 + CLASSES.index(c)} for of_task in found.values() for c, n in of_task.items())


def test_ids_of_classes_are_numbered_in_each_episode():
    """A head that is new in every task has no class 501."""
    head = Encoding("sequence_classification", PromptFormat(), tiny_tokenizer(), 32, Facts(num_labels=2))
    coded = [{**row, "label": 501 + CLASSES.index(row["text"][0])} for row in ROWS]
    ids = head.naming((row["label"] for row in coded), kept=False)
    found = numbers_of(ids, TaskSet.from_rows(coded, "label"), 2)
    assert {n for of_task in found.values() for numbers in of_task.values() for n in numbers} == {0, 1}
    drawn = episodes("given", TaskSet.from_rows(coded, "label").encoded(ids), 2)
    for episode in (drawn[i] for i in range(len(drawn))):
        letters = {
            ids.tokenizer.decode(row["input_ids"], skip_special_tokens=True)[0]: row["labels"][0]
            for row in episode.query
        }
        assert [letters[c] for c in sorted(letters)] == [0, 1], "in the order of the ids"
