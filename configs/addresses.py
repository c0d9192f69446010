"""Addresses of remote file systems in a config, such as s3://bucket/folder, which must not hold credentials."""


def holds_credentials(address: str) -> bool:
    """Whether an address has a user or password, a query of a signed URL, or a chain of file systems in it.

    Such an address must not be repeated in a message: what comes before the @, or behind the ?, is a secret.
    """
    scheme, separator, rest = address.partition("://")
    query = scheme.lower() in ("http", "https") and "?" in rest
    return bool(separator) and ("@" in rest.split("/")[0] or query or "x-amz-" in rest.lower() or "::" in address)
