"""Processes and devices: one process without torchrun, many with it, and the code is the same."""

import contextlib
import os
import signal
import time
from functools import partial

import torch
import torch.distributed as dist
from timm.utils.distributed import init_distributed_device_so, world_info_from_env
from torch.nn.parallel import DistributedDataParallel

from util.args import InputError


def world():
    """(rank, world size) as the launcher set them (torchrun, SLURM, Open MPI); nothing is started."""
    _, rank, world_size = world_info_from_env()
    return rank, world_size


def choose_device(name):
    """'auto', 'cuda', 'cuda:1', 'mps' or 'cpu' -> a device name that exists here; InputError if it does not."""
    if name == 'auto':
        return 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        kind = torch.device(name).type
    except RuntimeError:
        raise InputError(f'--device {name}: no such device; use cuda, mps or cpu') from None
    if kind not in ('cuda', 'mps', 'cpu'):
        raise InputError(f'--device {name}: not supported; use cuda, mps or cpu')
    count = {'cuda': torch.cuda.device_count(), 'mps': int(torch.backends.mps.is_available()), 'cpu': 1}[kind]
    if (torch.device(name).index or 0) >= count:
        raise InputError(
            f'--device {name}: this machine has none, or torch {torch.__version__} cannot use it; '
            '--device cpu works everywhere'
        )
    return name


def start(name):
    """Join the process group, if there are several processes, and return this process's torch.device.

    Raises:
        InputError: if torchrun is to restart processes that fail, but in a way that cannot work.
    """
    torch.set_float32_matmul_precision('high')  # TF32 where the device has it
    torchrun = {name: os.environ.get(f'TORCHELASTIC_{name}') for name in ('MAX_RESTARTS', 'USE_AGENT_STORE')}
    if torchrun['MAX_RESTARTS'] not in (None, '0') and torchrun['USE_AGENT_STORE'] == 'True':
        # Restarted processes would find the addresses of those before them (github.com/pytorch/pytorch/issues/135712).
        raise InputError(
            'torchrun --max_restarts fails at the restart unless TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 stands before '
            'torchrun, and with static rendezvous always; use --rdzv_backend=c10d or --standalone'
        )
    backend = 'cpu:gloo,cuda:nccl' if name.startswith('cuda') else 'gloo'  # StopRequest sums on the CPU
    return torch.device(init_distributed_device_so(name, backend)['device'])


def mixed_precision(amp, device):
    """(() -> autocast context, GradScaler) of --amp. The scaler skips updates that are not finite, on every device."""
    if amp == 'auto':
        has_bf16 = device.type == 'cuda' and torch.cuda.is_bf16_supported(including_emulation=False)
        amp = 'none' if device.type != 'cuda' else 'bf16' if has_bf16 else 'fp16'
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
    """Compile a sum; where even that fails, as without a C++ compiler, InputError with the reason."""
    try:
        torch.compile(torch.add)(*torch.ones(2, 2, device=device))
    except Exception as error:
        reason = ' '.join(str(error).partition('\n\n')[0].split())
        raise InputError(f'--compile does not work here ({reason}); --no-compile trains without it') from None


class StopRequest:
    """Whether to stop: from SIGTERM, Ctrl-C, or SIGUSR1 (SLURM's warning), at any process. Within `with`.

    The first signal lets the step finish. A second one exits at once with 128 + its number, unless it comes within a
    second: torchrun passes on what its processes have already got themselves.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self):
        self.received = self.pending = None

    def __enter__(self):
        self.handlers = [signal.signal(number, self.receive) for number in self.SIGNALS]
        return self

    def __exit__(self, *_):
        for number, handler in zip(self.SIGNALS, self.handlers):
            signal.signal(number, handler)

    def receive(self, number, _):
        if self.received is None:
            self.received, self.at = number, time.monotonic()
        elif time.monotonic() - self.at > 1:
            os._exit(128 + number)

    def agreed(self):
        """After each step: whether to stop now. All processes get the same answer, a step late, without waiting."""
        if not dist.is_initialized():
            return self.received is not None
        if self.pending is not None:
            self.pending.wait()
            if self.flag:
                return True
        self.flag = torch.tensor(self.received is not None, dtype=torch.uint8)
        self.pending = dist.all_reduce(self.flag, dist.ReduceOp.MAX, async_op=True)
        return False


left = []  # process groups; they go when the process ends


def stop():
    """Leave the process group.

    It is not destroyed together with DistributedDataParallel: that holds the GIL, which gloo's threads may still need
    to let go of the last tensors they summed, and torch 2.11 would wait for them for ever.
    """
    if dist.is_initialized():
        left.append(dist.group.WORLD)
        dist.destroy_process_group()


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
