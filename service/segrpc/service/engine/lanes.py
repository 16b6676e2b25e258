"""Lanes: threads that take works one after the other, so that one kind of work never waits for another kind.

Within a lane parties take turns (`TurnQueue`), so that who clicks once does not wait for another's fifty.
"""

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from segrpc.service.engine.base import CancelToken
from segrpc.service.engine.turns import TurnQueue
from segrpc.service.engine.work import Order, Result, Ticket, party_of
from segrpc.service.errors import DeadlineError

log = logging.getLogger("segrpc.engine")


class Lane:
    """A queue and the one thread that works it off.

    Args:
        name: The thread's name.
        run: Does works that were taken from the queue together, settles their tickets, and returns those of works that
            need another turn.
        most: How many works it takes at most together: those whose turns are next when it gets to them; it never waits
            for more.
        nice: How much lower than normal the operating system's priority of the thread is, 0 to 19; Linux only. Threads
            that it starts, such as those of OpenMP, inherit it.
    """

    def __init__(
        self, name: str, run: Callable[[Sequence[Ticket]], Sequence[Ticket]], *, most: int = 1, nice: int = 0
    ) -> None:
        self._run = run
        self._most = most
        self._nice = nice
        self._queue: TurnQueue[Ticket] = TurnQueue()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def submit(self, work: Order, token: CancelToken) -> "Future[Result]":
        """Put a work behind the others of its party. If its token is cancelled while it waits there, it fails at once.

        Raises:
            RuntimeError: If the lane is closed.
        """
        ticket = Ticket(work, token)
        with self._changed:
            if self._closing:
                raise RuntimeError("the lane is closed")
            self._queue.put(party_of(work), ticket)
            self._changed.notify()
        forget = token.on_cancel(lambda: self._drop(ticket))
        ticket.future.add_done_callback(lambda _: forget())
        return ticket.future

    def close(self) -> None:
        """Do what is in the queue, then end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _drop(self, ticket: Ticket) -> None:
        with self._changed:
            if not self._queue.discard(party_of(ticket.work), ticket):
                return
        ticket.settle(DeadlineError("the caller left before the work was done"))

    def _work(self) -> None:
        if self._nice and sys.platform == "linux":
            try:
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), self._nice)
            except OSError as error:
                log.warning("the priority of %s stays as it is: %s", self._thread.name, error)
        while tickets := self._take():
            now = time.perf_counter()
            for ticket in tickets:
                ticket.waited += now - ticket.queued
            try:
                self._put_back(self._run(tickets))
            except Exception as error:  # noqa: BLE001 - whatever went wrong is for whoever waits
                for ticket in tickets:
                    ticket.settle(error)

    def _put_back(self, tickets: Sequence[Ticket]) -> None:
        now = time.perf_counter()
        with self._changed:
            for ticket in tickets:
                ticket.queued = now
                self._queue.put_back(party_of(ticket.work), ticket)

    def _take(self) -> list[Ticket]:
        """Wait for works; an empty list says that there will be none any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closing)
            taken: list[Ticket] = []
            while self._queue and len(taken) < self._most:
                taken.append(self._queue.take())
            return taken
