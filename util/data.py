"""The input: data sets, the sampler, the loader, and all randomness of what they give.

A source gives decoded images: source[i] -> (uint8 tensor (C, H, W), label or -1), or raises ValueError if image i
cannot be read. Samples adds the transform and the mask noise and replaces bad images, BatchStream says which samples a
process sees when. Images stay uint8 until the device.

Randomness belongs to the sample: every crop, flip and mask is drawn from generators seeded by (seed, epoch,
index). What a run sees depends neither on the number of workers nor on that of processes, and a resumed run needs
no stored generator state.
"""

import fcntl
import os
import random
import signal
import sys
import time
import urllib.error

import numpy as np
import torch
import torchvision.datasets
from torchvision.transforms.v2.functional import to_dtype

from util import distributed, files, tar
from util.args import InputError, RunError
from util.shapes import Shapes
from util.transforms import Cover, decode_image, normalise, pil_to_tensor

EXTENSIONS = (*torchvision.datasets.folder.IMG_EXTENSIONS, '.gif', '.npy')
SPLITS = {'train': ['train'], 'val': ['val', 'valid', 'validation', 'test']}


# --- Sources --------------------------------------------------------------------------------------------------


class ImageFiles:
    """Image files below a folder, given by their names relative to it, as bytes, and the name of each one's class.

    Without class_names the first folder in the names is the class, if all have one.
    """

    def __init__(self, root, names, in_chans, class_names=None):
        self.root, self.in_chans = root, in_chans
        self.names = np.asarray(names, dtype=bytes)  # one buffer, shared with the workers
        self.dtype = None  # of the pixels: that of the first image that can be read
        self.classes, self.labels = None, np.full(len(names), -1)
        names = self.names.tolist()
        if class_names is None and all(b'/' in name for name in names):
            class_names = [os.fsdecode(name.split(b'/')[0]) for name in names]
        if class_names:
            self.classes = sorted(set(class_names))
            numbers = {name: number for number, name in enumerate(self.classes)}
            self.labels = np.array([numbers[name] for name in class_names])

    def __len__(self):
        return len(self.names)

    def path(self, index):
        return os.path.join(self.root, os.fsdecode(self.names[index]))

    def size(self, index):
        return os.path.getsize(self.path(index))

    def content(self, index):
        with open(os.open(self.path(index), os.O_RDONLY | os.O_NONBLOCK), 'rb') as file:  # a pipe would block
            return file.read()

    def __getitem__(self, index):
        path = self.path(index)
        try:
            image = decode_image(self.content(index), path, self.in_chans)
        except OSError as error:
            raise ValueError(f'{path}: {error.strerror}') from None
        self.dtype = self.dtype or image.dtype
        return to_dtype(image, self.dtype, scale=True), int(self.labels[index])


class TarImages(ImageFiles):
    """Images in tar files: names as they would be unpacked below root, and their places, as tar.load_index gives."""

    def __init__(self, root, names, in_chans, tars, places):
        super().__init__(root, names, in_chans)
        self.tars, self.places = tars, places

    def size(self, index):
        return int(self.places[index, 2])

    def content(self, index):
        number, offset, size = self.places[index].tolist()
        return tar.read(self.tars[number], offset, size)


class TorchvisionImages:
    """A torchvision classification set, whose items are (PIL image, label)."""

    def __init__(self, name, dataset, in_chans):
        self.name, self.dataset, self.in_chans = name, dataset, in_chans
        self.classes = getattr(dataset, 'classes', None)
        if not self.classes:  # SVHN, for one, only numbers them
            self.classes = [str(label) for label in range(1 + max(getattr(dataset, 'labels', [0])))]

    def __len__(self):
        return len(self.dataset)

    def path(self, index):
        return f'{self.name}, image {index}'

    def __getitem__(self, index):
        try:
            image, label = self.dataset[index]
            return pil_to_tensor(image, self.in_chans), label
        except Exception as error:
            raise ValueError(f'{self.path(index)}: {" ".join(str(error).split())}') from None


def name_of(source, index):
    """An image of a source as a person would find it: its path, or its number."""
    return source.path(index) if hasattr(source, 'path') else f'image {index}'


def open_sources(args, size):
    """(training source, validation source or None) of --data_path and --val_path. Raises InputError."""
    options = args.in_chans, size, args.download_dir
    return open_source(args.data_path, 'train', *options), open_validation(args, *options)


def open_validation(args, *options):
    if not args.val_path:
        return open_source(args.data_path, 'val', *options)
    return open_source(args.val_path, 'val', *options) or open_source(args.val_path, 'train', *options)


def open_labelled_sources(args, size):
    """(training source, or None with --eval; validation source), whose images have the same classes, two at least.

    With --eval, --data_path may itself be the validation images.

    Raises:
        InputError: as open_source does, or if there are no validation images, no labels, one class only, or other
            classes in one than in the other.
    """
    options = args.in_chans, size, args.download_dir, True
    train = None if args.eval else open_source(args.data_path, 'train', *options)
    val = open_validation(args, *options)
    if args.eval and val is None:
        val = open_source(args.data_path, 'train', *options)
    if val is None:
        raise InputError(f'{args.data_path} has no val/ or test/ beside its train/; --val_path names validation images')
    for path, source in ((args.data_path, train), (args.val_path or args.data_path, val)):
        if source is not None and source.classes is None:
            raise InputError(f'{path}: labels are missing; a folder a class gives them, or path, tab, class in a list')
    classes = (train or val).classes
    if len(classes) < 2:
        raise InputError(f'{args.data_path}: only one class, {classes[0]}; a classifier needs two at least')
    check_same_classes(classes, val.classes, 'the training images', 'the validation images')
    return train, val


def check_same_classes(ours, theirs, here, there):
    """Raise InputError that names the classes which only one of the two places has."""
    only = [
        f'{", ".join(sorted(map(str, odd))[:5])}{", ..." if len(odd) > 5 else ""} only in {place}'
        for odd, place in ((set(ours) - set(theirs), here), (set(theirs) - set(ours), there))
        if odd
    ]
    if only or list(ours) != list(theirs):
        raise InputError(f'the classes differ: {"; ".join(only) or "their order"}')


def open_source(path, split, in_chans=3, size=(224, 224), download_dir='data', labelled=False):
    """The images that --data_path (or --val_path) names; None for 'val' where the data has no such split.

    Raises:
        InputError: if nothing is there, or nothing in it can be read.
    """
    if not path:
        raise InputError('--data_path is required: a folder or tar of images, a list of them, torch/NAME, or shapes')
    if path == 'shapes':
        source = Shapes(split, size)
    elif path.startswith('torch/'):
        source = open_torchvision(path, split, in_chans, download_dir, labelled)
    elif os.path.isdir(path):
        source = open_folder(path, split, in_chans, download_dir)
    elif path.lower().endswith(tar.COMPRESSED):
        raise InputError(f'{path}: images inside a compressed tar cannot be read in place; unpack it, to .tar at least')
    elif path.lower().endswith('.tar') and os.path.isfile(path):
        source = open_tars({path: ''}, path, split, in_chans, download_dir)
    elif os.path.isfile(path):
        source = open_list(path, in_chans) if split == 'train' else None
    else:
        raise InputError(f'{path}: no such folder or file')
    if source is not None:
        check_readable(source, path, in_chans)
    return source


def open_folder(path, split, in_chans, cache_dir):
    """All images below path; below its train/ (or val/, valid/, validation/, test/) where it is divided so.

    Where there are no image files but tar files, the images in these: a tar stands for a folder of its name, and
    ..._train.tar and ..._val.tar for train/ and val/.
    """
    try:
        entries = [entry for entry in os.scandir(path) if entry.name[0] != '.']
    except OSError as error:
        raise InputError(f'{path}: {error.strerror}') from None
    folders = {entry.name: entry.path for entry in entries if entry.is_dir()}
    tars = {entry.name[:-4].rpartition('_')[2]: entry.path for entry in entries if entry.name.lower().endswith('.tar')}
    tars = {name: tars[name] for name in tars if not folders or name in ('train', *SPLITS['val'])}
    chosen = choose_split(tars | folders, split)
    if chosen is None and (folders or not tars):
        return None
    place = (tars | folders)[chosen] if chosen else path
    if os.path.isfile(place):
        return open_tars({place: ''}, place, None, in_chans, cache_dir)
    names = files.find(place, EXTENSIONS, cache_dir)
    if len(names):
        return None if chosen is None else ImageFiles(place, names, in_chans)
    names = map(os.fsdecode, files.find(place, ('.tar',), cache_dir).tolist())
    tars = {os.path.join(place, name): name[:-4] for name in names}
    if tars:
        return open_tars(tars, place, None if chosen else split, in_chans, cache_dir)
    raise InputError(
        f'{place}: no image in it or in the folders below; files that count end in {" ".join(EXTENSIONS)}, or .tar'
    )


def choose_split(folders, split):
    """Which of the folders holds a split: its name, '' for all of them together, None for none."""
    held_out = [name for name in SPLITS['val'] if name in folders]
    if 'train' in folders and (held_out or len(folders) == 1):  # else 'train' is a class or a folder like others
        return 'train' if split == 'train' else next(iter(held_out), None)
    return '' if split == 'train' else None


def open_tars(tars, root, split, in_chans, cache_dir):
    """The images in tars, {path: folder in whose place it stands}; those of a split, unless it is None.

    A folder that holds everything, as most tars have, is neither a class nor a split.
    """
    names, places = tar.load_index(tars, EXTENSIONS, cache_dir)
    if not len(names):
        raise InputError(f'{root}: no image in it; files that count end in {" ".join(EXTENSIONS)}')
    names = names.tolist()
    top = os.path.commonprefix([names[0], names[-1]]).rpartition(b'/')[0]  # they are in order
    if split:
        below = (name[len(top) :].strip(b'/') for name in names)
        chosen = choose_split({os.fsdecode(name.split(b'/')[0]) for name in below if b'/' in name}, split)
        if chosen is None:
            return None
        top = os.path.join(top, os.fsencode(chosen)) if chosen else top
    prefix = os.path.join(top, b'') if top else b''
    kept = [name.startswith(prefix) for name in names]
    names = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    return TarImages(os.path.join(root, os.fsdecode(top)), names, in_chans, list(tars), places[kept])


def open_list(path, in_chans):
    """A text file with an image a line, relative to the file's folder or absolute, and after a tab its class, if any.

    '#' starts a comment line.
    """
    try:
        with open(path, encoding='utf-8', errors='surrogateescape') as file:
            text = file.read(4096)
            lines = [] if '\0' in text else [line.strip() for line in (text + file.read()).splitlines()]
    except OSError as error:
        raise InputError(f'{path}: {error.strerror}') from None
    names = [line for line in lines if line and line[0] != '#']
    if not names:
        raise InputError(f'{path}: not a folder, and not a text file that lists images, one a line')
    names, class_names = zip(*(line.partition('\t')[::2] for line in names))
    missing = [name for name in names if not os.path.exists(os.path.join(os.path.dirname(path), name))]
    if missing:
        raise InputError(f'{path}: {len(missing)} of the {len(names)} images in it do not exist, such as {missing[0]}')
    names = [os.fsencode(name) for name in names]
    return ImageFiles(os.path.dirname(path), names, in_chans, class_names if all(class_names) else [])


def open_torchvision(path, split, in_chans, root, labelled):
    """torch/NAME, as timm spells it: any torchvision.datasets class of (image, label) pairs with splits.

    Where a set has unlabelled images beside the training images (STL-10), 'train' is both unless labels are asked
    for. Downloaded to root if it is not there.
    """
    known = {name.lower(): name for name in torchvision.datasets.__all__}
    name = known.get(path.removeprefix('torch/').replace('_', '').lower())
    if name is None:
        raise InputError(
            f'{path}: torchvision {torchvision.__version__} has no such data set; '
            'it has, for instance, torch/cifar10, torch/stl10, torch/flowers102'
        )
    dataset_class = getattr(torchvision.datasets, name)
    choices = ['train+unlabeled', 'train', 'trainval'][labelled:] if split == 'train' else SPLITS['val']
    for arguments in [{'split': choice} for choice in choices] + [{'train': split == 'train'}]:
        for download in (False, True):
            try:
                arguments |= {'download': True} if download else {}
                return TorchvisionImages(path, dataset_class(root, **arguments), in_chans)
            except (TypeError, ValueError) as error:  # no such argument, or no split of that name
                problem = error
                break
            except ImportError as error:
                raise InputError(f'{path}: {name} needs another package: {error}') from None
            except (RuntimeError, OSError, urllib.error.URLError) as error:  # not there, or no network
                if download:
                    reason = ' '.join(str(getattr(error, 'reason', error)).split())
                    raise InputError(
                        f'{path}: not found in {root} (--download_dir), and the download failed: {reason}'
                    ) from None
                if distributed.world()[1] > 1:
                    raise InputError(
                        f'{path}: not found in {root} (--download_dir); start once without torchrun to download it'
                    ) from None
    if split == 'val':
        return None
    raise InputError(f'{path}: {name} cannot be opened as a data set of labelled images ({problem})')


def check_readable(source, path, in_chans, tries=16):
    """Decode images from the start of a source until one succeeds; InputError if none of the first does."""
    for index in range(min(len(source), tries)):
        try:
            image = source[index][0]
        except ValueError as error:
            problem = error
            continue
        if image.shape[0] != in_chans:
            raise InputError(f'{path}: its images have {image.shape[0]} channels, but --in_chans is {in_chans}')
        return
    raise InputError(f'{path}: none of its first {index + 1} images can be read; {problem}')


# --- Samples, and which of them a process sees ----------------------------------------------------------------


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
    """(epoch, index) -> (transformed image (C, H, W), noise or label, problem).

    The noise, for masks, is (L,) in [0, 1); without num_patches there is the label. The problem is '', or where the
    image could not be read and another took its place, a line of path, tab, reason for each that could not.
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
        return self.transform(image), noise, problem

    def read(self, epoch, index, tries=100):
        """source[index] and '', or one drawn from the others and the problem. RunError if none can be read."""
        problems, others = [], None
        while len(problems) < tries:
            try:
                return *self.source[index], '\n'.join(problems)
            except ValueError as error:
                problems.append(describe(error, self.source.path(index)))
                others = others or np.random.default_rng((self.seed, epoch, index))
                index = int(others.integers(len(self.source)))
        last = problems[-1].replace('\t', ': ')
        raise RunError(f'{tries} images in a row cannot be read; {last}')


def describe(error, path):
    """A line of path, tab, reason, from the error of reading path."""
    return f'{path}\t{str(error).removeprefix(f"{path}: ")}'.replace('\n', ' ')


class BadImages:
    """The images that a loader found unreadable: how many, and in output_dir/bad_images.txt which, each path once.

    The file is that of all processes, epochs and resumed runs. Without output_dir there is none.
    """

    def __init__(self, num_images, max_bad, output_dir=None):
        self.num_images, self.max_bad = num_images, max_bad
        self.file = output_dir and os.path.join(output_dir, 'bad_images.txt')
        self.count, self.lines = 0, {}  # by path

    def add(self, problems):
        """Count the samples whose problem is not '', and write the paths that are new."""
        problems = [problem for problem in problems if problem]
        self.count += len(problems)
        lines = {line.split('\t')[0]: line for problem in problems for line in problem.split('\n')}
        new = {path: line for path, line in lines.items() if path not in self.lines}
        self.lines |= new
        if not new or not self.file:
            return
        try:
            with open(self.file, 'a+', encoding='utf-8', errors='surrogateescape', newline='\n') as file:
                fcntl.lockf(file, fcntl.LOCK_EX)
                file.seek(0)
                written = {line.split('\t')[0] for line in file.read().split('\n')}
                file.writelines(f'{line}\n' for path, line in new.items() if path not in written)
        except OSError as error:  # the number is known all the same
            print(f'{self.file}: {error.strerror}')

    def check(self, count):
        """Stop all processes if count, the sum over them, is above the limit: rank 0 raises RunError, others exit."""
        if count > self.max_bad * self.num_images or count == self.num_images:
            example = next(iter(self.lines.values()), '').replace('\t', ': ')
            where = f'see {self.file}' if self.file else example
            message = (
                f'{count} of {self.num_images} images cannot be read, more than --max_bad {self.max_bad:g}; {where}'
            )
            raise RunError(message) if distributed.world()[0] == 0 else SystemExit(1)


class BatchStream(torch.utils.data.Sampler):
    """Which (epoch, index) keys one process sees, micro-batch by micro-batch, from one optimiser step to another.

    The images of a step are total_batch consecutive ones of the epoch's permutation, whatever the number of
    processes and the batch per device. Each epoch drops what does not fill a step, as MAE does.
    """

    def __init__(self, num_samples, total_batch, batch_size, seed, start, stop, rank=0, world_size=1):
        self.num_samples, self.total_batch, self.batch_size, self.seed = num_samples, total_batch, batch_size, seed
        self.start, self.stop, self.rank, self.world_size = start, stop, rank, world_size
        self.steps_per_epoch = num_samples // total_batch

    def __len__(self):
        return (self.stop - self.start) * self.total_batch // (self.batch_size * self.world_size)

    def __iter__(self):
        order = None
        for step in range(self.start, self.stop):
            epoch, position = divmod(step, self.steps_per_epoch)
            if order is None or position == 0:
                order = np.random.default_rng((self.seed, epoch)).permutation(self.num_samples)
            images = order[position * self.total_batch : (position + 1) * self.total_batch]
            for micro_batch in images.reshape(-1, self.batch_size)[self.rank :: self.world_size]:
                yield [(epoch, index) for index in micro_batch.tolist()]


def fixed_batches(num_samples, batch_size, rank=0, world_size=1):
    """Keys of every sample once, in order, shared out over the processes; always of epoch 0, so nothing varies."""
    keys = [(0, index) for index in range(rank, num_samples, world_size)]
    return [keys[i : i + batch_size] for i in range(0, len(keys), batch_size)]


def split_batch(total, per_device, world_size):
    """Total batch -> (images on a device at a time, accumulation steps): total = per device x processes x steps.

    Raises:
        InputError: if it does not divide; it says which numbers would.
    """
    if total % world_size:
        near = [n for n in (total // world_size * world_size, -(-total // world_size) * world_size) if n]
        raise InputError(
            f'--total_batch_size {total} cannot be split over {world_size} processes; '
            f'{" or ".join(map(str, dict.fromkeys(near)))} can'
        )
    share = total // world_size
    per_device = per_device or share
    if share % per_device:
        fits = [n for n in range(1, share + 1) if share % n == 0]
        near = sorted(sorted(fits, key=lambda n: abs(n - per_device))[:4])
        raise InputError(
            f'--total_batch_size {total} is not --batch_size {per_device} x {world_size} processes x a '
            f'whole number of accumulation steps; --batch_size {", ".join(map(str, near))} would do'
        )
    return per_device, share // per_device


def cores():
    """CPU cores of this machine over its training processes."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    return max(1, count // int(os.environ.get('LOCAL_WORLD_SIZE', 1)))


def default_workers():
    return min(16, cores())


class Loader:
    """Batches on the device: (images (N, C, H, W) normalised float, noise or labels), loaded ahead by worker processes.

    batch_keys: an iterable of lists of (epoch, index). statistics: (mean, std), as pixel_statistics gives them.
    bad: BadImages that counts those that could not be read. With leave_out, for evaluation, what took their place is
    left out of the batch.
    """

    def __init__(self, samples, batch_keys, device, statistics, num_workers=None, bad=None, leave_out=False):
        self.device, self.bad, self.leave_out = device, bad or BadImages(len(samples), 1.0), leave_out
        self.mean, self.std = (torch.tensor(values, device=device) for values in statistics)
        num_workers = default_workers() if num_workers is None else num_workers
        self.batches = torch.utils.data.DataLoader(
            samples,
            batch_sampler=batch_keys,
            pin_memory=device.type == 'cuda',
            prefetch_factor=4 if num_workers else None,
            **worker_options(num_workers),
        )

    def __iter__(self):
        for images, other, problems in self.batches:
            self.bad.add(problems)
            if self.leave_out and any(problems):
                good = torch.tensor([not problem for problem in problems])
                images, other = images[good], other[good]
            if len(images):
                images, other = (x.to(self.device, non_blocking=True) for x in (images, other))
                yield normalise(images, self.mean, self.std), other


def worker_options(num_workers):
    """For a DataLoader: workers that stay for the next pass, and on Linux share the list of images with its maker."""
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


# --- Waiting for data -----------------------------------------------------------------------------------------


class Waiting:
    """How long the device stood still within `with waiting:` blocks. A GPU may be busy while its process waits."""

    def __init__(self, device):
        self.device, self.spans = device, []

    def now(self):
        if self.device.type != 'cuda':
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()  # reached once all that was asked of the GPU before is done
        return event

    def __enter__(self):
        self.began = self.now()

    def __exit__(self, *_):
        self.spans.append((self.began, self.now()))

    def seconds(self):
        """The sum since the last call; on a GPU only after waiting for it."""
        spans, self.spans = self.spans, []
        on_gpu = self.device.type == 'cuda'
        return sum(began.elapsed_time(ended) / 1000 if on_gpu else ended - began for began, ended in spans)


def advice(share, source, args, size):
    """What to do where a device waits for data for this share of the time; size is that of the images it gets."""
    workers = default_workers() if args.num_workers is None else args.num_workers
    if workers == 0:
        remedy = f'images are loaded between the steps; --num_workers {default_workers()} loads them meanwhile'
    elif workers < cores():
        remedy = f'--num_workers {cores()}, one for each CPU core of this process, may help; now they are {workers}'
    elif getattr(args, 'crop', None) == 'simple' and isinstance(source, ImageFiles) and resizes(source, size):
        sides = ' '.join(map(str, dict.fromkeys(size)))
        remedy = f'resize the images once: python -m util.resize {args.data_path} COPY --size {sides}'
    else:
        remedy = f'its {workers} workers have no CPU core to spare; more of them, or a faster disk, would help'
    return f'The device waits for data for {share:.0%} of the time: {remedy}'


def resizes(source, size):
    """Whether the first image of a source is resized in every epoch."""
    try:
        image = source[0][0]
    except ValueError:
        return True
    return Cover(size)(image) is not image
