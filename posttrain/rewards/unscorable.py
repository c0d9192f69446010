"""The exception by which a reward says that it cannot judge an attempt."""


class Unscorable(Exception):
    """An attempt that cannot be judged; the message is the reason by which reports count, so it names no attempt."""
