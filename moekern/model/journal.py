"""How far a run through the layers is, written down after a layer, so that the same command goes on from there.

A folder holds the states of all tasks in front of a layer (`state_files`), in two files in turn, and `position.json`,
which names them: the stage and the layer, what else the stage must know, and the key, all that decides the bits. It is
written last, under another name first, so that a process that is killed at any moment leaves the position before it.

Of several processes each writes the states of its own tasks, and rank 0 the position when all have done so. Another
number of processes goes on as well: each reads the states of the tasks that it has now, whoever has written them.
"""

from __future__ import annotations

import json
import os
import secrets
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from moekern import files
from moekern.errors import InputError, add_note
from moekern.model.position import Position, differences, digest
from moekern.model.state_files import StateFiles, write_states
from moekern.model.state_folder import POSITION, check_own, locked, remove_files, removed
from moekern.model.states import States
from moekern.model.stepwise import Beside
from moekern.team import ALONE, Team

FORMAT = "moekern.position/1"
SHARE = 20  # of the time of a run, one part in so many goes into this at the most, but for the first time
SPARE = 16  # of the room on the disk, one part in so many is left alone
ANEW = "--restart begins anew"


@dataclass(frozen=True)
class Resume:
    """Where a run that may be stopped writes down how far it is; with `restart` it does not go on from there."""

    folder: Path
    restart: bool = False
    tell: Callable[[str], None] = warnings.warn

    def keyed(self, name: str, key: Mapping[str, Any]) -> Resume:
        """In a folder of its own, by that name and a digest of what decides the bits: for commands without a target."""
        return replace(self, folder=self.folder / f"{name}{digest(key)[:16]}")

    @property
    def position(self) -> Path:
        """The file that is there as long as there is something to go on from."""
        return self.folder / POSITION


class Journal:
    """A locked folder. `found` is what a stopped run has left there, `saved` its states; `position` is the last one
    that was written down. Every rank of a team has one."""

    def __init__(self, resume: Resume, key: Mapping[str, Any], stages: Sequence[str], team: Team = ALONE) -> None:
        self.folder, self.tell, self.stages, self.team = resume.folder, resume.tell, tuple(stages), team
        self.key: Mapping[str, Any] = json.loads(json.dumps(key))
        self.saved = StateFiles(())
        self.found = self.position = team.broadcast(self._read() if team.first else None)
        self.lasting: dict[str, set[Any]] = {}  # file -> names of states that never change
        if self.position is not None:
            with undamaged(self.folder):
                self.saved = StateFiles([self.folder / name for name in self.position.files])
            for name in self.position.files:
                if name.startswith("lasting"):
                    self.lasting[name] = self.saved.names(self.folder / name)
        self.off = False  # states cannot be written down; where none are needed, positions still are
        self.ended, self.cost = time.monotonic(), 0.0

    def stage(self, name: str) -> Stage:
        """One of the stages, which follow one another."""
        return Stage(self, name)

    def save(self, position: Position, states: States | None) -> None:
        """Write down a position; `states` (None: nothing) are what goes on from there, each rank's own."""
        before = () if self.position is None else self.position.files
        there = {} if states is None else states.there
        known = {name: held for name, held in self.lasting.items() if any(n in there for n in held)}
        old = {n for held in known.values() for n in held}
        new = [n for n, lasting in there.items() if lasting and n not in old]
        parts = {
            self._free("lasting", before): new,
            self._free("states", before): [n for n, lasting in there.items() if not lasting],
        }
        parts = {name: part for name, part in parts.items() if part}
        written = self.team.every(((*known, *parts), None if states is None else self._write(states, parts)))
        position = replace(position, files=tuple(dict.fromkeys(name for names, _ in written for name in names)))
        why = next((why for _, why in written if why is not None), None)
        if why is not None:
            self._drop(parts)
        elif self.team.first:
            document = {"format": FORMAT, "key": self.key, "stages": self.stages, **position.document()}
            why = _refused(lambda: files.write_bytes(self.folder / POSITION, json.dumps(document).encode()))
        why = self.team.broadcast(why)
        if why is not None:
            self._give_up(why)
            return
        self.position, self.lasting = position, known | {n: set(new) for n in parts if n.startswith("lasting")}
        self._drop([name for name in before if name not in position.files])

    def _free(self, kind: str, taken: Sequence[str]) -> str:
        """A name that the last position does not need."""
        return next(name for i in range(len(taken) + 1) if (name := f"{kind}-{i}.{self.team.rank}") not in taken)

    def _write(self, states: States, parts: Mapping[str, Sequence[Any]]) -> str | None:
        """Write files of states. Why that cannot be is returned; None: they are on the disk."""

        def write() -> None:
            nbytes = sum(states.nbytes(n) for part in parts.values() for n in part)
            self._check_room(nbytes * self.team.size)  # as many as other ranks write, about
            for name, part in parts.items():
                (self.folder / name).unlink(missing_ok=True)
                write_states(self.folder / name, states, part)

        return _refused(write)

    def _check_room(self, nbytes: int) -> None:
        found = os.statvfs(self.folder)
        free = found.f_bavail * found.f_frsize
        if nbytes > free - free // SPARE:
            raise InputError(f"{files.sized(nbytes)} are needed and {files.sized(free)} free")

    def _give_up(self, why: str) -> None:
        """States are not written down any more, and that is told once."""
        if self.off:
            return
        self.off = True
        then = "begins anew" if self.position is None else f"goes on {self.position.described}"
        self.tell(f"{self.folder}: it is not written down how far this run is ({why}); if it is stopped, it {then}")

    def _drop(self, names: Iterable[str]) -> None:
        """Remove what this rank has written, and its share of what ranks of another number have."""
        paths = [self.folder / name for name in names]
        self.saved.close(paths)
        for path in paths:
            if int(path.suffix[1:]) % self.team.size == self.team.rank:
                with suppress(OSError):
                    path.unlink()

    def _read(self) -> Position | None:
        path = self.folder / POSITION
        if not files.is_plain(path):
            return None
        with undamaged(self.folder):
            found = json.loads(files.read_plain(path))
            if found.pop("format") != FORMAT:
                raise ValueError("another format")
            key = found.pop("key")
            del found["stages"]
            position = Position.of_document(found)
            differing = differences(key, self.key)
        if differing or position.stage not in self.stages:
            other = differing or f"stage {position.stage}"
            raise InputError(
                f"{self.folder}: a stopped run is kept there, with another {other}; give the same again and it goes on "
                f"{position.described}, or {ANEW}",
                kind="option",
            )
        return position


@dataclass(frozen=True)
class Stage:
    """One of the passes of a run."""

    journal: Journal
    name: str
    anew: bool = False  # this pass begins with its first layer, whatever a stopped run has left

    def again(self) -> Stage:
        """Of another pass of the same stage."""
        return replace(self, anew=True)

    @property
    def passed(self) -> bool:
        """A stopped run was in a later one."""
        at, stages = self.journal.found, self.journal.stages
        return at is not None and stages.index(self.name) < stages.index(at.stage)

    @property
    def left(self) -> Position | None:
        """Where in this stage a stopped run was."""
        at = self.journal.found
        return at if at is not None and at.stage == self.name and not self.anew else None

    def take_over(self, states: States, own: Collection[Any] = ()) -> None:
        """Let `states` have what a stopped run has left, which must hold a rank's `own`, a name for each of its tasks;
        of several ranks each has no other tasks'. Raises InputError where some are not there."""
        journal, saved = self.journal, self.journal.saved
        if self.left is not None and not self.left.complete and not all(name in saved for name in own):
            raise InputError(f"{journal.folder}: what a stopped run has left there lacks some of the text; {ANEW}")
        lasting = {name for held in journal.lasting.values() for name in held}
        tasks = set(map(_task_of, own))
        mine = [name for name in saved if journal.team.size == 1 or _task_of(name) in tasks]
        states.take_over(saved, mine, lasting)

    def save(
        self,
        layer: int,
        of: int,
        states: States | None,
        kept: Callable[[], Any],
        returns: Mapping[int, Beside],
        unit: str = "layer",
    ) -> None:
        """Layers up to `layer` - 1 are done: write that down, where the last time is long enough ago, or it is the end.

        What is `kept` must be on the disk when it is told; all ranks are asked, and rank 0's is written. States None:
        they cannot be written down.
        """
        journal, start = self.journal, time.monotonic()
        due = layer >= of or (states is not None and start - journal.ended >= SHARE * journal.cost)
        if journal.off:  # at the end there may be no states that need room
            due = layer >= of and (states is None or not states.there)
        if journal.team.broadcast(due):
            position = Position(self.name, layer, of, kept(), dict(returns), (), unit)
            journal.save(position, states)
            journal.ended = time.monotonic()
            journal.cost = journal.ended - start


def _task_of(name: Any) -> Any:
    """The number of the task whose state has this name."""
    return name[-1] if isinstance(name, tuple) else name


@contextmanager
def opened(
    resume: Resume | None, key: Mapping[str, Any], stages: Sequence[str], team: Team = ALONE
) -> Iterator[Journal | None]:
    """The journal of a run whose bits `key` decides, by words that a person knows; None where there is none to be had.

    All ranks of a team open it together: `resume` and `key` are rank 0's. Raises InputError where another run, or
    something strange, is kept there. What is there stays when the block fails, and until it is `removed`.
    """
    with nullcontext(False) if resume is None else locked(resume.folder, resume.tell) as there:
        if resume is not None and there:
            check_own(resume.folder)
            if resume.restart:
                remove_files(resume.folder)
        resume = _seen_by_all(resume if there else None, team)
        if resume is None:
            yield None
            return
        journal = Journal(resume, key, stages, team)
        if journal.position is not None:
            resume.tell(f"going on {journal.position.described}, where a stopped run was")
        elif team.first:
            remove_files(resume.folder)  # without a position they are nothing
        try:
            with _told_how_to_go_on(journal):
                yield journal
        finally:
            journal.saved.close()
            if team.first and not files.is_plain(resume.position):
                removed(resume.folder)


def _seen_by_all(resume: Resume | None, team: Team) -> Resume | None:
    """Rank 0's, for every rank; None where it has none, or not all ranks see the folder: of several nodes, each may
    have one of its own by that name. Raises InputError where a stopped run is kept there."""
    if team.size == 1:
        return resume
    mark = None if resume is None else resume.folder.absolute() / f"seen-{secrets.randbelow(10**9)}.0"
    if mark is not None:
        with suppress(OSError):
            mark.touch()
    mark = team.broadcast(mark)
    if mark is None:
        return None
    blind = [str(rank) for rank, sees in enumerate(team.every(os.path.lexists(mark))) if not sees]
    if resume is None:
        return None if blind else Resume(mark.parent, tell=lambda line: None)
    with suppress(OSError):
        mark.unlink()
    if blind:
        why = f"{resume.folder}: rank {', '.join(blind)} does not see what is written there, as all nodes must"
        if files.is_plain(resume.position):
            raise InputError(f"{why}, to go on where a stopped run was; share that folder, or {ANEW}", kind="option")
        resume.tell(f"{why}; if this run is stopped, it begins anew")
        removed(resume.folder)
        return None
    return resume


def _refused(write: Callable[[], object]) -> str | None:
    """Why something cannot be written; None: it is."""
    try:
        write()
    except (OSError, InputError, TypeError) as error:
        return files.reason(error) if isinstance(error, OSError) else str(error)
    return None


@contextmanager
def _told_how_to_go_on(journal: Journal) -> Iterator[None]:
    """Whatever ends the run meanwhile says what becomes of its work."""
    try:
        yield
    except BaseException as error:
        if journal.position is None or str(error).endswith(ANEW):  # that cannot go on
            raise
        then = f"the same command goes on {journal.position.described}"
        if isinstance(error, InputError):
            said = InputError(f"{error}; {then}", error.kind)
            add_note(said, then)
            raise said from error
        add_note(error, then)
        raise


def check_same_run(folder: Path, then: Any, now: Mapping[str, Any]) -> None:
    """Raise InputError where a stopped run is kept in a folder that another key decides."""
    with undamaged(folder):
        differing = differences(then, json.loads(json.dumps(now)))
    if differing:
        what = f"a stopped run is kept there, with another {differing}; give the same again and it goes on"
        raise InputError(f"{folder}: {what}, or {ANEW}", kind="option")


@contextmanager
def undamaged(folder: Path) -> Iterator[None]:
    """What is read there and cannot be becomes an InputError."""
    try:
        yield
    except InputError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, OSError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{folder}: what a stopped run has left there is damaged ({error}); {ANEW}") from error
