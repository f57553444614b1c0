"""torchrun, for common/launch/launcher.py: it leaves signals to the launcher and records which ranks failed first.

torchrun by itself sends its ranks SIGTERM, kills them 30 s later, and prints a page of its own below the error that matters.
The arguments are torchrun's.
"""

import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

from common.errors import EXIT_BAD_INPUT, EXIT_LOST, BadInput
from common.launch import elastic, heartbeat
from common.launch.launcher import SIGNALS
from common.launch.watch import FIRST_FAILURES, GRACE


def main(argv: list[str]) -> int:
    """The exit code: 0, that of the first rank that failed (128 + signal if one killed it), or 1 if no rank could start."""
    for number in SIGNALS:
        # A scheduler may signal every process of a job. This is a handler because the ranks would inherit SIG_IGN.
        signal.signal(number, lambda *_: None)
    os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGUSR2"  # torchrun's own handlers would replace those above
    os.environ["TWINSTACK_AGENT"] = str(os.getpid())  # the ranks end with their parent
    if "LOGLEVEL" not in os.environ:  # LOGLEVEL=INFO shows what torchrun does
        logging.disable(logging.ERROR)

    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import main as torchrun

    scratch = Path(os.environ[heartbeat.SCRATCH])
    _record_first_failures(scratch)
    settings = elastic.settings_of(os.environ)
    if settings:
        elastic.install(settings, scratch)
    try:
        torchrun(argv)
    except ChildFailedError as error:
        # torchrun ends the other ranks with SIGTERM: those are not the cause
        failed = {r: f for r, f in error.failures.items() if f.exitcode != -signal.SIGTERM} or error.failures
        code = min(failed.values(), key=lambda f: f.timestamp).exitcode
        return code if code > 0 else 128 - code
    except BadInput as error:
        print("\n".join(f"error: {line}" for line in error.problems), file=sys.stderr)
        return EXIT_BAD_INPUT
    except elastic.SpareNode:
        print("note: the run has ended; this node was not needed", file=sys.stderr)
    except (DistError, RendezvousError) as error:
        if settings and elastic.has_begun(scratch):
            return EXIT_LOST  # the launcher finds out why
        reason = " ".join(str(error.__cause__ or error).split())
        names = "NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT"
        print(f"error: the nodes did not find each other (check {names}): {reason}", file=sys.stderr)
        return 1
    return 0


def _record_first_failures(scratch: Path) -> None:
    """Patch torchrun: before it ends the other ranks of a failed one, it records which ranks failed by themselves. It then
    waits GRACE seconds for them, not 30: a rank that waits for a lost one does not react to SIGTERM. Ranks that save for
    a node that joins have longer (elastic.py)."""
    from torch.distributed.elastic.multiprocessing.api import SubprocessContext

    close = SubprocessContext._close

    def recording(self: Any, death_sig: signal.Signals, timeout: int = GRACE) -> None:
        path = scratch / FIRST_FAILURES
        if self._failures and not path.exists():
            path.write_text(json.dumps([[rank, f.pid, f.exitcode] for rank, f in sorted(self._failures.items())]))
        close(self, death_sig, timeout if timeout > 30 else GRACE)

    SubprocessContext._close = recording  # type: ignore[method-assign]  # torchrun has no hook there


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
