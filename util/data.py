"""Samples, the order in which a process sees them, and the loader: all randomness of the input.

Samples adds a transform and mask noise to a source (util/sources.py) and replaces images that cannot be read.
BatchStream says which samples a process sees when. Images stay uint8 until they are on the device.

Randomness belongs to the sample: every crop, flip and mask is drawn from generators seeded by (seed, epoch, index). So
a run does not depend on the number of workers or processes, and a resumed run needs no stored generator state.
"""

import os
import random
from dataclasses import dataclass

import numpy as np
import torch

from util import distributed
from util.errors import RunError
from util.transforms import normalise
from util.workers import default_workers, prefetch_factor, start_workers, worker_options

FLAT = 'one flat colour'  # a problem of an image that is used all the same
MIN_BAD = 3  # images that may be bad in any data set, unless --max_bad is 0


# --- Samples --------------------------------------------------------------------------------------------------


def seed_generators(*key, device=None):
    """Seed every generator that a transform or a step may draw from: torch's (and the device's), Python's, NumPy's."""
    words = np.random.SeedSequence(key).generate_state(3).tolist()
    torch.default_generator.manual_seed(words[0])  # torch.manual_seed would seed each GPU, which takes 150 us
    if device is not None and device.type == 'cuda':
        torch.cuda.default_generators[device.index or 0].manual_seed(words[0])
    elif device is not None and device.type == 'mps':
        torch.mps.manual_seed(words[0])
    random.seed(words[1])
    np.random.seed(words[2])


class Samples(torch.utils.data.Dataset):
    """(epoch, index) -> (transformed image (C, H, W), target, problem).

    With num_patches, for pre-training, the target is the noise of the mask, (L,) in [0, 1): the smallest stay visible.
    Without it, the target is the label. The problem is '', or a line of path, tab, reason for each image
    that could not be read until another took its place; in pre-training an image of one colour has a problem too, FLAT,
    but is used.
    """

    def __init__(self, source, transform, num_patches=None, seed=0):
        self.source, self.transform, self.num_patches, self.seed = source, transform, num_patches, seed

    def __len__(self):
        return len(self.source)

    def __getitem__(self, key):
        epoch, index = key
        image, label, problem = self.read(epoch, index)
        seed_generators(self.seed, epoch, index)
        if self.num_patches is None:
            return self.transform(image), label, problem
        noise = torch.rand(self.num_patches)  # first, so that masks are the same for every crop
        if not problem and is_flat(image):
            problem = problem_line(FLAT, self.source.path(index))
        return self.transform(image), noise, problem

    def read(self, epoch, index, tries=100):
        """source[index] and '', or one drawn from the others and the problem. RunError if none can be read."""
        problems, others = [], None
        while len(problems) < tries:
            try:
                return *self.source[index], '\n'.join(problems)
            except ValueError as error:
                problems.append(problem_line(error, self.source.path(index)))
                others = others or np.random.default_rng((self.seed, epoch, index))
                index = int(others.integers(len(self.source)))
        last = problems[-1].replace('\t', ': ')
        raise RunError(f'{tries} images in a row cannot be read; {last}')


def is_flat(image):
    """Whether all pixels of an image (C, H, W) are the same."""
    few = image[:, :: 1 + image.shape[1] // 8, :: 1 + image.shape[2] // 8]  # enough to tell for most
    return all(bool((pixels == pixels[:, :1, :1]).all()) for pixels in (few, image))


def problem_line(error, path):
    """A line of path, tab, reason, from the error of reading path."""
    return f'{path}\t{str(error).removeprefix(f"{path}: ")}'.replace('\n', ' ')


def is_bad(problem):
    """Whether the problem of a sample is that its image could not be read."""
    return problem != '' and not problem.endswith(FLAT)


class BadImages:
    """Counts the images that cannot be read, and those that are flat, and lists both in output_dir, each path once.

    The list is bad_images.txt for rank 0 and bad_images-RANK.txt for other processes; later epochs and resumed runs
    add to it. Without output_dir there is none.
    """

    def __init__(self, num_images, max_bad, output_dir=None):
        rank = distributed.world()[0]
        name = f'bad_images-{rank}.txt' if rank else 'bad_images.txt'
        self.num_images, self.max_bad = num_images, max_bad
        self.file = output_dir and os.path.join(output_dir, name)
        self.count = self.flat = 0  # samples
        self.examples = {}  # a line of a bad image (True) and of a flat one (False)
        self.listed = set()  # paths
        if self.file and os.path.exists(self.file):
            with open(self.file, encoding='utf-8', errors='surrogateescape', newline='\n') as file:
                self.listed = {line.split('\t')[0] for line in file.read().split('\n')}

    def add(self, problems):
        """Count the samples that have a problem, and list the paths that are new."""
        problems = [problem for problem in problems if problem]
        bad = sum(map(is_bad, problems))
        self.count += bad
        self.flat += len(problems) - bad
        new = {}
        for line in [line for problem in problems for line in problem.split('\n')]:
            path = line.split('\t')[0]
            self.examples.setdefault(is_bad(line), line)
            if path not in self.listed:
                new[path] = line
        self.listed.update(new)
        if not new or not self.file:
            return
        try:
            with open(self.file, 'a', encoding='utf-8', errors='surrogateescape', newline='\n') as file:
                file.writelines(f'{line}\n' for line in new.values())
        except OSError as error:  # the number is known all the same
            print(f'{self.file}: {error.strerror}')

    def check(self, count):
        """Stop all processes if count, the sum over them, is too high: rank 0 raises RunError, the others exit.

        Allowed are the share max_bad of the images, but at least MIN_BAD, and never all.
        """
        allowed = max(MIN_BAD, self.max_bad * self.num_images) if self.max_bad else 0
        if count > allowed or count == self.num_images:
            where = f'see {self.file}' if self.file else self.examples.get(True, '').replace('\t', ': ')
            message = f'{count} of {self.num_images} images cannot be read, more than --max_bad {self.max_bad:g} allows'
            message += f'; {where}'
            raise RunError(message) if distributed.world()[0] == 0 else SystemExit(1)

    def flat_note(self):
        """A sentence on the images of one colour that all processes have used so far, or ''. All of them call it."""
        counts, examples = zip(*distributed.gather((self.flat, self.examples.get(False, ''))))
        if not sum(counts):
            return ''
        example = next(filter(None, examples)).split('\t')[0]
        return f'{sum(counts)} images are {FLAT}, such as {example}; see {self.file}'


# --- Which samples a process sees -----------------------------------------------------------------------------


@dataclass(frozen=True)
class BatchStream:
    """Which (epoch, index) keys one process sees, micro-batch by micro-batch, from step start to step stop.

    The images of a step are total_batch consecutive ones of the epoch's permutation, whatever the number of processes
    and the batch per device. Leftover images of an epoch are dropped, as MAE does.
    """

    num_samples: int
    total_batch: int
    batch_size: int  # images on a device at a time
    seed: int
    start: int
    stop: int
    rank: int = 0
    world_size: int = 1

    def __iter__(self):
        steps_per_epoch = self.num_samples // self.total_batch
        order = None
        for step in range(self.start, self.stop):
            epoch, position = divmod(step, steps_per_epoch)
            if order is None or position == 0:
                order = np.random.default_rng((self.seed, epoch)).permutation(self.num_samples)
            images = order[position * self.total_batch : (position + 1) * self.total_batch]
            for micro_batch in images.reshape(-1, self.batch_size)[self.rank :: self.world_size]:
                yield [(epoch, index) for index in micro_batch.tolist()]


def fixed_batches(num_samples, batch_size, rank=0, world_size=1):
    """Keys of every sample once, in order, shared out over the processes; always of epoch 0, so nothing varies."""
    keys = [(0, index) for index in range(rank, num_samples, world_size)]
    return [keys[i : i + batch_size] for i in range(0, len(keys), batch_size)]


# --- The loader -----------------------------------------------------------------------------------------------


class Loader:
    """Batches on the device: (images (N, C, H, W) normalised float, noise or labels), loaded ahead by worker processes.

    Args:
        batch_keys: an iterable of lists of (epoch, index).
        statistics: (mean, std) per channel, of pixels in 0..1.
        bad: BadImages that counts the images that could not be read.
        leave_out: leave out of a batch what took the place of such images, for evaluation.
    """

    def __init__(self, samples, batch_keys, device, statistics, num_workers=None, bad=None, leave_out=False):
        self.device, self.leave_out = device, leave_out
        self.bad = bad or BadImages(len(samples), 1.0)
        self.mean, self.std = (torch.tensor(values, device=device) for values in statistics)
        num_workers = default_workers() if num_workers is None else num_workers
        keys = next(iter(batch_keys), []) if num_workers else []
        batch_bytes = samples[keys[0]][0].nbytes * len(keys) if keys else 1
        self.batches = torch.utils.data.DataLoader(
            samples,
            batch_sampler=batch_keys,
            pin_memory=device.type == 'cuda',
            prefetch_factor=prefetch_factor(num_workers, batch_bytes) if num_workers else None,
            **worker_options(num_workers),
        )

    def __iter__(self):
        non_blocking = self.device.type == 'cuda'  # on MPS it corrupts data before torch 2.13 (pytorch issue 189690)
        for images, targets, problems in start_workers(self.batches):
            self.bad.add(problems)
            if self.leave_out and any(map(is_bad, problems)):
                good = torch.tensor([not is_bad(problem) for problem in problems])
                images, targets = images[good], targets[good]
            if len(images):
                images = images.to(self.device, non_blocking=non_blocking)
                targets = targets.to(self.device, non_blocking=non_blocking)
                yield normalise(images, self.mean, self.std), targets
