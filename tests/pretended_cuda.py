"""A pretended CUDA device: tensors that say cuda:0 and are computed on the CPU.

    with pretended_cuda(chip=(7, 5)) as counts:
        ids = pipe.draw(["a star"], [0])
    assert not counts.syncs and not counts.in_capture

It raises where a CPU tensor meets a CUDA tensor, as a GPU does. It counts what makes the host wait
(syncs), copies from pageable memory (copies), what is illegal while a graph is captured
(in_capture), and operations (launches): all but views, so about the kernels of a GPU. Triton
kernels are not run: kernels take their plain path.
"""
import contextlib
import os
import traceback
from collections import Counter
from unittest import mock

import torch
import torch._dynamo.trace_rules
from common import ROOT
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda:0")
WAITS = {"nonzero", "unique_dim", "_unique2", "bincount", "masked_select", "equal"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
FACTORIES = ("empty", "zeros", "ones", "full", "new_")
VIEWS = {"device", "view", "_unsafe_view", "expand", "permute", "transpose", "t", "slice", "select",
         "split", "split_with_sizes", "unsqueeze", "squeeze", "detach", "alias", "as_strided",
         "unbind", "unfold", "lift_fresh", "empty", "empty_like", "empty_strided", "new_empty",
         "_reshape_alias", "view_as_real", "view_as_complex", "chunk"}


class Counts:
    """What happened, by the line of the project that did it -> Counters."""
    def __init__(self):
        self.syncs = Counter()
        self.copies = Counter()
        self.in_capture = Counter()
        self.launches = 0
        self.recorded = 0
        self.replayed = 0
        self.capturing = False
        self.in_backward = False
        self.asked_for_cpu = False

    def note(self, counter, what):
        counter[f"{what}: {caller()}"] += 1
        if self.capturing:
            self.in_capture[f"{what}: {caller()}"] += 1


def caller():
    """The line of the project that is running."""
    for frame in reversed(traceback.extract_stack()):
        if frame.filename.startswith(str(ROOT)) and "tests" not in frame.filename:
            return f"{os.path.relpath(frame.filename, ROOT)}:{frame.lineno} {frame.line}"
    return "a test"


counts = Counts()                                 # of the context that is open


class PretendedTensor(torch.Tensor):
    """A meta tensor that says cuda:0; `host` is the CPU tensor with its numbers."""
    @staticmethod
    def __new__(cls, real):
        size, stride, offset = real.size(), real.stride(), real.storage_offset()
        last = sum((n - 1) * step for n, step in zip(size, stride)) if real.numel() else 0
        storage = torch.empty(offset + last + 1, dtype=real.dtype, device="meta")
        tensor = torch.Tensor._make_subclass(
            cls, storage.as_strided(size, stride, offset), dispatch_device=True,
            device_for_backend_keys=CUDA)
        tensor.host = real
        return tensor

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)
    is_meta = property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return dispatch(function, args, kwargs or {})

    def __repr__(self):
        return f"PretendedTensor({tuple(self.shape)}, {self.dtype})"

    def tolist(self):
        counts.note(counts.syncs, "tolist")
        return self.host.tolist()

    def cpu(self):
        counts.note(counts.syncs, "cpu")
        return self.detach().host.clone()

    def numpy(self):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")


class Dispatch(TorchDispatchMode):
    """Sees the operations that have no pretended tensor among their arguments."""
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return dispatch(function, args, kwargs or {})


# -------------------------------------------------------------------------------------------------
# One operation


def dispatch(function, args, kwargs):
    """Check an operation as a GPU would, compute it on the CPU, mark its results."""
    name = str(function.overloadpacket).split(".")[-1]
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    pretended = [x for x in tensors if isinstance(x, PretendedTensor)]
    device = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
    if name == "_to_copy" and pretended and device == torch.device("cpu") \
            and not counts.asked_for_cpu:
        device = CUDA                             # C++ code asked for the device of the real tensor
    check(name, args, tensors, pretended, device)
    if any(x.device.type == "meta" for x in tensors) and not pretended:
        return function(*args, **kwargs)
    if pretended and name not in VIEWS:
        counts.launches += 1
    real_kwargs = dict(kwargs)
    if device is not None and device.type == "cuda":
        real_kwargs["device"] = torch.device("cpu")
    if name == "_to_copy":
        real_kwargs.pop("non_blocking", None)
        real_kwargs.pop("pin_memory", None)
    result = function(*tree_map(unwrap, args), **tree_map(unwrap, real_kwargs))
    if not is_on_cuda(name, args, pretended, device):
        return result
    known = {id(x.host): x for x in pretended}    # in-place operations return their argument
    return tree_map(lambda x: known[id(x)] if id(x) in known else wrap(x), result)


def unwrap(x):
    return x.host if isinstance(x, PretendedTensor) else x


def wrap(x):
    return PretendedTensor(x) if isinstance(x, torch.Tensor) else x


def is_on_cuda(name, args, pretended, device):
    """Whether the result of an operation is a CUDA tensor."""
    if counts.in_backward and device == torch.device("cpu") and name.startswith(FACTORIES):
        return True                               # autograd's zeros for a pretended tensor
    if device is not None:
        return device.type == "cuda"
    if name == "index" and not isinstance(args[0], PretendedTensor):
        return False
    return bool(pretended)


def check(name, args, tensors, pretended, device):
    """Raise for tensors of two devices; count what waits, copies, or breaks a capture."""
    on_cpu = [x for x in tensors if not isinstance(x, PretendedTensor) and x.device.type == "cpu"]
    if name == "_local_scalar_dense" and pretended:
        counts.note(counts.syncs, "item")
    elif name in WAITS and pretended:
        counts.note(counts.syncs, name)
    elif name in INDEXING and pretended:
        check_index(name, args)
    elif name == "copy_":
        check_transfer(isinstance(args[1], PretendedTensor), isinstance(args[0], PretendedTensor))
    elif name == "_to_copy":
        to_cuda = device.type == "cuda" if device is not None else bool(pretended)
        check_transfer(bool(pretended), to_cuda)
    elif name != "set_" and pretended and any(x.dim() > 0 for x in on_cpu):
        raise RuntimeError("Expected all tensors to be on the same device, but found at least two "
                           f"devices, cuda:0 and cpu! ({name}) {caller()}")


def check_index(name, args):
    for index in args[1]:
        if isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8):
            counts.note(counts.syncs, f"{name} with a bool mask")
        if isinstance(index, torch.Tensor) and not isinstance(index, PretendedTensor):
            counts.note(counts.copies, f"{name} with a CPU index")
    on_cuda = [isinstance(x, PretendedTensor) for x in args[1] if x is not None]
    if any(on_cuda) and not isinstance(args[0], PretendedTensor):
        raise RuntimeError(f"indices should be on the same device as the tensor, cpu {caller()}")


def check_transfer(from_cuda, to_cuda):
    if from_cuda and not to_cuda:
        counts.note(counts.syncs, "copy to the host")
    if to_cuda and not from_cuda:
        counts.note(counts.copies, "copy from the host")


# -------------------------------------------------------------------------------------------------
# torch.cuda


class Stream:
    def wait_stream(self, other):
        pass


class CaptureGraph:
    """torch.cuda.CUDAGraph. `again` computes what was captured."""
    def replay(self):
        counts.replayed += 1
        launches = counts.launches
        self.again()
        counts.launches = launches + 1            # one launch, whatever it holds


def set_device(device):
    """PyTorch 2.11 refuses a device without a number."""
    if not isinstance(device, int) and torch.device(device).index is None:
        raise ValueError(f"expected a torch.device with a specified index or an int, not {device}")


@contextlib.contextmanager
def capture(graph, pool=None, stream=None):
    counts.capturing = True
    counts.recorded += 1
    try:
        yield
    finally:
        counts.capturing = False


class OpenedFile:
    """safetensors' safe_open, which knows no pretended device."""
    def __init__(self, open_file, path, framework, device="cpu"):
        self.file, self.device = open_file(path, framework=framework, device="cpu"), str(device)
        self.keys, self.get_slice = self.file.keys, self.file.get_slice
        self.metadata = self.file.metadata

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def get_tensor(self, name):
        tensor = self.file.get_tensor(name)
        return PretendedTensor(tensor.clone()) if self.device.startswith("cuda") else tensor


def on_device(x):
    """The argument of Tensor.to and factories: "cuda" -> cuda:0."""
    named = isinstance(x, (str, torch.device)) and str(x).startswith("cuda")
    return CUDA if named else x


def asks_for_cpu(x):
    return isinstance(x, (str, torch.device)) and str(x) == "cpu"


@contextlib.contextmanager
def pretended_cuda(chip=(9, 0), memory=80e9):
    """-> Counts. chip: compute capability; memory: of the device, in bytes."""
    global counts
    import engine.checkpoint
    import engine.fast
    counts = Counts()
    torch._dynamo.trace_rules.get_torch_obj_rule_map()        # caches what is replaced below
    real_to, real_run = torch.Tensor.to, torch.autograd._engine_run_backward
    real_open, real_graph = engine.checkpoint.safe_open, engine.fast.Graph

    def to(tensor, *args, **kwargs):
        counts.asked_for_cpu = any(asks_for_cpu(x) for x in (*args, *kwargs.values()))
        try:
            kwargs = {name: on_device(x) for name, x in kwargs.items()}
            return real_to(tensor, *map(on_device, args), **kwargs)
        finally:
            counts.asked_for_cpu = False

    def factory(make):
        def made(data, *args, device=None, **kwargs):
            if isinstance(data, PretendedTensor):
                wanted = on_device(device) or CUDA
                return data.to(device=wanted, **kwargs) if device or kwargs else data
            tensor = make(data, *args, **kwargs)
            return tensor if device is None else tensor.to(device)
        return made

    def run_backward(*args, **kwargs):
        counts.in_backward = True
        try:
            return real_run(*args, **kwargs)
        finally:
            counts.in_backward = False

    class Graph(real_graph):
        def __init__(self, function, inputs, pool):
            super().__init__(function, inputs, pool)
            self.graph.again = lambda: self.output.copy_(function(*self.inputs))

    properties = mock.Mock(major=chip[0], minor=chip[1], multi_processor_count=132,
                           total_memory=memory)
    nothing = lambda *args, **kwargs: None
    cuda = dict(
        is_available=lambda: True, device_count=lambda: 1, current_device=lambda: 0,
        get_device_capability=lambda device=None: chip,
        get_device_properties=lambda device=None: properties,
        get_device_name=lambda device=None: "pretended", _lazy_init=nothing,
        set_device=set_device,
        empty_cache=nothing, graph_pool_handle=nothing, graph=capture, CUDAGraph=CaptureGraph,
        current_stream=lambda device=None: Stream(), Stream=lambda *args, **kwargs: Stream(),
        stream=lambda stream: contextlib.nullcontext(),
        synchronize=lambda device=None: counts.note(counts.syncs, "synchronize"))
    with contextlib.ExitStack() as stack:
        replace = lambda *args: stack.enter_context(mock.patch.object(*args))
        stack.enter_context(mock.patch.dict(os.environ, {"MEISSONIC_KERNELS": "plain"}))
        for name, value in cuda.items():
            replace(torch.cuda, name, value)
        replace(torch.Tensor, "to", to)
        replace(torch, "tensor", factory(torch.tensor))
        replace(torch, "as_tensor", factory(torch.as_tensor))
        replace(torch.autograd, "_engine_run_backward", run_backward)
        replace(engine.fast, "Graph", Graph)
        replace(engine.checkpoint, "safe_open",
                lambda *args, **kwargs: OpenedFile(real_open, *args, **kwargs))
        stack.enter_context(Dispatch())
        yield counts
