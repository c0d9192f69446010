"""Addresses of remote file systems, such as s3://bucket/folder: where they may stand, and without credentials."""


def holds_credentials(address: str) -> bool:
    """Whether an address has a user or password, a query of a signed URL, or a chain of file systems in it.

    Such an address must not be repeated in a message: what comes before the @, or behind the ?, is a secret.
    """
    scheme, separator, rest = address.partition("://")
    query = scheme.lower() in ("http", "https") and "?" in rest
    return bool(separator) and ("@" in rest.split("/")[0] or query or "x-amz-" in rest.lower() or "::" in address)


def refuse_address(path: str, key: str) -> None:
    """Raises ValueError if `path` is the address of a remote file system, where no model of a run is read."""
    if "://" in path:
        shown = "an address that holds credentials" if holds_credentials(path) else f"the address {path}"
        raise ValueError(
            f"{key} is {shown}, and models are read from folders; copy it to a disk first, such as by `aws s3 sync "
            "ADDRESS FOLDER`; a mirror of checkpoints is laid out as a run"
        )
