"""Who has which lane: one for each thread, made when it first needs it and given back when it ends, or some that threads share.

What failed is given up, and made anew for the next frame.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np

from advrad_fast.backends.base import Array
from advrad_fast.backends.cuda_lane import Lane
from advrad_fast.backends.cuda_session import Plan, Session, Where, current
from advrad_fast.errors import BackendUnavailableError, ImageError, InferenceError


class _Slot:
    """A thread's lane; when the thread ends it goes, and gives the lane back."""

    def __init__(self, lane: Lane) -> None:
        self.lane = lane
        weakref.finalize(self, lane.close).atexit = False


class Lanes:
    """A session and its lanes.

    Some errors of a GPU end the context and all that is in it.  Then all lanes and the session are given up, and the next frame
    opens them anew, which works as soon as nobody else in the process holds the context.

    Args:
        open_session: opens the session; called now, and again after such an error.
        graphs: whether lanes use CUDA graphs.

    Raises:
        BackendUnavailableError, InferenceError: as for :class:`Session`.
    """

    def __init__(self, open_session: Callable[[], Session], *, graphs: bool = True) -> None:
        self._open, self._graphs = open_session, graphs
        self._lock = threading.RLock()  # before any lane's lock, never after
        self._mine = threading.local()
        self._shared: list[Lane] = []
        self._lanes: weakref.WeakSet[Lane] = weakref.WeakSet()
        self._closed, self._process = False, os.getpid()
        self._session: Session | None = open_session()

    @property
    def session(self) -> Session | None:
        """The open one, if any."""
        return self._session

    @contextmanager
    def lane(self) -> Iterator[Lane]:
        """This thread's lane, with its context current; it is given up if the body fails, but for an ImageError.

        Raises:
            InferenceError: there is none to be had, or the body raised it.
        """
        with self._held(self._of_this_thread) as (lane,):
            yield lane

    @contextmanager
    def shared(self, count: int) -> Iterator[list[Lane]]:
        """So many lanes that all threads share, in turns, as :meth:`lane` gives one."""
        with self._held(lambda: self._of_all(count)) as lanes:
            yield lanes

    @contextmanager
    def _held(self, find: Callable[[], list[Lane]]) -> Iterator[list[Lane]]:
        while True:
            lanes = find()
            for lane in lanes:
                lane.lock.acquire()
            if not any(lane.closed for lane in lanes):
                break
            for lane in lanes:  # another thread has just given everything up
                lane.lock.release()
        try:
            try:
                with current(lanes[0].gpu):
                    yield lanes
            finally:
                for lane in lanes:
                    lane.lock.release()
        except ImageError:  # a frame's own fault, found before it was enqueued
            raise
        except BaseException:
            self._give_up(lanes)
            raise

    def _of_this_thread(self) -> list[Lane]:
        slot: _Slot | None = getattr(self._mine, "slot", None)
        if slot is None or slot.lane.closed:
            slot = self._mine.slot = _Slot(self._made())
        return [slot.lane]

    def _of_all(self, count: int) -> list[Lane]:
        with self._lock:
            self._shared = [lane for lane in self._shared if not lane.closed]
            while len(self._shared) < count:
                self._shared.append(self._made())
            return self._shared[:count]

    def _made(self) -> Lane:
        if os.getpid() != self._process:
            raise InferenceError("cuda: a detector does not survive fork(); start processes by spawn, and load it in each")
        with self._lock:
            if self._closed:
                raise InferenceError("cuda: the detector was closed")
            try:
                if self._session is None:
                    self._session = self._open()
                lane = Lane(self._session, graphs=self._graphs)
            except BackendUnavailableError as error:
                raise InferenceError(str(error)) from error
            except InferenceError:
                self._give_up([])
                raise
            self._lanes.add(lane)
        return lane

    def _give_up(self, failed: list[Lane]) -> None:
        """Lanes that failed, and everything if the context is lost."""
        for lane in failed:
            lane.close()
        with self._lock:
            present = self._session is not None and all(lane.session is self._session for lane in failed)
            if present and self._session is not None and not self._session.alive():
                self._close_all()

    def _close_all(self) -> None:
        for lane in list(self._lanes):
            lane.close()  # waits for its thread's frame to end
        self._shared = []
        session, self._session = self._session, None
        if session is not None:
            session.close()

    def close(self) -> None:
        """Give everything back; later frames are refused.  Closing twice is fine."""
        if os.getpid() != self._process:
            return
        with self._lock:
            self._closed = True
            self._close_all()


def open_lanes(
    plan: Plan,
    where: Where,
    weights: Mapping[str, Array],
    mu: Array,
    inverse_spread: Array,
    *,
    graphs: bool = True,
    shared: int = 0,
) -> Lanes:
    """Lanes for a plan, with those made that are needed first, this thread's or the shared ones: what is missing is said now.

    Raises:
        BackendUnavailableError, ConfigError, ModelFileError: as for :class:`advrad_fast.backends.cuda.CudaBackend`.
    """
    kept = [np.array(array, dtype=np.float32, order="C") for array in (mu, inverse_spread)]
    try:
        lanes = Lanes(lambda: Session(plan, where, weights, *kept), graphs=graphs)
        try:
            with lanes.shared(shared) if shared else lanes.lane():
                if lanes.session is not None:
                    lanes.session.engine.keep_kernels()
        except BaseException:
            lanes.close()
            raise
    except InferenceError as error:
        raise BackendUnavailableError(str(error)) from error
    return lanes
