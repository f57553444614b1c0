"""Which rank has stopped, hangs or was lost: what a launcher knows of its own ranks and of the other nodes. Torch-free.

Several nodes share OUT/logs/nodes/node_K.json: each launcher writes there how its ranks stand and how it ended. The files are
rewritten in place and opened anew for each reading, which a network file system answers with the current content.
"""

import contextlib
import json
import re
import signal
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from common.errors import EXIT_BAD_INPUT, EXIT_HANG, EXIT_LOST
from common.launch import heartbeat
from common.launch.heartbeat import Record

START = 540  # seconds at least that a rank has before its first step: imports and the reading of data show no progress
NEVER = 1e9  # seconds: longer than any limit
GRACE = 5  # seconds that the other ranks of a node have to end by themselves once one has failed
FIRST_FAILURES = "first_failures.json"  # in the scratch folder, by agent.py: [[local rank, process, exit code], ...]
STATES = {"stopped": "stopped by a signal", "tracing-stop": "stopped by a debugger", "zombie": "dead", "dead": "dead"}
# Frames near the top of a stack that waits for other ranks
_COLLECTIVE = re.compile(
    r"/torch/distributed/|/torch/autograd/graph\.py|/deepspeed/comm/|/deepspeed/runtime/zero/|/p2p_communication"
)


class Nodes(Protocol):
    nproc: int
    nnodes: int
    node_rank: int


class Failure(NamedTuple):
    code: int  # exit code
    lines: list[str]  # for the screen
    is_cause: bool = True  # not the consequence of what happened on another node


class Rank(NamedTuple):
    """How a rank stands, as its launcher sees it."""

    rank: int
    node: int
    host: str
    record: Record | None  # None: it has not begun
    state: str  # of its process, in psutil's words
    waits: bool  # for other ranks, by its phase or its stack

    @property
    def runs(self) -> bool:
        return not (self.record and self.record.phase == heartbeat.DONE)

    @property
    def position(self) -> tuple[int, int]:
        return (self.record.step, self.record.beats) if self.record else (-1, 0)


class Watch:
    """Of one launch. limit: seconds without progress of any rank on any node after which it hangs, 0: none."""

    def __init__(self, scratch: Path, on: Nodes, out: Path | None, limit: int):
        self.scratch, self.on, self.out, self.limit = scratch, on, out, limit
        self.ranks = range(on.node_rank * on.nproc, (on.node_rank + 1) * on.nproc)
        self.host = socket.gethostname()
        self.tick = min(5.0, max(0.2, limit / 8)) if limit else 5.0  # seconds between two looks
        self.idle = 0.0  # seconds since the last progress on this node
        self.seen: list[Record | None] = []
        self.looked = time.monotonic()
        self.stacks: dict[int, str] | None = None  # since the last progress
        self.peers = Peers(out / "logs/nodes", on, self.tick) if out and on.nnodes > 1 else None

    def look(self) -> Failure | None:
        """Once a tick: has the run stopped making progress, or ended on another node?"""
        now = time.monotonic()
        passed = min(now - self.looked, 2 * self.tick)  # not the time in which the launcher itself was stopped
        self.looked = now
        records = [heartbeat.read(self.scratch, rank) for rank in self.ranks]
        if records != self.seen or not any(records):
            self.idle, self.seen, self.stacks = 0.0, records, None
        else:
            self.idle += passed
        starts = any(record is None or not record.step for record in records)
        limit = max(self.limit, START) if starts else self.limit
        if (self.scratch / FIRST_FAILURES).exists():  # torchrun is about to end
            limit += 6 * GRACE
        done = all(record and record.phase == heartbeat.DONE for record in records)  # then only other nodes can hang
        if self.limit and self.idle >= 0.9 * limit and self.stacks is None:
            self.stacks = self._dump()
        if self.peers:
            self.peers.write(self.rows(), NEVER if done else self.idle)
            if self.idle >= 2 * self.tick:
                self.peers.read()
                failure = self.peers.failure()
                if failure:
                    return failure
        if self.limit and self.idle >= limit and not done and (not self.peers or self.peers.are_idle(limit)):
            return self._hang()
        return None

    def rows(self) -> list[Rank]:
        """How the ranks of this node stand."""
        made = []
        for rank in self.ranks:
            record = heartbeat.read(self.scratch, rank)
            stack = (self.stacks or {}).get(rank, "")
            waits = bool(record) and (record.waits or _waits(stack))
            made.append(Rank(rank, self.on.node_rank, self.host, record, _state(record), waits))
        return made

    def _dump(self) -> dict[int, str]:
        """The Python stacks of the ranks of this node, as text; none of one that is stopped."""
        before, records = {}, {}
        for rank in self.ranks:
            record = heartbeat.read(self.scratch, rank)
            if record and record.phase != heartbeat.DONE:
                before[rank], records[rank] = len(heartbeat.stacks(self.scratch, rank)), record
        import psutil

        for record in records.values():
            with contextlib.suppress(psutil.Error):
                psutil.Process(record.pid).send_signal(heartbeat.STACKS)
        time.sleep(min(1.0, self.tick))
        return {rank: heartbeat.stacks(self.scratch, rank)[size:] for rank, size in before.items()}

    def _hang(self) -> Failure:
        silent = self.peers.silent() if self.peers else []
        lines = [f"error: {self.peers.lost(node)}" for node in silent]
        lines += [] if silent else _first([f"error: {line}" for line in _culprits(self._all_rows())])
        lines += [
            f"no rank made progress for {self.idle:.0f} s (train.hang_seconds): all were ended, nothing was saved; "
            "the same command continues from the last checkpoint"
        ]
        return Failure(EXIT_HANG, lines)

    def _all_rows(self) -> list[Rank]:
        """Of the other nodes too, as far as they are known."""
        return sorted(self.rows() + (self.peers.rows() if self.peers else []))

    def failed(self, ended: int) -> Failure | None:
        """Why torchrun has ended by `ended` (as Popen tells it); None where that is on the screen already."""
        first, rows = self._first_failures(), {row.rank: row for row in self.rows()}
        crashes = {rank: found for rank in self.ranks if (found := heartbeat.crash(self.scratch, rank))}
        causes = _causes({rank: code for rank, (_, code) in first.items()}, crashes)
        if causes:
            [code, *_] = causes.values()
            trace = [crashes[rank].trace.rstrip() for rank in causes if rank in crashes]
            lines = []
            for rank, how in causes.items():
                where = f" at {rows[rank].record}" if rows[rank].record else ""
                lines.append(f"error: {_name(rows[rank], first.get(rank, (0,))[0])} {_how(how)}{where}")
            lines = trace + _first(lines)
            # NCCL's watchdog ends a rank by SIGABRT when another has gone
            failure = Failure(128 - code if code < 0 else code, lines, code != -signal.SIGABRT)
        elif crashes:
            message = next(iter(crashes.values())).message.splitlines()[0]
            line = f"error: ranks of node {self.on.node_rank} ({self.host}) lost the connection to another rank: {message}"
            failure = Failure(EXIT_LOST, [line], False)
        elif ended < 0:
            return Failure(128 - ended, [f"error: torchrun {_how(ended)}"])
        else:
            return None
        if self.peers and not failure.is_cause:
            self.peers.write(list(rows.values()), self.idle, failure)  # no other node shall wait for this one's cause
            failure = self.peers.cause() or failure
        return failure

    def _first_failures(self) -> dict[int, tuple[int, int]]:
        """{rank: (process, exit code)} of those that ended before torchrun ended the others."""
        try:
            found = json.loads((self.scratch / FIRST_FAILURES).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        return {self.ranks[local]: (pid, code) for local, pid, code in found}

    def close(self, failure: Failure | None, code: int) -> str | None:
        """At the end of the launch: the other nodes learn of a failure, and its details are written. Returns what to say of
        them. Called when the cause is on the screen: a file system that hangs may be that cause."""
        if self.peers:
            self.peers.write(self.rows(), self.idle, failure) if failure else self.peers.leave()
        more = self.on.nproc * self.on.nnodes > 1 or heartbeat.stacks(self.scratch, 0)
        if failure is None or code == EXIT_BAD_INPUT or self.out is None or not more:
            return None
        path = self.out / "logs" / f"failure_{time.strftime('%Y%m%d-%H%M%S')}_node{self.on.node_rank}.txt"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join([*failure.lines, "", *self._details()]) + "\n", encoding="utf-8")
        except OSError as error:
            return f"details could not be written to {path}: {error.strerror}"
        return f"details: {path}"

    def _details(self) -> list[str]:
        lines = ["rank  node  host  process  stands at"]
        for row in self._all_rows():
            pid, where = (row.record.pid, row.record) if row.record else ("-", "not begun")
            lines.append(f"{row.rank:>4}  {row.node:>4}  {row.host}  {pid}  {where}")
        for rank in self.ranks:
            crash, stacks = heartbeat.crash(self.scratch, rank), heartbeat.stacks(self.scratch, rank)
            lines += [f"\n---- rank {rank}: exception", crash.trace.rstrip()] if crash else []
            lines += [f"\n---- rank {rank}: stacks", stacks.rstrip()] if stacks else []
        return lines


class Peers:
    """The other nodes of a run."""

    def __init__(self, folder: Path, on: Nodes, tick: float):
        self.folder, self.on, self.tick = folder, on, tick
        self.count = 0
        self.known: dict[int, dict] = {}  # what node_K.json held when it could be read last
        self.changed: dict[int, float] = {}  # when that was new
        self.write([], 0.0)

    def write(self, rows: Sequence[Rank], idle: float, failure: Failure | None = None) -> None:
        """What the others shall know of this node. A disk that does not take it ends no run."""
        self.count += 1
        if failure:  # its traceback is on one screen
            failure = failure._replace(lines=[line for line in failure.lines if line.startswith("error: ")])
        values = {
            "count": self.count, "host": socket.gethostname(), "ranks": (self.on.node_rank * self.on.nproc, self.on.nproc),
            "idle": idle, "rows": rows, "failure": failure,
        }  # fmt: skip
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._path(self.on.node_rank).write_text(json.dumps(values), encoding="utf-8")

    def read(self) -> None:
        for node in set(range(self.on.nnodes)) - {self.on.node_rank}:
            try:
                found = json.loads(self._path(node).read_text(encoding="utf-8"))
            except FileNotFoundError:
                found = {}  # it has ended well
            except (OSError, ValueError):
                continue  # half written
            if found != self.known.get(node):
                self.known[node], self.changed[node] = found, time.monotonic()

    def are_idle(self, limit: float) -> bool:
        """Has no rank of the other nodes made progress for so long either? (After `read`.)"""
        silent = self.silent()
        return all(n in silent or not found or found["idle"] >= limit - 2 * self.tick for n, found in self.known.items())

    def silent(self) -> list[int]:
        """Nodes whose launcher gives no sign of life. (After `read`, more than once.)"""
        last = time.monotonic() - max(2.0, 4 * self.tick)
        return [n for n, found in self.known.items() if found and not found["failure"] and self.changed[n] < last]

    def rows(self) -> list[Rank]:
        return [_rank(row) for found in self.known.values() for row in found.get("rows", [])]

    def failure(self) -> Failure | None:
        """How another node has ended, if by a cause of its own."""
        found = [Failure(*f["failure"]) for _, f in sorted(self.known.items()) if f.get("failure")]
        return next((failure for failure in found if failure.is_cause), None)

    def cause(self) -> Failure | None:
        """The failure that made the ranks of this node lose a connection, once another node tells of it or is silent."""
        end = time.monotonic() + GRACE + max(4.0, 6 * self.tick)
        while time.monotonic() < end:
            self.read()
            silent = self.silent()
            if self.failure():
                return self.failure()
            if silent:
                return Failure(EXIT_LOST, [f"error: {self.lost(node)}" for node in silent])
            if all(found.get("failure") for found in self.known.values()):
                return None  # all have lost a connection
            time.sleep(min(0.5, self.tick))
        return None

    def lost(self, node: int) -> str:
        found = self.known[node]
        begin, count = found["ranks"]
        rows = [_rank(row) for row in found["rows"]]
        record = max((row.record for row in rows if row.record), default=None, key=lambda record: record.time)
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time.time() - (time.monotonic() - self.changed[node])))
        last = f"; last seen at {record}" if record else ""
        return f"node {node} ({found['host']}, {_ranks(range(begin, begin + count))}) gives no sign of life since {since}{last}"

    def leave(self) -> None:
        """The run has ended well here: leave no trace."""
        with contextlib.suppress(OSError):
            self._path(self.on.node_rank).unlink(missing_ok=True)
            self.folder.rmdir()
            self.folder.parent.rmdir()
            self.folder.parent.parent.rmdir()  # OUT, where the ranks have written nothing

    def _path(self, node: int) -> Path:
        return self.folder / f"node_{node}.json"


def _causes(first: dict[int, int], crashes: dict[int, heartbeat.Crash]) -> dict[int, int]:
    """{rank: exit code} of those of a node that made the run end, none if only consequences of another node's end are known.

    first: of the ranks that ended by themselves.
    """
    killed = {rank: code for rank, code in first.items() if code < 0 and code != -signal.SIGABRT}
    genuine = sorted((crash.time, rank) for rank, crash in crashes.items() if not crash.is_lost_connection)
    if killed or genuine:
        return killed or {genuine[0][1]: 1}
    return {rank: code for rank, code in first.items() if rank not in crashes}


def _rank(values: list) -> Rank:
    """Of JSON."""
    rank, node, host, record, *rest = values
    return Rank(rank, node, host, Record(*record) if record else None, *rest)


def _state(record: Record | None) -> str:
    import psutil

    try:
        return psutil.Process(record.pid).status() if record else "unknown"
    except psutil.Error:
        return "dead"


def _waits(stacks: str) -> bool:
    """Does the main thread of these stacks (faulthandler's, the main thread last) wait for other ranks?"""
    main = stacks.strip().split("\n\n")[-1].splitlines()
    return any(_COLLECTIVE.search(line) for line in main[1:5])


def _culprits(rows: Sequence[Rank]) -> list[str]:
    """A line for each group of ranks that keep the others waiting, as well as can be known."""
    running = [row for row in rows if row.runs]
    apart = [row for row in running if not row.waits]
    guesses = {
        "hangs": [row for row in running if row.state in STATES],
        "has not begun": [row for row in running if row.record is None],
        "hangs in the file system or a driver": [row for row in running if row.state == "disk-sleep"],
        "hangs while others wait for it": _behind(apart) if len(apart) < len(running) else [],
        "is behind the others": _behind(running),
    }
    certain = "hangs" if guesses["hangs"] else ""
    what = certain or next((what for what, found in guesses.items() if 0 < len(found) < len(running)), "stands")
    groups: dict[tuple, list[Rank]] = {}
    for row in guesses.get(what, running):
        groups.setdefault((row.node, row.state, row.position), []).append(row)
    return [_line(group, what) for group in groups.values()]


def _behind(rows: Sequence[Rank]) -> list[Rank]:
    least = min((row.position for row in rows), default=None)
    return [row for row in rows if row.position == least]


def _line(rows: Sequence[Rank], what: str) -> str:
    first = rows[0]
    name = _name(first, first.record.pid if first.record else 0)
    if len(rows) > 1:
        name = f"{_ranks([row.rank for row in rows])} of node {first.node} ({first.host}), each of which"
    why = f": {STATES[first.state]}," if first.state in STATES else ""
    return f"{name} {what}{why}{f' at {first.record}' if first.record else ''}"


def _name(row: Rank, pid: int) -> str:
    return f"rank {row.rank} of node {row.node} ({row.host}{f', process {pid}' if pid else ''})"


def _ranks(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    apart = list(ranks) != list(range(ranks[0], ranks[-1] + 1))
    return f"ranks {', '.join(map(str, ranks))}" if apart else f"ranks {ranks[0]} to {ranks[-1]}"


def _first(lines: list[str], most: int = 8) -> list[str]:
    return lines if len(lines) <= most else [*lines[:most], f"error: and {len(lines) - most} more, which the details list"]


def _how(code: int) -> str:
    """Of an exit code as Popen tells it."""
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name
    return f"was killed by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}"
