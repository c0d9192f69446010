"""Fetches the newest whole checkpoint of a run's mirror if the run's own folder has none, or an older one.

All ranks take part, each of which fetches its share of the files into the run's folder and compares them with their
checksums; the main rank writes the manifest last and renames the folder. A checkpoint that is damaged in the mirror is
passed over with a warning. Nothing is fetched of a run that trains something else.
"""

import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from configs.files import sync, write_atomic
from configs.folders import check_expanded
from configs.loader import ConfigError
from configs.sealed import CHECKPOINT
from pretrain.checkpoint import storage
from pretrain.checkpoint.mirror import RUN_FILES, Mirror, MirrorError, check_owner, claim, files_of, newest, patiently
from pretrain.checkpoint.storage import MANIFEST, CheckpointError
from pretrain.parallel.groups import Mesh

Fits = Callable[[str, dict[str, Any]], None]  # raises ConfigError if a manifest, named for messages, is another run's


class Fetcher:
    """Fetches checkpoints for a run that starts, from its mirror at `address`.

    The main rank makes one and calls its methods.
    """

    def __init__(self, mesh: Mesh, run_dir: Path, address: str, fits: Fits):
        self._mesh, self._run_dir, self._fits = mesh, run_dir, fits
        self._mirror = _opened(address, run_dir)

    def check_is_new(self) -> None:
        """Raises ConfigError if the mirror of a new run has checkpoints, CheckpointError if it cannot be read."""
        _check_is_new(self._mirror)

    def fetch_newer(self, own: Path | None) -> Path | None:
        """Returns the fetched checkpoint if the mirror has a whole one of a later step than `own`, else None.

        Raises ConfigError if the mirror is another run's, and CheckpointError if it cannot be read and `own` is None.
        """
        try:
            return self._fetch_newer(own)
        except MirrorError as error:
            if own is None:
                raise _unreachable(self._mirror.address, error) from None
            print(
                f"warning: {_unreachable(self._mirror.address, error)}; going on from {own}, the newest in the run's "
                "own folder",
                flush=True,
            )
            return None

    def _fetch_newer(self, own: Path | None) -> Path | None:
        stop = threading.Event()
        if own is not None:
            check_owner(self._mirror, self._run_dir)
        step = int(storage.read_manifest(own)["step"]) if own else -1
        candidates = patiently(lambda: list(newest(self._mirror, step)), stop)
        for number, (found, manifest) in enumerate(candidates):
            try:
                return self._fetch(found, manifest, own)
            except CheckpointError as error:
                print(f"warning: {error}; an earlier checkpoint is looked for", flush=True)
                if own is None and number == len(candidates) - 1:
                    raise CheckpointError(
                        f"no checkpoint in {self._mirror.address} is whole; remove them there to start from the "
                        "beginning, or name another checkpoint.mirror"
                    ) from None
        return None

    def _fetch(self, step: int, manifest: bytes, own: Path | None) -> Path:
        """Fetches one checkpoint and publishes it. Raises CheckpointError if it is damaged."""
        began, where = time.monotonic(), self._mirror.named(step)
        inside = f"checkpoints/step_{step}"
        files = files_of(manifest, where, lambda name: self._mirror.read(f"{inside}/{name}"))
        self._fits(where, CHECKPOINT.read(manifest, Path(MANIFEST)))
        final = storage.directory(self._run_dir, step)
        temporary = storage.temporary_name(final)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        world, names = self._mesh.layout.world_size, sorted(files)
        faults: list[dict[str, str]] = []
        for first in range(0, len(names), world):  # a file for each rank, so that none waits long for the others
            wave = {name: files[name] for name in names[first : first + world]}
            request = {"fetch": self._mirror.address, "step": step, "into": str(temporary), "files": wave}
            self._mesh.gather_json(request)
            faults += filter(None, self._mesh.gather_json(fetch_share(self._mesh.rank, request)))
            if faults:
                shutil.rmtree(temporary, ignore_errors=True)
                raise (MirrorError if "mirror" in faults[0] else CheckpointError)(next(iter(faults[0].values())))
        put_whole(temporary, final, manifest)
        claim(self._mirror, self._run_dir)
        for name in RUN_FILES:
            if (content := patiently(partial(self._mirror.read, name), threading.Event())) is not None:
                write_atomic(self._run_dir / name, content)
        size = sum(facts["bytes"] for facts in files.values())
        why = f"its own newest is step {storage.read_manifest(own)['step']}" if own else "it has no checkpoint itself"
        print(
            f"fetched step {step} from {self._mirror.address} into {self._run_dir}, since {why}: {size / 1e6:.1f} MB "
            f"in {time.monotonic() - began:.1f} s",
            flush=True,
        )
        return final


def newer_manifest(run_dir: Path, address: str, own: Path | None, is_new: bool) -> tuple[str, dict[str, Any]] | None:
    """Returns address and manifest of the checkpoint that a run would fetch; None if its `own` is the newest.

    Only manifests are read. Raises ConfigError and CheckpointError as `Fetcher` does; `is_new` says that the run has
    to be a new one.
    """
    mirror = _opened(address, run_dir)
    if is_new:
        _check_is_new(mirror)
        return None
    step = int(storage.read_manifest(own)["step"]) if own else -1
    try:
        if own is not None:
            check_owner(mirror, run_dir)
        for found, manifest in newest(mirror, step):
            with suppress(ValueError):
                return mirror.named(found), CHECKPOINT.read(manifest, Path(MANIFEST))
    except MirrorError as error:
        if own is None:
            raise _unreachable(address, error) from None
    return None


def _opened(address: str, run_dir: Path) -> Mirror:
    check_expanded(address, "checkpoint.mirror")
    mirror = Mirror(address)
    if mirror.is_local and Path(address).resolve() == run_dir.resolve():
        raise ConfigError(f"checkpoint.mirror = {address!r} is run.dir itself; name another folder, on another disk")
    return mirror


def _check_is_new(mirror: Mirror) -> None:
    try:
        if steps := mirror.steps():
            raise ConfigError(
                f"checkpoint.mirror = {mirror.address!r} holds checkpoints, the newest of step {steps[-1]}, which "
                "--resume no would overwrite; name another folder there, or leave --resume out to go on"
            )
    except MirrorError as error:
        raise _unreachable(mirror.address, error) from None


def claim_mirror(mesh: Mesh, run_dir: Path, address: str) -> None:
    """Notes in a run and in its mirror that they belong together, once nothing refuses the run. Collective.

    Raises ConfigError if the mirror is another run's, and CheckpointError if it cannot be written and the run has no
    checkpoint yet; a run that has one goes on without its mirror, and has said so.
    """
    answer: dict[str, str] = {}
    if mesh.is_main:
        has_checkpoints = bool(storage.steps(run_dir))
        try:
            if has_checkpoints:
                check_owner(Mirror(address), run_dir)
            claim(Mirror(address), run_dir)
        except ConfigError as error:
            answer = {"refused": str(error)}
        except MirrorError as error:
            answer = {} if has_checkpoints else {"failed": str(_unreachable(address, error))}
    answer = mesh.gather_json(answer)[0]
    if answer:
        raise ConfigError(answer["refused"]) if "refused" in answer else CheckpointError(answer["failed"])


def _unreachable(address: str, error: MirrorError) -> CheckpointError:
    return CheckpointError(
        f"checkpoint.mirror = {address!r} cannot be used ({error}), and it may have checkpoints of this run; check the "
        "address, and endpoint and credentials in the environment (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID...), or leave "
        "it out (as an override: checkpoint.mirror=) to go on without it"
    )


def put_whole(temporary: Path, final: Path, manifest: bytes) -> None:
    """Writes the manifest of a checkpoint whose other files are in `temporary`, and renames the folder.

    Raises CheckpointError.
    """
    try:
        write_atomic(temporary / MANIFEST, manifest)
        sync(temporary)
        storage.rename_to_final(temporary, final)
    except OSError as error:
        raise CheckpointError(f"{final} cannot be written: {error.strerror}; free disk space") from None


def fetch_share(rank: int, request: dict[str, Any]) -> dict[str, str] | None:
    """Fetches this rank's file of a request, if there is one for it; returns the fault, of a file or of the mirror."""
    names = sorted(request["files"])
    if rank >= len(names):
        return None
    name, file = names[rank], Path(request["into"], names[rank])
    try:
        mirror = Mirror(request["fetch"])
        inside = f"checkpoints/step_{request['step']}/{name}"
        patiently(partial(mirror.fetch, inside, file, request["files"][name]), threading.Event())
    except CheckpointError as error:
        return {"file": str(error)}
    except MirrorError as error:
        return {"mirror": str(error)}
    except (OSError, ConfigError) as error:
        return {"file": f"rank {rank} cannot fetch {name}: {error}"}
    return None
