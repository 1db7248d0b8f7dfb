"""Work mapped over Dask's workers, here or on a cluster that exists; what comes back does not depend on how many.

A lost worker costs its tasks: they go to another. A worker that computes with other versions is refused, since its last
bits would be others.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

from toolkit.device.fitting import Pool
from toolkit.device.memory import keep_memory
from toolkit.errors import CheckpointError, MachineError
from toolkit.files import FULL_DISK
from toolkit.machine import package_versions
from toolkit.workers.parcels import get, put

Shared = TypeVar("Shared")
Piece = TypeVar("Piece")
Made = TypeVar("Made")
# Seconds between two looks at whether there is a scheduler, and workers, still; and how long there may be none.
_LOOK_S: Final = 2.0
_PATIENCE_S: Final = 30.0
# How often tasks are given out again whose worker, or what it held, was lost.
_GIVEN_OUT: Final = 5
# On a worker: the content of the files that its latest tasks shared, of this pool and of the one behind it.
_SHARED: Final[dict[str, Any]] = {}
_SHARED_FILES: Final = 2
_SETTLED: Final = {
    "distributed.admin.tick.interval": "1s",
    "distributed.admin.system-monitor.interval": "5s",
    "distributed.admin.system-monitor.gil.enabled": False,
    "distributed.worker.profile.enabled": False,
}
# Versions that decide last bits.
_DECIDING: Final = ("toolkit", "numpy")
_AGAIN: Final = "finished layers are kept, the same command goes on"


class Here:
    """The pool of no workers: the same pieces, one after the other, in this process."""

    here = 1

    @property
    def behind(self) -> Here:
        """Itself: one piece comes after the other."""
        return self

    def map(
        self,
        work: Callable[[Shared, Piece], Made],
        shared: Shared,
        pieces: Sequence[Piece],
        costs: Sequence[float] | None = None,
    ) -> list[Made]:
        """What `work` makes of each piece, in order."""
        return [work(shared, piece) for piece in pieces]

    def begin(self, work: Callable[[Shared, Piece], Made], shared: Shared, piece: Piece) -> Callable[[], Made]:
        """Makes what `work` makes of a piece at once, and returns what gives it."""
        made = work(shared, piece)
        return lambda: made


@contextmanager
def open_pool(word: str | None, patience_s: float = _PATIENCE_S) -> Iterator[Pool | None]:
    """Yields the pool that `--workers` names: none without a word, this process for 0, so many processes here for
    another number, else the workers of the scheduler at that address.

    Raises MachineError if Dask is not installed, nobody answers there, or a worker has other versions.
    """
    if word is None or word == "0":
        yield None if word is None else Here()
        return
    try:
        import distributed
    except ImportError:
        raise MachineError("--workers needs Dask: pip install 'onnx-distill-toolkit[workers]'") from None
    # What is wrong is said in one line, by this command.
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    if word.isdecimal():
        with (
            _settled(),
            distributed.LocalCluster(
                n_workers=int(word),
                threads_per_worker=1,
                processes=True,
                dashboard_address="127.0.0.1:0",
                silence_logs=logging.CRITICAL,
            ) as cluster,
            distributed.Client(cluster) as client,
            tempfile.TemporaryDirectory(prefix="toolkit-workers-", ignore_cleanup_errors=True) as folder,
        ):
            yield DaskPool(client, f"{word} processes here", patience_s, Path(folder))
        return
    try:
        client = distributed.Client(word, timeout=min(patience_s, 10.0))
    except (OSError, ValueError, TimeoutError):
        raise MachineError(
            f"no Dask scheduler answers at {word}: start one with `dask scheduler`, or name a number"
        ) from None
    with client:
        yield DaskPool(client, word, patience_s)


@contextmanager
def _settled() -> Iterator[None]:
    """Holds Dask, here and in the workers that it starts, to looking after itself once in seconds: a tenth of a core
    went into its looks at how its loops fare."""
    import dask

    with dask.config.set(_SETTLED):
        yield


class DaskPool:
    """The workers of one Dask scheduler, all of which compute with this process' versions. Those of this machine read
    and write their arrays in files of `folder`; others are sent them."""

    def __init__(self, client: Any, name: str, patience_s: float = _PATIENCE_S, folder: Path | None = None) -> None:
        self._client, self._name, self._patience, self._folder = client, name, patience_s, folder
        self._priority = 0
        # Addresses of workers that are at a piece which was begun; of this pool and of the one behind it.
        self._taken = set[str]()
        self._alone_since: float | None = None
        self._check_versions()
        self.here = len(client.nthreads()) if folder else 0
        # Dask tells malloc to give back whatever is free beyond 64 KB (MALLOC_TRIM_THRESHOLD_).
        self._client.register_worker_callbacks(keep_memory)

    @property
    def behind(self) -> DaskPool:
        """Returns the same workers for what they do while nothing of this pool waits."""
        other = copy(self)
        other._priority = self._priority - 1
        return other

    def map(
        self,
        work: Callable[[Shared, Piece], Made],
        shared: Shared,
        pieces: Sequence[Piece],
        costs: Sequence[float] | None = None,
    ) -> list[Made]:
        """What `work` makes of each piece, in order, wherever it is made. `work` is a function of a module; `costs` is
        how much work each piece is beside the others, where they are not alike.

        Raises MachineError if the scheduler goes, or every worker.
        """
        if self._folder:
            return self._map_files(self._folder, work, shared, pieces, costs or [1.0] * len(pieces))
        return self._map(work, shared, pieces)

    def begin(self, work: Callable[[Shared, Piece], Made], shared: Shared, piece: Piece) -> Callable[[], Made]:
        """Gives one piece to one worker, which maps leave alone meanwhile where there are others; returns what waits
        for it. That raises as `map` does."""
        alone = copy(self)
        alone._taken = set(sorted(self._client.nthreads())[1:])
        taken = sorted(self._client.nthreads())[:1]
        self._taken.update(taken)

        def made() -> Made:
            try:
                return alone.map(work, shared, [piece])[0]
            finally:
                self._taken.difference_update(taken)

        with_it = ThreadPoolExecutor(1, "begun")
        begun = with_it.submit(made)
        with_it.shutdown(wait=False)
        return begun.result

    def _map_files(
        self,
        folder: Path,
        work: Callable[[Shared, Piece], Made],
        shared: Shared,
        pieces: Sequence[Piece],
        costs: Sequence[float],
    ) -> list[Made]:
        """The same through files: tasks and what they give back are paths. A task costs Dask's loops milliseconds,
        however little it has to do: each worker has two at most."""
        groups = dealt(costs, min(len(pieces), 2 * max(1, len(self._client.nthreads()))))
        given = [put(folder, content) for content in (shared, *([pieces[k] for k in group] for group in groups))]
        made = self._map(_in_files, (work, given[0]), given[1:])
        results: list[Any] = [None] * len(pieces)
        for group, path in zip(groups, made, strict=True):
            for place, result in zip(group, get(path), strict=True):
                results[place] = result
        for path in (*given, *made):
            # Windows keeps a file that is mapped until the folder goes.
            with suppress(PermissionError):
                Path(path).unlink()
        return results

    def _map(self, work: Callable[[Shared, Piece], Made], shared: Shared, pieces: Sequence[Piece]) -> list[Made]:
        made: dict[int, Made] = {}
        for _ in range(_GIVEN_OUT):
            missing = [k for k in range(len(pieces)) if k not in made]
            if not missing:
                break
            self._give_out(work, shared, {k: pieces[k] for k in missing}, made)
        if len(made) < len(pieces):
            raise MachineError(f"workers of {self._name} died {_GIVEN_OUT} times at the same work: {_AGAIN}")
        return [made[k] for k in range(len(pieces))]

    def _give_out(
        self, work: Callable[[Shared, Piece], Made], shared: Shared, pieces: dict[int, Piece], made: dict[int, Made]
    ) -> None:
        """One try: `made` gets what comes back; what is lost is not in it."""
        from distributed import KilledWorker, wait
        from distributed.comm.core import CommClosedError

        try:
            held: Any = shared
            if not self._folder:
                # A copy for each worker that gets a piece, which is small beside it: one that is lost takes nothing
                # with it.
                copies = min(len(pieces), len(self._client.nthreads())) or True
                (held,) = self._client.scatter([shared], broadcast=copies, hash=False)
            task = partial(_named, work)
            values = list(pieces.values())
            free = sorted(self._client.nthreads().keys() - self._taken) or None
            futures = self._client.map(
                task,
                [held] * len(values),
                values,
                pure=False,
                priority=self._priority,
                workers=free,
                allow_other_workers=free is not None,
            )
            waiting = dict(zip(futures, pieces, strict=True))
            while waiting:
                try:
                    done = wait(list(waiting), timeout=_LOOK_S).done
                except TimeoutError:
                    done = {future for future in waiting if future.done()}
                    self._check_alive()
                finished = {waiting.pop(future): future for future in done}
                for future in finished.values():
                    if future.status == "error" and not isinstance(future.exception(), KilledWorker):
                        raise future.exception()
                whole = {k: future for k, future in finished.items() if future.status == "finished"}
                made.update(zip(whole, self._client.gather(list(whole.values())), strict=True))
        except (CommClosedError, OSError, TimeoutError):
            self._check_alive()
            time.sleep(_LOOK_S)
        except Exception as problem:
            # Futures that were cancelled since what they need is gone have a class of their own in each version.
            if "Cancelled" not in type(problem).__name__:
                raise
            self._check_alive()

    def _check_alive(self) -> None:
        """Raises MachineError if the scheduler is gone, or has had no worker for longer than one waits."""
        try:
            workers = self._client.run_on_scheduler(_count_workers)
        except Exception:
            raise MachineError(f"the Dask scheduler of {self._name} is gone: {_AGAIN}") from None
        if workers:
            self._alone_since = None
            return
        self._alone_since = self._alone_since or time.monotonic()
        if time.monotonic() - self._alone_since > self._patience:
            raise MachineError(f"no worker of {self._name} is left: start one with `dask worker`; {_AGAIN}")

    def _check_versions(self) -> None:
        try:
            self._client.wait_for_workers(1, timeout=self._patience)
            found = self._client.run(worker_versions, on_error="return")
        except (TimeoutError, OSError):
            raise MachineError(f"{self._name} has no worker: start one with `dask worker`") from None
        ours = worker_versions()
        for address, theirs in sorted(found.items()):
            if not isinstance(theirs, dict):
                raise MachineError(
                    f"the worker {address} cannot run this toolkit: {' '.join(str(theirs).split())[:200]}"
                )
            for package in _DECIDING:
                if theirs.get(package) != ours.get(package):
                    raise MachineError(
                        f"the worker {address} has {package} {theirs.get(package)}, this process {ours.get(package)}: "
                        "install the same version there"
                    )


def dealt(costs: Sequence[float], groups: int) -> list[list[int]]:
    """Returns the places of pieces in so many groups: the dearest first, each to the group that has least, so that no
    two workers of as many groups differ by more than a piece."""
    found, sums = [list[int]() for _ in range(groups)], [0.0] * groups
    for place in sorted(range(len(costs)), key=lambda place: -costs[place]):
        lightest = min(range(groups), key=sums.__getitem__)
        found[lightest].append(place)
        sums[lightest] += costs[place]
    return [sorted(group) for group in found]


def _named(work: Callable[[Shared, Piece], Made], shared: Shared, piece: Piece) -> Made:
    """On the worker: what a function makes of a piece. Raises MachineError, with this worker's address, where it cannot
    read a file that it was told of, or has no room for one; CheckpointError likewise for a file that is not whole."""
    from distributed import get_worker

    try:
        return work(shared, piece)
    except CheckpointError as problem:
        raise CheckpointError(f"the worker {get_worker().address}: {problem}; {_AGAIN}") from None
    except OSError as problem:
        hint = "" if problem.errno in FULL_DISK else ": let it have the checkpoint and the bundle at the same path"
        raise MachineError(
            f"the worker {get_worker().address} cannot open {problem.filename or 'a file'}: "
            f"{problem.strerror or problem}{hint}; {_AGAIN}"
        ) from None


def _in_files(task: tuple[Callable[[Any, Any], Any], str], pieces: str) -> str:
    """On the worker: what a function makes of each piece in a file and of the file that all pieces share, as a file
    beside them."""
    work, shared = task
    if shared not in _SHARED:
        while len(_SHARED) >= _SHARED_FILES:
            _SHARED.pop(next(iter(_SHARED)))
        _SHARED[shared] = get(shared)
    return put(Path(pieces).parent, [work(_SHARED[shared], piece) for piece in get(pieces)])


def worker_versions() -> dict[str, str]:
    """The versions that decide what a worker computes, by package."""
    return {name: version for name, version in package_versions().items() if name in _DECIDING}


def _count_workers(dask_scheduler: Any) -> int:
    return len(dask_scheduler.workers)
