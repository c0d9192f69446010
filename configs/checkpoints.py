"""Config section of a run's checkpoints: when they are written, which are kept, and where copies of them are."""

from pydantic import Field, field_validator, model_validator

from configs.addresses import holds_credentials
from configs.section import Section


class CheckpointConfig(Section):
    """Steps at which checkpoints are written, which of them are kept, and where they are copied to. One is always
    written at the end."""

    every: int = Field(default=100, ge=1)
    """The number of steps from one checkpoint to the next."""
    keep: int = Field(default=2, ge=1)
    """The number of newest checkpoints that are kept."""
    keep_every: int = Field(default=0, ge=0)
    """Checkpoints at multiples of this step are never deleted; it must be a multiple of every; 0: none."""
    mirror: str | None = None
    """The folder or address, such as s3://bucket/runs/name, that checkpoints are copied to in the background, and that
    a run goes on from if its own folder is lost; credentials are those of the environment; left out, there is none."""
    mirror_seconds: float = Field(default=600.0, ge=0)
    """The time that the end of a run waits for the copy of the last checkpoint, in seconds; 30 at most after a
    signal."""

    local_dir: str | None = None
    """The folder on a disk that each node has for itself, an absolute path, where checkpoints are written between those
    in run.dir, with a copy on the next node's; after the loss of a node the run goes on from them; left out, there are
    none."""
    local_every: int = Field(default=0, ge=0)
    """The number of steps from one checkpoint in local_dir to the next, where there is none in run.dir; every is a
    multiple of it; 0: none."""

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is written after a step, in run.dir or in local_dir."""
        return step % self.every == 0 or (self.local_every > 0 and step % self.local_every == 0)

    @field_validator("mirror", "local_dir")
    @classmethod
    def _empty_is_left_out(cls, value: str | None) -> str | None:
        """Turns "" into None, so that an override can unset a key of the file."""
        return value or None

    @field_validator("local_dir")
    @classmethod
    def _local_dir_is_absolute(cls, local_dir: str | None) -> str | None:
        if local_dir is not None and not local_dir.startswith("/"):
            raise ValueError(
                f"checkpoint.local_dir = {local_dir!r} is no absolute path; name a folder on a disk that each node has "
                "for itself, such as /scratch/checkpoints"
            )
        return local_dir

    @model_validator(mode="after")
    def _local_checkpoints_are_between_the_others(self) -> "CheckpointConfig":
        if (self.local_dir is None) != (self.local_every == 0):
            missing = "checkpoint.local_every" if self.local_dir else "checkpoint.local_dir"
            raise ValueError(f"{missing} is missing: local checkpoints need both local_dir and local_every; set it")
        if self.local_every and (self.every % self.local_every or self.every == self.local_every):
            raise ValueError(
                f"checkpoint.every = {self.every} is no multiple of checkpoint.local_every = {self.local_every}, by "
                "which local checkpoints come between the others; set checkpoint.every="
                f"{max(2, round(self.every / self.local_every)) * self.local_every}"
            )
        return self

    @field_validator("mirror")
    @classmethod
    def _mirror_can_be_written(cls, mirror: str | None) -> str | None:
        if mirror is None:
            return None
        scheme, separator, rest = mirror.partition("://")
        if holds_credentials(mirror) or (separator and "?" in mirror):
            raise ValueError(  # without the address, which has a secret in it
                f"checkpoint.mirror is an address with {scheme}:// that holds credentials, a query or a chain of file "
                "systems, which would be written into the run's folder; give the plain address, and the credentials "
                "in the environment (AWS_ACCESS_KEY_ID...)"
            )
        if not mirror.strip("/ ") or (separator and not rest.strip("/")):
            raise ValueError(f"checkpoint.mirror = {mirror!r} names no folder; write one like s3://bucket/runs/name")
        if scheme.lower() in ("http", "https"):
            raise ValueError(
                f"checkpoint.mirror = {mirror!r} cannot be written to over HTTP; name a folder, or an address of an "
                "object store like s3://bucket/runs/name"
            )
        return mirror.rstrip("/")

    @model_validator(mode="after")
    def _multiples_are_saved(self) -> "CheckpointConfig":
        if self.keep_every % self.every:
            raise ValueError(
                f"checkpoint.keep_every = {self.keep_every} is not a multiple of checkpoint.every = {self.every}; only "
                "saved steps can be kept; set checkpoint.keep_every="
                f"{max(1, round(self.keep_every / self.every)) * self.every}"
            )
        return self
