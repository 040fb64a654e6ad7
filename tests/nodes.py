"""Two machines for tests: network namespaces of this one, each with an address, a host name and a link to the other."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
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

    def start(self, log: Path, *command: object, cwd: Path = ROOT, **environment: str) -> subprocess.Popen:
        """A command on this node, by default from the repository, as the head of a process group."""
        words = ["ip", "netns", "exec", self.name, "unshare", "--uts", "sh", "-c", ENTER, "sh", self.name]
        with log.open("w") as file:
            return subprocess.Popen(
                [*words, *map(str, command)],
                cwd=cwd,
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


def ranks_alone(nodes: tuple[Node, Node], rank: int, per_node: int) -> list[object]:
    """One rank a node, without a launcher: what one would set."""
    assert per_node == 1
    place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_ADDR": nodes[0].address, "MASTER_PORT": 29513}
    return ["env", *(f"{key}={value}" for key, value in place.items()), sys.executable]


def seeing(other: Path, at: Path) -> list[object]:
    """Before a node's command: it sees another folder at a path, as where no disk is shared."""
    return ["sh", "-c", 'mount --bind "$1" "$2" && shift 2 && exec "$@"', "sh", other, at]


SSHD = """\
Port 22
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
PidFile none
"""
SSH = """\
#!/bin/sh
exec {ssh} -F none -i {folder}/key -o IdentitiesOnly=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null \
    -o LogLevel=ERROR "$@"
"""
# What is started over ssh sees no other processes: DeepSpeed's launcher, at Ctrl-C, ends those it finds by their names.
SERVE = """\
mount -t tmpfs tmpfs /run && mkdir -p /run/sshd &&
exec unshare --pid --fork --mount-proc --kill-child {sshd} -D -e -f {config}
"""


@dataclass(frozen=True)
class Ssh:
    """Keys and configs for ssh between nodes, all in one folder: nothing of the user's is read or changed."""

    folder: Path

    @property
    def path(self) -> str:
        """For PATH: ssh as these nodes know it."""
        return f"{self.folder}:{os.environ['PATH']}"

    def serve(self, node: Node) -> subprocess.Popen:
        """An ssh server on a node. When it is killed all that was started over it ends, too."""
        words = SERVE.format(
            sshd=shutil.which("sshd", path="/usr/sbin:/usr/local/sbin"), config=self.folder / "sshd_config"
        )
        process = node.start(self.folder / f"sshd-{node.name}.txt", "sh", "-c", words)
        until = time.monotonic() + 20
        while subprocess.run(["ip", "netns", "exec", node.name, self.folder / "ssh", node.name, "true"]).returncode:
            assert process.poll() is None and time.monotonic() < until, "sshd does not answer"
            time.sleep(0.2)
        return process


def ssh_between(folder: Path) -> Ssh:
    """Skips the test, saying why, where programs lack."""
    missing = [name for name in ("ssh", "ssh-keygen", "pdsh") if not shutil.which(name)]
    missing += [] if shutil.which("sshd", path="/usr/sbin:/usr/local/sbin") else ["sshd"]
    if missing:
        pytest.skip(f"a start over ssh needs {', '.join(missing)} (Debian: openssh-server, openssh-client, pdsh)")
    for name in ("key", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    (folder / "sshd_config").write_text(SSHD.format(folder=folder))
    (folder / "ssh").write_text(SSH.format(ssh=shutil.which("ssh"), folder=folder))
    (folder / "ssh").chmod(0o755)
    return Ssh(folder)


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
