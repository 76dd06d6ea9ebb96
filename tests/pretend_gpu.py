"""A GPU that is none: tensors say that they are on "cuda" and are computed on the CPU, so that whole programs run as they would there.

    python tests/pretend_gpu.py sample.py --audio x.wav        any script of the project; the kernels are interpreted, slowly
    with pretend_gpu(monkeypatch) as gpu: ...                  in a test

It fails where a GPU would and a CPU does not: operations on tensors of two devices (numbers without dimensions, indices and copies may
differ), numpy on a GPU's tensor, and, while a CUDA graph is recorded, a number that Python reads or a tensor that comes from the CPU.
A recorded graph behaves like CUDA's: recording changes no tensor and its results hold NaN until the first replay; a replay repeats the
operations on the same memory, with the numbers that Python had when they were recorded. Memory from torch.empty holds NaN.

Not watched: what happens inside an operator, such as a kernel or its backward pass; streams; speed and memory.
"""
import contextlib
import os
import runpy
import sys
from types import SimpleNamespace

if __name__ == "__main__":
    os.environ.setdefault("TRITON_INTERPRET", "1")         # before triton is imported

import torch
import torch._dynamo                                       # which wants to see torch as it is
import torch.utils.checkpoint
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
COPIES = {Tensor.copy_, Tensor.__getitem__, Tensor.__setitem__, torch._has_compatible_shallow_copy_type}       # take tensors of two devices
READS = {Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.__contains__, Tensor.equal,
         Tensor.nonzero, Tensor.masked_select, torch.equal, torch.nonzero, torch.unique, torch.masked_select}  # wait for numbers
EMPTY = {torch.empty, torch.empty_like, Tensor.new_empty, torch.empty_strided}


def tensors(*values) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def on_gpu(x: Tensor) -> bool:
    return x.__dict__.get("on_gpu", False)


def names_device(value) -> bool:
    return isinstance(value, torch.device) or isinstance(value, str) and value.split(":")[0] in ("cuda", "cpu")


def to_cpu(values):
    """The same arguments with the CPU as device."""
    return tree_map(lambda value: CPU if names_device(value) and torch.device(value).type == "cuda" else value, values)


class Pretend(TorchFunctionMode):
    """Every tensor on the GPU has the attribute `on_gpu`; all else is said and done here."""
    operations = replays = 0
    recording: list | None = None                          # of a graph: (function, args, kwargs, results)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", str(function))
        if function in (torch.device, torch._C._nn._parse_to):                    # which only read arguments
            return function(*args, **kwargs)
        if name in ("__get__", "__set__", "__delete__"):
            return self.attribute(function, *args)
        if function in (Tensor.cpu, Tensor.cuda):
            function, args = Tensor.to, (args[0], CPU if function is Tensor.cpu else CUDA)
        if function is Tensor.to:
            return self.move(*args, **kwargs)
        given = tensors(args, kwargs)
        gpu, cpu = any(map(on_gpu, given)), any(x.ndim and not on_gpu(x) for x in given)
        if gpu and function in (Tensor.numpy, Tensor.__array__):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if gpu and cpu and function not in COPIES and torch._C._current_graph_task_id() == -1:      # in a backward pass new tensors are unmarked
            raise RuntimeError(f"tensors on two devices, cuda:0 and cpu: {name} of {[(on_gpu(x), tuple(x.shape)) for x in given]}")
        device = next((torch.device(value) for value in (kwargs.get("device"), *(() if gpu else args)) if names_device(value)), None)
        gpu = device.type == "cuda" if device else gpu
        if self.recording is not None and (function in READS or gpu and cpu or gpu and function is torch.tensor):
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        args, kwargs = to_cpu((args, kwargs))
        kwargs.pop("pin_memory", None)
        return self.compute(function, args, kwargs, gpu)

    def compute(self, function, args, kwargs, gpu: bool):
        self.operations += gpu
        given, capturing = tensors(args, kwargs), gpu and self.recording is not None
        before = [(x, x._version, x.detach().clone()) for x in given if capturing]
        out = function(*args, **kwargs)
        for x in tensors(out):
            if all(x is not y for y in given):
                x.on_gpu = gpu
        if gpu and function in EMPTY and out.is_floating_point():
            out.detach().fill_(float("nan"))
        if capturing:
            for x, version, was in before:
                if x._version != version:
                    x.detach().copy_(was)
            self.recording.append((function, args, kwargs, out))
        return out

    def attribute(self, function, x: Tensor, *value):
        name = getattr(function.__self__, "__name__", "")
        if function.__name__ == "__get__" and name in ("is_cuda", "is_cpu"):
            return on_gpu(x) == (name == "is_cuda")
        out = function(x, *value)
        if function.__name__ == "__set__" and name == "data":
            x.on_gpu = on_gpu(value[0])
        if isinstance(out, Tensor) and out is not x:                              # its gradient, its transpose
            out.on_gpu = on_gpu(x)
        return CUDA if name == "device" and on_gpu(x) else out

    def move(self, x: Tensor, *args, **kwargs):
        """Tensor.to; another device means a copy."""
        device = next((value if names_device(value) else CUDA if on_gpu(value) else CPU
                       for value in (*args, *kwargs.values()) if names_device(value) or isinstance(value, Tensor)), None)
        gpu = torch.device(device).type == "cuda" if device is not None else on_gpu(x)
        args, kwargs = to_cpu((args, kwargs))
        if gpu == on_gpu(x):
            return self.compute(Tensor.to, (x, *args), kwargs, gpu)
        if self.recording is not None:
            raise RuntimeError("operation not permitted when stream is capturing: to")
        out = x.to(*args, **kwargs | {"copy": True})
        out.on_gpu = gpu
        return out

    def graph(self):
        """What stands in for torch.cuda.CUDAGraph and torch.cuda.graph."""
        class Graph:
            def replay(graph):
                self.replays += 1
                for function, args, kwargs, results in graph.calls:
                    for x, new in zip(tensors(results), tensors(function(*args, **kwargs)), strict=True):
                        if x.data_ptr() != new.data_ptr():                        # not a view, nor written in place
                            x.copy_(new)

        @contextlib.contextmanager
        def record(graph):
            self.recording = graph.calls = []
            try:
                yield
            finally:
                self.recording = None
            made, found = set(), set()                                            # memory that nothing fills before the first replay
            for _, args, kwargs, results in graph.calls:
                found |= {x.untyped_storage().data_ptr() for x in tensors(args, kwargs)} - made
                for x in tensors(results):
                    if x.untyped_storage().data_ptr() not in found:
                        made.add(x.untyped_storage().data_ptr())
                        x.detach().fill_(float("nan") if x.is_floating_point() else 1)
        return Graph, record


@contextlib.contextmanager
def pretend_gpu(patch):
    """`patch`: pytest's monkeypatch. Gives the `Pretend`, which counts operations and replays."""
    gpu = Pretend()
    autocast, enabled, half, subclass = torch.autocast, torch.is_autocast_enabled, torch.get_autocast_dtype, Tensor._make_subclass

    def make_subclass(cls, data, *rest, **others):                                # of nn.Parameter
        out = subclass(cls, data, *rest, **others)
        out.on_gpu = on_gpu(data)
        return out

    def stream(*_):
        return SimpleNamespace(wait_stream=lambda other: None)

    def event(**_):
        return SimpleNamespace(record=lambda: None, elapsed_time=lambda other: 1.0)
    graph, record = gpu.graph()
    for name, value in {
            "is_available": True, "device_count": 1, "current_device": 0, "get_device_name": "NVIDIA H100", "get_device_capability": (9, 0),
            "max_memory_allocated": 10**9, "memory_allocated": 10**9, "reset_peak_memory_stats": None, "synchronize": None, "empty_cache": None,
            "set_device": None, "is_bf16_supported": True, "is_current_stream_capturing": False, "device": contextlib.nullcontext(),
            "stream": contextlib.nullcontext()}.items():
        patch.setattr(torch.cuda, name, lambda *_, value=value: value)
    for name, function in {"Stream": stream, "current_stream": stream, "Event": event, "CUDAGraph": graph, "graph": record,
                           "get_rng_state": torch.get_rng_state, "set_rng_state": torch.set_rng_state}.items():
        patch.setattr(torch.cuda, name, function)
    checkpoint = torch.utils.checkpoint.checkpoint

    def watched(function, *args, **kwargs):                                        # what is computed again in a backward pass, too
        def within(*given):
            with gpu if torch._C._current_graph_task_id() != -1 else contextlib.nullcontext():
                return function(*given)
        return checkpoint(within, *args, **kwargs)
    patch.setattr(torch.utils.checkpoint, "checkpoint", watched)
    patch.setattr(Tensor, "_make_subclass", staticmethod(make_subclass))
    for module in (torch, torch.amp):
        patch.setattr(module, "autocast", lambda device_type, *rest, **others:
                      autocast("cpu", *rest, **others) if device_type == "cuda" else contextlib.nullcontext())
    patch.setattr(torch, "is_autocast_enabled", lambda device: enabled("cpu"))
    patch.setattr(torch, "get_autocast_dtype", lambda device: half("cpu"))
    with gpu:
        yield gpu


if __name__ == "__main__":
    import pytest
    del sys.argv[0]
    sys.path[:1] = [os.path.dirname(os.path.abspath(sys.argv[0])), os.getcwd()]
    with pytest.MonkeyPatch.context() as patch, pretend_gpu(patch) as gpu:
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        finally:
            print(f"{gpu.operations} operations and {gpu.replays} replays of graphs on a pretended GPU", file=sys.stderr)
