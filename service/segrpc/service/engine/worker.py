"""The worker process: ``python -m segrpc.service.engine.worker QUICK BULK``, with the numbers of two inherited sockets.

Only the front starts it. It ends when it is told to, or when the front's end of a socket is closed, as it is when the
front was killed. Calls come over either socket and are answered over the same; large ones use the second, so that they
do not delay small ones.
"""

import contextlib
import faulthandler
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future

from segrpc.service.engine.base import CancelToken
from segrpc.service.engine.local import LocalCore
from segrpc.service.engine.logs import configure_logging
from segrpc.service.engine.messages import (
    DUMP_SIGNAL,
    Answer,
    Call,
    Cancel,
    Failed,
    Ready,
    Release,
    Start,
    Stop,
    portable,
)
from segrpc.service.engine.wire import Connection
from segrpc.service.engine.work import Result
from segrpc.service.errors import SegrpcError

log = logging.getLogger("segrpc.worker")


class Worker:
    """Answers the front's calls.

    Args:
        core: Does the work; started.
    """

    def __init__(self, core: LocalCore) -> None:
        self._core = core
        self._tokens: dict[int, CancelToken] = {}

    def serve(self, connection: Connection) -> None:
        """Take messages from a connection until one says to stop.

        Raises:
            EOFError: If the front is gone.
        """
        while not isinstance(message := connection.receive(), Stop):
            if isinstance(message, Call):
                self._call(message, connection)
            elif isinstance(message, Cancel):
                token = self._tokens.get(message.number)
                if token is not None:
                    token.cancel()
            elif isinstance(message, Release):
                self._core.release(message.model, message.digest)

    def _call(self, call: Call, connection: Connection) -> None:
        token = self._tokens[call.number] = CancelToken(call.timeout)

        def answer(future: "Future[Result]") -> None:
            self._tokens.pop(call.number, None)
            error = future.exception()
            outcome = portable(error) if isinstance(error, Exception) else future.result()
            with contextlib.suppress(OSError):  # the front is gone: whoever receives will find out
                self._send(connection, Answer(call.number, outcome, self._core.holdings()))

        self._core.submit(call.work, token).add_done_callback(answer)

    def _send(self, connection: Connection, answer: Answer) -> None:
        try:
            connection.send(answer)
        except OSError:
            raise
        except Exception as error:  # noqa: BLE001 - a model's own type that cannot be pickled
            connection.send(Answer(answer.number, portable(error), answer.holdings))


def main(arguments: Sequence[str]) -> int:
    """Run the process.

    Args:
        arguments: The numbers of the two sockets.

    Returns:
        The exit status: 0 if it was told to end, 1 if the models could not be loaded.
    """
    # Signals to the whole process group are for the front, which lets calls end before it ends the worker.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    faulthandler.enable()
    faulthandler.register(DUMP_SIGNAL)  # says where all threads are, even if one keeps the interpreter for itself
    quick, bulk = (Connection(socket.socket(fileno=int(number))) for number in arguments)
    start = quick.receive()
    if not isinstance(start, Start):
        raise TypeError(f"the first message is a {type(start).__name__}")
    configure_logging(start.options.log_level, start.options.log_format)
    try:
        core = LocalCore(start.options, start.device)
        models = core.start()
    except Exception as error:
        if not isinstance(error, SegrpcError):
            log.exception("the models cannot be loaded")
        quick.send(Failed(portable(error)))
        return 1
    worker = Worker(core)
    threading.Thread(target=_serve_or_end, args=(worker, bulk), name="bulk", daemon=True).start()
    quick.send(Ready(models))
    _serve_or_end(worker, quick)
    core.stop()
    return 0


def _serve_or_end(worker: Worker, connection: Connection) -> None:
    """Serve a connection; end the process, whatever it is doing, when the front is gone."""
    try:
        worker.serve(connection)
    except EOFError:
        log.info("the server is gone: the worker ends")
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
