"""What can go wrong between a client and the loopback Hub, on purpose."""

import re
from dataclasses import dataclass, field


@dataclass(frozen=True)
class CutRequest:
    """The connection breaks while the request is sent; the Hub does nothing.

    Args:
        after (`int`, defaults to 0): bytes of the body that are read before.
    """

    after: int = 0


@dataclass(frozen=True)
class CutAnswer:
    """The Hub does what it was asked to, and the connection breaks before it can say so.

    Args:
        after (`int`, *optional*): bytes of the answer's body that are sent; by default not even its head.
    """

    after: int | None = None


@dataclass(frozen=True)
class Status:
    """The Hub does nothing and answers with this status.

    Args:
        code (`int`): 429, 500, 503, ...
        headers (`dict[str, str]`): such as Retry-After.
    """

    code: int
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Slow:
    """The Hub waits before it answers.

    Args:
        seconds (`float`): how long.
    """

    seconds: float


Fault = CutRequest | CutAnswer | Status | Slow


class Faults:
    """
    Which requests fail, and how.

    Attributes:
        met (`int`): how many have failed.
    """

    def __init__(self):
        self._planned: list[dict] = []
        self.met = 0

    def add(self, fault: Fault, pattern: str, nth: int, times: int) -> None:
        """Of requests whose `METHOD /path` holds `pattern`: `times` of them, from the `nth` on (1 is the first)."""
        self._planned.append({"fault": fault, "pattern": pattern, "first": nth, "last": nth + times - 1, "seen": 0})

    def clear(self) -> None:
        self._planned.clear()

    def of(self, request: str) -> Fault | None:
        """The fault that this request meets; to be asked once for each request."""
        met = None
        for plan in self._planned:
            if re.search(plan["pattern"], request):
                plan["seen"] += 1
                if plan["first"] <= plan["seen"] <= plan["last"]:
                    met = met or plan["fault"]
        self.met += met is not None
        return met
