"""Links between ranks: who is lost, who only leaves, and who is told."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from solollm.errors import BackendError, RankLost
from solollm.lifeline import Lifeline, Patience, connect

LONG, SHORT = 60.0, 0.2


class Rank:
    """One end of a pair of links, and what its lifeline has called."""

    def __init__(
        self, link: socket.socket, *, silent: float = LONG, stalled: float = LONG, grace: float = 0
    ) -> None:
        self.notes: list[tuple[str, bool]] = []
        self.ends: list[RankLost] = []
        self.told = threading.Event()
        self.ended = threading.Event()
        patience = Patient(silent, stalled)
        patience.grace = grace
        self.lifeline = Lifeline([link], patience, note=self._note, end=self._end)

    def _note(self, error: RankLost, hangs: bool) -> None:
        self.notes.append((error.why, hangs))
        self.told.set()

    def _end(self, error: RankLost) -> None:
        self.ends.append(error)
        self.ended.set()


class Patient(Patience):
    grace = 0.0

    @property
    def grace_seconds(self) -> float:
        return self.grace


@pytest.fixture
def rank(ends) -> Iterator[Callable[..., Rank]]:  # of `ends`: they close after the threads on them
    made: list[Rank] = []

    def make(*arguments, **settings) -> Rank:
        made.append(Rank(*arguments, **settings))
        return made[-1]

    yield make
    for each in made:
        each.lifeline.drop()


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    pair = socket.socketpair()
    yield pair
    for end in pair:
        end.close()


def test_a_closed_link_is_a_lost_rank(rank, ends) -> None:
    """A survivor that waits forever inside a collective for a process that was killed."""
    left = rank(ends[0])
    ends[1].close()
    assert left.ended.wait(LONG)
    assert left.notes == [("its connection was closed", False)]
    assert left.ends[0].exit_code == 1


def test_a_silent_link_is_a_rank_that_hangs(rank, ends) -> None:
    """A process that was stopped, or a machine whose cable was pulled: no connection closes."""
    left = rank(ends[0], silent=SHORT)
    assert left.ended.wait(LONG)
    ((why, hangs),) = left.notes
    assert "said nothing" in why
    assert hangs


def test_ranks_that_speak_are_not_silent(rank, ends) -> None:
    """A patience that counts from the start, and not from the last word."""
    both = [rank(end, silent=SHORT) for end in ends]
    time.sleep(5 * SHORT)
    assert not any(each.notes or each.ends for each in both)


def test_a_rank_that_leaves_is_not_lost(rank, ends) -> None:
    """A run of two that fails at its very end, because one process was gone first."""
    first, other = (rank(end, silent=SHORT) for end in ends)
    leaving = threading.Thread(target=first.lifeline.leave)
    leaving.start()
    time.sleep(5 * SHORT)
    assert not other.notes
    assert not other.ends
    other.lifeline.leave()
    leaving.join(LONG)
    assert not leaving.is_alive()


def test_one_that_refuses_ends_the_others_and_fails_no_run(rank, ends) -> None:
    """A wrong setting that every rank finds, and the slower one takes for a death."""
    first, other = (rank(end, grace=LONG) for end in ends)
    refusing = threading.Thread(target=first.lifeline.refuse)
    refusing.start()
    time.sleep(5 * SHORT)
    other.lifeline.refuse()
    refusing.join(LONG)
    assert not other.notes
    assert not other.ends


def test_one_that_waits_for_a_rank_that_has_refused_ends(rank, ends) -> None:
    """Rank 1 cannot read its copy of the data; rank 0 waits for it in its first collective."""
    first, other = (rank(end) for end in ends)
    refusing = threading.Thread(target=first.lifeline.refuse)
    refusing.start()
    assert other.ended.wait(LONG)
    assert len(other.notes) == 1
    other.lifeline.drop()
    refusing.join(LONG)


def test_a_training_that_ends_by_itself_is_left_to_do_so(rank, ends) -> None:
    """A process that is torn down while it writes its report."""
    left = rank(ends[0], grace=LONG)
    ends[1].close()
    assert left.told.wait(LONG)
    left.lifeline.drop()
    assert not left.ends


def test_a_training_that_stands_still_has_failed(rank, ends) -> None:
    """Two living processes in a collective that never ends (mlx #4475)."""
    stuck = rank(ends[0], stalled=SHORT)
    going = rank(ends[1], stalled=SHORT)
    for _ in range(10):
        going.lifeline.progress()
        time.sleep(SHORT / 10)
    assert not going.notes
    assert stuck.ended.wait(LONG)
    assert "no step has ended" in stuck.notes[0][0]


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_find_their_neighbours_and_no_stranger(world_size: int) -> None:
    """Two links to one neighbour; a port scanner that is taken for a rank."""
    words = [""] * world_size
    met = threading.Barrier(world_size)

    def gather(rank: int, text: str) -> list[str]:
        words[rank] = text
        if rank == 0:
            host, port, _ = text.split()
            with socket.create_connection((host, int(port))) as stranger:
                stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        met.wait(LONG)
        return words

    def join(rank: int) -> list[socket.socket]:
        return connect(rank, "127.0.0.1", lambda text: gather(rank, text), seconds=LONG)

    with ThreadPoolExecutor(world_size) as pool:
        links = list(pool.map(join, range(world_size)))
    for rank, (after, _) in enumerate(links):
        after.sendall(bytes([rank]))
    for rank, (_, before) in enumerate(links):
        assert before.recv(1) == bytes([(rank - 1) % world_size])
    for link in (link for pair in links for link in pair):
        link.close()


def test_a_neighbour_that_does_not_come_is_an_error() -> None:
    """A firewall that lets the ring through and this not: a training that never begins."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        elsewhere = f"127.0.0.1 {other.getsockname()[1]} {'0' * 16}"
        with pytest.raises(BackendError, match="do not reach each other"):
            connect(0, "127.0.0.1", lambda text: [text, elsewhere], seconds=SHORT)
