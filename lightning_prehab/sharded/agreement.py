"""How processes that work for themselves fail together, so that none waits for one that has given up."""

from collections.abc import Callable
from typing import Any

#: ``agree(work)``: what ``work`` returns on this process; an error on one process is raised on every one.
Agree = Callable[[Callable[[], Any]], Any]


def alone(work: Callable[[], Any]) -> Any:
    """For one process: there is nobody to agree with."""
    return work()
