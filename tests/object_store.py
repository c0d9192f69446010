"""An S3 server on loopback for tests, by moto, and the environment that leads to it."""

import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import boto3
from moto.server import ThreadedMotoServer

KEY_ID, SECRET = "AKIDEXAMPLE", "wJalrXUtnFEMI-not-a-real-key"


@contextmanager
def serve(bucket: str) -> Iterator[tuple[Any, dict[str, str]]]:
    """Context of a server with an empty bucket; yields boto3's client of it, and the variables that clients need."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    # moto keeps what the servers of a process hold in one dictionary, which an earlier one may have left.
    address, region = f"http://{host}:{port}", "us-east-1"
    urllib.request.urlopen(urllib.request.Request(f"{address}/moto-api/reset", method="POST")).close()
    client = boto3.client(
        "s3", endpoint_url=address, region_name=region, aws_access_key_id=KEY_ID, aws_secret_access_key=SECRET
    )
    client.create_bucket(Bucket=bucket)
    try:
        yield (
            client,
            {
                "AWS_ENDPOINT_URL": address,
                "AWS_ACCESS_KEY_ID": KEY_ID,
                "AWS_SECRET_ACCESS_KEY": SECRET,
                "AWS_DEFAULT_REGION": region,
            },
        )
    finally:
        server.stop()
