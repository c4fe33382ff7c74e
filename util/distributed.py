"""Processes and devices: one process without a launcher, many with torchrun, srun or mpirun; the code is the same."""

import contextlib
import os
import signal
import time
from functools import partial

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from util.errors import InputError, RunError, as_input_error

# Variables that launchers set: torchrun, Open MPI, MPICH and Intel MPI, srun. SLURM's come last: a batch script has
# them, and hands them on to the processes of mpirun.
RANK = ('RANK', 'OMPI_COMM_WORLD_RANK', 'PMI_RANK', 'SLURM_PROCID')
WORLD_SIZE = ('WORLD_SIZE', 'OMPI_COMM_WORLD_SIZE', 'PMI_SIZE', 'SLURM_NTASKS')
LOCAL_RANK = ('LOCAL_RANK', 'OMPI_COMM_WORLD_LOCAL_RANK', 'MPI_LOCALRANKID', 'SLURM_LOCALID')


def from_launcher(names, default):
    """The number in the first of these variables that is set, or default. Raises InputError if it is no number."""
    name = first_set(names)
    with as_input_error(name):
        return int(os.environ[name]) if name else default


def first_set(names):
    return next((name for name in names if name in os.environ), None)


def world():
    """(rank, world size) as the launcher set them; nothing is started."""
    return from_launcher(RANK, 0), from_launcher(WORLD_SIZE, 1)


def choose_device(name):
    """'auto', 'cuda', 'cuda:1', 'mps' or 'cpu' -> a device name that exists here; InputError if it does not."""
    if name == 'auto':
        if torch.cuda.is_available():
            return 'cuda'
        return 'mps' if torch.backends.mps.is_available() else 'cpu'
    counts = {'cuda': torch.cuda.device_count(), 'mps': int(torch.backends.mps.is_available()), 'cpu': 1}
    try:
        device = torch.device(name)
        count = counts[device.type]
    except (RuntimeError, KeyError):
        raise InputError(f'--device {name}: no such device; use cuda, mps or cpu') from None
    if (device.index or 0) >= count:
        raise InputError(
            f'--device {name}: this machine has none, or torch {torch.__version__} cannot use it; '
            '--device cpu works everywhere'
        )
    return name


def start(name, join=True):
    """Join the process group, if there are several processes, and return this process's torch.device.

    join=False: for work that one process does alone, whatever the launcher says.

    Raises:
        InputError: if the launcher does not say where to meet, or would restart processes in a way that cannot work.
        RunError: if the processes cannot connect.
    """
    torch.set_float32_matmul_precision('high')  # TF32 where the device has it
    restarts, shares_store = (os.environ.get(f'TORCHELASTIC_{key}') for key in ('MAX_RESTARTS', 'USE_AGENT_STORE'))
    if restarts not in (None, '0') and shares_store == 'True':
        # Restarted processes would find the addresses of those before them (github.com/pytorch/pytorch/issues/135712).
        raise InputError(
            'torchrun --max_restarts fails at the restart unless TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 is set for '
            'torchrun, and rendezvous is by --rdzv_backend=c10d or --standalone'
        )
    if join and world()[1] > 1:
        if name == 'mps':
            raise InputError('several processes cannot share an Apple GPU; --device cpu works')
        join_group(name)
    if name == 'cuda':  # a task may see fewer devices than there are tasks: srun --gpus-per-task
        name = f'cuda:{from_launcher(LOCAL_RANK, 0) % torch.cuda.device_count()}'
    device = torch.device(name)
    if device.type == 'cuda':
        torch.cuda.set_device(device)
    return device


# Process groups, kept until the process ends: DistributedDataParallel would destroy one while it holds the GIL, which
# gloo's threads may still need to free their last tensors, and torch 2.11 would wait forever.
joined = []


def join_group(name):
    """Meet the other processes at MASTER_ADDR:MASTER_PORT, which torchrun sets."""
    rank, world_size = world()
    variable = first_set(WORLD_SIZE)
    missing = [name for name in ('MASTER_ADDR', 'MASTER_PORT') if name not in os.environ]
    if missing:
        raise InputError(
            f'{variable}={world_size} says that {world_size} processes run, but {" and ".join(missing)} are not set; '
            f'set them to a host and a free port, or, for a single process, unset {variable}'
        )
    if variable != 'WORLD_SIZE' and rank == 0:
        print(f'Waiting for {world_size} processes ({variable}) at {os.environ["MASTER_ADDR"]}', flush=True)
    backend = 'cpu:gloo,cuda:nccl' if name.startswith('cuda') else 'gloo'  # StopRequest sums on the CPU
    try:
        dist.init_process_group(backend, rank=rank, world_size=world_size)
        joined.append(dist.group.WORLD)
        barrier()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise RunError(
            f'the {world_size} processes cannot connect ({reason}); where a host name resolves to 127.0.1.1, set '
            'GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to its network interface, such as eth0'
        ) from None


def mixed_precision(amp, device):
    """(() -> autocast context, GradScaler) of --amp. The scaler skips updates that are not finite, on every device."""
    if amp == 'auto':
        amp = 'none'
        if device.type == 'cuda':
            amp = 'bf16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'fp16'
    dtype = {'bf16': torch.bfloat16, 'fp16': torch.float16}.get(amp)
    autocast = partial(torch.autocast, device.type, dtype=dtype, enabled=dtype is not None)
    return autocast, torch.amp.GradScaler(device.type) if amp == 'fp16' else UnitScaler(device.type, init_scale=1.0)


class UnitScaler(torch.amp.GradScaler):
    """Without fp16 the loss needs no scale: it stays 1, which is exact, and has nothing to save."""

    def update(self):
        super().update(1.0)

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def wrap(model, device, compiled=False):
    """model, compiled if asked for, in DistributedDataParallel if there are several processes.

    Raises:
        InputError: if torch.compile does not work here.
    """
    if compiled:
        check_compiler(device)
        model.compile()  # in place: parameter names stay as they are
    if not dist.is_initialized():
        return model
    network = DistributedDataParallel(model, [device] if device.type == 'cuda' else None, gradient_as_bucket_view=True)
    network.broadcast_buffers = False  # only BatchNorm's change, and share_buffers copies them where they are used
    return network


def check_compiler(device):
    """Compile a sum; where even that fails, as without a C++ compiler, raise an InputError with the reason."""
    try:
        torch.compile(torch.add)(*torch.ones(2, 2, device=device))
    except Exception as error:
        reason = ' '.join(str(error).partition('\n\n')[0].split())
        raise InputError(f'--compile does not work here ({reason}); --no-compile trains without it') from None


class StopRequest:
    """Whether to stop: from SIGTERM, Ctrl-C, or SIGUSR1 (SLURM's warning), at any process. Use it in a `with`.

    The first signal lets the step finish. A second one exits at once with 128 + its number, unless it comes within a
    second: torchrun passes on what its processes have already received. From agreed() on all are ignored: processes
    wait until the checkpoint is on disk.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self):
        self.received = self.pending = None
        self.stopping = False

    def __enter__(self):
        self.handlers = [signal.signal(number, self.receive) for number in self.SIGNALS]
        return self

    def __exit__(self, error, *_):
        if not (self.stopping and dist.is_initialized()):  # else srun, when it ends the last, replaces code 75
            for number, handler in zip(self.SIGNALS, self.handlers):
                signal.signal(number, handler)
        if error is None and self.pending is not None:  # gloo must not be left in the middle of a sum
            self.pending.wait()

    def receive(self, number, _):
        if self.received is None:
            self.received, self.at = number, time.monotonic()
        elif not self.stopping and time.monotonic() - self.at > 1:
            os._exit(128 + number)

    def agreed(self):
        """After each step: whether to stop now. All processes get the same answer, a step late, without waiting."""
        if not dist.is_initialized():
            self.stopping = self.received is not None
            return self.stopping
        if self.pending is not None:
            self.pending.wait()
            self.stopping = bool(self.flag)
            if self.stopping:
                return True
        self.flag = torch.tensor(self.received is not None, dtype=torch.uint8)
        self.pending = dist.all_reduce(self.flag, dist.ReduceOp.MAX, async_op=True)
        return False


def stop():
    """Leave the process group. What is left of it goes when the process ends: see args.leave."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier():
    """Wait until all processes are here."""
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(1))  # on the CPU, by gloo


def check_equal(value, what):
    """Raise InputError on every process if value is not the same on all of them."""
    values = gather(value)
    if len(set(values)) > 1:
        raise InputError(f'the processes do not agree on {what}: {values}')


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


def share_buffers(model):
    """Give every process the buffers (BatchNorm's running statistics) of rank 0, which are those that are saved."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def no_sync(model, skip):
    """A context in which backward leaves gradients unsynchronised, where there is anything to skip."""
    return model.no_sync() if skip and hasattr(model, 'no_sync') else contextlib.nullcontext()
