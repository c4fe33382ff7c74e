"""The processes that load images ahead: how many, how far ahead, and how they end."""

import atexit
import multiprocessing
import os
import signal
import sys

from util.distributed import from_launcher

LOCAL_WORLD_SIZE = ('LOCAL_WORLD_SIZE', 'OMPI_COMM_WORLD_LOCAL_SIZE', 'MPI_LOCALNRANKS')  # srun binds to cores
MAX_PREFETCH, PREFETCH_BYTES = 4, 2e9  # batches that a worker loads ahead, and what all of them may hold


def default_workers():
    """The CPU cores of this machine that this process may use over its training processes, from 1 to 16."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    processes = from_launcher(LOCAL_WORLD_SIZE, 1)
    return min(16, max(1, count // processes))


def prefetch_factor(num_workers, batch_bytes):
    """How many batches each worker of a process loads ahead.

    All workers together hold at most about PREFETCH_BYTES, unless one batch for each is more.
    """
    return max(1, min(MAX_PREFETCH, int(PREFETCH_BYTES / (num_workers * batch_bytes))))


def worker_options(num_workers):
    """For a DataLoader: workers that stay for the next pass, and on Linux share the list of images with this process.

    The DataLoader is to be iterated by start_workers.
    """
    fork = num_workers > 0 and sys.platform == 'linux'
    return {
        'num_workers': num_workers,
        'persistent_workers': num_workers > 0,
        'multiprocessing_context': 'fork' if fork else None,
        'worker_init_fn': ignore_signals,
    }


def ignore_signals(worker):
    """Leave to the training process what terminals and SLURM send to every process: it still needs batches."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def start_workers(loader):
    """iter(loader) of a DataLoader with worker_options, whose workers are killed when Python exits."""
    batches = iter(loader)
    atexit.unregister(kill_workers)
    atexit.register(kill_workers)  # after torch's own, to run before it
    return batches


def kill_workers():
    """Kill the loaders' workers: they ignore SIGTERM, by which Python would end them, and it would wait forever."""
    workers = [process for process in multiprocessing.active_children() if process.daemon]
    if workers:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise an error for each
    for process in workers:
        process.kill()
