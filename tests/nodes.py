"""Two machines for tests: network namespaces of this one, each with an address, a host name and a link to the other."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.processes import ENVIRONMENT, ROOT, Ended

ENTER = 'hostname "$1"; shift; exec "$@"'  # in a namespace of host names of its own


@dataclass(frozen=True)
class Node:
    name: str
    address: str
    link: str

    def start(self, log: Path, *command: object, **environment: str) -> subprocess.Popen:
        """A command on this node, from the repository, as the head of a process group."""
        words = ["ip", "netns", "exec", self.name, "unshare", "--uts", "sh", "-c", ENTER, "sh", self.name]
        with log.open("w") as file:
            return subprocess.Popen(
                [*words, *map(str, command)],
                cwd=ROOT,
                env={**os.environ, **ENVIRONMENT, **environment},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def cut(self) -> None:
        """Its link carries nothing any more, and nobody is told."""
        _ip("netns", "exec", self.name, "ip", "link", "set", self.link, "down")

    def mend(self) -> None:
        _ip("netns", "exec", self.name, "ip", "link", "set", self.link, "up")

    def kill_all(self) -> None:
        pids = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True).stdout
        for pid in map(int, pids.split()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _ip(*words: str) -> None:
    done = subprocess.run(words if words[0] == "ip" else ("ip", *words), capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(words)}: {done.stderr.strip()}")


@contextlib.contextmanager
def two_nodes() -> Iterator[tuple[Node, Node]]:
    """Skips the test, saying why, where namespaces cannot be made."""
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("two nodes need root and iproute2, for network namespaces")
    mark = f"{os.getpid() % 100000}"
    nodes = (Node(f"nodea{mark}", "10.77.0.1", f"va{mark}"), Node(f"nodeb{mark}", "10.77.0.2", f"vb{mark}"))
    folders = [Path("/etc/netns") / node.name for node in nodes]
    try:
        try:
            for node in nodes:
                _ip("netns", "add", node.name)
            _ip("link", "add", nodes[0].link, "type", "veth", "peer", "name", nodes[1].link)
        except OSError as error:
            pytest.skip(f"network namespaces cannot be made here: {error}")
        hosts = "127.0.0.1 localhost\n" + "".join(f"{node.address} {node.name}\n" for node in nodes)
        for node, folder in zip(nodes, folders, strict=True):
            folder.mkdir(parents=True)
            (folder / "hosts").write_text(hosts)  # what is /etc/hosts on that node
            _ip("link", "set", node.link, "netns", node.name)
            inside = ("netns", "exec", node.name, "ip")
            _ip(*inside, "addr", "add", f"{node.address}/24", "dev", node.link)
            _ip(*inside, "link", "set", node.link, "up")
            _ip(*inside, "link", "set", "lo", "up")
        yield nodes
    finally:
        for node, folder in zip(nodes, folders, strict=True):
            node.kill_all()
            subprocess.run(["ip", "netns", "del", node.name], capture_output=True)
            shutil.rmtree(folder, ignore_errors=True)
            Path("/tmp", f"{node.name}-hostfile").unlink(missing_ok=True)


def torchrun(nodes: tuple[Node, Node], rank: int, per_node: int) -> list[object]:
    """How a node of the two begins its ranks."""
    head = [sys.executable, "-m", "torch.distributed.run", "--nnodes", 2, "--node-rank", rank]
    return [*head, "--nproc-per-node", per_node, "--master-addr", nodes[0].address, "--master-port", 29511]


def deepspeed(nodes: tuple[Node, Node], rank: int, per_node: int) -> list[object]:
    """The same by DeepSpeed's launcher, which then needs no ssh."""
    hosts = Path("/tmp", f"{nodes[rank].name}-hostfile")
    hosts.write_text("".join(f"{node.name} slots={per_node}\n" for node in nodes))
    head = [Path(sys.executable).parent / "deepspeed", "--hostfile", hosts, "--no_ssh", "--node_rank", rank]
    return [*head, "--master_addr", nodes[0].address, "--master_port", 29512]


def ended(process: subprocess.Popen, log: Path, timeout: float) -> Ended:
    """The end of a node's command; where it outlives the timeout the test fails."""
    try:
        code: int | None = process.wait(timeout)
    except subprocess.TimeoutExpired:
        code = None
    output = log.read_text()
    assert code is not None, f"it did not end in {timeout} s:\n{output}"
    return Ended(code, output)
