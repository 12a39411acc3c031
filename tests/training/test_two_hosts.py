"""Two hosts: network namespaces that share nothing but a cable, each with a torchrun of its own."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import six_steps
from running import ROOT, assert_same, exit_codes, forked_python, load_checkpoint, train_command, train_environment

from nvfp4_train.callbacks.preemption import EXIT_CODE
from nvfp4_train.checkpoints import saved_step


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[str]]:
    """Names of two namespaces; the device eth0 of each is one end of a cable, with address 10.77.0.1 or 10.77.0.2."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("network namespaces need Linux and root")
    assert shutil.which("ip"), "the tool `ip` is missing (package iproute2)"
    names = [f"nvfp4-{os.getpid()}-{number}" for number in (1, 2)]
    try:
        ip("netns", "add", names[0])
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not permitted here: {error.stderr.strip()}")
    try:
        ip("netns", "add", names[1])
        ip("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1])
        for number, name in enumerate(names, start=1):
            ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def launch_on(hosts: list[str], run_dir: Path, *overrides: str) -> list[subprocess.CompletedProcess[str]]:
    """One torchrun with one rank on every host; the first host keeps the rendezvous."""
    launchers = []
    for number, host in enumerate(hosts, start=1):
        torchrun = (
            "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-endpoint=10.77.0.1:29400", "--rdzv-id=two-hosts",
            # Both namespaces have the host name of this machine, by which a launcher would know itself.
            f"--rdzv-conf=is_host={number == 1}", f"--local-addr=10.77.0.{number}",
        )  # fmt: skip
        on_host = ("ip", "netns", "exec", host)
        python, server = forked_python(within=on_host)
        command = [*on_host, *train_command(run_dir, *overrides, "logger=none", torchrun=torchrun, python=python)]
        environment = train_environment() | server | {"GLOO_SOCKET_IFNAME": "eth0"}
        launchers.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
        )
    try:
        outputs = [launcher.communicate(timeout=300) for launcher in launchers]
    finally:
        for launcher in launchers:
            launcher.kill()
    return [
        subprocess.CompletedProcess(launcher.args, launcher.returncode, *output)
        for launcher, output in zip(launchers, outputs, strict=True)
    ]


def received_bytes(host: str) -> int:
    command = ["ip", "netns", "exec", host, "cat", "/sys/class/net/eth0/statistics/rx_bytes"]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_two_hosts_train_what_two_ranks_of_one_host_train(
    hosts: list[str], whole_run: Callable[[int], Path], tmp_path: Path
) -> None:
    before = [received_bytes(host) for host in hosts]
    run_dir = tmp_path / "hosts"
    for launcher in launch_on(hosts, run_dir, *six_steps.STEPS, "trainer=ddp", *six_steps.dump(run_dir)):
        assert launcher.returncode == 0, launcher.stderr[-3000:]
    first, second = (load_checkpoint(run_dir / "dump" / f"rank{rank}.pt") for rank in (0, 1))
    assert_same(first, second)
    gradients = 4 * sum(master.numel() for master in first["masters"].values())
    for host, count in zip(hosts, before, strict=True):
        assert received_bytes(host) - count > 6 * gradients, "the gradients of six steps came over the cable"
    six_steps.assert_same_end(whole_run(2), run_dir)


@pytest.mark.parametrize("trainer", ["ddp", "hsdp"])
def test_a_signal_on_one_host_saves_and_ends_both(trainer: str, hosts: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    stop = {"_target_": "stop_at_step.StopAtStep", "number": int(signal.SIGTERM), "batch_idx": 1, "rank": 1}
    options = (
        "+recipe=quickstart",
        "trainer.max_steps=4",
        "quant.start_step=2",
        f"trainer={trainer}",
        "trainer.accelerator=cpu",
        *(f"+callbacks.stop.{name}={value}" for name, value in stop.items()),
    )
    for launcher in launch_on(hosts, run_dir, *options):
        assert exit_codes(launcher.stderr) == {EXIT_CODE}, launcher.stderr[-3000:]
    (checkpoint,) = run_dir.glob("checkpoints/preempted-*.ckpt")
    assert saved_step(checkpoint) == 3
