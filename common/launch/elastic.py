"""Elastic runs, NNODES=min:max: what torchrun's elastic agent (common/launch/agent.py) does beside starting ranks again.

torchrun's c10d rendezvous forms a new group of ranks when a rank or a node is lost, or a node joins. The ranks of every round
are new processes that continue from the last checkpoint, whose state any number of data-parallel ranks can read. The store of
the rendezvous is on the node with NODE_RANK=0: the other nodes may be lost, this one not.
"""

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common.checkpoints import checkpoint
from common.errors import EXIT_SIGINT, EXIT_SIGTERM, BadInput
from common.launch import heartbeat
from common.launch.watch import ENDED_FOR_HANG, FIRST_FAILURES, GROUP, causes, how_it_ended

VARIABLE = "TWINSTACK_ELASTIC"  # of the agent's environment: Settings as JSON
STOP = "stop"  # in the scratch folder: this node's launcher was asked to stop the run
SAVE = 10**6  # seconds that ranks have to save before a node joins; the launcher detects hangs


class Settings(NamedTuple):
    """What an agent has to know of the run."""

    out: str
    node_rank: int  # NODE_RANK: torchrun renumbers the nodes in each round
    worlds: list[int]  # numbers of ranks among which the global batch divides
    asked: str  # NNODES as it was given


class Group(NamedTuple):
    """The ranks of one round."""

    nodes: int
    world: int

    def __str__(self) -> str:
        return f"{self.world} rank{'s' * (self.world > 1)} on {self.nodes} node{'s' * (self.nodes > 1)}"


class SpareNode(Exception):
    """The run ended while this node waited, because there were as many nodes as it can use."""


def variables(settings: Settings) -> dict[str, str]:
    return {VARIABLE: json.dumps(settings)}


def settings_of(environ: Mapping[str, str]) -> Settings | None:
    """None: the run is not elastic."""
    return Settings(*json.loads(environ[VARIABLE])) if VARIABLE in environ else None


def listed(worlds: Sequence[int]) -> str:
    """'1, 2 or 4 ranks'"""
    *first, last = map(str, worlds)
    return f"{', '.join(first)} or {last} ranks" if first else f"{last} rank{'s' * (last != '1')}"


def install(settings: Settings, scratch: Path) -> None:
    """Patch torchrun's agent, which has no hooks for what follows."""
    from torch.distributed.elastic.agent.server.api import WorkerState
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.rendezvous.api import RendezvousGracefulExitError

    _number_ranks_by_node(settings.node_rank)
    agent: Any = LocalElasticAgent
    form_group, monitor = agent._rendezvous, agent._monitor_workers
    rounds: list[Group] = []

    def rendezvous(self: Any, workers: Any) -> None:
        """Form the group of the next round, and say what has changed."""
        handler = workers.spec.rdzv_handler
        # a store of its own for each round: torchrun keeps the address of the first one, whose node may be lost, and its keys
        handler._bootstrap_store_info = handler._shared_tcp_store_server = None
        if rounds:
            _tell_failures(scratch)
        _clear(scratch)
        try:
            form_group(self, workers)
        except RendezvousGracefulExitError:
            raise SpareNode from None
        ranks = [worker.global_rank for worker in workers.workers]
        group = Group(workers.group_world_size, workers.workers[0].world_size)
        if group.world not in settings.worlds:
            raise BadInput(_too_few(group, settings))
        _write(scratch / GROUP, [ranks[0], ranks[-1] + 1])
        if rounds and settings.node_rank == 0:
            print(f"note: {_change(rounds[-1], group, Path(settings.out))}", file=sys.stderr, flush=True)
        rounds.append(group)

    def monitor_workers(self: Any, workers: Any) -> Any:
        """As torchrun's, which would start the ranks again whatever their reason to end was."""
        result = monitor(self, workers)
        if result.state in (WorkerState.FAILED, WorkerState.UNHEALTHY):
            code = _reported(scratch)
            is_asked = (scratch / STOP).exists()
            if code in (EXIT_SIGTERM, EXIT_SIGINT) and not is_asked and _a_node_waits(workers.spec.rdzv_handler):
                self._remaining_restarts += 1  # these ranks have saved because a node joins: not a failure
            elif code or is_asked:
                self._remaining_restarts = 0  # bad input, a loss that is not finite, or a stop: on purpose
        return result

    def stop_workers(self: Any, workers: Any) -> None:
        """End the ranks. They save first if nothing is wrong and a node joins."""
        taking_part = workers.spec.rdzv_handler._state_holder.state.participants
        joins = workers.state == WorkerState.HEALTHY and len(taking_part) == workers.group_world_size
        self._shutdown(timeout=SAVE if joins else 30)

    agent._rendezvous, agent._monitor_workers, agent._stop_workers = rendezvous, monitor_workers, stop_workers


def _number_ranks_by_node(node_rank: int) -> None:
    """Give the nodes of a round their ranks in the order of NODE_RANK, so that rank 0, which prints the steps, is on node 0.

    torchrun sorts them by name and process id, and numbers the rendezvous of a process from 0 (`_NodeDesc` in
    torch/distributed/elastic/rendezvous/dynamic_rendezvous.py); an agent has one rendezvous.
    """
    from torch.distributed.elastic.rendezvous import dynamic_rendezvous

    module: Any = dynamic_rendezvous
    module.DynamicRendezvousHandler._node_desc_generator._local_id = node_rank
    module._NodeDesc.__lt__ = lambda self, other: (self.local_id, self.addr, self.pid) < (other.local_id, other.addr, other.pid)


def has_begun(scratch: Path) -> bool:
    """Whether this node has had ranks."""
    return (scratch / GROUP).exists()


def _a_node_waits(handler: Any) -> bool:
    """Whether a node wants to join; torchrun keeps an answer for a second. Without node 0, whose agent has ended, none does."""
    from torch.distributed.elastic.rendezvous import RendezvousConnectionError

    with contextlib.suppress(RendezvousConnectionError):
        for _ in range(15):
            if handler.num_nodes_waiting():
                return True
            time.sleep(0.1)
    return False


def _too_few(group: Group, settings: Settings) -> str:
    return (
        f"NNODES={settings.asked}: train.global_batch does not divide among {group}; it does among "
        f"{listed(settings.worlds)}; start the same command on as many nodes, it continues from the last checkpoint"
    )


def _change(before: Group, now: Group, out: Path) -> str:
    """'1 node lost: 4 ranks on 2 nodes before, 2 ranks on 1 node now; continues from step 40'"""
    difference = abs(now.nodes - before.nodes)
    nodes = f"{difference} node{'s' * (difference > 1)}"
    what = f"{nodes} lost" if now.nodes < before.nodes else f"{nodes} joined" if difference else "the ranks start again"
    newest = checkpoint.latest(out) if out.is_dir() else None
    where = f"continues from step {newest.step}" if newest else "begins again, as there is no checkpoint yet"
    return f"{what}: {before} before, {now} now; {where}"


def _tell_failures(scratch: Path) -> None:
    """Print which ranks of this node ended the last round, one line each."""
    if _reported(scratch) or (scratch / ENDED_FOR_HANG).exists() or not (scratch / FIRST_FAILURES).exists():
        return
    first, _ = json.loads((scratch / GROUP).read_text(encoding="utf-8"))
    failures = json.loads((scratch / FIRST_FAILURES).read_text(encoding="utf-8"))
    codes = {first + local: code for local, _, code in failures}
    crashes = {rank: crash for rank in codes if (crash := heartbeat.crash(scratch, rank))}
    for rank, code in causes(codes, crashes).items():
        why = f": {crashes[rank].message.splitlines()[0]}" if rank in crashes else ""
        print(f"error: rank {rank} ({socket.gethostname()}) {how_it_ended(code)}{why}", file=sys.stderr, flush=True)


def _reported(scratch: Path) -> int:
    """The exit code that a rank of this node has reported in this round, 0 if none has."""
    try:
        return int((scratch / "exit_code").read_text(encoding="utf-8").partition("\n")[0] or 0)
    except FileNotFoundError:
        return 0


def _clear(scratch: Path) -> None:
    """Remove what the ranks of the last round have left, so that the launcher waits for those of the next one."""
    for path in [*scratch.glob("rank_*"), scratch / "exit_code", scratch / FIRST_FAILURES, scratch / ENDED_FOR_HANG]:
        path.unlink(missing_ok=True)


def _write(path: Path, value: Any) -> None:
    part = path.with_suffix(".tmp")
    part.write_text(json.dumps(value), encoding="utf-8")
    os.replace(part, path)
