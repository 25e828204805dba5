"""What clients may call: finding it, calling it.

All of it has been imported before the worker serves (loader.py), so a call is two dictionary
look-ups. No name that a client sends ever reaches an import or an attribute.
"""

import hashlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import msgspec

from cpanbridge.supervisor.config import Affinity
from cpanbridge.workers.client.client_socket import ClientSocket
from cpanbridge.workers.protocol.refusal import Refusal
from cpanbridge.workers.protocol.requests import Request

_QUICK_NS = 250_000  # less than switching to another thread and back costs under load
_NAMES_SHOWN = 30
FOR_CLIENT = 0


class Exposed(NamedTuple):
    """A module that clients may call, under the name in its table."""

    functions: dict[str, Callable[..., Any]]
    python: ModuleType | None  # None: built in
    takes_request: bool = False  # its functions receive the Request itself and the ClientSocket
    request_timeout: float = 0.0  # seconds that a call may take; 0: any time
    affinity: Affinity = "none"
    lenient: bool = False  # its results may lose what JSON cannot carry
    ping: str | None = None  # the function that asks whether the daemon lives


class Target(msgspec.Struct, eq=False):
    """A function that can be called, and whether its last calls have been quick."""

    function: Callable[..., Any]
    takes_request: bool
    request_timeout: float
    # None: any worker may run it; FOR_CLIENT: the worker that has the client's state; else the
    # worker that has the state of the module with this number.
    owned_as: int | None
    lenient: bool = False  # as in Exposed
    is_ping: bool = False  # it only asks whether the daemon lives: no limit counts it
    number: int = -1  # its index in the daemon's table of names; -1: not called in this worker
    _slow_share: float = 0.5  # of its calls, an exponential moving average

    @property
    def is_quick(self) -> bool:
        """Whether its next call is likely to take no longer than `_QUICK_NS`."""
        return self._slow_share < 0.25

    def took(self, duration_ns: int) -> None:
        """Record a call's duration. An update that is lost between two threads does no harm."""
        slow = 1.0 if duration_ns > _QUICK_NS else 0.0
        self._slow_share += (slow - self._slow_share) / 16


def _owned_as(module: str, affinity: Affinity) -> int | None:
    """The key by which the owner of a module's state is found; see `Target.owned_as`.

    A hash of the name alone is the same in all workers of all generations. Two names with the same
    one of 2**63 numbers are unlikely, and would only share a worker.
    """
    if affinity == "none":
        return None
    if affinity == "client":
        return FOR_CLIENT
    digest = hashlib.blake2b(module.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1 or 1


class Registry:
    """All that may be called, by name."""

    def __init__(self, exposed: dict[str, Exposed], left_out: dict[str, str] | None = None) -> None:
        self.exposed = exposed
        self.left_out = left_out or {}  # modules that could not be loaded -> why
        self._targets: dict[str, dict[str, Target]] = {}
        for name, module in exposed.items():
            owned_as = _owned_as(name, module.affinity)
            rules = module.takes_request, module.request_timeout, owned_as, module.lenient
            self._targets[name] = {
                called: Target(function, *rules, is_ping=module.ping == called)
                for called, function in module.functions.items()
            }

    def find(self, request: Request) -> Target:
        """The function that a request names.

        Raises Refusal (ModuleNotAllowed, FunctionNotAllowed) that lists what is allowed.
        """
        functions = self._targets.get(request.module)
        if functions is None:
            problem = f"is not exposed; {_listed(self._targets)}"
            if request.module in self.left_out:
                problem = f"could not be loaded: {self.left_out[request.module]}"
            message = f"Module {request.module!r} {problem}"
            raise Refusal("ModuleNotAllowed", message, request.request_id, request.perl_caller)
        target = functions.get(request.function)
        if target is None:
            function = f"Function {request.function!r} of module {request.module!r}"
            message = f"{function} is not exposed; {_listed(functions)}"
            raise Refusal("FunctionNotAllowed", message, request.request_id, request.perl_caller)
        return target

    def hooks(self, name: str) -> Iterable[tuple[str, Callable[[], object]]]:
        """The hooks of this name, each with its module's name: each Python module once."""
        seen: set[int] = set()
        for exposed_as, module in self.exposed.items():
            hook = getattr(module.python, name, None)
            if inspect.isroutine(hook) and id(module.python) not in seen:
                seen.add(id(module.python))
                yield exposed_as, hook


def call(
    target: Target, request: Request, client: ClientSocket
) -> tuple[Any, BaseException | None]:
    """Run a function with a request's params: an object as keywords, an array by position.

    Returns its value, or the exception that ended it, SystemExit included: a module must not be
    able to end the thread that serves a client. Raises Refusal (InvalidParams) when the params do
    not fit the signature; then the function has not run.
    """
    function = target.function
    positional: Sequence[Any] = ()
    named: Mapping[str, Any] = {}
    if target.takes_request:
        positional = request, client
    elif type(request.params) is dict:
        named = request.params
    elif type(request.params) is list:
        positional = request.params
    elif request.params is not None:
        positional = (request.params,)
    try:
        return function(*positional, **named), None
    except TypeError as error:
        if not target.takes_request and _is_misfit(function, positional, named, error):
            message = f"Invalid params for {request.module}.{request.function}: {error}"
            raise Refusal("InvalidParams", message, request.request_id) from None
        return None, error
    except Refusal:
        raise
    except BaseException as error:
        return None, error


def _is_misfit(
    function: Callable[..., Any],
    positional: Sequence[Any],
    named: Mapping[str, Any],
    error: TypeError,
) -> bool:
    """Whether the call itself failed, before any line of the function ran."""
    if error.__traceback__ is not None and error.__traceback__.tb_next is not None:
        return False  # raised by Python code that the function ran
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return False  # a C function without a signature
    try:
        signature.bind(*positional, **named)
    except TypeError:
        return True
    return False


def _listed(names: Iterable[str]) -> str:
    allowed = sorted(names)
    more = f" and {len(allowed) - _NAMES_SHOWN} more" if len(allowed) > _NAMES_SHOWN else ""
    return f"allowed: {', '.join(allowed[:_NAMES_SHOWN])}{more}"
