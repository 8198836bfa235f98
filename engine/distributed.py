"""A training run: its settings, its processes, and what they exchange.

    run = Run(Path("runs/big"), PRESETS["paper"], device="cuda", shard=True)      # under torchrun
    for (rows,) in run.rank_slice(np.arange(64)):         # 64 / processes / accumulations each
        ...
    total = run.all_reduce(torch.ones((), device=run.device))

torchrun starts the processes and sets RANK, LOCAL_RANK and WORLD_SIZE. Without it there is one. The
process of rank 0 is the main one: it alone writes the model, the checkpoints and the log.
"""
import atexit
import contextlib
import os
import zlib
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from engine import hub
from engine.checkpoint import UserError


@dataclass
class Run:
    """The settings of a run, and this process's place in it."""
    out: Path                                     # folder of the run
    stages: dict                                  # {stage: its settings}, see train.PRESETS
    seed: int = 0
    device: torch.device = torch.device("cpu")
    preset: str = "tiny"
    data: str = "shapes"
    resume: bool = False
    init: Path | None = None                      # folder of the model that the run starts from
    save_every: int = 500                         # steps
    eval_every: int = 1000                        # steps; 0: never
    eval_captions: int = 24                       # pictures of sheet.png
    accumulate: int = 1                           # forward and backward passes in one step
    shard: bool = False
    checkpointing: bool = False
    compile: bool = False
    lora: int | None = None                       # rank
    init_text_encoder: Path | None = None         # in place of the text encoder of init
    negative: str = ""                            # the negative prompt of init
    rank: int = field(default=0, init=False)
    world_size: int = field(default=1, init=False)

    def __post_init__(self):
        self.out = Path(self.out)
        self.rank = int(os.environ.get("RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.device = torch.device(self.device)
        if self.device.type == "cuda" and self.world_size > 1:
            self.device = torch.device("cuda", torch.cuda.current_device())   # see own_device
        if self.shard and self.world_size == 1:
            raise UserError("--shard wants several processes: start with torchrun")
        if self.world_size > 1 and not dist.is_initialized():
            backends = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backends, timeout=timedelta(days=1))      # encoding takes hours
            atexit.register(dist.destroy_process_group)
        self.out.mkdir(parents=True, exist_ok=True)

    @property
    def is_main(self):
        """Whether this process writes models, checkpoints and logs."""
        return self.rank == 0

    @property
    def dtype(self):
        """dtype of the matrix products: bfloat16 if the device has instructions for it."""
        return torch.bfloat16 if hub.has_bfloat16(self.device) else torch.float32

    @property
    def settings(self):
        """Settings that must match on --resume -> {name: str}. All paths of --data count as one."""
        data = "shapes" if self.data == "shapes" else "SOURCE"
        return {"seed": str(self.seed), "preset": self.preset, "data": data}

    def rng(self, stage, step, attempt=0):
        """Generator of the random choices of one step, the same in all processes. A resumed run
        draws what the uninterrupted one would have drawn."""
        return np.random.default_rng([self.seed, stage_seed(stage), step, attempt])

    def to_device(self, array):
        """Array or CPU tensor -> tensor on the device. The host does not wait for the copy."""
        tensor = torch.as_tensor(array)
        if self.device.type == "cuda" and torch.cuda.is_available():
            tensor = tensor.pin_memory()          # only pinned memory is copied in the background
        return tensor.to(self.device, non_blocking=True)

    # ----------------------------------------------------------------------------------------------
    # Processes

    def rank_slice(self, *arrays):
        """This process's rows of the arrays of a global batch -> a list of tuples, one for each
        gradient accumulation. Over all processes the slices are disjoint and cover the batch.
        Raises UserError if the batch does not divide."""
        number = self.world_size * self.accumulate
        if len(arrays[0]) % number:
            raise UserError(f"a batch of {len(arrays[0])} does not divide by {self.world_size} "
                            f"processes x {self.accumulate}")
        slices = []
        for i in range(self.accumulate):
            first = self.rank + self.world_size * i
            slices.append(tuple(array[first::number] for array in arrays))
        return slices

    def all_reduce(self, tensor):
        """The sum over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast(self, tensor):
        """Overwrite the tensor with that of the main process."""
        if self.world_size > 1:
            dist.broadcast(tensor, 0)

    def any(self, flag):
        """Whether `flag` is true in any process. Goes through CPU memory: the GPU need not wait."""
        if self.world_size == 1:
            return flag
        return bool(self.all_reduce(torch.tensor(int(flag))))

    def barrier(self):
        """Wait until all processes are here."""
        self.any(False)

    def on_main(self, function, *arguments):
        """Call the function in the main process -> its result there; the others wait."""
        result = function(*arguments) if self.is_main else None
        self.barrier()
        return result

    # ----------------------------------------------------------------------------------------------
    # Models

    @contextlib.contextmanager
    def precision(self):
        """Matrix products in self.dtype. On a CPU attention runs as plain matrix products: at the
        lengths of the small models that trains 1.2x faster than the flash kernel."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            with self.attention():
                yield

    def attention(self):
        """The attention of `precision`, for recomputation in the backward pass. NOTE Not cuDNN's:
        its backward fails or writes out of bounds (PyTorch 2.11, H200)."""
        if self.device.type == "cpu":
            return sdpa_kernel(SDPBackend.MATH)
        return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION,
                            SDPBackend.MATH])

    def parallelize(self, module):
        """The module over all processes: replicated, or with --shard the parameters, gradients and
        moments of each block split (ZeRO-3, PyTorch's fully_shard). Modules without `blocks` are
        small: always replicated. With --compile its blocks are compiled."""
        if self.compile:
            torch._dynamo.config.optimize_ddp = False     # else blocks are cut into 25 MB pieces
            for block in blocks_of(module):
                block.compile()
        if self.shard and blocks_of(module):
            for block in blocks_of(module):
                fully_shard(block)
            return fully_shard(module)
        return DistributedDataParallel(module) if self.world_size > 1 else module

    def sync_gradients(self, model, last):
        """Call before a forward pass. Processes exchange gradients in a step's last one only."""
        if isinstance(model, DistributedDataParallel):
            model.require_backward_grad_sync = last
        elif self.shard:
            model.set_requires_gradient_sync(last)


def own_device(name):
    """--device of one of several processes: make this process's GPU the current one, before
    anything allocates on the first -> the name without a number. Raises UserError."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or not torch.cuda.is_available():
        return name
    if name is not None and not name.startswith("cuda"):
        return name
    index = int(os.environ["LOCAL_RANK"])
    visible = torch.cuda.device_count()
    if visible == 1:                              # CUDA_VISIBLE_DEVICES names one for each process
        index = 0
    if index >= visible:
        raise UserError(f"process {index} of this machine has no GPU of its own: {visible} GPUs")
    torch.cuda.set_device(index)
    return None if name is None else "cuda"


def stage_seed(stage):
    """A stage's number in seeds. It depends on the name: adding a stage changes no other."""
    return zlib.crc32(stage.encode())


def blocks_of(module):
    """The blocks that are compiled and sharded one by one."""
    return getattr(module, "blocks", [])


# --------------------------------------------------------------------------------------------------
# Tensors that may be split over processes


def clip_gradients(parameters, max_norm):
    """Scale the gradients to a norm of max_norm at most -> the norm before, a 0-d tensor."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def full_tensor(tensor, keep=True):
    """A whole CPU copy, or None without `keep`. All processes must call it."""
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.detach().cpu() if keep else None


def local_tensor(tensor):
    """This process's part, which shares memory with the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def copy_sharded(target, value):
    """Overwrite `target`, split or not, with a whole tensor."""
    if isinstance(target, DTensor):
        value = value.to(target.device)
        value = distribute_tensor(value, target.device_mesh, target.placements)
    target.copy_(value)
