"""Notices when a process of the team dies: a connection to rank 0 that ends without a farewell."""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from moekern.errors import InputError

GRACE = 1.0  # seconds in which a rank may come to the same error by itself
GREETING = 10.0  # seconds in which who connects must say who it is
LAST = 15.0  # seconds in which the main thread must have ended, cleaned up; then the process is ended as it is
KEEPALIVE = ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3))  # a host that vanishes


class Watch:
    """A thread with a connection to every other rank (rank 0) or to rank 0 (the others).

    Each rank says farewell before it ends: that it is done, or its error. When one fails or dies without a word, all
    learn why (`lost`), and the main thread gets SIGTERM, so that what is half written is removed.
    """

    def __init__(self, rank: int, peers: Mapping[int, socket.socket], names: Mapping[int, str]) -> None:
        self.rank, self.peers, self.names = rank, dict(peers), names
        self.lost: str | None = None
        self.unsaid = False  # rank 0 has died without a word
        self.found, self.ended, self.stopping = threading.Event(), threading.Event(), False
        self.lock = threading.Lock()
        self.main = threading.main_thread().ident
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._stop)
        self.thread = threading.Thread(target=self._run, name="moekern-team", daemon=True)
        self.thread.start()

    def end(self, error: str | None) -> None:
        """Say farewell; nothing that other ranks do matters any longer."""
        with self.lock:
            if not self.ended.is_set() and self.lost is None:
                self._tell({"bye": True} if error is None else {"error": error})
            self.ended.set()

    def _stop(self, number: int, frame: Any) -> None:
        """The first SIGTERM ends the process; those that follow must not disturb the cleaning up."""
        if not self.stopping:
            self.stopping = True
            sys.exit(128 + number)

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            for rank, peer in self.peers.items():
                selector.register(peer, selectors.EVENT_READ, (rank, bytearray()))
            while selector.get_map() and not self.ended.is_set():
                for key, _ in selector.select(timeout=0.5):
                    rank, seen = key.data
                    word = self._read(key.fileobj, seen)
                    if word is None:
                        continue
                    selector.unregister(key.fileobj)
                    if "bye" not in word:
                        self._lose(rank, word)
                        return

    def _read(self, peer: Any, seen: bytearray) -> dict[str, Any] | None:
        """What a rank has said, once it is whole; {} where it ends without a word."""
        try:
            data = peer.recv(1 << 16)
        except OSError:
            data = b""
        seen += data
        if not data:
            return {}
        line, end, _ = bytes(seen).partition(b"\n")
        return json.loads(line) if end else None

    def _lose(self, rank: int, word: Mapping[str, Any]) -> None:
        if "error" in word and self.ended.wait(GRACE):
            return
        self.unsaid = not word and rank == 0
        name = self.names[rank]
        reason = f"{name}: {word['error']}" if "error" in word else f"{name} has died; the run ends on all ranks"
        with self.lock:
            if self.ended.is_set():
                return
            self.lost = str(word.get("lost", reason))
            self._tell({"lost": self.lost})
            self.found.set()
            if not self.stopping and self.main is not None:
                signal.pthread_kill(self.main, signal.SIGTERM)
        if not self.ended.wait(LAST):
            with suppress(OSError):
                if self.rank == 0 or (self.rank == 1 and self.unsaid):
                    print(f"moekern: {self.lost}", file=sys.stderr, flush=True)
            os._exit(2)

    def _tell(self, word: Mapping[str, Any]) -> None:
        for peer in self.peers.values():
            with suppress(OSError):
                peer.sendall(json.dumps(word).encode() + b"\n")


def gathered(listener: socket.socket, token: str, size: int, seconds: float) -> dict[int, socket.socket]:
    """The connections of all other ranks to rank 0, by rank. Raises InputError when one does not come in time."""
    found: dict[int, socket.socket] = {}
    until = time.monotonic() + seconds
    while len(found) < size - 1:
        listener.settimeout(max(0.01, until - time.monotonic()))
        try:
            peer, _ = listener.accept()
        except TimeoutError as error:
            missing = ", ".join(str(rank) for rank in range(1, size) if rank not in found)
            raise InputError(f"rank {missing} did not come within {seconds:.0f} s", kind="system") from error
        rank = _rank_of(peer, token)
        if rank is None or rank in found:
            peer.close()
        else:
            found[rank] = _kept(peer)
    return found


def _rank_of(peer: socket.socket, token: str) -> int | None:
    """The rank that has connected; None for anybody else."""
    peer.settimeout(GREETING)
    try:
        said, rank = _line(peer).split()
    except (OSError, ValueError):
        return None
    return int(rank) if said == token else None


def connected(address: tuple[str, int], token: str, rank: int, seconds: float) -> socket.socket:
    """A connection to rank 0. Raises InputError where there is none."""
    try:
        peer = socket.create_connection(address, timeout=seconds)
    except OSError as error:
        where = f"{address[0]}:{address[1]}"
        raise InputError(f"rank {rank} cannot reach rank 0 at {where}: {error}", kind="system") from error
    peer.sendall(f"{token} {rank}\n".encode())
    return _kept(peer)


def _line(peer: socket.socket) -> str:
    seen = b""
    while not seen.endswith(b"\n") and len(seen) < 200:
        if not (data := peer.recv(1)):
            break
        seen += data
    return seen.decode("ascii", "replace")


def _kept(peer: socket.socket) -> socket.socket:
    peer.settimeout(None)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEPALIVE:
        peer.setsockopt(socket.IPPROTO_TCP, option, value)
    return peer
