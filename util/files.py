"""Finding the files below a folder, and keeping what took long to find."""

import fcntl
import hashlib
import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from util import distributed
from util.args import InputError

THREADS = 16  # folders at a time: on a network each answer takes a while
KEEP_FROM = 1.0  # seconds of search
SETTLED = 2.0  # seconds after which a new change has a new time, in every file system


def find(root, extensions, cache_dir):
    """Names (N,), as bytes relative to root and in order, of the files in root and below that have an extension.

    Links are followed, but not into a folder that they are in; hidden files and folders are left out. What took long
    is kept in cache_dir, and holds as long as no folder gains or loses an entry.

    Raises:
        InputError: if a folder may not be read.
    """
    root = os.fsencode(root)
    cache = cache_file(cache_dir, 'folder', (os.path.realpath(root), extensions))
    with ThreadPoolExecutor(THREADS) as pool:

        def is_current(kept):
            folders = [os.path.join(root, folder) for folder in kept['folders'].tolist()]
            settled = kept['versions'][:, 0].max() < kept['began'] - SETTLED * 1e9
            return settled and np.array_equal(kept['versions'], [now[:2] for now in pool.map(version, folders)])

        one_of_many = distributed.world()[1] > 1  # one of them searches
        found = None if one_of_many or os.path.exists(cache) else search(root, extensions, pool)
        if found is None or time.time_ns() - found['began'] > KEEP_FROM * 1e9:
            found = load_or_build(cache, lambda: found or search(root, extensions, pool), is_current)
    return found['names']


def search(root, extensions, pool):
    """{'names': as find gives them, 'folders': where they are, 'versions': of the folders, 'began': when, in ns}."""
    extensions = tuple(map(os.fsencode, extensions))

    def scan(folder, above):
        """(names, [(folder, folders above it), ...], version) of what lies in a folder; None if it is above itself."""
        now, names, subfolders = version(os.path.join(root, folder)), [], []
        prefix = folder and folder + b'/'
        if now[1:] in above:
            return None
        with os.scandir(os.path.join(root, folder)) as entries:
            for entry in entries:
                name = entry.name
                if name[0] == ord('.'):
                    continue
                if is_folder(entry):
                    subfolders.append((prefix + name, above | {now[1:]}))
                elif name.lower().endswith(extensions):
                    names.append(prefix + name)
        return names, subfolders, now

    names, folders, versions, level, began = [], [], [], [(b'', frozenset())], time.time_ns()
    try:
        with tqdm(desc=os.fsdecode(root), unit=' files', delay=1, disable=None) as bar:
            while level:
                tasks, level = level, []
                for (folder, _), found in zip(tasks, pool.map(scan, *zip(*tasks))):
                    if found is not None:
                        folders.append(folder)
                        names += found[0]
                        level += found[1]
                        versions.append(found[2][:2])
                        bar.update(len(found[0]))
    except OSError as error:
        raise InputError(f'{os.fsdecode(error.filename)}: {error.strerror}') from None
    if (seconds := (time.time_ns() - began) / 1e9) > KEEP_FROM:
        print(f'{os.fsdecode(root)}: {len(names)} files in {len(folders)} folders, found in {seconds:.1f} s')
    names.sort()
    arrays = {'names': np.array(names, dtype=bytes), 'folders': np.array(folders), 'versions': np.array(versions)}
    return arrays | {'began': np.array(began)}


def version(folder):
    """(time of the last change in ns, number, device) of a folder; zeros if it is gone."""
    try:
        status = os.stat(folder)
    except OSError:
        return 0, 0, 0
    return status.st_mtime_ns, status.st_ino % 2**63, status.st_dev


def is_folder(entry):
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


# --- What is kept -----------------------------------------------------------------------------------------------


def cache_file(cache_dir, kind, key):
    """Where what belongs to key is kept."""
    return os.path.join(cache_dir, f'{kind}-index-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.npz')


def load_or_build(cache, build, is_current=lambda arrays: True):
    """{name: array} as kept in the file cache, or, unless that is current, of build(), which is then kept.

    One process builds, while others wait for it.
    """
    try:
        os.makedirs(os.path.dirname(cache), exist_ok=True)
        file = os.fdopen(os.open(cache, os.O_RDWR | os.O_CREAT, 0o644), 'r+b')
        fcntl.lockf(file, fcntl.LOCK_EX)
    except OSError as error:
        print(f'{cache}: {error.strerror}; the index is built anew every time (--download_dir)')
        return build()
    with file:
        try:
            with np.load(file, allow_pickle=False) as arrays:
                arrays = dict(arrays)
            if is_current(arrays):
                return arrays
        except Exception:  # it is new and empty, or was cut off
            pass
        arrays = build()
        try:
            file.seek(0)
            file.truncate()
            np.savez(file, **arrays)
            file.flush()
        except OSError as error:
            print(f'{cache}: {error.strerror}; the index is not kept')
    return arrays
