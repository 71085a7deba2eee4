"""support/processes.py - several processes under torchrun; a single process needs none of it."""
import os
import sys
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0

def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1

def join(args) -> None:
    """Join the other processes and take a GPU of one's own; only the first process prints."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return
    if args.device == "cuda":
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
    if rank():
        sys.stdout = open(os.devnull, "w")

@contextmanager
def first_one_first():
    """The others enter when the first process has left."""
    if rank():
        dist.barrier()
    yield
    if rank() == 0 and dist.is_initialized():
        dist.barrier()

def average(*tensors) -> None:
    """Every tensor becomes its mean over all processes, in place."""
    for tensor in tensors:
        if dist.is_initialized():
            dist.all_reduce(tensor)
            tensor /= world_size()

def parallel(model, seed: int):
    """Gradients become means over all processes, which draw other random numbers from here on."""
    if not dist.is_initialized():
        return model
    if rank():
        torch.manual_seed(seed + 1000 * rank())
    # Without language LoRA has no gradient. Each process has class means (buffers) of its own.
    wrapped = DistributedDataParallel(model, find_unused_parameters=True, broadcast_buffers=False)
    for name, part in model.named_children():              # Algorithm 1 reads head and class_means
        setattr(wrapped, name, part)
    return wrapped
