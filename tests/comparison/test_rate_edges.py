from __future__ import annotations

from meta_peft.comparison.rate_edges import at_the_edge, edges_in_words

STEPS = [0, 1, 3, 10]
TRIED = [1.0, 0.25, 4.0]


def test_what_most_seeds_chose_counts():
    chosen = [[0.25, 4.0, 1.0, 0.25], [0.25, 4.0, 0.25, 0.25], [0.25, 1.0, 4.0, 0.25]]
    assert at_the_edge(STEPS, chosen, TRIED) == {"smallest": [10], "largest": [1]}
    assert at_the_edge(STEPS, chosen[:2], TRIED) == {"smallest": [10], "largest": [1]}, "half is not most"


def test_one_rate_has_no_edge():
    assert at_the_edge(STEPS, [[0.25] * 4], [0.25, 0.25]) == {}


def test_in_words():
    said = edges_in_words("plain LoRA", {"smallest": [1], "largest": [3, 10]})
    assert said == [
        f"The best of the rates that were tried for plain LoRA after {which} rate_factors may do better."
        for which in ("1 step is the smallest: smaller", "3 and 10 steps is the largest: larger")
    ]
