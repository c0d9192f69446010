"""Checkpoints that any layout can read: files on disk (`storage`), and ZeRO's state as pieces of them (`state`)."""

from pretrain.checkpoint.storage import find_newest, latest, read_full, read_manifest

__all__ = ["find_newest", "latest", "read_full", "read_manifest"]
