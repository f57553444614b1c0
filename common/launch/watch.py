"""Which rank has stopped, hangs or was lost: what a launcher knows of its own ranks and of the other nodes. Torch-free.

Several nodes share OUT/logs/nodes/node_K.json, where each launcher writes the state of its ranks and how it ended. The files
are rewritten in place and opened for each reading, so that a network file system returns the current content.
"""

import contextlib
import json
import re
import signal
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from common.errors import EXIT_BAD_INPUT, EXIT_HANG, EXIT_LOST, printable, shortened
from common.launch import heartbeat
from common.launch.heartbeat import Record

START = 540  # seconds that a rank has at least before its first step: imports and the reading of data show no progress
NEVER = 1e9  # seconds: longer than any limit
GRACE = 5  # seconds in which the other ranks of a node may end by themselves once one has failed
# In the scratch folder
FIRST_FAILURES = "first_failures.json"  # by agent.py: [[local rank, process, exit code], ...]
GROUP = "group.json"  # of an elastic run, by elastic.py: this node's first rank and the one after its last, of this round
ENDED_FOR_HANG = "ended_for_hang"  # of an elastic run, by the launcher: it has ended the ranks of this round
STATES = {"stopped": "stopped by a signal", "tracing-stop": "stopped by a debugger", "zombie": "dead", "dead": "dead"}
# Frames near the top of the stack of a rank that waits for others
_COLLECTIVE = re.compile(
    r"/torch/distributed/|/torch/autograd/graph\.py|/deepspeed/comm/|/deepspeed/runtime/zero/|/p2p_communication"
)


class Nodes(Protocol):
    """The part of `Nodes` in common/launch/launcher.py that is used here. That module imports this one."""

    @property
    def nproc(self) -> int: ...

    @property
    def nnodes(self) -> int: ...

    @property
    def node_rank(self) -> int: ...

    @property
    def is_elastic(self) -> bool: ...


class Failure(NamedTuple):
    """How a run failed."""

    code: int  # exit code
    lines: list[str]  # for the screen
    is_cause: bool = True  # False: a consequence of what happened on another node
    in_short: str = ""  # the line that matters, where it is not the first of `lines` that begins with error:

    def last_words(self, is_shown: bool) -> str:
        """How the run failed, in one line. is_shown: `lines` stand just above it: the cause again only where a traceback is
        among them."""
        if is_shown and not self.in_short:
            return f"failed with exit code {self.code}"
        first = next((line.removeprefix("error: ") for line in self.lines if line.startswith("error: ")), "")
        return f"failed with exit code {self.code}: {self.in_short or first or ' '.join(self.lines)}"


class RankState(NamedTuple):
    """The state of a rank, as its launcher sees it."""

    rank: int
    node: int
    host: str
    record: Record | None  # None: it has not begun
    process: str  # psutil's status of its process
    waits: bool  # for other ranks, by its phase or its stack

    @property
    def runs(self) -> bool:
        return not (self.record and self.record.phase == heartbeat.DONE)

    @property
    def position(self) -> tuple[int, int]:
        return (self.record.step, self.record.beats) if self.record else (-1, 0)


class Watch:
    """Watches the ranks of this node during one launch. limit: seconds without progress of any rank on any node after which the
    run hangs; 0: never."""

    def __init__(self, scratch: Path, nodes: Nodes, out: Path | None, limit: int):
        self.scratch, self.nodes, self.out, self.limit = scratch, nodes, out, limit
        self.ranks = range(nodes.node_rank * nodes.nproc, (nodes.node_rank + 1) * nodes.nproc)
        self.round = 0  # of an elastic run: when this round's group was written
        self.host = socket.gethostname()
        self.tick = min(5.0, max(0.2, limit / 8)) if limit else 5.0  # seconds between two checks
        self.idle = 0.0  # seconds since the last progress on this node
        self.records: list[Record | None] = []  # at the last progress
        self.last_check = time.monotonic()
        self.stacks: dict[int, str] | None = None  # since the last progress
        self.peers = Peers(out / "logs/nodes", nodes, self.tick) if out and nodes.nnodes > 1 else None
        self.hung: Failure | None = None  # of an elastic run: why this round was ended, until the next one begins

    def check(self) -> Failure | None:
        """The failure if the run has stopped making progress or has failed on another node, else None. Called once per tick."""
        if self.nodes.is_elastic:
            self._follow()
        now = time.monotonic()
        passed = min(now - self.last_check, 2 * self.tick)  # without the time in which the launcher itself was stopped
        self.last_check = now
        records = [heartbeat.read(self.scratch, rank) for rank in self.ranks]
        if records != self.records or not any(records):
            self.idle, self.records, self.stacks = 0.0, records, None
        else:
            self.idle += passed
        starts = any(record is None or not record.step for record in records)
        limit = max(self.limit, START) if starts else self.limit
        if (self.scratch / FIRST_FAILURES).exists():  # torchrun is about to end
            limit += 6 * GRACE
        done = all(record and record.phase == heartbeat.DONE for record in records)  # then only other nodes can hang
        if self.limit and self.idle >= 0.9 * limit and self.stacks is None:
            self.stacks = self._dump_stacks()
        if self.peers:
            self.peers.write(self.states(), NEVER if done else self.idle)
            if self.idle >= 2 * self.tick:
                self.peers.read()
                failure = self.peers.failure()
                if failure:
                    return failure
        if self.limit and self.idle >= limit and not done and (not self.peers or self.peers.are_idle(limit)):
            return self._hang()
        return None

    def _follow(self) -> None:
        """Take over this node's ranks from the group of an elastic run, which changes. A node that is lost is forgotten."""
        try:
            begin, end = json.loads((self.scratch / GROUP).read_text(encoding="utf-8"))
            written = (self.scratch / GROUP).stat().st_mtime_ns
        except FileNotFoundError:
            return
        if written != self.round:
            self.round, self.ranks, self.idle, self.hung = written, range(begin, end), 0.0, None
            if self.peers:
                self.peers.forget()

    def end_round(self, failure: Failure) -> None:
        """The launcher ends the ranks of this round of an elastic run, which this failure explains."""
        self.hung, self.idle = failure, 0.0
        (self.scratch / ENDED_FOR_HANG).touch()

    def states(self) -> list[RankState]:
        """The states of the ranks of this node."""
        states = []
        for rank in self.ranks:
            record = heartbeat.read(self.scratch, rank)
            stack = (self.stacks or {}).get(rank, "")
            waits = record is not None and (record.waits or _waits(stack))
            states.append(RankState(rank, self.nodes.node_rank, self.host, record, _process_status(record), waits))
        return states

    def _dump_stacks(self) -> dict[int, str]:
        """The Python stacks of the ranks of this node, as text; empty for a rank that is stopped."""
        before, records = {}, {}
        for rank in self.ranks:
            record = heartbeat.read(self.scratch, rank)
            if record and record.phase != heartbeat.DONE:
                before[rank], records[rank] = len(heartbeat.stacks(self.scratch, rank)), record
        import psutil

        for record in records.values():
            with contextlib.suppress(psutil.Error):
                psutil.Process(record.pid).send_signal(heartbeat.DUMP_STACKS)
        time.sleep(min(1.0, self.tick))
        return {rank: heartbeat.stacks(self.scratch, rank)[size:] for rank, size in before.items()}

    def _hang(self) -> Failure:
        lines = [f"error: {self.peers.describe(node)}" for node in self.peers.silent()] if self.peers else []
        lines = lines or _first_lines([f"error: {line}" for line in _culprits(self._all_states())])
        what = "the run continues from the last checkpoint" if self.nodes.is_elastic else "all were ended without a save"
        lines += [f"no rank made progress for {self.idle:.0f} s (train.hang_seconds): {what}"]
        return Failure(EXIT_HANG, lines)

    def _all_states(self) -> list[RankState]:
        """The states of all ranks; those of other nodes as last reported."""
        return sorted(self.states() + (self.peers.states() if self.peers else []))

    def failure(self, returncode: int) -> Failure | None:
        """Why torchrun has ended with `returncode` (of Popen); None if the reason is on the screen already."""
        if self.nodes.is_elastic:
            self._follow()
        no_new_round = self.nodes.is_elastic and returncode == EXIT_LOST
        if self.hung and not no_new_round:
            return self.hung
        first, states = self._first_failures(), {state.rank: state for state in self.states()}
        crashes = {rank: crash for rank in self.ranks if (crash := heartbeat.crash(self.scratch, rank))}
        ended = causes({rank: code for rank, (_, code) in first.items()}, crashes)
        if ended and not self.hung:  # else the launcher has ended them
            [code, *_] = ended.values()
            trace = [crashes[rank].trace.rstrip() for rank in ended if rank in crashes]
            lines = []
            for rank, exit_code in ended.items():
                where = f" at {states[rank].record}" if states[rank].record else ""
                lines.append(f"error: {_name(states[rank], first.get(rank, (0,))[0])} {how_it_ended(exit_code)}{where}")
            lines = trace + _first_lines(lines)
            # NCCL's watchdog ends a rank with SIGABRT when another rank is lost
            [rank, *_] = ended
            in_short = f"rank {rank}: {shortened(printable(crashes[rank].message))}" if rank in crashes else ""
            failure = Failure(128 - code if code < 0 else code, lines, code != -signal.SIGABRT, in_short)
        elif crashes:
            message = next(iter(crashes.values())).message.splitlines()[0]
            line = f"error: ranks of node {self.nodes.node_rank} ({self.host}) lost the connection to another rank: {message}"
            failure = Failure(EXIT_LOST, [line], False)
        elif no_new_round:
            lost = "error: the run was ended on another node, or node 0, which the others need to find each other, is lost"
            failure = Failure(EXIT_LOST, [lost], False)
        elif returncode < 0:
            return Failure(128 - returncode, [f"error: torchrun {how_it_ended(returncode)}"])
        else:
            return None
        if self.peers and not failure.is_cause:
            self.peers.write(list(states.values()), self.idle, failure)  # so that no other node waits for this one's cause
            failure = self.peers.wait_for_cause() or failure
        return failure

    def _first_failures(self) -> dict[int, tuple[int, int]]:
        """{rank: (process, exit code)} of the ranks that ended before torchrun ended the others."""
        try:
            failures = json.loads((self.scratch / FIRST_FAILURES).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        return {self.ranks[local]: (pid, code) for local, pid, code in failures}

    def close(self, failure: Failure | None, code: int) -> str | None:
        """At the end of the launch: report a failure to the other nodes and write its details to a file. Returns a line that
        names the file. Called once the cause is on the screen, since a file system that hangs may be the cause."""
        if self.peers and failure:
            self.peers.write(self.states(), self.idle, failure)
        elif self.peers:
            self.peers.leave()
        has_details = self.nodes.nproc * self.nodes.nnodes > 1 or heartbeat.stacks(self.scratch, 0)
        if failure is None or code == EXIT_BAD_INPUT or self.out is None or not has_details:
            return None
        path = self.out / "logs" / f"failure_{time.strftime('%Y%m%d-%H%M%S')}_node{self.nodes.node_rank}.txt"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join([*failure.lines, "", *self._details()]) + "\n", encoding="utf-8")
        except OSError as error:
            return f"details could not be written to {path}: {error.strerror}"
        return f"details: {path}"

    def _details(self) -> list[str]:
        lines = ["rank  node  host  process  position"]
        for state in self._all_states():
            pid, position = (str(state.record.pid), str(state.record)) if state.record else ("-", "not begun")
            lines.append(f"{state.rank:>4}  {state.node:>4}  {state.host}  {pid}  {position}")
        for rank in self.ranks:
            crash, stacks = heartbeat.crash(self.scratch, rank), heartbeat.stacks(self.scratch, rank)
            lines += [f"\n---- rank {rank}: exception", crash.trace.rstrip()] if crash else []
            lines += [f"\n---- rank {rank}: stacks", stacks.rstrip()] if stacks else []
        return lines


class Peers:
    """The other nodes of a run."""

    def __init__(self, folder: Path, nodes: Nodes, tick: float):
        self.folder, self.nodes, self.tick = folder, nodes, tick
        self.count = 0
        self.reports: dict[int, dict[str, Any]] = {}  # {node: the last content of node_K.json that could be read}
        self.changed: dict[int, float] = {}  # {node: when its report changed last}
        self.forgotten: dict[int, dict[str, Any]] = {}  # {node: a report that does not count}
        if nodes.is_elastic:
            self.forget()
        self.write([], 0.0)

    def write(self, states: Sequence[RankState], idle: float, failure: Failure | None = None) -> None:
        """Write this node's report for the others. A disk that fails does not end the run."""
        self.count += 1
        if failure:  # without its traceback, which is on the screen here
            failure = failure._replace(lines=[line for line in failure.lines if line.startswith("error: ")])
        nodes, ranks = self.nodes, [state.rank for state in states]
        first = nodes.node_rank * nodes.nproc
        report = {
            "count": self.count, "host": socket.gethostname(), "ranks": (ranks[0] if ranks else first, nodes.nproc),
            "idle": idle, "states": states, "failure": failure,
        }  # fmt: skip
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._path(nodes.node_rank).write_text(json.dumps(report), encoding="utf-8")

    def forget(self) -> None:
        """Until another node's report changes, it is one of an earlier launch, or of a node that is lost."""
        self.read()
        self.forgotten |= {node: report for node, report in self.reports.items() if report}
        self.reports = dict.fromkeys(self.reports, {})

    def read(self) -> None:
        """Read the reports of the other nodes."""
        for node in set(range(self.nodes.nnodes)) - {self.nodes.node_rank}:
            try:
                report = json.loads(self._path(node).read_text(encoding="utf-8"))
            except FileNotFoundError:
                report = {}  # the run has ended well there
            except (OSError, ValueError):
                continue  # half written
            if report == self.forgotten.get(node):
                report = {}
            if report != self.reports.get(node):
                self.reports[node], self.changed[node] = report, time.monotonic()

    def are_idle(self, limit: float) -> bool:
        """Have the ranks of the other nodes made no progress for `limit` seconds either? Call `read` before."""
        silent = self.silent()
        return all(n in silent or not report or report["idle"] >= limit - 2 * self.tick for n, report in self.reports.items())

    def silent(self) -> list[int]:
        """Nodes whose launcher no longer reports. Call `read` before, more than once."""
        last = time.monotonic() - max(2.0, 4 * self.tick)
        return [n for n, report in self.reports.items() if report and not report["failure"] and self.changed[n] < last]

    def states(self) -> list[RankState]:
        """The states of the ranks of the other nodes."""
        return [_rank_state(values) for report in self.reports.values() for values in report.get("states", [])]

    def failure(self) -> Failure | None:
        """The failure of another node, if the cause is on that node."""
        failures = [Failure(*report["failure"]) for _, report in sorted(self.reports.items()) if report.get("failure")]
        return next((failure for failure in failures if failure.is_cause), None)

    def wait_for_cause(self) -> Failure | None:
        """The failure because of which the ranks of this node lost a connection, once another node reports it or is silent."""
        end = time.monotonic() + GRACE + max(4.0, 6 * self.tick)
        while time.monotonic() < end:
            self.read()
            silent = self.silent()
            if self.failure():
                return self.failure()
            if silent:
                return Failure(EXIT_LOST, [f"error: {self.describe(node)}" for node in silent])
            if all(report.get("failure") for report in self.reports.values()):
                return None  # all nodes have lost a connection
            time.sleep(min(0.5, self.tick))
        return None

    def describe(self, node: int) -> str:
        """One line about a silent node."""
        report = self.reports[node]
        begin, count = report["ranks"]
        states = [_rank_state(values) for values in report["states"]]
        record = max((state.record for state in states if state.record), default=None, key=lambda record: record.time)
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time.time() - (time.monotonic() - self.changed[node])))
        last = f"; last seen at {record}" if record else ""
        return f"node {node} ({report['host']}, {_ranks(range(begin, begin + count))}) has not reported since {since}{last}"

    def leave(self) -> None:
        """The run has ended well on this node: remove its report."""
        with contextlib.suppress(OSError):
            self._path(self.nodes.node_rank).unlink(missing_ok=True)
            self.folder.rmdir()
            self.folder.parent.rmdir()
            self.folder.parent.parent.rmdir()  # OUT, where the ranks have written nothing

    def _path(self, node: int) -> Path:
        return self.folder / f"node_{node}.json"


def causes(first: dict[int, int], crashes: dict[int, heartbeat.Crash]) -> dict[int, int]:
    """{rank: exit code} of the ranks of this node that ended the run; empty if all failures here are consequences of another
    node's. first: {rank: exit code} of the ranks that ended by themselves."""
    killed = {rank: code for rank, code in first.items() if code < 0 and code != -signal.SIGABRT}
    genuine = sorted((crash.time, rank) for rank, crash in crashes.items() if not crash.is_lost_connection)
    if killed or genuine:
        return killed or {genuine[0][1]: 1}
    return {rank: code for rank, code in first.items() if rank not in crashes}


def _rank_state(values: list[Any]) -> RankState:
    """A RankState from JSON."""
    rank, node, host, record, *rest = values
    return RankState(rank, node, host, Record(*record) if record else None, *rest)


def _process_status(record: Record | None) -> str:
    import psutil

    try:
        return str(psutil.Process(record.pid).status()) if record else "unknown"
    except psutil.Error:
        return "dead"


def _waits(stacks: str) -> bool:
    """Does the main thread of these stacks (faulthandler's, the main thread last) wait for other ranks?"""
    main = stacks.strip().split("\n\n")[-1].splitlines()
    return any(_COLLECTIVE.search(line) for line in main[1:5])


def _culprits(states: Sequence[RankState]) -> list[str]:
    """One line for each group of ranks that, as far as is known, keep the others waiting."""
    running = [state for state in states if state.runs]
    not_waiting = [state for state in running if not state.waits]
    guesses = {
        "hangs": [state for state in running if state.process in STATES],
        "has not begun": [state for state in running if state.record is None],
        "hangs in the file system or a driver": [state for state in running if state.process == "disk-sleep"],
        "hangs while others wait for it": _behind(not_waiting) if len(not_waiting) < len(running) else [],
        "is behind the others": _behind(running),
    }
    certain = "hangs" if guesses["hangs"] else ""
    what = certain or next((what for what, some in guesses.items() if 0 < len(some) < len(running)), "stands")
    groups: dict[tuple[int, str, tuple[int, int]], list[RankState]] = {}
    for state in guesses.get(what, running):
        groups.setdefault((state.node, state.process, state.position), []).append(state)
    return [_line(group, what) for group in groups.values()]


def _behind(states: Sequence[RankState]) -> list[RankState]:
    least = min((state.position for state in states), default=None)
    return [state for state in states if state.position == least]


def _line(states: Sequence[RankState], what: str) -> str:
    first = states[0]
    name = _name(first, first.record.pid if first.record else 0)
    if len(states) > 1:
        name = f"{_ranks([state.rank for state in states])} of node {first.node} ({first.host}), each of which"
    why = f": {STATES[first.process]}," if first.process in STATES else ""
    return f"{name} {what}{why}{f' at {first.record}' if first.record else ''}"


def _name(state: RankState, pid: int) -> str:
    return f"rank {state.rank} of node {state.node} ({state.host}{f', process {pid}' if pid else ''})"


def _ranks(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    apart = list(ranks) != list(range(ranks[0], ranks[-1] + 1))
    return f"ranks {', '.join(map(str, ranks))}" if apart else f"ranks {ranks[0]} to {ranks[-1]}"


def _first_lines(lines: list[str], most: int = 8) -> list[str]:
    return lines if len(lines) <= most else [*lines[:most], f"error: and {len(lines) - most} more, which the details list"]


def how_it_ended(code: int) -> str:
    """How a process ended, in words. code: Popen's return code."""
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name
    return f"was killed by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}"
