"""A Python that has imported what the launchers import; every forked_python.py runs in a fork of it.

    python fork_server.py SOCKET

To import takes longer than a small run. The server ends, and its forks with it, when its standard input is closed.
"""

import contextlib
import gc
import importlib
import json
import os
import pkgutil
import runpy
import select
import signal
import socket
import sys
from typing import Any

import torch

from nvfp4_train import callbacks

IMPORTS = (
    "lightning.pytorch.strategies",
    "nvfp4_train.run.build",
    *(f"nvfp4_train.callbacks.{module.name}" for module in pkgutil.iter_modules(callbacks.__path__)),
    "torch.distributed.elastic.rendezvous.c10d_rendezvous_backend",
    "torch.distributed.launcher.api",
    "transformers.models.llama.modeling_llama",
)


def serve(path: str) -> dict[str, Any]:
    """Wait for requests. Returns in the fork that is to run one."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen()
        print("ready", flush=True)
        while True:
            ready, _, _ = select.select([listener, sys.stdin], [], [])
            if sys.stdin in ready:
                sys.exit()
            connection, _ = listener.accept()
            with connection:
                if os.fork() == 0:
                    return fork_for(connection)
            # Forks that have ended.
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass


def fork_for(connection: socket.socket) -> dict[str, Any]:
    """Fork once more. The parent tells the client the fork's process id and, at its end, its exit code; it ends with the client."""
    message, descriptors, _, _ = socket.recv_fds(connection, 2**20, 3)
    pid = os.fork()
    if pid:
        # The client may have been killed by now.
        with contextlib.suppress(BrokenPipeError):
            connection.send(str(pid).encode())
        ended = os.pidfd_open(pid)
        ready, _, _ = select.select([connection, sys.stdin, ended], [], [])
        if ended not in ready:
            os.kill(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if connection not in ready:
            connection.send(str(code).encode())
        os._exit(0)
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    return json.loads(message)


def run(arguments: list[str], environment: dict[str, str], folder: str, ignored: list[int]) -> None:
    """What `python ARGUMENT ...` does: of a script, or of `-m` and a module, behind `-u` or not."""
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", torch.get_num_threads())))
    if arguments[0] == "-u":
        sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
        arguments = arguments[1:]
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        sys.path[0] = folder
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path[0] = os.path.dirname(os.path.abspath(arguments[0]))
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    for name in IMPORTS:
        importlib.import_module(name)
    # Forks need not look for garbage in what they share.
    gc.freeze()
    run(**serve(sys.argv[1]))
