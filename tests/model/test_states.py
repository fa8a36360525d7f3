"""What waits between layers, in memory."""

from __future__ import annotations

import mmap

import torch

from moekern.model.budget import resident
from moekern.model.memory import return_freed_memory, weights_apart
from moekern.model.states import State, States

NUMBER, WIDE = 60, (512, 2048)


def test_states_take_what_they_are_and_go() -> None:
    with weights_apart():
        pass  # from here on glibc takes all that is smaller than 32 MiB from the heap
    held, states = resident(), States()
    for number in range(NUMBER):
        wide = [torch.full(WIDE, float(number)) for _ in range(2)]  # as a layer makes, of twice a state's size
        states.put(number, State(wide[0].add_(wide[1]).bfloat16(), {}))
        del wide
    taken = sum(states.nbytes(number) for number in range(NUMBER))
    assert taken == NUMBER * 2 * 512 * 2048
    places = [states.look(number).hidden.data_ptr() for number in range(NUMBER)]
    assert not any(place % mmap.PAGESIZE for place in places)  # in pages of their own, and none in the heap
    return_freed_memory()  # as behind each layer
    assert resident() - held < 1.25 * taken
    assert [float(states.take(number).hidden[0, 0]) for number in range(NUMBER)] == [2 * n for n in range(NUMBER)]
    return_freed_memory()
    assert resident() - held < 0.25 * taken
