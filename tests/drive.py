"""Run many recipes one after the other in one process group: `torchrun --nproc-per-node N tests/drive.py CASES.json`.

CASES is a list of {module, config, out, overrides, expect}: `module` as recipes.gpt.megatron.pretrain, `expect` the exit code
(0). The first rank prints a line before and after each case. An exception in a rank ends it: the others wait in a collective,
and whoever started the ranks must end them.
"""

import json
import os
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, os.getcwd())  # the repository's root

from common.errors import EXIT_BAD_INPUT, BadInput  # noqa: E402
from common.launch import in_process, processes  # noqa: E402

BEGIN, END = "BEGIN ", "CASE "  # of the lines before and after each case


def main(path: str) -> None:
    processes.quiet()
    from tests import watch

    watch.install()
    unexpected = 0
    first = int(os.environ.get("RANK", "0")) == 0
    for case in json.loads(Path(path).read_text(encoding="utf-8")):
        begin = time.time()
        if first:
            print(f"{BEGIN}{case['out']}", flush=True)
        code, message = 0, ""
        try:
            in_process.run(case["module"], [case["config"], case["out"], *case.get("overrides", [])])
        except BadInput as error:
            code, message = EXIT_BAD_INPUT, str(error)
        except processes.Stopped as stop:
            code, message = stop.code, str(stop)
        except Exception:
            traceback.print_exc()
            os._exit(1)
        if first:
            print(f"{END}{case['out']} code {code} {time.time() - begin:.1f} s {message}", flush=True)
        unexpected += code != case.get("expect", 0)
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(min(unexpected, 1))


if __name__ == "__main__":
    main(sys.argv[1])
