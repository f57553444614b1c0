"""Run many recipes in one process group: `torchrun --nproc-per-node N tests/drive.py CASES.json`.

Imports of the stacks cost seconds a process, so a test that needs many layouts runs them one after the other here. CASES is
a list of {module, config, out, overrides, expect}: `module` as recipes.gpt.megatron.pretrain, `expect` the exit code (0).
"""

import importlib
import json
import os
import sys
import time
import traceback

sys.path.insert(0, os.getcwd())  # the repository's root

from common.errors import EXIT_BAD_INPUT, BadInput  # noqa: E402
from common.launch import (
    lock,  # noqa: E402
    processes,  # noqa: E402
)


def _forget_accelerator() -> None:
    """accelerate keeps one precision per process."""
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state()


def _groups() -> set:
    import torch.distributed as dist

    return set(dist.distributed_c10d._world.pg_map) if dist.is_initialized() else set()


def _leave_groups(before: set) -> None:
    """Megatron makes some twenty groups a layout, each with threads of its own: a hundred layouts would crawl."""
    if "megatron.core" in sys.modules and before:
        import torch.distributed as dist
        from megatron.core import parallel_state

        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
            for group in _groups() - before:
                dist.destroy_process_group(group)


def main(path: str) -> int:
    processes.quiet()
    from tests import watch

    watch.install()
    failures = 0
    for case in json.load(open(path, encoding="utf-8")):
        begin = time.time()
        _forget_accelerator()
        processes.start()
        before = _groups()
        code, told = 0, ""
        try:
            processes._signal = 0
            importlib.import_module(case["module"]).main([case["config"], case["out"], *case.get("overrides", [])])
        except BadInput as error:
            code, told = EXIT_BAD_INPUT, str(error)
        except processes.Stopped as stop:
            code, told = stop.code, str(stop)
        except Exception:
            traceback.print_exc()
            os._exit(1)  # the other ranks wait in a collective: end all
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"CASE {case['out']} code {code} {time.time() - begin:.1f} s {told}", flush=True)
        _leave_groups(before)
        lock.release()
        failures += code != case.get("expect", 0)
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(min(failures, 1))


if __name__ == "__main__":
    main(sys.argv[1])
