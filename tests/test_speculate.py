"""speculate.py: what is found in a text, what a draft must promise, and what it may cost."""

import itertools
import random
from collections.abc import Sequence

import pytest

from cpuinfer.speculate import CANDIDATES, LONGEST, ROWS, STALE, Costs, Drafts, Matches


def longest(text: Sequence[int], candidates: int = CANDIDATES) -> tuple[int, int]:
    """(source, length) by comparing the end of the text with every place before it."""
    best = (0, 0)
    seen = 0
    for place in range(len(text) - 1, 2, -1):
        if text[place - 3 : place] != text[-3:]:
            continue
        seen += 1
        length = 3
        while (
            length < min(place, LONGEST)
            and text[place - length - 1] == text[len(text) - length - 1]
        ):
            length += 1
        if seen <= candidates and length > best[1]:
            best = (place, length)
    return best


# --- matches ---


@pytest.mark.parametrize(
    ("text", "source", "length"),
    [
        ([], 0, 0),
        ([1, 2], 0, 0),
        ([1, 2, 3], 0, 0),
        ([1, 2, 3, 1, 2], 0, 0),
        ([1, 2, 3, 1, 2, 3], 3, 3),
        ([9, 1, 2, 3, 8, 1, 2, 3], 4, 3),
        ([5, 1, 2, 3, 7, 1, 2, 3, 5, 1, 2, 3], 4, 4),  # the longer one, though earlier
        ([1, 2, 3, 7, 1, 2, 3, 8, 1, 2, 3], 7, 3),  # of two as long the later one
        ([4, 4, 4, 4, 4], 4, 4),  # over itself
    ],
)
def test_the_longest_match_and_of_two_the_later(text: list[int], source: int, length: int) -> None:
    found = Matches(text)
    assert found.length == length
    assert length == 0 or found.source == source


@pytest.mark.parametrize("seed", range(30))
def test_matches_are_those_of_a_search_through_everything(seed: int) -> None:
    draw = random.Random(seed)
    text = draw.choices(range(draw.choice([2, 3, 6])), k=draw.randrange(3, 120))
    found, (source, length) = Matches(text), longest(text)
    assert found.length == length
    assert length == 0 or found.source == source


@pytest.mark.parametrize("seed", range(10))
def test_a_text_that_goes_on_keeps_a_match_that_was_right(seed: int) -> None:
    draw = random.Random(seed)
    text = draw.choices(range(3), k=20)
    found = Matches(text)
    for token in draw.choices(range(3), k=200):
        right = found.length > 0 and text[found.source] == token
        wanted = (found.source + 1, found.length + 1)
        text.append(token)
        found.append(token)
        assert (found.source, found.length) == wanted if right else found.length == longest(text)[1]
        assert text[found.source - found.length : found.source] == text[len(text) - found.length :]


def test_what_follows_is_repeated_over_and_over() -> None:
    found = Matches([7, 1, 2, 3, 4, 5, 1, 2, 3])
    assert found.continuation(2) == [4, 5]
    assert found.continuation(5) == [4, 5, 1, 2, 3]
    assert found.continuation(12) == [4, 5, 1, 2, 3, 4, 5, 1, 2, 3, 4, 5]
    assert found.continuation(0) == []


# --- costs ---


def known(seconds: dict[int, float], times: int = 2) -> Costs:
    costs = Costs()
    for rows in seconds:
        for _ in range(times):
            costs.record(rows, seconds[rows])
    return costs


FLAT = dict.fromkeys(ROWS, 1.0)
#: What a 7B model on two cores was measured to take.
REAL = {1: 0.149, 2: 0.173, 4: 0.225, 8: 0.348, 16: 0.722, 32: 1.044}


@pytest.mark.parametrize(
    ("seconds", "chance", "limit", "rows"),
    [
        (FLAT, 0.9, 99, 32),  # a pass costs the same whatever its rows
        (FLAT, 0.9, 31, 16),
        (FLAT, 0.9, 1, 1),
        (FLAT, 0.04, 99, 1),  # 4 % more tokens, less than the margin
        ({rows: float(rows) for rows in ROWS}, 0.99, 99, 1),  # each row costs a pass
        # (1 - chance ** rows) / (1 - chance) tokens a pass, 0.149 seconds a token without drafts:
        (REAL, 0.999, 99, 32),  # 32 tokens a second, 8 rows 23, none 7
        (REAL, 0.9, 99, 8),  # 16.4, 4 rows 15.3, 16 rows 11.3
        (REAL, 0.6, 99, 4),  # 9.7, 2 rows 9.2
        (REAL, 0.3, 99, 2),  # 7.5, none 6.7
        (REAL, 0.1, 99, 1),
        ({1: 1.0, 2: 0.4}, 0.9, 99, 4),  # what cannot be still leads to a cost above 0
    ],
)
def test_the_rows_of_the_most_tokens_a_second(
    seconds: dict[int, float], chance: float, limit: int, rows: int
) -> None:
    assert known(seconds).best_rows(chance, limit) == rows


def test_nothing_is_drafted_before_the_cost_of_a_plain_pass_is_known() -> None:
    assert Costs().best_rows(0.99, 99) == 1


def test_sizes_are_tried_one_after_the_other() -> None:
    costs = Costs()
    tried = []
    costs.record(1, 1.0)
    for _ in range(12):
        tried.append(rows := costs.best_rows(0.99, 99))
        costs.record(rows, 0.9 + 0.1 * rows)  # 2 rows cost 1.1, 32 rows 4.1
    assert tried == [2, 2, 4, 4, 8, 8, 16, 16, 32, 32, 32, 32]


def test_a_size_that_costs_too_much_is_the_last_that_is_tried() -> None:
    costs = Costs()
    tried = []
    costs.record(1, 1.0)
    for _ in range(8):
        tried.append(rows := costs.best_rows(0.99, 99))
        costs.record(rows, float(rows))
    assert tried == [2, 2, 1, 1, 1, 1, 1, 1]


def test_one_disturbed_pass_decides_nothing() -> None:
    costs = known({1: 1.0})
    costs.record(2, 50.0)
    assert costs.best_rows(0.9, 2) == 2
    costs.record(2, 1.0)
    assert costs.best_rows(0.9, 2) == 2
    costs.record(2, 3.0)
    assert costs.best_rows(0.9, 2) == 2
    for _ in range(20):
        costs.record(2, 3.0)
    assert costs.best_rows(0.9, 2) == 1


def test_a_size_long_unused_is_measured_anew() -> None:
    costs = known({1: 1.0, 2: 50.0})
    for _ in range(STALE):
        assert costs.best_rows(0.9, 2) == 1
        costs.record(1, 1.0)
    costs.record(1, 1.0)
    assert costs.best_rows(0.9, 2) == 2
    costs.record(2, 1.0)
    costs.record(2, 1.0)
    for _ in range(10):
        assert costs.best_rows(0.9, 2) == 2


# --- drafts ---


def seconds(prompt: list[int], text: list[int], cost: dict[int, float]) -> tuple[float, int]:
    """What it takes to write `text` where passes cost this much, and the tokens drafted."""
    drafts = Drafts(prompt, Costs())
    total, done, drafted = 0.0, 1, 0
    drafts.append(text[0])
    while done < len(text):
        draft = drafts.draft(len(text) - done)
        assert len(draft) + 1 <= len(text) - done
        drafts.costs.record(1 + len(draft), cost[1 + len(draft)])
        total += cost[1 + len(draft)]
        drafted += len(draft)
        for drafted_token in [*draft, None]:
            drafts.append(text[done])
            done += 1
            if drafted_token != text[done - 1]:
                break
    return total, drafted


def words(seed: int, count: int) -> list[int]:
    """Sentences: 3 words that often follow each other, and then any other."""
    draw = random.Random(seed)
    habits = [draw.choices(range(50), k=3) for _ in range(12)]
    sentences = ([*draw.choice(habits), draw.randrange(1000)] for _ in range(count))
    return list(itertools.chain.from_iterable(sentences))


@pytest.mark.parametrize("seed", range(5))
def test_a_text_that_quotes_is_written_twice_as_fast(seed: int) -> None:
    prompt = random.Random(seed).choices(range(1000), k=300)
    quoted = words(seed, 5) + prompt[40:260] + words(seed + 1, 5)
    total, _ = seconds(prompt, quoted, REAL)
    assert total < REAL[1] * len(quoted) / 2


@pytest.mark.parametrize("seed", range(5))
def test_a_text_whose_matches_lead_astray_costs_2_percent_at_most(seed: int) -> None:
    """Every fourth token follows a match, and the match is never right."""
    text = words(seed, 250)
    total, drafted = seconds(words(seed + 9, 100), text, REAL)
    assert 0 < drafted < 60
    assert total <= 1.02 * REAL[1] * len(text)


def test_a_match_says_more_the_longer_it_is() -> None:
    text = list(range(100))
    drafted = []
    for length in (2, 3, 4, 8, 16, 32):
        drafts = Drafts([*text, 200, *text[60 - length : 60]], known(REAL))
        drafted.append(len(drafts.draft(99)))
    assert drafted == [0, 1, 1, 3, 3, 7]


def test_guesses_that_were_not_made_count_too() -> None:
    """The costs rule out every draft at first; what the text has shown by then is used at once."""
    text = random.Random(1).choices(range(1000), k=100)
    costs = known({1: 1.0, 2: 1000.0, 4: 1000.0, 8: 1000.0, 16: 1000.0, 32: 1000.0})
    drafts = Drafts([*text, *text[:40]], costs)
    for token in text[40:90]:
        assert drafts.draft(99) == []
        drafts.append(token)
    for rows in ROWS:
        costs.record(rows, REAL[rows])
    assert drafts.draft(99) == (text * 2)[90:121]  # without them 8 rows
