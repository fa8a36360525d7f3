"""How the ranks find each other."""

from __future__ import annotations

import socket
import struct
import threading

from moekern.team.watch import connected, gathered


def test_who_is_no_rank_is_passed_over() -> None:
    """A word too few, another token, and a connection that is reset, as those who look for open ports leave it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        for word in (b"hello\n", b"other 1\n"):
            with socket.create_connection(address) as peer:
                peer.sendall(word)
        peer = socket.create_connection(address)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        peer.close()
        mine: list[socket.socket] = []
        rank = threading.Thread(target=lambda: mine.append(connected(address, "token", 1, 30)))
        rank.start()
        found = gathered(listener, "token", 2, 30)
        rank.join()
    assert found[1].getpeername() == mine[0].getsockname()
    for each in (*found.values(), *mine):
        each.close()
