"""Lanes of a body in an order that is chosen, so that a barrier that is missing shows every time.

One lane runs at a time, as far as it can: to the next barrier or its end. In Numba's simulator the operating
system decides how far that is, and lanes start in their order, which hides that one waits for those before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from gpu.kernels.lanes import Target, _target

ORDERS = ([0], [0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 0, 4, 1, 3])
PATIENCE = 30.0


class OrderedLanes:
    """Lanes that take turns in one order between every two barriers.

    Parameters
    ----------
    order : sequence of int
        Every lane once.

    Attributes
    ----------
    target : Target
        For the bodies of kernels, which stay Python.
    """

    def __init__(self, order: Sequence[int]) -> None:
        self.order = order
        self.target: Target = _target(lambda body: body, self._barrier)
        self._turn = [threading.Semaphore(0) for _ in order]
        self._handed_back = threading.Semaphore(0)
        self._lane = -1
        self._ended: dict[int, Any] = {}

    def run(self, body: Callable[[int, int], Any]) -> list[Any]:
        """What `body(lane, lanes)` returns in every lane.

        Raises
        ------
        AssertionError
            If some lanes end where others wait at a barrier, for ever on a device.
        """
        self._ended = {}
        for lane in self.order:
            threading.Thread(target=self._thread, args=(body, lane), daemon=True).start()
        while not self._ended:
            for lane in self.order:
                self._lane = lane
                self._turn[lane].release()
                assert self._handed_back.acquire(timeout=PATIENCE), f"lane {lane} hangs"
        for result in self._ended.values():
            if isinstance(result, Exception):
                raise result
        assert len(self._ended) == len(self.order), f"only {sorted(self._ended)} pass the last barrier"
        return [self._ended[lane] for lane in range(len(self.order))]

    def _thread(self, body: Callable[[int, int], Any], lane: int) -> None:
        self._turn[lane].acquire()
        try:
            self._ended[lane] = body(lane, len(self.order))
        except Exception as error:
            self._ended[lane] = error
        self._handed_back.release()

    def _barrier(self) -> None:
        lane = self._lane
        self._handed_back.release()
        self._turn[lane].acquire()
