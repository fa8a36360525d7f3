"""Hidden states in blocks of memory that a GPU copies from and to; without one everything but the pinning."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from moekern.model import pinned
from moekern.model.pinned import Blocks
from moekern.model.states import State, States

CPU = torch.device("cpu")


@pytest.mark.parametrize("sizes", [[100, 64, 300], [1000, 1, 5000]])
def test_a_block_is_used_again_when_its_last_tensor_is_gone(sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned, "SLAB", 2048)
    blocks = Blocks(CPU)
    held = [blocks.block(size, None) for size in sizes]
    for number, block in enumerate(held):
        assert block is not None
        assert len(block) >= sizes[number]
        assert block.data_ptr() % 64 == 0
        block.fill_(number)
    assert all(bool((block == number).all()) for number, block in enumerate(held) if block is not None)
    taken, inside = blocks.nbytes, held[0][10:20]  # type: ignore[index]
    held.clear()
    del block
    gc.collect()
    again = [blocks.block(size, None) for size in sizes[1:]]
    assert bool((inside == 0).all())  # which kept the first one
    assert blocks.nbytes == taken
    del inside, again
    gc.collect()
    last = blocks.block(1, None)
    assert last is not None
    assert sum(stop - start for slab in blocks.slabs for start, stop in slab.free) == taken - len(last)
    assert all(len(slab.free) == 1 for slab in blocks.slabs)


def test_blocks_take_no_more_than_they_may() -> None:
    blocks = Blocks(CPU)
    assert blocks.block(1000, 999) is None
    first = blocks.block(1000, 2048)
    assert blocks.nbytes == 2048
    second = blocks.block(1000, 2048)
    assert (blocks.block(1000, 2048), blocks.nbytes) == (None, 2048)
    del first, second
    gc.collect()
    assert blocks.block(2000, 2048) is not None  # of both
    gc.collect()
    assert blocks.block(2500, 2600) is not None  # slabs of other sizes go first
    assert blocks.nbytes == 2560


@pytest.mark.parametrize("memory", [None, 0, 300, 1000])
def test_states_in_blocks_come_back_as_they_were_put(memory: int | None, tmp_path: Path) -> None:
    many = torch.arange(60, dtype=torch.bfloat16).view(3, 20)
    with States(memory, tmp_path, Blocks(CPU)) as states:
        for number in range(3):
            beside = {("mask", 1): torch.tensor([number]), ("other",): torch.empty(0)}
            states.put(number, State(many[number : number + 1], beside))
        for number in range(3):
            got = states.copy(number)
            got.hidden.zero_()  # a copy's own
            got = states.take(number)
            assert torch.equal(got.hidden, many[number : number + 1])
            assert got.beside[("mask", 1)].tolist() == [number]
            states.put(number, State(torch.full((1, 40), float(number)), {}))
        assert memory is None or states.size <= memory
        assert [float(states.take(number).hidden.sum()) for number in range(3)] == [0, 40, 80]
        assert states.loose == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_copies_of_a_gpu_are_there_before_the_host_reads_them() -> None:
    device = torch.device("cuda")
    with States(None, None, Blocks(device)) as states:
        for turn in range(4):
            for number in range(8):
                hidden = torch.full((512, 2048), float(turn * 8 + number), device=device)
                states.put(number, State(hidden @ torch.eye(2048, device=device), {}))
            assert all(float(states.look(number).hidden.mean()) == turn * 8 + number for number in range(8))
            assert all(slab.memory.is_pinned() for slab in states.blocks.slabs)  # type: ignore[union-attr]
            for number in range(8):
                assert float(states.take(number).moved(device).hidden.mean()) == turn * 8 + number
