"""Which text is in which step."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moekern.recovery.course import Course, schedule
from moekern.recovery.settings import FEWEST, MOST, STEPS, Training
from tests.helpers.recovering import data


@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=30),
    epochs=st.sampled_from([0.1, 0.5, 1.0, 2.0, 3.7]),
    step=st.integers(1, 400),
    seed=st.integers(0, 3),
)
def test_the_text_is_gone_through_as_often_as_asked(sizes: list[int], epochs: float, step: int, seed: int) -> None:
    training = Training(epochs=epochs, step_tokens=step, seed=seed)
    found = schedule(sizes, training)
    assert found == schedule(sizes, training)
    assert all(found)
    order, whole = [n for one in found for n in one], epochs * sum(sizes)
    for start in range(0, len(order), len(sizes)):  # all batches come before one comes again
        assert max(Counter(order[start : start + len(sizes)]).values()) == 1
    largest = max(sizes)
    for one in found:
        tokens = sum(sizes[n] for n in one)
        assert tokens <= max(min(step, whole + 1) + largest, largest)
    if min(step, whole) >= 8 * largest:
        assert sum(sizes[n] for n in order) == pytest.approx(whole, rel=0.7)


def test_what_one_step_lacks_the_next_one_has() -> None:
    found = schedule([7] * 100, Training(step_tokens=10))
    assert len(found) == 70
    assert [sum(7 for step in found[:n] for _ in step) for n in (10, 35, 70)] == pytest.approx([100, 350, 700], abs=4)


def test_a_step_of_more_tokens_than_there_are_is_all_of_them_once() -> None:
    assert [sorted(step) for step in schedule([10] * 7, Training(step_tokens=5000))] == [list(range(7))]
    assert [len(step) for step in schedule([10] * 7, Training())] == [7]
    assert [len(step) for step in schedule([10] * 8, Training(step_tokens=5000, epochs=0.5))] == [4]


def test_steps_by_default() -> None:
    assert Training().tokens_of_step(1000 * STEPS) == FEWEST
    assert Training().tokens_of_step(10000 * STEPS) == 10000
    assert Training().tokens_of_step(10**8) == MOST
    assert Training().tokens_of_step(0) == 1
    assert [Training().looks(steps) for steps in (1, 9, 24, 100)] == [1, 1, 2, 10]
    assert Training(every=3).looks(100) == 3


def test_another_seed_is_another_order() -> None:
    assert schedule([10] * 20, Training(step_tokens=40)) != schedule([10] * 20, Training(step_tokens=40, seed=1))


def test_of_every_domain_some_text_is_held_back_and_some_judges() -> None:
    course = Course.of(data(60, domains="ab"), Training(step_tokens=64, epochs=0.2))
    parts = [{s.place for step in course.steps for s in step}, {s.place for s in course.held}]
    parts.append({s.place for s in course.judged})
    assert [sample.place for sample in course.samples] == list(range(len(course.samples)))
    assert sum(map(len, parts)) == len(set.union(*parts)) == len(course.samples)
    for part in (course.held, course.judged):
        assert {sample.batch.domain for sample in part} == {"a", "b"}
    ids = [row.tobytes() for sample in course.samples for row in sample.batch.input_ids.numpy()]
    assert len(ids) == len(set(ids))
    assert course.notes == ()
    assert course.tokens(0) == sum(sample.batch.input_ids.numel() for sample in course.steps[0])


def test_what_a_person_should_know_of_the_text_is_told() -> None:
    often = Course.of(data(20), Training(step_tokens=64, epochs=3))
    assert any(" different ones: each is trained on " in note for note in often.notes)
    few = Course.of(data(3), Training())
    assert any("nothing chooses the best state" in note for note in few.notes)
    assert (few.held, few.judged) == ((), ())


def test_rates_rise_and_fall() -> None:
    training = Training(rate=1.0, warmup=0.25, floor=0.1)
    rates = [training.rate_at(step, 40, 1.0) for step in range(40)]
    assert rates[:10] == pytest.approx([(n + 1) / 11 for n in range(10)])
    assert max(rates) == rates[10] == 1
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[25] == pytest.approx(0.55)
    assert 0.1 < rates[-1] < 0.11
    assert replace(training, warmup=0.0).rate_at(0, 1, 1.0) == 1
    assert replace(training, warmup=1.0).rate_at(0, 4, 1.0) == pytest.approx(1 / 5)
