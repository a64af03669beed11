"""A tiny model, many tiny tars, and an S3 server on loopback."""

import time
from collections.abc import Iterator

import pytest

from tests.engines.runs import NUM_SHARDS, PAIRS_PER_SHARD, Tensors, World, tensors, write_pairs
from tests.launching import Zygote
from tests.light import save_light_pipeline


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    return World(
        model=save_light_pipeline(folder / "model"),
        pairs=write_pairs(folder / "pairs", num_shards=NUM_SHARDS, pairs_per_shard=PAIRS_PER_SHARD),
    )


@pytest.fixture(scope="session")
def undisturbed(world: World, zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tensors, float]:
    """The cache of one process that nobody disturbed, and how many seconds that took here."""
    cache = tmp_path_factory.mktemp("undisturbed") / "cache"
    start = time.monotonic()
    zygote.run(world.arguments(cache))
    return tensors(cache), time.monotonic() - start


@pytest.fixture(scope="session")
def uninterrupted(undisturbed: tuple[Tensors, float]) -> Tensors:
    """What every other run must equal."""
    return undisturbed[0]


@pytest.fixture(scope="session")
def s3() -> Iterator[dict[str, str]]:
    """A real S3 API on loopback with the bucket `bucket`: the environment that points to it."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
    }
    boto3.client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        region_name="us-east-1",
        aws_access_key_id="key",
        aws_secret_access_key="secret",
    ).create_bucket(Bucket="bucket")
    yield environment
    server.stop()
