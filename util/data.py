"""Samples, the order in which a process sees them, and the loader: all randomness of the input.

Randomness belongs to the sample: every crop, flip and mask is drawn from generators seeded by
(seed, epoch, index). So a run does not depend on the number of workers or processes, and a resumed
run needs no stored generator state. Images stay uint8 until they are on the device.
"""

import atexit
import multiprocessing
import os
import random
import signal
import sys
import time
import weakref
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from util import distributed
from util.errors import RunError
from util.transforms import normalise

BAD_SHARE, BAD_ALWAYS = 0.01, 3  # images that may be unreadable: this share, but at least three


def seed_generators(*key, device=None):
    """Seed all generators that a transform or a step may draw from."""
    words = np.random.SeedSequence(key).generate_state(3).tolist()
    torch.default_generator.manual_seed(words[0])  # torch.manual_seed: 150 us, for all the GPUs
    if device is not None and device.type == 'cuda':
        torch.cuda.default_generators[device.index or 0].manual_seed(words[0])
    elif device is not None and device.type == 'mps':
        torch.mps.manual_seed(words[0])
    random.seed(words[1])
    np.random.seed(words[2])


class Samples(Dataset):
    """(epoch, index) -> (transformed image (C, H, W), target, problem).

    With num_patches, for pre-training, the target is the noise of the mask, (L,) in [0, 1): the
    smallest stay visible. Without it, it is the image's label, or, if numbered, its index. In place
    of an image that cannot be read comes another, and the problem says what was wrong, else ''.
    """

    def __init__(self, source, transform, num_patches=None, seed=0, numbered=False):
        self.source, self.transform, self.num_patches = source, transform, num_patches
        self.seed, self.numbered = seed, numbered

    def __len__(self):
        return len(self.source)

    def __getitem__(self, key):
        image, target, problem = self.read(*key)
        seed_generators(self.seed, *key)
        if self.num_patches is not None:
            target = torch.rand(self.num_patches)  # first: masks are the same for every crop
        elif self.numbered:
            target = key[1]
        return self.transform(image), target, problem

    def read(self, epoch, index, tries=100):
        """(*source[index], ''), or one drawn from the others, and the problem."""
        problem, others = '', np.random.default_rng((self.seed, epoch, index))
        for _ in range(tries):
            try:
                return *self.source[index], problem
            except ValueError as error:
                problem = problem or str(error)
                index = int(others.integers(len(self.source)))
        raise RunError(f'{tries} images in a row cannot be read; {problem}')


@dataclass(frozen=True)
class BatchStream:
    """The (epoch, index) keys of this process, a list per micro-batch, from step start to the end.

    The images of a step are consecutive ones of the epoch's permutation, whatever the number of
    processes and the batch per device. Leftover images of an epoch are dropped, as MAE does.
    """

    schedule: object  # optim.Schedule
    seed: int
    start: int

    def __iter__(self):
        schedule, (rank, world_size), order = self.schedule, distributed.world(), None
        for step in range(self.start, schedule.total_steps):
            epoch, position = divmod(step, schedule.steps_per_epoch)
            if order is None or position == 0:
                order = np.random.default_rng((self.seed, epoch)).permutation(schedule.num_images)
            images = order[position * schedule.total_batch_size :][: schedule.total_batch_size]
            for micro_batch in images.reshape(-1, schedule.batch_size)[rank::world_size]:
                yield [(epoch, index) for index in micro_batch.tolist()]


def fixed_batches(num_images, batch_size):
    """Keys of every image once, shared out over the processes; always of epoch 0.

    All processes get the same number of batches, of which the last may be empty.
    """
    rank, world_size = distributed.world()
    keys = [(0, index) for index in range(rank, num_images, world_size)]
    count = -(-num_images // (world_size * batch_size))
    return [keys[i * batch_size : (i + 1) * batch_size] for i in range(count)]


class Loader:
    """Batches on the device, loaded ahead: (images (N, C, H, W) normalised, noise or labels).

    Args:
        batch_keys: BatchStream, for next(loader), or fixed_batches, for a loop.
        settings: its mean and std, per channel, are of the pixels in 0..1.
        leave_out: leave out what took the place of unreadable images, for evaluation.

    Attributes:
        num_bad: unreadable images so far; whoever counts sets it back.
        waits: how long the last batches took to come: pairs of moments (see now).
    """

    def __init__(self, samples, batch_keys, device, settings, num_workers=None, leave_out=False):
        self.samples, self.device, self.leave_out = samples, device, leave_out
        # on the device: from a list, each batch would wait for all the work before it
        self.mean, self.std = (
            torch.tensor(v, device=device) for v in (settings.mean, settings.std)
        )
        self.num_bad, self.waits, self.reported, self.stream = 0, [], set(), None
        workers = default_workers() if num_workers is None else num_workers
        fork = workers > 0 and sys.platform == 'linux'  # workers share the list of images
        self.batches = DataLoader(
            samples,
            batch_sampler=batch_keys,
            num_workers=workers,
            persistent_workers=workers > 0,
            multiprocessing_context='fork' if fork else None,
            pin_memory=device.type == 'cuda',
            collate_fn=collate,
            worker_init_fn=ignore_signals,
        )

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        batches = iter(self.batches)
        atexit.unregister(kill_workers)
        atexit.register(kill_workers)  # after torch's own, to run before it
        for images, targets, problems in batches:
            self.report(problems)
            if self.leave_out and any(problems):
                good = torch.tensor([not problem for problem in problems])
                images, targets = images[good], targets[good]
            asynchronous = self.device.type == 'cuda'  # on MPS it corrupts data before torch 2.13
            images = images.to(self.device, non_blocking=asynchronous)
            targets = targets.to(self.device, non_blocking=asynchronous)
            yield normalise(images, self.mean, self.std) if len(images) else images, targets

    def __next__(self):
        """The next batch of the training run."""
        if self.stream is None:  # not in a circle with its loader: its workers end with that
            self.stream = Loader.__iter__(weakref.proxy(self))
        asked = self.now()
        batch = next(self.stream)
        self.waits.append((asked, self.now()))
        return batch

    def now(self):
        """This moment; on a GPU, which may have work left, an event that it reaches in its turn."""
        if self.device.type != 'cuda':
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def report(self, problems):
        """Count the images that could not be read, and print each one once."""
        for problem in filter(None, problems):
            self.num_bad += 1
            if problem not in self.reported:
                print(f'unreadable: {problem}', file=sys.stderr, flush=True)
                self.reported.add(problem)

    def check_bad(self, count):
        """RunError if count unreadable images, the sum over all processes, are too many."""
        total = len(self.samples)
        if count == total or count > max(BAD_ALWAYS, BAD_SHARE * total):
            if not distributed.is_first():  # rank 0 speaks for all
                raise SystemExit(1)
            raise RunError(f'{count} of {total} images cannot be read')


def collate(samples):
    """A batch; an empty one where this process has no image left."""
    if samples:
        return torch.utils.data.default_collate(samples)
    return torch.empty(0), torch.empty(0), []


# --- The processes that load images ahead ---------------------------------------------------------


def default_workers():
    """The CPU cores that this process may use over the training processes beside it, 1 to 16."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == 'linux' else os.cpu_count()
    return min(16, max(1, cores // int(os.environ.get('LOCAL_WORLD_SIZE', 1))))


def ignore_signals(worker):
    """Leave to the training process what is sent to all processes: it still needs batches."""
    for number in distributed.StopRequest.SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def kill_workers():
    """Kill the workers: they ignore SIGTERM, by which Python would end them and wait forever."""
    workers = [process for process in multiprocessing.active_children() if process.daemon]
    if workers:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise an error
    for process in workers:
        process.kill()
