"""Running many independent tasks here, or on the processes of a Ray cluster, with the same results.

Ray (https://docs.ray.io) is the extra ``[ray]``; every machine of the cluster needs this package, in this version.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from typing import Any, TypeVar

from advrad_fast.errors import AdvRADError, SpreadError

S = TypeVar("S")
T = TypeVar("T")
R = TypeVar("R")

RETRIES = 3  #: of tasks whose worker died; those that kill four workers are given up
GROUP_SECONDS = 0.2  #: tasks travel in groups of about this length: short ones would wait for Ray more than they take
GROUP_TASKS = 64  #: at most in one group

_states: dict[str, Any] = {}  # in a worker: what the present run's setup made


def map_tasks(
    function: Callable[[S, T], R], tasks: Iterable[T], *, setup: Callable[[], S], ray: str | None = None
) -> Generator[tuple[int, R], None, None]:
    """(index, ``function(state, task)``) of every task, each once, as soon as it is done.

    Without ``ray``: in this process, in order.  With it: on the cluster's processes, in the order in which they are done.  Short
    tasks travel in groups; a group whose worker dies is run again elsewhere, whole, and counts once.  Tasks are drawn as workers
    are free to take them, so an iterator need not hold all of them at once.  After stopping early (an exception, or closing the
    iterator) no more are drawn; the two groups for each worker that were under way end with the connection, or, where the caller
    had made it, run on and their results are dropped.

    Args:
        function: of a module (workers import it), or a ``partial`` of one, and pure: its result depends on its arguments only.
        setup: makes the ``state``, once a process: what is expensive to make or to send, such as a detector.
        ray: the address of a cluster (``auto``, ``HOST:PORT``, ``ray://HOST:PORT``), or ``local`` for one on this machine.

    Raises:
        SpreadError: Ray or its cluster can't be used, or a group of tasks has killed all the workers that tried it.
        Exception: whatever ``function`` or ``setup`` raises, as it is raised without Ray.
    """
    if ray is None:
        state = setup()
        for index, task in enumerate(tasks):
            yield index, function(state, task)
        return
    yield from _on_cluster(function, tasks, setup, ray)


def in_order(results: Generator[tuple[int, R], None, None]) -> Generator[R, None, None]:
    """What :func:`map_tasks` yields, in the order of the tasks; results that are early wait in memory for those before them."""
    early: dict[int, R] = {}
    with closing(results):
        for wanted in itertools.count():
            while wanted not in early:
                found = next(results, None)
                if found is None:
                    return
                early[found[0]] = found[1]
            yield early.pop(wanted)


@contextmanager
def connection(address: str) -> Iterator[Any]:
    """The module ``ray``, connected to a cluster: as the caller has it, or for the length of the block.

    Raises:
        SpreadError: Ray is not installed, or the cluster can't be reached.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing about a run leaves the cluster
    try:
        import ray as library
    except ModuleNotFoundError as error:
        raise SpreadError("ray is not installed; needed here: pip install 'advrad-fast[ray]'") from error
    ray: Any = library  # its types are partial
    started = not ray.is_initialized()
    if started:
        try:
            quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": False}
            ray.init(address=address, **quiet, **({"include_dashboard": False} if address == "local" else {}))
        except Exception as error:  # Ray has no common type for all that can be wrong with an address
            raise SpreadError(f"Ray cluster {address!r} can't be reached: {error}") from error
    try:
        yield ray
    finally:
        if started:
            ray.shutdown()


def _on_cluster(
    function: Callable[[S, T], R], tasks: Iterable[T], setup: Callable[[], S], address: str
) -> Iterator[tuple[int, R]]:
    # No ray.cancel on the way out: met by a task that is just being sent, it aborts this process ("Tried to complete task that
    # was not pending", Ray 2.60).
    with connection(address) as ray:
        run = ray.remote(max_retries=RETRIES, num_cpus=1)(_run)
        name = uuid.uuid4().hex
        # Inside a list a reference is not followed: a worker fetches the setup once, not with every task.
        shared = [ray.put((setup, function))]
        window = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
        todo = iter(enumerate(tasks))
        size = 1
        waiting: dict[Any, tuple[int, ...]] = {}
        while True:
            while len(waiting) < window and (group := list(itertools.islice(todo, size))):
                waiting[run.remote(name, shared, [task for _, task in group])] = tuple(index for index, _ in group)
            if not waiting:
                return
            # One reference is one group, whatever died in between: so each index comes once.
            done, _ = ray.wait(list(waiting), num_returns=1)
            indices = waiting.pop(done[0])
            results, seconds, error = _result(ray, done[0])
            yield from zip(indices, results, strict=False)
            if error is not None:
                raise error
            size = max(1, min(GROUP_TASKS, int(GROUP_SECONDS * len(results) / max(seconds, 1e-9))))


def _run(name: str, shared: list[Any], tasks: list[Any]) -> tuple[list[Any], float, AdvRADError | None]:
    """In a worker: the results up to the first error, the seconds they took, and that error."""
    import ray

    if name not in _states:
        setup, function = ray.get(shared[0])
        _states.clear()
        _states[name] = (setup(), function)
    state, function = _states[name]
    results = []
    start = time.perf_counter()
    for task in tasks:
        try:
            results.append(function(state, task))
        except AdvRADError as error:
            return results, time.perf_counter() - start, error
    return results, time.perf_counter() - start, None


def _result(ray: Any, reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, AdvRADError):  # of the setup
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        raise SpreadError(f"tasks were given up, their workers died {RETRIES + 1} times: {error}") from error
