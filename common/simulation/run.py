"""One rank of a run on the null GPU: its recipe as it is, with what happens in it counted.

Call `run` in a process that LD_PRELOAD has given the null GPU (null_gpu.is_here), once. Several cases in one process, which
imports the stacks once: `run_all` forks for each.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from common import config, families
from common.errors import BadInput
from common.launch import lock, processes
from common.layout import layout_for
from common.planning import flops, memory
from common.preflight import task_module
from common.simulation import corpus, null_gpu, patches, trace
from common.yaml_files import read_yaml

if TYPE_CHECKING:
    from common.checkpoints import pieces


class Case(NamedTuple):
    """What is simulated."""

    config: str
    stack: str
    world: int = 1
    rank: int = 0
    steps: int = 3  # the last one is counted. At the first the optimizer has no state, at the second DDP orders its buckets
    overrides: Sequence[str] = ()
    fill: bool = False  # give every parameter its value; where it takes minutes it changes nothing that is counted
    save: bool = False  # go on to the end: evaluation of a finetuning run, checkpoint, export
    state: bool = False  # go on to the checkpoint, and count what this rank would write, instead of writing it
    out: str | None = None  # OUT of the run, kept, and resumed from; default: a temporary folder
    data: bool = False  # the config's own corpus instead of a synthetic one
    roofline: bool = True


class _Done(Exception):
    """All steps are made."""


def run(case: Case) -> dict[str, Any]:
    """Simulate a case. BadInput for a config or layout that cannot be; what else goes wrong is `fault` in the result."""
    with tempfile.TemporaryDirectory(prefix="simulate_") as folder:
        scratch = Path(folder)
        with _quiet_stdout(scratch / "log.txt"):
            return _Run(case, scratch).result()


@contextlib.contextmanager
def _quiet_stdout(log: Path) -> Iterator[None]:
    """What the run prints, C libraries included, goes to a file."""
    sys.stdout.flush()
    kept = os.dup(1)
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


class _Run:
    """What a simulation learns while its recipe runs."""

    def __init__(self, case: Case, scratch: Path):
        self.case, self.scratch = case, scratch
        self.out = Path(case.out) if case.out else scratch / "out"
        self.family = families.of_config(case.config)
        values = read_yaml(case.config)
        self.task: Any = task_module(self.family, values)
        self.kind = "finetune" if "task" in values else "pretrain"
        if case.stack not in families.stacks(self.family):
            raise BadInput(f"--stack {case.stack}: recipes/{self.family} has {', '.join(families.stacks(self.family))}")
        if not 0 <= case.rank < case.world:
            raise BadInput(f"--rank {case.rank}: must be from 0 to {case.world - 1}, since --world is {case.world}")
        if case.steps < 1:
            raise BadInput(f"--steps {case.steps}: must be 1 or more")
        self.begun = 0  # steps
        self.done = self._steps_done()
        self.overrides = self._overrides()
        self.cfg = self._resolved()
        self.phases = trace.Phases()
        self.state = trace.State()
        self.step_trace: trace.StepTrace | None = None
        self.seconds: dict[str, Any] | None = None
        self.written: dict[str, int] | None = None

    # ---- config

    def _steps_done(self) -> int:
        from common.checkpoints import checkpoint

        newest = checkpoint.latest(self.out) if self.out.is_dir() else None
        return newest.step if newest else 0

    def _overrides(self) -> list[str]:
        """Those of the case, a corpus if the run has none, and as many steps as are simulated."""
        case, given = self.case, list(self.case.overrides)
        cfg = config.load(case.config, given, self.task.Config)
        last = self.done + case.steps + self._is_timed
        given += [f"train.steps={last}", "train.save_every=0", "train.eval_every=0", "phases=[]", "log.wandb=null"]
        if self.kind == "pretrain" and not case.data and not any(word.startswith("data.train=") for word in given):
            vocabulary = cfg.model.vocab_size or corpus.SMALLEST
            given += ["data.valid=null", "data.tokenizer=null", f"model.vocab_size={vocabulary}"]
            given.append(f"data.train={self._corpus(given, vocabulary, cfg.data.sample_tokens)}")
        return given

    def _corpus(self, overrides: Sequence[str], vocabulary: int, sample_tokens: int) -> Path:
        """A corpus that the family can read: without bounds of sentences, else with them."""
        for sentences in (False, True):
            prefix = corpus.write(self.scratch / f"corpus_{sentences}", vocabulary, sample_tokens, sentences)
            try:
                cfg = config.load(self.case.config, [*overrides, f"data.train={prefix}"], self.task.Config)
                self.task.dataset(cfg, cfg.data.train, True, self.case.stack)
            except BadInput:
                if sentences:
                    raise
            else:
                break
        return prefix

    @property
    def _is_timed(self) -> bool:
        """Is there one step more, for the roofline? Watching every operator in Python changes what the allocator sees."""
        return self.case.roofline and not (self.case.save or self.case.state)

    def _resolved(self) -> Any:
        """The config with every key, to estimate from; None where only the run itself can tell the vocabulary."""
        cfg = config.load(self.case.config, self.overrides, self.task.Config)
        try:
            cfg = config.resolve(cfg, self.task.ResolvedConfig, None)
        except BadInput:
            return None
        layout_for(cfg, self.case.stack, self.case.world)
        return cfg

    # ---- the run

    def result(self) -> dict[str, Any]:
        case = self.case
        patches.before_imports(case.rank, case.world)
        processes.quiet()
        begin = time.perf_counter()
        fault = lines = None
        try:
            patches.install(case.rank, case.world)
            recipe = importlib.import_module(f"recipes.{self.family}.{case.stack}.{self.kind}")
            patches.after_imports(case.stack, case.world)
            self._watch(recipe)
            try:
                recipe.main([case.config, str(self.out), *self.overrides])
            finally:
                lock.release()
        except _Done:
            pass
        except BadInput:
            raise
        except processes.Stopped as error:
            fault = lines = f"stopped with exit code {error.code}: {error}"
        except Exception as error:
            fault, lines = f"{type(error).__name__}: {error}".splitlines()[0][:500], traceback.format_exc()
        null_gpu.record(False)
        return self._found(fault) | {"traceback": lines, "seconds": time.perf_counter() - begin}

    def _watch(self, recipe: Any) -> None:
        """Let the recipe say where it is: by its Log, and by the functions of common/ that every recipe calls."""
        run, log = self, recipe.Log

        class Watch(log):  # type: ignore[misc, valid-type]
            def __init__(self, *args: Any):
                if run.case.rank:  # so that the run can be resumed; in a launch rank 0 does this
                    from common.checkpoints import run_record

                    run_record.begin(args[0])
                super().__init__(*args)

            def begin_step(self) -> None:
                run._begin_step()
                super().begin_step()

            def step(self, *args: Any, **kwargs: Any) -> None:
                run._end_step()
                super().step(*args, **kwargs)

        recipe.Log = Watch
        if self.kind == "finetune":  # a text is written until the device says that it is at its end
            self.task.after_export = lambda *_: None
        self._watch_functions()

    def _watch_functions(self) -> None:
        from common.checkpoints import checkpoint, parameters, pieces, state
        from common.training import lora

        for module in (parameters, lora):
            _after(module, "expected", lambda: self.phases.end("model"))
        loads: list[tuple[Any, str]] = [(state, "load")]
        if self.case.stack == "deepspeed":
            from common.stacks import zero

            loads = [(zero, "load_state")]
        if self.case.stack == "megatron":
            from common.stacks import mcore

            loads = [(mcore, "load_state")]
        for module, name in loads:
            setattr(module, name, self._load(getattr(module, name)))
        reduce_step = processes.reduce_step

        def reduced(*args: Any, **kwargs: Any) -> Any:
            self._backward_is_over()
            return reduce_step(*args, **kwargs)

        processes.reduce_step = reduced
        if self.case.stack == "deepspeed":
            self._watch_pipeline()
        save = checkpoint.save

        def saved(out: Path, batches: pieces.Batches, *args: Any, **kwargs: Any) -> Any:
            if self.case.state:
                self.written = _counted(batches)
                raise _Done
            self.phases.begin()
            path = save(out, batches, *args, **kwargs)
            self.phases.end("save")
            return path

        checkpoint.save = saved

    def _watch_pipeline(self) -> None:
        """DeepSpeed's pipeline updates the parameters in the call that computes the gradients: it begins with the tied ones."""
        from deepspeed.runtime.pipe import engine, schedule

        instructions: Any = engine.PipelineEngine._INSTRUCTION_MAP
        reduce_tied = instructions[schedule.ReduceTiedGrads]

        def reduced_tied(pipeline: Any) -> None:
            self._backward_is_over()
            reduce_tied(pipeline)

        instructions[schedule.ReduceTiedGrads] = reduced_tied

    def _backward_is_over(self) -> None:
        """All gradients are there: the first time in a step counts."""
        if self.step_trace and not self.step_trace.events_of_backward:
            self.step_trace.backward_is_over(self.state)

    def _load(self, load: Callable[..., None]) -> Callable[..., None]:
        def loaded(model: Any, optimizer_or_shapes: Any, *rest: Any) -> None:
            self.phases.end("optimizer")
            self.state.keep(model, optimizer_or_shapes)
            # values from the seed take minutes to draw, and change nothing but values
            if self.case.fill or self.done or self.cfg is None or self.cfg.init.from_ != "scratch":
                load(model, optimizer_or_shapes, *rest)
            self.phases.end("load state")

        return loaded

    def _begin_step(self) -> None:
        self.begun += 1
        if self.begun == self.case.steps:
            self.step_trace = trace.StepTrace()
        self.phases.begin()
        if self.begun > self.case.steps:
            from common.simulation import roofline

            self._roofline = roofline.Roofline()
            self._roofline.__enter__()
        elif self.step_trace:
            self.step_trace.begin(self.state)

    def _end_step(self) -> None:
        if self.begun > self.case.steps:
            self._roofline.__exit__(None, None, None)
            self.seconds = self._roofline.found()
            raise _Done
        if self.step_trace:
            self.step_trace.end(self.state)
        self.phases.end("first step" if self.begun == 1 and self.case.steps > 1 else "step")
        if self.begun == self.case.steps and not (self.case.save or self.case.state or self._is_timed):
            raise _Done

    # ---- what was found

    def _found(self, fault: str | None) -> dict[str, Any]:
        case = self.case
        found: dict[str, Any] = {
            "config": case.config, "stack": case.stack, "world": case.world, "rank": case.rank,
            "overrides": list(case.overrides), "step": self.done + case.steps, "fault": fault,
            **self.phases.found(), "estimate_bytes": self._estimate(),
            **(self.step_trace.found() if self.step_trace else trace.NOTHING),
            "gloo_groups": len(patches.gloo_groups), "object_collectives": dict(patches.object_collectives),
            "state": self.written, "roofline": None,
        }  # fmt: skip
        if self.seconds and self.cfg is not None:
            found["roofline"] = self.seconds | self._mfu(self.seconds["seconds"])
        return found

    def _estimate(self) -> int | None:
        if self.cfg is None:
            return None
        try:
            return memory.estimate_for(self.cfg, self.cfg.model, self.case.stack, self.case.world)["total"]
        except BadInput:  # a layout whose memory is not estimated
            return None

    def _mfu(self, seconds: float) -> dict[str, float | None]:
        """Of the whole run, if every rank takes as long as this one."""
        per_token = self.task.forward_backward_flops(self.cfg.model, self.cfg.data)
        tokens = self.cfg.train.global_batch * self.cfg.data.sample_tokens
        shares = {
            kind: flops.mfu(per_token.get(kind, 0.0), tokens / seconds, "H100", self.case.world) for kind in ("full", "causal")
        }
        rate = tokens / seconds / self.case.world
        return {"mfu_full": shares["full"], "mfu_causal": shares["causal"] or None, "tokens_per_s_per_gpu": rate}


def _counted(batches: "pieces.Batches") -> dict[str, int]:
    """What this rank writes of a checkpoint, beside the header of its file, and its part of the index."""
    from common.checkpoints import pieces

    own = [piece for batch in batches for piece in pieces.own(batch.pieces)]
    entries = [[0, 2**31, "0" * 16, list(piece.offset), list(piece.tensor.shape)] for piece in own]
    return {
        "bytes_written": sum(4 * piece.tensor.numel() for piece in own),
        "pieces": len(own),
        "index_bytes": sum(len(json.dumps(entry, separators=(",", ":"))) + 1 for entry in entries),
    }


def _after(module: Any, name: str, then: Callable[[], None]) -> None:
    function = getattr(module, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        then()
        return result

    setattr(module, name, wrapped)


# ---- many cases ------------------------------------------------------------------------------------------------------


def run_all(cases: Sequence[Case]) -> Iterator[dict[str, Any]]:
    """The results of all cases, in their order. This process imports torch and the recipes; each case runs in a fork of it."""
    prepare(cases)
    for case in cases:
        yield forked(case)


def prepare(cases: Sequence[Case]) -> None:
    """Import what these cases need, so that `forked` can run them, and others of the same recipes."""
    patches.before_imports(0, 1)
    processes.quiet()
    import torch

    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    for case in cases:
        with contextlib.suppress(BadInput):  # the fork reports it
            kind = "finetune" if "task" in read_yaml(case.config) else "pretrain"
            importlib.import_module(f"recipes.{families.of_config(case.config)}.{case.stack}.{kind}")
    torch.cuda.init()  # with this device a fork can go on as it is
    torch.cuda._is_in_bad_fork = lambda: False
    gc.collect()


def forked(case: Case) -> dict[str, Any]:
    """The result of a case, in a fork of this process, which `prepare` has prepared."""
    with tempfile.TemporaryDirectory(prefix="simulate_") as folder:
        path = Path(folder) / "result.json"
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if not child:
            ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG: do not outlive a parent that is killed
            try:
                found = run(case)
            except BadInput as error:
                found = {"fault": "; ".join(error.problems), "bad_input": True}
            except BaseException as error:
                found = {"fault": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
            path.write_text(json.dumps(found), encoding="utf-8")
            sys.stderr.flush()
            os._exit(0)  # a normal exit would wait for threads that the fork has not
        _, status = os.waitpid(child, 0)
        if not path.exists():
            return {"fault": f"the process ended with status {os.waitstatus_to_exitcode(status)}"}
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return result
