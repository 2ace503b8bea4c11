"""Functions run in several gloo processes at once, for the tests of what is spread over processes; and programs.

They fork from one server that has imported what they need: a start takes a tenth of a second, not the seconds that
torch takes to import.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

TIMEOUT_SECONDS = 120
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["preloaded"])


def on_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ``function(rank, world_size, *arguments)`` returns in each of ``world_size`` processes that make up one
    process group. Raises AssertionError with the traceback of the first that failed."""
    start_server()
    with tempfile.TemporaryDirectory() as folder:
        processes, ends = [], []
        for rank in range(world_size):
            ours, theirs = CONTEXT.Pipe(duplex=False)
            place = (rank, world_size, folder, str(Path.cwd()), dict(os.environ))
            process = CONTEXT.Process(target=_run, args=(theirs, place, function, arguments), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            ends.append(ours)
        with ThreadPoolExecutor(world_size) as pool:
            answers = list(pool.map(_answer, ends))
        for process in processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
    failures = [text for text, _ in answers if text]
    # A process that waits for one that has failed fails too, and says nothing of why.
    causes = [text for text in failures if "Connection closed" not in text]
    assert not failures, (causes or failures)[0]
    return [result for _, result in answers]


def start_server() -> None:
    """Start the server, if there is none, with the modules of this process in its reach."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()


def start_program(printed: Path, module: str, *arguments: str) -> BaseProcess:
    """``python -m module arguments`` in the current folder, but for the start of an interpreter: what it prints goes to
    the file ``printed``."""
    start_server()
    place = (str(Path.cwd()), dict(os.environ), str(printed))
    process = CONTEXT.Process(target=_become, args=(place, module, arguments), daemon=True)
    process.start()
    return process


def _become(place: tuple[str, dict[str, str], str], module: str, arguments: tuple[str, ...]) -> None:
    folder, environment, printed = place
    output = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.argv = [module, *arguments]
    import_module(module).main()


def _answer(end: Connection) -> tuple[str, Any]:
    if not end.poll(TIMEOUT_SECONDS):
        return f"no answer in {TIMEOUT_SECONDS} s", None
    try:
        answer: tuple[str, Any] = end.recv()
    except EOFError:
        return "a process ended without an answer", None
    return answer


def _run(end: Connection, place: tuple[Any, ...], function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    rank, world_size, folder, current, environment = place
    os.chdir(current)
    os.environ.clear()
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    try:
        torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=world_size)
        end.send(("", function(rank, world_size, *arguments)))
    except BaseException:
        end.send((traceback.format_exc(), None))
    finally:
        end.close()
        torch.distributed.destroy_process_group()
