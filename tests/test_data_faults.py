"""What is wrong with users' images, and with the processes that load them: said, counted, survived or refused."""

import io
import multiprocessing
import os
import re
import shutil
import signal
import struct
import threading
import time
import zlib

import numpy as np
import pytest
import torch
from conftest import Result, command
from PIL import Image

from util import data
from util.args import RunError, end_workers


def jpeg(size=(40, 30)):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)).save(buffer, 'JPEG')
    return buffer.getvalue()


def png_that_claims(width, height):
    """A PNG of few bytes whose header promises so many pixels."""

    def chunk(kind, content):
        return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))

    header = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(b'')) + chunk(b'IEND', b'')


# name: (bytes, or what makes the path, and the reason in bad_images.txt)
FAULTS = {
    'truncated.jpg': (jpeg()[:-700], 'truncated'),
    'header_only.jpg': (jpeg()[:200], ''),
    'empty.png': (b'', 'empty'),
    'text.jpg': (b'404 Not Found\n', 'no image of a known format'),
    'flipped.png': (png_that_claims(8, 8), ''),
    'bomb.png': (png_that_claims(30_000, 30_000), 'decompression bomb'),
    'narrow.png': (png_that_claims(1, 2_000), '1 x 2000 pixels are too long and narrow'),
    'pickle.npy': (lambda path: np.save(path, np.array([print], dtype=object)), 'allow_pickle=False'),
    'folder.png': (os.mkdir, 'Is a directory'),
    'pipe.png': (os.mkfifo, 'empty'),
    'vanished.png': (lambda path: None, 'No such file'),
    'loop.png': (lambda path: os.symlink(path, path), 'Too many levels'),
    os.fsdecode(b'not \xff UTF-8.png'): (b'', 'empty'),
}


def make(folder, name):
    what = FAULTS[name][0]
    path = os.path.join(folder, name)
    if isinstance(what, bytes):
        with open(path, 'wb') as file:
            file.write(what)
    else:
        what(path)
    return path


@pytest.fixture
def faulty(folder, tmp_path):
    """A folder with train/ and val/, each the good images and after them, in name, every fault: (root, good root)."""
    root = tmp_path / 'faulty'
    shutil.copytree(folder, root)
    for split in ('train', 'val'):
        for name in FAULTS:
            make(next((root / split).iterdir()), name)
    return root


@pytest.mark.parametrize('name', FAULTS, ids=ascii)
def test_a_fault_is_said_and_replaced(name, folder, tmp_path):
    good = sorted(str(path) for path in (folder / 'train').rglob('*.png'))[:5]
    bad = make(tmp_path, name)
    source = data.ImageFiles('', [os.fsencode(path) for path in (*good, bad)], 3)
    with pytest.raises(ValueError, match=f'{re.escape(bad)}: .*{FAULTS[name][1]}'):
        source[5]
    samples = data.Samples(source, lambda image: image, 4, seed=1)
    (image, noise, problem), again = samples[3, 5], data.Samples(source, lambda image: image, 4, seed=1)[3, 5]
    assert all(re.match(f'{re.escape(bad)}\t.*{FAULTS[name][1]}', line) for line in problem.split('\n'))
    assert any(torch.equal(image, source[index][0]) for index in range(5))
    assert torch.equal(image, again[0]) and torch.equal(noise, again[1])
    stand_ins = {tuple(samples[epoch, 5][0].flatten().tolist()) for epoch in range(20)}
    assert len(stand_ins) > 1  # not always the same


def test_a_source_without_any_good_image_ends(tmp_path):
    source = data.ImageFiles('', [os.fsencode(make(tmp_path, name)) for name in ('empty.png', 'text.jpg')], 3)
    with pytest.raises(RunError, match='100 images in a row cannot be read; .*(empty|no image)'):
        data.Samples(source, lambda image: image)[0, 0]
    for bad in (data.BadImages(2, 1.0), data.BadImages(300, 0.01)):
        with pytest.raises(RunError, match=f'of {bad.num_images} images cannot be read'):
            bad.check(min(4, bad.num_images))


@pytest.mark.parametrize('workers', ['0', '2'])
def test_a_run_with_every_fault(workers, faulty, pretrain):
    """A link that loops to a folder above is no image; 'vanished' and the folder are not listed."""
    os.symlink(faulty / 'train', next((faulty / 'train').iterdir()) / 'up')
    flags = ('--data_path', str(faulty), '--num_workers', workers, '--max_bad', '0.6', '--epochs', '2')
    result = pretrain('run', *flags, '--total_batch_size', '64')
    listed = {name for name in FAULTS if name not in ('vanished.png', 'folder.png')}
    with open(result.output_dir / 'bad_images.txt', encoding='utf-8', errors='surrogateescape') as file:
        paths = [line.split('\t')[0] for line in file.read().splitlines()]
    assert len(paths) == len(set(paths))
    assert {os.path.basename(path) for path in paths} <= listed
    counts = [entry for entry in result.entries if 'val_loss' in entry]
    assert [entry['val_bad_images'] for entry in counts] == [len(listed)] * 2


def test_evaluation_leaves_bad_images_out(faulty, folder, pretrain, finetune, linprobe, capsys):
    """Accuracy and neighbours are those of the folder without the faults."""
    jobs = [
        (linprobe, '--knn', '5', pretrain('a', '--epochs', '1')),
        (finetune, '--eval', finetune('b', '--epochs', '1')),
    ]
    printed = {faulty: [], folder: []}
    for root, lines in printed.items():
        for job, *flags, weights in jobs:
            capsys.readouterr()
            init_from = ('--init_from', str(weights.output_dir / 'checkpoint-last.pth'))
            job('measured', *flags, *init_from, '--data_path', str(root), '--max_bad', '0.5')
            lines += re.findall(r'top-1 .* on \d+ images', capsys.readouterr().out)
    assert printed[faulty] == printed[folder] and len(printed[folder]) == 3


def test_the_limit_in_evaluation(faulty, finetune, capsys):
    weights = ('--init_from', str(finetune('run', '--epochs', '1').output_dir / 'checkpoint-last.pth'))
    with pytest.raises(SystemExit) as exit:
        finetune('eval', '--eval', *weights, '--data_path', str(faulty))
    assert exit.value.code == 1
    assert 'images cannot be read, more than --max_bad 0.01' in capsys.readouterr().err


def test_two_processes_of_which_one_can_read_nothing(folder, small_run, tmp_path, pretrain):
    images = sorted(map(str, (folder / 'train').rglob('*.png')))
    (tmp_path / 'val.txt').write_text('\n'.join([images[0], make(tmp_path, 'text.jpg')]))
    flags = ('--val_path', str(tmp_path / 'val.txt'), '--max_bad', '0.5', '--epochs', '1')
    done = command('main_pretrain.py', *small_run('two', *flags), torchrun=2)
    assert done.returncode == 0, done.stderr
    two, one = (
        [entry for entry in result.entries if 'val_loss' in entry]
        for result in (Result(tmp_path / 'two'), pretrain('one', *flags))
    )
    assert two[0]['val_bad_images'] == one[0]['val_bad_images'] == 1
    assert two[0]['val_loss'] == pytest.approx(one[0]['val_loss'], rel=1e-5)


def test_the_limit_counts_over_processes(folder, small_run, tmp_path):
    images = sorted(map(str, (folder / 'train').rglob('*.png')))[:30]
    bad = [make(tmp_path, name) for name in ('text.jpg', 'empty.png')]
    (tmp_path / 'list.txt').write_text('\n'.join([*images, *bad]))
    flags = small_run('run', '--data_path', str(tmp_path / 'list.txt'), '--max_bad', '0.05', '--total_batch_size', '32')
    done = command('main_pretrain.py', *flags, torchrun=2)
    assert done.returncode == 1
    assert done.stderr.count('2 of 32 images cannot be read, more than --max_bad 0.05') == 1
    assert len((tmp_path / 'run/bad_images.txt').read_text().splitlines()) == 2


# --- Loader processes -------------------------------------------------------------------------------------------


@pytest.fixture
def in_worker(monkeypatch):
    """in_worker(action): every read of an image in a loader's worker does action(worker's number) first."""
    read = data.ImageFiles.__getitem__

    def install(action):
        def act_and_read(source, index):
            worker = torch.utils.data.get_worker_info()
            if worker is not None:
                action(worker.id)
            return read(source, index)

        monkeypatch.setattr(data.ImageFiles, '__getitem__', act_and_read)

    return install


@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGBUS])
def test_a_worker_that_dies_is_reported(number, in_worker, pretrain, capfd):
    in_worker(lambda worker: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit) as exit:
        pretrain('run', '--num_workers', '2')
    error = capfd.readouterr().err
    assert exit.value.code == 1
    assert re.search(r'error: DataLoader worker .*(killed|exited|bus error)', error, re.IGNORECASE), error
    assert 'Traceback' not in error and not multiprocessing.active_children()


def test_a_worker_that_hangs_does_not_keep_a_failed_run(in_worker, pretrain, capfd):
    def action(worker):
        if worker == 1:
            time.sleep(600)
        raise RunError('the disk is gone')

    in_worker(action)
    with pytest.raises(SystemExit) as exit:
        pretrain('run', '--num_workers', '2')
    assert exit.value.code == 1 and 'error: the disk is gone' in capfd.readouterr().err
    assert not multiprocessing.active_children()


def test_a_worker_that_is_killed_with_a_lock_does_not_keep_the_run():
    """The loader takes the same lock when it is deleted."""
    batches = iter(torch.utils.data.DataLoader(range(100), num_workers=1))
    next(batches)
    batches._workers_done_event._cond.acquire()  # as a worker does each time it asks whether to end
    end_workers()
    done = threading.Thread(target=batches._shutdown_workers, daemon=True)
    done.start()
    done.join(30)
    assert not done.is_alive()


def test_workers_leave_signals_to_the_run(in_worker, pretrain):
    whole = pretrain('whole', '--epochs', '1')

    def action(worker):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(os.getpid(), number)

    in_worker(action)
    assert pretrain('signals', '--epochs', '1', '--num_workers', '2').losses == whole.losses
