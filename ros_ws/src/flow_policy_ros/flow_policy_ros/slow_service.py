"""A service whose work takes seconds: done in a thread, while the node goes on serving."""

import threading
from collections.abc import Callable

from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.node import Node
from std_srvs.srv import Trigger

POLL_S = 0.001


class _OthersFirst:
    """Awaited in a callback, it lets the executor serve the others before it goes on."""

    def __await__(self):
        yield


class SlowService:
    """One call at a time; another one meanwhile is refused.

    Args:
        work: returns what was done, or raises.
        otherwise: what is said, before the error, where it raised.
    """

    def __init__(self, node: Node, name: str, work: Callable[[], str], otherwise: str):
        self._node, self._name, self._work, self._otherwise = node, name, work, otherwise
        self._thread: threading.Thread | None = None
        # In a group of its own: while it waits, the callbacks of its group are not served.
        group = ReentrantCallbackGroup()
        node.create_service(Trigger, name, self._serve, callback_group=group)

    async def _serve(self, request, response):
        if self._thread is not None:
            response.success = False
            response.message = f"{self._name.rpartition('/')[2]} is under way already"
            return response
        self._thread = threading.Thread(target=self._do, args=(response,), daemon=True)
        self._thread.start()
        while self._thread.is_alive():
            self._thread.join(POLL_S)
            await _OthersFirst()
        self._thread = None
        if not response.success:
            self._node.get_logger().error(response.message)
        return response

    def _do(self, response) -> None:
        try:
            response.message, response.success = self._work(), True
        except Exception as error:  # whatever is wrong must not cost the node
            response.message, response.success = f"{self._otherwise}: {error}", False
