from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from fedhead.common.data.records import Records, split_records

TEXTS = st.lists(st.text(max_size=20), min_size=1, max_size=30)


def sides(texts: list[str], fraction: float) -> dict[str, str]:
    train, test = split_records(Records.from_memory("text", texts), fraction)
    assert sorted([*train, *test]) == list(range(len(texts)))
    found = {texts[i]: "train" for i in train}
    assert not found.keys() & {texts[i] for i in test}  # equal records stay together
    return {**found, **{texts[i]: "test" for i in test}}


@settings(derandomize=True, max_examples=60, deadline=None)
@given(TEXTS, TEXTS, st.floats(0.05, 0.95), st.randoms(use_true_random=False))
def test_other_records_and_order_never_move_a_record(
    texts: list[str], others: list[str], fraction: float, random
) -> None:
    before = sides(texts, fraction)
    mixed = [*texts, *others]
    random.shuffle(mixed)
    after = sides(mixed, fraction)
    assert {text: after[text] for text in texts} == before
    fewer = texts[: len(texts) // 2] or texts
    assert {text: before[text] for text in fewer} == sides(fewer, fraction)


@settings(derandomize=True, max_examples=30, deadline=None)
@given(TEXTS, st.floats(0.05, 0.5), st.floats(0.5, 0.95))
def test_a_larger_share_only_adds_test_records(texts: list[str], small: float, large: float) -> None:
    few, many = sides(texts, small), sides(texts, large)
    assert all(many[text] == "test" for text in texts if few[text] == "test")
