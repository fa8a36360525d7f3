"""Several processes over torch.distributed: objects go through gloo, on whatever device layers are computed."""

from __future__ import annotations

import importlib
import os
import secrets
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from moekern.errors import InputError, NoRoomForText, first_line
from moekern.team.member import Member
from moekern.team.team import Team, current
from moekern.team.watch import Watch, connected, gathered

T = TypeVar("T")

MEETING = 300.0  # seconds in which all ranks must have come
FOREVER = timedelta(days=365)  # others wait while rank 0 prunes; who dies is noticed by `Watch`


class Ranks(Team):
    """The processes of a torchrun. A method that another rank's death interrupts raises InputError, which says so."""

    def __init__(self, member: Member, watch: Watch, nodes: Mapping[int, int]) -> None:
        self.rank, self.size = member.rank, member.size
        self.local_rank, self.local_size = member.local_rank, member.local_size
        self.watch = watch
        for node in sorted(set(nodes.values())):  # all ranks make all groups
            ranks = [rank for rank in range(self.size) if nodes[rank] == node]
            groups = [dist.new_group(ranks, timeout=FOREVER) for _ in range(2)]
            if self.rank in ranks:  # a thread meets others while the main thread asks them
                self.node, self.meeting = groups

    def __reduce__(self) -> tuple[Callable[[], Team], tuple[()]]:
        """Where it is sent to, it is that process's own."""
        return current, ()

    @property
    def described(self) -> str:
        return f"{self.size} processes"

    def together(self, job: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        if self.first:
            self.broadcast((job.__module__, job.__qualname__, arguments, options))

    def serve(self) -> None:
        while (asked := self.broadcast(None)) is not None:
            module, name, arguments, options = asked
            with suppress(NoRoomForText):  # which all ranks find together: rank 0 asks for less text then, or ends
                getattr(importlib.import_module(module), name)(*arguments, **options)

    def broadcast(self, value: T) -> T:
        box: list[Any] = [value]
        self._do(lambda: dist.broadcast_object_list(box, src=0))
        return box[0]  # type: ignore[no-any-return]

    def gather(self, value: T) -> list[T]:
        found: list[Any] | None = [None] * self.size if self.first else None
        self._do(lambda: dist.gather_object(value, found, dst=0))
        return found or []

    def every(self, value: T) -> list[T]:
        found: list[Any] = [None] * self.size
        self._do(lambda: dist.all_gather_object(found, value))
        return found

    def send(self, value: object) -> None:
        self._do(lambda: dist.send_object_list([value], dst=0))

    def receive(self, rank: int) -> Any:
        box: list[Any] = [None]
        self._do(lambda: dist.recv_object_list(box, src=rank))
        return box[0]

    def meet(self) -> None:
        self._do(dist.barrier)

    def meet_on_node(self) -> None:
        if self.local_size > 1:
            self._do(lambda: dist.barrier(group=self.meeting))

    def every_on_node(self, value: T) -> list[T]:
        found: list[Any] = [None] * self.local_size
        self._do(lambda: dist.all_gather_object(found, value, group=self.node))
        return found

    def check_alike(self, facts: Mapping[str, object]) -> None:
        found = self.every(dict(facts))
        for name, mine in found[0].items():
            for rank, theirs in enumerate(found):
                if theirs[name] != mine:
                    raise InputError(
                        f"rank {rank} has {name} {theirs[name]}, rank 0 {mine}: their sums would have other bits",
                        kind="system",
                    )

    @property
    def speaks(self) -> bool:
        return self.first or (self.rank == 1 and self.watch.unsaid)

    def lost(self, wait: float = 0) -> str | None:
        self.watch.found.wait(wait)
        return self.watch.lost

    def end(self, error: str | None = None) -> None:
        if error is None and self.lost() is None:
            with suppress(InputError):
                if self.first:
                    self.broadcast(None)
                self.meet()
        self.watch.end(error)
        if self.lost() is None and error is None:
            dist.destroy_process_group()

    def _do(self, call: Callable[[], object]) -> None:
        try:
            call()
        except RuntimeError as error:
            reason = self.lost(wait=10) or f"the ranks have lost each other: {first_line(error)}"
            raise InputError(reason, kind="system") from error


def joined(member: Member) -> Ranks:
    """Meet the other ranks at the address that torchrun has given to all. Raises InputError where one does not come."""
    address = os.environ.get("MASTER_ADDR", "localhost")
    try:
        store, _, _ = next(rendezvous("env://", member.rank, member.size, timeout=timedelta(seconds=MEETING)))
        store = PrefixStore("moekern", store)
        host = socket.gethostname()
        node = os.environ.get("GROUP_RANK", host)
        store.set(f"rank{member.rank}", f"{node}\n{host}")
        if member.rank == 0:
            listener, token = _listener(member.size), secrets.token_hex(16)
            store.set("watch", f"{listener.getsockname()[1]} {token}")
            with listener:
                peers = gathered(listener, token, member.size, MEETING)
        else:
            port, token = store.get("watch").decode().split()
            peers = {0: connected((address, int(port)), token, member.rank, MEETING)}
        places = [store.get(f"rank{rank}").decode().split("\n") for rank in range(member.size)]
        names = {rank: f"rank {rank} (on {host})" for rank, (_, host) in enumerate(places)}
        numbered = list(dict.fromkeys(node for node, _ in places))
        nodes = {rank: numbered.index(node) for rank, (node, _) in enumerate(places)}
        watch = Watch(member.rank, peers, names)
        dist.init_process_group(
            "gloo", store=PrefixStore("gloo", store), rank=member.rank, world_size=member.size, timeout=FOREVER
        )
        return Ranks(member, watch, nodes)
    except (RuntimeError, OSError) as error:
        where = f"{address}:{os.environ.get('MASTER_PORT', '')}"
        raise InputError(f"the ranks cannot meet at {where}: {first_line(error)}", kind="system") from error


def _listener(size: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, backlog=size, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=size)
