"""torchrun, told to leave signals to the launcher and to name failed ranks in one line each. For common/launch.py.

torchrun by itself sends its ranks SIGTERM and kills them 30 s later, and ends every failure with a page of its own
below the error that matters. The arguments are torchrun's.
"""

import logging
import os
import signal
import sys

from common.launch import SIGNALS


def main(argv: list[str]) -> int:
    """Exit code: 0, that of the first rank that failed (128 + signal if one killed it), or 1 if no rank could start."""
    for number in SIGNALS:
        # A scheduler may signal every process of a job. A handler, not SIG_IGN: the ranks would inherit that.
        signal.signal(number, lambda *_: None)
    os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGUSR2"  # torchrun's own handlers would replace those above
    os.environ["TWINSTACK_AGENT"] = str(os.getpid())  # the ranks end with their parent
    if "LOGLEVEL" not in os.environ:  # LOGLEVEL=INFO shows what torchrun does
        logging.disable(logging.ERROR)

    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import main as torchrun

    try:
        torchrun(argv)
    except ChildFailedError as error:
        # torchrun ends the other ranks by SIGTERM: they are not the cause
        failed = {r: f for r, f in error.failures.items() if f.exitcode != -signal.SIGTERM} or error.failures
        if not _told(os.environ.get("TWINSTACK_EXIT_CODE")):
            for rank, failure in sorted(failed.items()):
                print(f"error: rank {rank} (process {failure.pid}) {_how(failure.exitcode)}", file=sys.stderr)
        code = min(failed.values(), key=lambda f: f.timestamp).exitcode
        return code if code > 0 else 128 - code
    except (DistError, RendezvousError) as error:
        told = " ".join(str(error.__cause__ or error).split())
        names = "NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT"
        print(f"error: the nodes did not find each other (check {names}): {told}", file=sys.stderr)
        return 1
    return 0


def _told(path: str | None) -> bool:
    """Have the ranks said themselves why they end?"""
    return bool(path) and os.path.exists(path)


def _how(exitcode: int) -> str:
    if exitcode >= 0:
        return f"ended with exit code {exitcode}"
    name = signal.Signals(-exitcode).name
    hint = " (out of memory?)" if name == "SIGKILL" else ""
    return f"was killed by {name}{hint}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
