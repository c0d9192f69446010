"""Layout-independent checkpoints: their form on disk (`storage`), and how ZeRO's state becomes one (`state`)."""

from pretrain.checkpoint.storage import find_newest, latest, read_full, read_manifest

__all__ = ["find_newest", "latest", "read_full", "read_manifest"]
