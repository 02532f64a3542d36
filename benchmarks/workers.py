"""Each contender in a process of its own, started once and then told when to run.

The parent starts ``program --worker`` and talks with it in lines of JSON. Contenders run in turns, never two at a time:
a slow minute of the machine hits all of them, and the ratio of two contenders within one round is a fair one. Building
the model is paid once.

Every worker, whoever the contender is, has the same number of threads and keeps freed memory (`keep_freed_memory`),
which is what meta_peft's own programs do and helps everybody alike.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import measure

ROOT = Path(__file__).resolve().parent.parent
FLAG = "--worker"
Tensors = dict[str, Any]
Load = Callable[[dict[str, Any]], Callable[[], Callable[[int | None], Tensors]]]
"""Reads a spec, loads the model and runs one plain forward; the result makes the contender, whose calls are timed.

To warm up, it is called with 1: one task is enough for those that go task by task."""


class WorkerFailed(Exception):  # noqa: N818  # it is an outcome to record, as often as not
    """What went wrong in a worker: the exception's last line, or how the process ended."""

    def __init__(self, message: str, details: str = ""):
        super().__init__(message)
        self.details = details


# ---- in the worker's process


def serve(load: Load) -> None:
    """Answer the parent's lines until there are no more or one of them fails; then the process ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not end up among the replies

    def reply(**values: Any) -> None:
        replies.write(json.dumps(values) + "\n")
        replies.flush()

    served = _served(load, json.loads(sys.stdin.readline()))
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply(**served[request.pop("do")](**request))
        except Exception as error:
            reply(error=f"{type(error).__name__}: {error}", details=traceback.format_exc())
            break
    sys.stderr.flush()
    os._exit(0)  # taking torch and its libraries apart takes seconds


def _served(load: Load, spec: dict[str, Any]) -> dict[str, Callable[..., dict[str, Any]]]:
    found: dict[str, Any] = {"result": {}}

    def warm_up() -> dict[str, Any]:
        """Load, and run once. Memory is counted from the loaded model on: what a contender sets up counts as its own."""
        import torch

        from meta_peft.utils.allocator import keep_freed_memory

        torch.set_num_threads(spec["threads"])
        prepare = load(spec)
        measure.give_back()
        if spec["malloc"] == "keep":  # from here on: what loading left behind is not to be there to be used again
            keep_freed_memory()
        found["loaded"] = measure.resident()
        was_reset = measure.reset_peak()
        found["step"] = prepare()
        return {
            **run(first_tasks=1),
            "loaded_bytes": found["loaded"],
            "peak_was_reset": was_reset,
            "threads": torch.get_num_threads(),
        }

    def run(first_tasks: int | None = None) -> dict[str, Any]:
        found["result"] = {}
        gc.collect()
        wall, cpu = time.perf_counter(), time.process_time()
        result = found["step"](first_tasks)
        seconds = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        found["result"] = result
        return {**seconds, "peak_bytes": measure.peak() - found["loaded"]}

    def save(path: str) -> dict[str, Any]:
        from safetensors.torch import save_file

        save_file({name: value.detach().contiguous() for name, value in found["result"].items()}, path)
        return {}

    def give_back() -> dict[str, Any]:
        measure.give_back()
        return {}

    return {"warm_up": warm_up, "run": run, "save": save, "give_back": give_back}


# ---- in the parent's


class Worker:
    """A contender's process, seen from the parent."""

    def __init__(self, program: Path, spec: dict[str, Any]):
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed with the worker
        self._process = subprocess.Popen(
            [sys.executable, str(program), FLAG],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=_environment(spec["threads"]),
        )
        self._send(spec)

    def warm_up(self) -> dict[str, Any]:
        return self._ask("warm_up")

    def run(self) -> dict[str, Any]:
        return self._ask("run")

    def save(self, path: Path) -> None:
        self._ask("save", path=str(path))

    def give_back(self) -> None:
        self._ask("give_back")

    def resident(self) -> int:
        return measure.resident(self._process.pid)

    def close(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def _ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        self._send({"do": do, **arguments})
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._errors.seek(0)
            raise WorkerFailed(f"The process ended with code {code}.", self._errors.read()[-2000:])
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerFailed(answer["error"], answer["details"])
        return answer

    def _send(self, values: dict[str, Any]) -> None:
        try:
            self._process.stdin.write(json.dumps(values) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the process is gone: reading its answer finds that out, and how


def _environment(threads: int) -> dict[str, str]:
    """This checkout's package, no hub, and the number of threads before torch is imported."""
    own = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    own |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    return {**os.environ, **own}


@contextmanager
def started(program: Path, specs: dict[str, dict[str, Any]]) -> Iterator[dict[str, Worker]]:
    workers = {name: Worker(program, spec) for name, spec in specs.items()}
    try:
        yield workers
    finally:
        for worker in workers.values():
            worker.close()


def take_turns(
    program: Path,
    specs: dict[str, dict[str, Any]],
    rounds: int,
    results: Path | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, dict[str, Any]]:
    """Warm all contenders up, then `rounds` times each of them in turn. Who fails is recorded and left out.

    Returns by contender: ``seconds`` and ``cpu_seconds`` of each round, ``peak_bytes`` over the loaded model, or
    ``error``. If `results` is a folder, the last result of each is written there, see `result_file`.
    """
    outcomes: dict[str, dict[str, Any]] = {name: {"seconds": [], "cpu_seconds": []} for name in specs}
    with started(program, specs) as workers:
        resident: dict[str, int] = {}
        for name, worker in workers.items():
            if measure.available() < measure.total() // 2:
                _all_give_back([workers[n] for n in resident])
            with _recorded(outcomes[name], name, say):
                outcomes[name] |= _warmed_up(worker)
                resident[name] = worker.resident()
                say(f"    warm-up {name}: {outcomes[name]['warm_up_seconds']:.3g} s")
        # Where kept memory would not fit, nobody keeps any: else those who come after a large one would run slower.
        largest = max((outcomes[n]["loaded_bytes"] + outcomes[n]["peak_bytes"] for n in resident), default=0)
        keeps = sum(resident.values()) + largest < 0.9 * measure.total()
        for number in range(1, rounds + 1):
            for name, worker in workers.items():
                if "error" in outcomes[name]:
                    continue
                with _recorded(outcomes[name], name, say):
                    if not keeps:
                        _all_give_back([w for n, w in workers.items() if "error" not in outcomes[n]])
                    answer = worker.run()
                    outcomes[name]["peak_bytes"] = answer["peak_bytes"]
                    outcomes[name]["seconds"].append(answer["seconds"])
                    outcomes[name]["cpu_seconds"].append(answer["cpu_seconds"])
                    say(f"    round {number} {name}: {answer['seconds']:.3g} s")
        for i, (name, worker) in enumerate(workers.items()):
            outcomes[name]["kept_freed_memory_between_runs"] = keeps
            if results is not None and "error" not in outcomes[name]:
                worker.save(result_file(results, i))
    return outcomes


def result_file(folder: Path, contender: int) -> Path:
    """Where the result of contender number `contender` is written."""
    return folder / f"{contender}.safetensors"


def _warmed_up(worker: Worker) -> dict[str, Any]:
    answer = worker.warm_up()
    kept = {name: answer[name] for name in ("loaded_bytes", "peak_was_reset", "threads", "peak_bytes")}
    return {**kept, "warm_up_seconds": answer["seconds"], "first_peak_bytes": answer["peak_bytes"]}


def _all_give_back(workers: list[Worker]) -> None:
    for worker in workers:
        worker.give_back()


@contextmanager
def _recorded(outcome: dict[str, Any], name: str, say: Callable[[str], None]) -> Iterator[None]:
    """A failure becomes a part of the outcome."""
    try:
        yield
    except WorkerFailed as failure:
        outcome |= {"error": str(failure), "details": failure.details}
        say(f"    {name} failed: {failure}")
