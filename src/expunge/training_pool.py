"""Make reference models in as many processes as there are, each of them once, whoever else is at it.

The folder is the queue: every process goes through all jobs and takes those that nobody holds the lock of. So processes
share the work without a server, whether they belong to one call or to several, and a call that is killed and given again
goes on where it was.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
import pickle
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from expunge.core import Refused, RunFailed
from expunge.progress import progress
from expunge.registry import need_extra
from expunge.run import writing
from expunge.shelf import Job, Made, Making, Shelf, said
from expunge.weights import packed


def make_all(
    shelf: Shelf, work: Making, jobs: Sequence[Job], workers: int, ray: str | None, label: str
) -> tuple[dict[str, Made], set[str]]:
    """Every model of the jobs, by key, made where it is not there yet; and the keys of those that this call made.

    Args:
        shelf, work, jobs: where, from what, which.
        workers: processes on this machine, each with one thread; with 1 the work is done in this process.
        ray: the address of a Ray cluster, which takes the place of the processes.
        label: of the progress bar.

    Raises:
        RunFailed: where a model cannot be made, or a process dies; what is finished is kept.
    """
    known = {job.key: made for job in jobs if (made := shelf.found(job)) is not None}
    before = set(known)
    todo = [job for job in jobs if job.key not in known or work.missing(known[job.key])]
    todo = list({job.key: job for job in todo}.values())
    keys = {job.key for job in jobs}

    def done() -> int:
        return sum(shelf.finished(key) for key in keys)

    if todo:
        try:
            with writing(shelf.folder), _shown(label, len(keys), done):
                if ray is not None:
                    _on_ray(ray, shelf, work, todo)
                elif workers > 1 and len(todo) > 1:
                    _in_processes(shelf, work, todo, workers)
                else:
                    _here(shelf, work, todo)
        except RunFailed as error:
            raise RunFailed(
                f"{error}; {done()} of {len(keys)} models are finished and kept, the same call goes on from there"
            ) from error
        known = {job.key: made for job in jobs if (made := shelf.found(job)) is not None}
    lost = [job.label for job in jobs if job.key not in known]
    if lost:
        raise RunFailed(f"{lost[0]} was finished and is gone from {shelf.folder}: does anything else write there?")
    return known, keys - before


def work_through(shelf: Shelf, work: Making, jobs: Sequence[Job]) -> None:
    """Make what nobody else is making; then wait for what others are making, and make it should they fail."""
    waiting = list(jobs)
    for patience in (0, -1):
        left = []
        for job in waiting:
            try:
                with shelf.lock(job.key).acquire(timeout=patience):
                    _finish(shelf, work, job)
            except Timeout:
                left.append(job)
        waiting = left


def _finish(shelf: Shelf, work: Making, job: Job) -> None:
    """Make one model and what it says, as far as they are not there. Under its lock."""
    made, model = shelf.found(job), None
    if made is None:
        model, record = work.model(job, None if job.start is None else shelf.weights(job.start))
        made = shelf.keep(job, packed(model), record)
    names = work.missing(made)
    if names:
        model = work.opened(shelf.check(made), job) if model is None else model
        work.keep(made, work.said(model, names))


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Sums in one order: a model is the same to the bit whoever makes it, and processes do not get into each other's way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _here(shelf: Shelf, work: Making, jobs: Sequence[Job]) -> None:
    with _one_thread():
        work_through(shelf, work, jobs)


def sent(what: Any) -> bytes:
    """Anything as bytes for another process; functions of notebooks, lambdas and run files go along as code.

    Raises:
        Refused: for what cannot be sent (an open file, a lock) with one sentence.
    """
    import cloudpickle

    try:
        return cloudpickle.dumps(what)
    except Exception as error:  # pickle and the user's own __reduce__ raise any kind
        raise Refused(
            f"the training function, its data or the task cannot be sent to another process ({said(error)}): define what it "
            f"needs inside it, or give workers=1"
        ) from error


def _in_processes(shelf: Shelf, work: Making, jobs: Sequence[Job], workers: int) -> None:
    """The same in several processes. Each goes through all jobs: the locks share them out."""
    import joblib

    payload = sent((shelf, work, list(jobs)))
    try:
        with joblib.parallel_config(backend="loky", n_jobs=workers, inner_max_num_threads=1):
            joblib.Parallel(batch_size=1)(
                joblib.delayed(_serve)(payload, os.getpid(), os.getcwd()) for _ in range(min(workers, len(jobs)))
            )
    except BrokenProcessPool as error:
        raise RunFailed("a worker process died: was there too little memory, or did its code end it?") from error


def _serve(payload: bytes, parent: int, folder: str) -> None:
    """In a process of its own, which may have served a call from another folder before."""
    _WATCH.start(parent)
    os.chdir(folder)
    shelf, work, jobs = pickle.loads(payload)
    _here(shelf, work, jobs)


class _Watch:
    """Ends this process when its parent is gone: nobody would look at its work, and somebody may have started again."""

    def __init__(self) -> None:
        self.parent: int | None = None

    def start(self, parent: int) -> None:
        if self.parent != parent and os.getppid() == parent:
            self.parent = parent
            threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while os.getppid() == self.parent:
            time.sleep(0.2)
        os._exit(1)


_WATCH = _Watch()


@contextlib.contextmanager
def _shown(label: str, total: int, done: Callable[[], int]) -> Iterator[None]:
    """A progress bar that looks into the folder: it counts what any process finishes."""
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(0.5):
            show(done())

    with progress(label, total) as show:
        thread = threading.Thread(target=contextvars.copy_context().run, args=(look,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def _on_ray(address: str, shelf: Shelf, work: Making, jobs: Sequence[Job]) -> None:
    """On a Ray cluster. This process holds the locks and writes the files, so that no folder needs to be shared."""
    ray = need_extra("ray", "scale", "training on a Ray cluster")
    own = not ray.is_initialized()
    if own:
        try:
            _reachable(address)
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except (OSError, ValueError, RuntimeError) as error:
            raise Refused(
                f"cannot use the Ray cluster at {address!r}: {said(error)}; start one, or leave ray out"
            ) from error
    try:
        payload = ray.put(sent(work))
        remote = ray.remote(num_cpus=1, max_retries=1)(_remote)
        _collect(ray, remote, payload, shelf, work, [job for job in jobs if shelf.found(job) is None])
    finally:
        if own:
            ray.shutdown()
    _here(shelf, work, jobs)  # what another process was making, and outputs that are missing


def _reachable(address: str) -> None:
    """Try host:port for five seconds: Ray itself tries for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()


def _collect(ray: Any, remote: Any, payload: Any, shelf: Shelf, work: Making, jobs: Sequence[Job]) -> None:
    """Keep twice as many tasks under way as the cluster has processors; write each model as it comes."""
    window = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
    waiting = list(jobs)
    under_way: dict[Any, tuple[Job, FileLock]] = {}
    with contextlib.ExitStack() as locks:
        while waiting or under_way:
            while waiting and len(under_way) < window:
                job = waiting.pop(0)
                lock = shelf.lock(job.key)
                with contextlib.suppress(Timeout):
                    lock.acquire(timeout=0)
                    locks.callback(lock.release)
                    start = None if job.start is None else shelf.weights(job.start).read_bytes()
                    under_way[remote.remote(payload, sys.path, job, start)] = (job, lock)
            if not under_way:
                return
            task = ray.wait(list(under_way), num_returns=1)[0][0]
            job, lock = under_way.pop(task)
            try:
                failed, content, record, outputs = ray.get(task)
            except ray.exceptions.RayError as error:
                cause = getattr(error, "cause", None) or error
                raise RunFailed(f"{job.label} could not be made on the Ray cluster: {said(cause)}") from error
            if failed:
                raise RunFailed(failed)
            work.keep(shelf.keep(job, content, record), outputs)
            lock.release()


def _remote(
    payload: bytes, paths: list[str], job: Job, start: bytes | None
) -> tuple[str, bytes, dict[str, Any], dict[str, Any]]:
    """In a Ray worker: (what went wrong or "", weights, record, what the model says)."""
    sys.path += [path for path in paths if path not in sys.path]  # modules beside the user's script, where it sees them
    work: Making = pickle.loads(payload)
    with _one_thread(), tempfile.TemporaryDirectory() as folder:
        path = None if start is None else Path(folder) / "start.safetensors"
        if path is not None and start is not None:
            path.write_bytes(start)
        try:
            model, record = work.model(job, path)
            return "", packed(model), record, work.said(model, list(work.addresses))
        except RunFailed as error:
            return str(error), b"", {}, {}
