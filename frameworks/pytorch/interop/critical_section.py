"""The critical section: work that neither a signal handler nor another thread sees half done.

A step gives its state to XLA, which consumes it, and stores the results afterwards: in between the state is in nobody's
hands, and the tape is neither pending nor committed. So handlers that Python would run there (Ctrl-C, a notice of
preemption whose handler saves a checkpoint, a timer) wait until the section ends, and run then as they would have,
exceptions included. Threads that want a value of the tape wait for the section's lock.
"""

import functools
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

from trainingcompiler.adapters.patches import Patches
from trainingcompiler.frameworks.pytorch.interop.passthrough import noticed

_Function = TypeVar("_Function", bound=Callable)
_NONE = object()


class CriticalSection:
    """One of a process: a lock that a thread may take again, in the main thread without signal handlers meanwhile.

    Attributes:
        handling: How many signal handlers of the script are running, one inside another.

    Example:
        >>> with section:
        ...     results = executable(state, inputs)
        ...     store(results)
        >>> @section.around
        ... def commit(): ...
    """

    def __init__(self) -> None:
        self.handling = 0
        self._handlers: dict[int, Callable] = {}  # the script's, in whose places `_arrive` is
        self._originals: tuple[Callable, Callable] = signal.signal, signal.getsignal
        self._patches = Patches()
        self.renew()

    def renew(self) -> None:
        """Begins anew, in a forked child, whose only thread is the one that has forked."""
        self._lock: Any = threading.RLock()
        self._main = threading.main_thread().ident
        self._depth = 0  # of the main thread, the only one in which Python runs handlers
        self._arrived: dict[int, FrameType | None] = {}

    def __enter__(self) -> None:
        if threading.get_ident() == self._main:
            self._depth += 1  # first: whatever arrives from here on waits, so that nothing can be raised in between
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        if self._lock._is_owned():  # not where an exception has been raised at the very end of `outside`
            self._lock.release()
        if threading.get_ident() == self._main:
            self._depth = max(self._depth - 1, 0)
            if self._arrived and not self._depth:
                self._deliver()

    def around(self, function: _Function) -> _Function:
        """A function that is a critical section from its beginning to its end."""

        @functools.wraps(function)
        def whole(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != self._main:
                with self:
                    return function(*args, **kwargs)
            if self._depth:  # in it already
                return function(*args, **kwargs)
            # `with self`, without its two calls: this is done at every call that is recorded.
            self._depth = 1
            self._lock.acquire()
            try:
                return function(*args, **kwargs)
            finally:
                if self._lock._is_owned():
                    self._lock.release()
                self._depth = 0
                if self._arrived:
                    self._deliver()

        return whole  # type: ignore[return-value]

    def outside(self) -> "_Outside":
        """Leaves the section for a while, for code of the script that torch runs as it would without us."""
        return _Outside(self)

    # -- forks --------------------------------------------------------------------------------------------------

    def hold(self) -> None:
        """Enters the section before a fork, so that no thread is in it, whose work the child would never see ended."""
        self.__enter__()

    def let_go(self) -> None:
        """Ends it in the parent. A handler waits until the next section ends: Python drops what is raised here."""
        arrived, self._arrived = self._arrived, {}
        self.__exit__()
        self._arrived.update(arrived)

    # -- signals ------------------------------------------------------------------------------------------------

    def watch_signals(self) -> None:
        """Takes the place of the script's handlers, of those to come as well; not outside of the main thread."""
        if self._patches or threading.current_thread() is not threading.main_thread():
            return
        self._originals = signal.signal, signal.getsignal
        for number in signal.valid_signals():
            handler = signal.getsignal(number)
            if callable(handler):
                self._handlers[number] = handler
                signal.signal(number, self._arrive)
        why = "a handler waits for the end of a step, whose state is nobody's meanwhile"
        self._patches.replace(signal, "signal", self._install, why)
        self._patches.replace(signal, "getsignal", self._installed, why)

    def unwatch_signals(self) -> None:
        """Gives the signals back to the handlers of the script."""
        if not self._patches:
            return
        self._patches.restore()
        if threading.current_thread() is threading.main_thread():
            install, installed = self._originals
            for number, handler in self._handlers.items():
                if installed(number) == self._arrive:
                    install(number, handler)
            self._handlers.clear()

    def _install(self, signalnum: int, handler: Any) -> Any:
        before = self._installed(signalnum)
        ours = callable(handler) and bool(self._patches)  # or somebody who has wrapped us calls this after the end
        if ours and threading.current_thread() is threading.main_thread():
            self._handlers[signalnum] = handler  # first: from the next line on it may be asked for
        self._originals[0](signalnum, self._arrive if ours else handler)  # raises what is wrong with its arguments
        if not ours:
            self._handlers.pop(signalnum, None)
        return before

    def _installed(self, signalnum: int) -> Any:
        found = self._originals[1](signalnum)
        return self._handlers.get(signalnum, found) if found == self._arrive else found

    def _arrive(self, number: int, frame: FrameType | None) -> None:
        self._arrived[number] = frame  # once, however often it comes, as Python does
        if not self._depth:
            self._deliver()

    def _deliver(self) -> None:
        number = min(self._arrived, default=-1)
        frame = self._arrived.pop(number, _NONE)
        if frame is _NONE:
            return
        try:
            handler = self._handlers.get(number)
            if handler is not None:
                self.handling += 1
                try:
                    with noticed():
                        handler(number, frame)
                finally:
                    self.handling -= 1
        finally:
            self._deliver()


class _Outside:
    """See `CriticalSection.outside`.

    No generator: an exception that a handler raises at the very beginning of `__exit__` leaves the section's frames
    without it, which they expect. A generator's end would come when it is collected, and enter the section for good.
    """

    def __init__(self, section: CriticalSection):
        self._section = section

    def __enter__(self) -> None:
        section = self._section
        self._is_main = threading.get_ident() == section._main
        self._depth = section._depth
        self._held = section._lock._release_save() if section._lock._is_owned() else None
        if self._is_main:
            section._depth = 0
            try:
                section._deliver()
            except BaseException:
                self.__exit__()
                raise

    def __exit__(self, *_: object) -> None:
        if self._is_main:
            self._section._depth = self._depth
        if self._held is not None:
            self._section._lock._acquire_restore(self._held)


section = CriticalSection()
"""The one of this process."""
