"""Checks every operator of PyTorch's `OpInfo` database, in worker processes, and writes docs/operators.md.

python tests/conformance/run.py --write docs/operators.md
python tests/conformance/run.py --only 'fft\\..*' --processes 1
"""

import argparse
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from json import dumps, loads
from pathlib import Path

from report import FAILURES, summary, write

_LIMIT_S = 240
_ENTRIES_PER_WORKER = 150  # compiled code and torch's caches add up
_REPORT_EVERY = 100


class Worker:
    """A process that checks one entry and dtype at a time."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.checked = 0

    def check(self, name: str, dtype: str) -> dict:
        """The verdict on one entry; one of its own where the process dies or takes too long over it."""
        assert self._process.stdin is not None and self._process.stdout is not None
        late = threading.Timer(_LIMIT_S, self._process.kill)
        late.start()
        try:
            self._process.stdin.write(dumps([name, dtype]) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        timed_out = not late.is_alive()
        late.cancel()
        self.checked += 1
        if answer:
            return loads(answer)
        code = self._process.wait()
        status = "too slow" if timed_out else "crash"
        note = f"not done in {_LIMIT_S} s" if timed_out else f"the process ended with {code}"
        return {"operator": name, "dtype": dtype, "status": status, "note": note}

    def is_alive(self) -> bool:
        """Whether it can be asked again."""
        return self._process.poll() is None

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()


def work() -> None:
    """Answers questions from the standard input until it ends."""
    import torch
    from conformance import Verdict, check

    answers, sys.stdout = sys.stdout, sys.stderr  # nothing that torch prints may get between the answers
    torch.set_num_threads(1)
    for line in sys.stdin:
        name, dtype = loads(line)
        try:
            verdict = check(name, getattr(torch, dtype))
        except Exception as error:
            verdict = Verdict(name, dtype, "crash", f"{type(error).__name__}: {error}".split("\n")[0])
        answers.write(dumps(asdict(verdict)) + "\n")
        answers.flush()


def tasks(only: str, dtypes: list[str]) -> Iterator[tuple[str, str]]:
    """Every entry and dtype to check."""
    from conformance import ENTRIES, dtypes_of

    for name, operator in ENTRIES.items():
        if re.fullmatch(only, name):
            for dtype in dtypes_of(operator):
                kind = str(dtype).removeprefix("torch.")
                if not dtypes or kind in dtypes:
                    yield name, kind


def check_all(pending: queue.Queue, verdicts: list[dict]) -> None:
    """Works through the queue, with a new worker where one has died."""
    worker = None
    while True:
        try:
            name, dtype = pending.get_nowait()
        except queue.Empty:
            break
        worker = worker or Worker()
        verdict = worker.check(name, dtype)
        verdicts.append(verdict)
        if not len(verdicts) % _REPORT_EVERY:
            sys.stderr.write(f"{len(verdicts)} done, {pending.qsize()} to go\n")
        if verdict["status"] in FAILURES:
            sys.stderr.write(f"{verdict['status']}: {name} {dtype}: {verdict['note']}\n")
        if not worker.is_alive() or worker.checked >= _ENTRIES_PER_WORKER:
            worker.close()
            worker = None
    if worker:
        worker.close()


def main() -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--processes", type=int, default=2, help="how many workers (default: 2)")
    parser.add_argument("--only", default=".*", help="a regular expression that an entry's name must match")
    parser.add_argument("--dtypes", nargs="*", default=[], help="the dtypes to check (default: all that are tested)")
    parser.add_argument("--write", type=Path, help="where to write the table")
    parser.add_argument("--json", type=Path, help="where to write the verdicts as JSON")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work()
        return 0
    start_s = time.monotonic()
    pending: queue.Queue = queue.Queue()
    for task in tasks(arguments.only, arguments.dtypes):
        pending.put(task)
    order = {task: index for index, task in enumerate(pending.queue)}
    verdicts: list[dict] = []
    threads = [threading.Thread(target=check_all, args=(pending, verdicts)) for _ in range(arguments.processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    verdicts.sort(key=lambda verdict: order[verdict["operator"], verdict["dtype"]])
    if arguments.json:
        arguments.json.write_text(dumps(verdicts, indent=1) + "\n", encoding="utf-8")
    if arguments.write:
        write(arguments.write, verdicts)
    sys.stdout.write(summary(verdicts) + f"\n{(time.monotonic() - start_s) / 60:.0f} minutes\n")
    return int(any(verdict["status"] in FAILURES for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
