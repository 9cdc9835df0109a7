"""Running many independent tasks here, or on the processes of a Ray cluster, with the same results.

Ray (https://docs.ray.io) is the extra ``[ray]``; every machine of the cluster needs this package, in this version.
"""

from __future__ import annotations

import itertools
import logging
import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from advrad_fast.errors import AdvRADError, SpreadError

S = TypeVar("S")
T = TypeVar("T")
R = TypeVar("R")

RETRIES = 3  #: of a task whose worker died; one that kills four workers is given up

_states: dict[str, Any] = {}  # in a worker: what the present run's setup made


def map_tasks(
    function: Callable[[S, T], R], tasks: Iterable[T], *, setup: Callable[[], S], ray: str | None = None
) -> Iterator[tuple[int, R]]:
    """(index, ``function(state, task)``) of every task, each once, as soon as it is done.

    Without ``ray``: in this process, in order.  With it: on the cluster's processes, in the order in which they are done.  A task
    whose worker dies is run again elsewhere.  Tasks are drawn as workers are free to take them, so an iterator need not hold all
    of them at once.  After stopping early (an exception, or closing the iterator) no more are drawn; the two for each worker that
    were under way end with the connection, or, where the caller had made it, run on and their results are dropped.

    Args:
        function: of a module (workers import it), and pure: its result depends on its arguments only.
        setup: makes the ``state``, once a process: what is expensive to make or to send, such as a detector.
        ray: the address of a cluster (``auto``, ``HOST:PORT``, ``ray://HOST:PORT``), or ``local`` for one on this machine.

    Raises:
        SpreadError: Ray or its cluster can't be used, or a task has killed all the workers that tried it.
        Exception: whatever ``function`` or ``setup`` raises, as it is raised without Ray.
    """
    if ray is None:
        state = setup()
        for index, task in enumerate(tasks):
            yield index, function(state, task)
        return
    yield from _on_cluster(function, tasks, setup, ray)


def _on_cluster(
    function: Callable[[S, T], R], tasks: Iterable[T], setup: Callable[[], S], address: str
) -> Iterator[tuple[int, R]]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing about a run leaves the cluster
    try:
        import ray as library
    except ModuleNotFoundError as error:
        raise SpreadError("ray is not installed; needed here: pip install 'advrad-fast[ray]'") from error
    ray: Any = library  # its types are partial
    started = not ray.is_initialized()
    if started:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False)
        except Exception as error:  # Ray has no common type for all that can be wrong with an address
            raise SpreadError(f"Ray cluster {address!r} can't be reached: {error}") from error
    waiting: dict[Any, int] = {}
    try:
        run = ray.remote(max_retries=RETRIES, num_cpus=1)(_run)
        name = uuid.uuid4().hex
        # Inside a list a reference is not followed: a worker fetches the setup once, not with every task.
        shared = [ray.put((setup, function))]
        window = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
        todo = enumerate(tasks)
        while True:
            for index, task in itertools.islice(todo, window - len(waiting)):
                waiting[run.remote(name, shared, task)] = index
            if not waiting:
                return
            # One reference is one task, whatever died in between: so each index comes once.
            done, _ = ray.wait(list(waiting), num_returns=1)
            yield waiting.pop(done[0]), _result(ray, done[0])
    finally:
        # No ray.cancel: met by a task that is just being sent, it aborts this process ("Tried to complete task that was not
        # pending", Ray 2.60).
        if started:
            ray.shutdown()


def _run(name: str, shared: list[Any], task: Any) -> Any:
    """In a worker."""
    import ray

    if name not in _states:
        setup, function = ray.get(shared[0])
        _states.clear()
        _states[name] = (setup(), function)
    state, function = _states[name]
    return function(state, task)


def _result(ray: Any, reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, AdvRADError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        raise SpreadError(f"a task was given up, its workers died {RETRIES + 1} times: {error}") from error
