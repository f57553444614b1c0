"""torch.compile and torch.jit.script on the null GPU: a compiled region is traced and split into forward and backward as for
Inductor, but what Triton would fuse is one kernel here, which reads its inputs and writes its outputs.

Matrix products, attention and collectives inside a region run as they are. Between two of them, all pointwise operators and
reductions count as one kernel. What the forward pass saves is decided by torch's own partitioner, as for Inductor. A result
that a function writes over one of its inputs takes no other memory (torch/_inductor/ir.py, MutationLayout.realize_into).
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from common.simulation import null_gpu

EXTERN = ("mm", "addmm", "bmm", "baddbmm", "convolution", "_local_scalar_dense")  # kernels of libraries, and effects
VIEWS = (
    "view", "_unsafe_view", "reshape", "t", "transpose", "permute", "expand", "unsqueeze", "squeeze", "slice", "select",
    "as_strided", "alias", "detach", "split", "split_with_sizes", "unbind", "getitem",
)  # fmt: skip
watchers: list[Callable[[str, float], None]] = []  # called with the name and the bytes of every kernel: the roofline


def install() -> None:
    """Replace torch.compile, and torch.jit.script of functions. Before the stacks are imported: they decorate with it."""
    module: Any = torch
    module.compile = functools.partial(_compile, torch.compile)
    jit: Any = torch.jit
    jit.script = functools.partial(_script, torch.jit.script)


def _script(script: Callable[..., Any], function: Any, *args: Any, **kwargs: Any) -> Any:
    return torch.compile(function) if inspect.isfunction(function) else script(function, *args, **kwargs)


def _compile(real: Callable[..., Any], model: Any = None, **options: Any) -> Any:
    """As torch.compile, which is `real`."""
    if model is None:  # a decorator with options
        return lambda function: _compile(real, function, **options)
    if options.get("disable") or options.get("backend", "inductor") != "inductor":
        return real(model, **options)
    inner: Any = torch._dynamo.config
    inner.recompile_limit = 64  # each shape is compiled by itself
    name = getattr(model, "__qualname__", type(model).__name__)
    return real(model, backend=_backend(name), dynamic=False, fullgraph=options.get("fullgraph", False))


def _backend(name: str) -> Callable[..., Any]:
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    def compiler(graph: fx.GraphModule, _: Any) -> Callable[..., Any]:
        run = _Region(name, graph)

        def boxed(arguments: list[Any]) -> Any:
            return run(arguments)

        boxed._boxed_call = True  # type: ignore[attr-defined]  # arguments come as a list, which is emptied
        return boxed

    backend: Callable[..., Any] = aot_autograd(
        fw_compiler=compiler, bw_compiler=compiler, decompositions=select_decomp_table,
        partition_fn=min_cut_rematerialization_partition, keep_inference_input_mutations=True,
    )  # fmt: skip
    return backend


def _kind(node: fx.Node) -> str:
    """extern, view or fused"""
    if node.op == "get_attr":
        return "extern"
    name = getattr(node.target, "__name__", str(node.target)).partition(".")[0]
    namespace = getattr(node.target, "namespace", "aten")
    if name in VIEWS:
        return "view"
    is_extern = namespace not in ("aten", "prims") or name in EXTERN or "attention" in name
    is_extern |= name == "copy_" and node.args[0].op != "placeholder"  # type: ignore[union-attr]
    return "extern" if is_extern else "fused"


def _written_input(node: fx.Node) -> fx.Node | None:
    """The input that a fused copy_ writes its result over."""
    is_copy = getattr(node.target, "__name__", "").startswith("copy_")
    return node.args[0] if is_copy and isinstance(node.args[0], fx.Node) else None


def _with_early_sums(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """Each sum right after its input: Inductor computes both in one kernel, although a product may stand between them in the
    graph, as before the gradient of a bias (torch/_inductor/scheduler.py, fuse_nodes)."""
    order: list[fx.Node] = []
    placed: set[fx.Node] = set()

    def place(node: fx.Node) -> None:
        order.append(node)
        placed.add(node)
        for user in node.users:
            if getattr(user.target, "__name__", "").startswith("sum") and placed.issuperset(user.all_input_nodes):
                place(user)

    for node in nodes:
        if node not in placed:
            place(node)
    return order


class _Region:
    """One graph. Its nodes are run in order; fused ones wait until a node outside needs them."""

    def __init__(self, name: str, graph: fx.GraphModule):
        self.name, self.graph = name, graph
        self.nodes = _with_early_sums(list(graph.graph.nodes))
        self.kinds = {node: _kind(node) for node in self.nodes if node.op not in ("placeholder", "output")}
        self.last_use: dict[fx.Node, list[fx.Node]] = {}
        seen: set[fx.Node] = set()
        for node in reversed(self.nodes):
            self.last_use[node] = [used for used in node.all_input_nodes if used not in seen]
            seen.update(node.all_input_nodes)

    def __call__(self, arguments: list[Any]) -> Any:
        values: dict[fx.Node, Any] = {}
        group: list[fx.Node] = []  # fused nodes, and views of them, that no kernel has computed yet
        ended: list[fx.Node] = []  # run since the last kernel, which may still read what they have read
        given = iter(list(arguments))
        arguments.clear()
        for node in self.nodes:
            if node.op == "placeholder":
                values[node] = next(given)
                continue
            waits = [used for used in node.all_input_nodes if used not in values]
            if node.op != "output" and (self.kinds[node] == "fused" or (self.kinds[node] == "view" and waits)):
                group.append(node)
                continue
            if waits or node.op == "output":
                self._launch(group, values)
                self._free([*group, *ended], values)
                group, ended = [], []
            if node.op == "output":
                return fx.map_arg(node.args[0], lambda used: values[used])
            values[node] = self._run(node, values)
            ended.append(node)
            if not group:
                self._free(ended, values)
                ended = []
        raise AssertionError("a graph ends with its output")

    def _run(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        if node.op == "get_attr":
            return getattr(self.graph, str(node.target))
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda used: values[used])
        target: Any = node.target
        if "rng_state" in kwargs and getattr(target, "__name__", "") == "graphsafe_run_with_rng_state":
            # dropout that is computed again in the backward pass: the operator without the state of its random numbers
            target, args = args[0], args[1:]
            kwargs = {key: value for key, value in kwargs.items() if key != "rng_state"}
        return target(*args, **kwargs)

    def _free(self, nodes: Sequence[fx.Node], values: dict[fx.Node, Any]) -> None:
        for node in nodes:
            for used in self.last_use[node]:
                values.pop(used, None)

    def _launch(self, group: Sequence[fx.Node], values: dict[fx.Node, Any]) -> None:
        """One kernel: allocate what is used outside of `group`, and count it."""
        inside = set(group)
        over = {node: values[used] for node in group for used in [_written_input(node)] if used}
        escapes = [node for node in group if any(user not in inside for user in node.users)]
        written: dict[fx.Node, Any] = {}
        views: list[fx.Node] = []
        for node in escapes:
            while self.kinds[node] == "view" and any(used in inside for used in node.all_input_nodes):
                views.append(node)
                node = next(used for used in node.all_input_nodes if used in inside)
            if node not in written and node not in over:
                written[node] = _empty(node)
        written |= over
        if group:
            inputs = {used for node in group for used in (node.all_input_nodes[1:] if node in over else node.all_input_nodes)}
            reads = [used for used in inputs if used in values]
            tensors = [*written.values(), *(values[node] for node in reads)]
            self._count(sum(_bytes(value) for value in tensors), is_kernel=any(self.kinds[n] == "fused" for n in group))
        values.update(written)
        for node in sorted(set(views), key=self.nodes.index):
            values[node] = self._run(node, values)

    def _count(self, moved: float, is_kernel: bool) -> None:
        if is_kernel:
            null_gpu.count(f"kernel\tcompiled {self.name}")
            null_gpu.count(f"region\t{self.name}", moved)
            for watcher in watchers:
                watcher(self.name, moved)


def _empty(node: fx.Node) -> Any:
    """Memory for the value of a node, as tracing has found it."""
    fake = node.meta["val"]

    def one(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return torch.empty_strided(tuple(value.shape), value.stride(), dtype=value.dtype, device=value.device)

    return tuple(map(one, fake)) if isinstance(fake, tuple | list) else one(fake)


def _bytes(value: Any) -> int:
    tensors = value if isinstance(value, tuple | list) else [value]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
