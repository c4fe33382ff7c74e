"""Processes and devices: one process, or several under torchrun or srun; the code is the same."""

import contextlib
import os
import signal
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from util.errors import InputError, as_input_error

# DistributedDataParallel would destroy a group while it holds the GIL, which gloo's threads may
# need to free their last tensors: groups are kept until the process ends (args.run_job).
joined = []


def world():
    """(rank, world size), as torchrun or srun set them. Raises InputError under mpirun alone."""
    mpi = os.environ.get('OMPI_COMM_WORLD_SIZE', os.environ.get('PMI_SIZE', '1'))
    if mpi != '1' and 'WORLD_SIZE' not in os.environ:
        raise InputError(f'mpirun would train {mpi} models, each alone; start with torchrun')
    return variable('RANK', 'SLURM_PROCID', 0), variable('WORLD_SIZE', 'SLURM_NTASKS', 1)


def is_first():
    return world()[0] == 0


def local_rank():
    """The number of this process on its machine."""
    return variable('LOCAL_RANK', 'SLURM_LOCALID', 0)


def variable(name, slurms, default):
    name = name if name in os.environ else slurms
    with as_input_error(name):
        return int(os.environ.get(name, default))


def start(name):
    """Join the other processes, if there are any, and return this process's torch.device.

    name: 'auto', 'cuda', 'cuda:1', 'mps' or 'cpu'. Raises InputError where there is none.
    """
    torch.set_float32_matmul_precision('high')  # TF32 where the device has it
    if name == 'auto':
        mps = torch.backends.mps.is_available()
        name = 'cuda' if torch.cuda.is_available() else 'mps' if mps else 'cpu'
    try:
        device = torch.device(name)
        if name == 'cuda':  # srun --gpus-per-task shows a task fewer devices than there are tasks
            device = torch.device('cuda', local_rank() % max(1, torch.cuda.device_count()))
        if device.type not in ('cuda', 'mps', 'cpu'):
            raise RuntimeError('not cuda, mps or cpu')
        torch.empty(0, device=device)  # on cuda:0 all processes would take memory
    except (RuntimeError, AssertionError) as error:  # torch says why
        raise InputError(f'--device {name}: {str(error).splitlines()[0]}') from None
    if world()[1] > 1:
        if name != 'cuda' and (device.type == 'mps' or device.index is not None):
            raise InputError(f'--device {name} is one device, for {world()[1]} processes')
        join_group(device.type)
    if device.type == 'cuda':
        torch.cuda.set_device(device)
    return device


def join_group(device_type):
    """Meet the other processes at MASTER_ADDR:MASTER_PORT, which torchrun sets."""
    rank, world_size = world()
    if not {'MASTER_ADDR', 'MASTER_PORT'} <= os.environ.keys():
        raise InputError(
            f'{world_size} processes, but no MASTER_ADDR and MASTER_PORT: start with torchrun, or '
            'set them for srun; for one process alone unset SLURM_NTASKS'
        )
    # gloo beside nccl, as processes tell each other numbers and stop requests on the CPU
    backend = 'cpu:gloo,cuda:nccl' if device_type == 'cuda' else 'gloo'
    dist.init_process_group(backend, rank=rank, world_size=world_size)
    joined.append(dist.group.WORLD)
    barrier()


def stop():
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


# --- A model on several processes -----------------------------------------------------------------


def wrap(model, device, compiled=False):
    """model, compiled if asked for, in DistributedDataParallel if there are several processes."""
    if compiled:
        try:
            torch.compile(torch.add)(*torch.ones(2, 2, device=device))
        except Exception as error:  # no C++ compiler, for instance
            reason = str(error).splitlines()[0]
            raise InputError(f'--compile does not work here: {reason}') from None
        model.compile()  # in place: parameter names stay as they are
    if not dist.is_initialized():
        return model
    devices = [device] if device.type == 'cuda' else None
    network = DistributedDataParallel(model, devices, gradient_as_bucket_view=True)
    network.broadcast_buffers = False  # only BatchNorm's change: share_buffers
    return network


def no_sync(network, skip):
    """A context in which backward leaves gradients unsynchronised, where there is any need."""
    return network.no_sync() if skip and dist.is_initialized() else contextlib.nullcontext()


def share_buffers(model):
    """Give every process rank 0's buffers (BatchNorm's statistics), which are those of the file."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


# --- Small messages -------------------------------------------------------------------------------


def barrier():
    """Wait until all processes are here."""
    gather(None)


def gather(value):
    """The values, any small objects, of all processes, in their order."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def sum_over_processes(tensor):
    """Sum a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def check_equal(values):
    """Raise InputError on every process unless the values {name: value} are the same on all."""
    everyones = gather(values)
    for name, value in values.items():
        if any(theirs[name] != value for theirs in everyones):
            different = [theirs[name] for theirs in everyones]
            raise InputError(f'the processes do not agree on {name}: {different}')


def on_first(action):
    """What action() returns on rank 0, on all processes, and so with its InputError."""
    result = error = None
    if world()[0] == 0:
        try:
            result = action()
        except InputError as mistake:
            error = str(mistake)
    result, error = gather((result, error))[0]
    if error:
        raise InputError(error)
    return result


class StopRequest:
    """Whether to stop: SIGTERM, Ctrl-C or SIGUSR1 (SLURM's warning), at any process.

    The first signal lets the step finish. A second one ends the process at once, unless it comes
    within a second: torchrun passes on what its processes have already received.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self):
        self.received_at = self.pending = None
        self.stopping = False

    def __enter__(self):
        self.handlers = {number: signal.signal(number, self.receive) for number in self.SIGNALS}
        return self

    def __exit__(self, error, *_):
        if error is None and self.pending is not None:  # gloo must not be left in mid-sum
            self.pending.wait()
        if self.stopping and dist.is_initialized():  # srun ends the last processes by a signal,
            return  # which would replace their exit code
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def receive(self, number, _):
        if self.received_at is None:
            self.received_at = time.monotonic()
        elif not self.stopping and time.monotonic() - self.received_at > 1:
            os._exit(128 + number)

    def __call__(self):
        """After each step: whether to stop now. The answer is the same on all processes.

        It comes a call late, so that nobody waits for it. From then on signals are ignored, until
        the checkpoint is on disk.
        """
        if not dist.is_initialized():
            self.stopping = self.received_at is not None
        else:
            if self.pending is not None:
                self.pending.wait()
                self.stopping = bool(self.flag)
            if not self.stopping:
                self.flag = torch.tensor(self.received_at is not None, dtype=torch.uint8)
                self.pending = dist.all_reduce(self.flag, dist.ReduceOp.MAX, async_op=True)
        return self.stopping
