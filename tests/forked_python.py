"""Stands for `python` where it would take too long to start: runs its arguments in a fork of fork_server.py.

It has the fork's output, passes signals on to it, and ends as it ends.
"""

import contextlib
import json
import os
import signal
import socket
import sys

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT)
# By the fork, until it has a handler of its own.
ignored = [number for number in SIGNALS if signal.getsignal(number) == signal.SIG_IGN]

with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
    connection.connect(os.environ["FORK_SERVER"])
    request = {"arguments": sys.argv[1:], "environment": dict(os.environ), "folder": os.getcwd(), "ignored": ignored}
    socket.send_fds(connection, [json.dumps(request).encode()], [0, 1, 2])
    pid = int(connection.recv(64))

    def pass_on(number: int, frame: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    for number in SIGNALS:
        signal.signal(number, pass_on)
    code = int(connection.recv(64))
if code < 0:
    if -code != signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
