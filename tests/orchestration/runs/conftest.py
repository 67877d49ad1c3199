"""Each test of a run's folder runs on a disk and on a real S3 server."""

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestration.runs.storage import Storage, storage_at

BUCKET = "runs"


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """A real S3 server with a bucket; its address."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
    boto3.client("s3", endpoint_url=url, **keys).create_bucket(Bucket=BUCKET)
    yield url
    server.stop()


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """An address in a bucket that nobody else uses."""
    settings = {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{secrets.token_hex(8)}"


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The path or address of a folder that is not there yet."""
    return str(tmp_path / "place") if request.param == "disk" else str(request.getfixturevalue("s3"))


@pytest.fixture
def storage(place: str) -> Storage:
    return storage_at(place)
