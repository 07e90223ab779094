"""How many HTTP requests a library of adapters on S3 costs: planning its inversion anew and again, and reading it back.

    python -m bench.storage

Prints a table and writes bench/results/storage.json. The server is moto's, the requests are counted by a proxy before it.
"""

import os
import time
from collections.abc import Callable

import boto3
from lr_ray.bench.driver_memory import experiment, make_library
from lr_ray.bench.speed import write_result
from rich.console import Console
from rich.table import Table

from lr_ray.runtime.inversion_plan import plan_inversion
from lr_ray.storage.adapters import list_adapters, read_adapters, read_specs
from lr_ray.storage.filesystem import list_uris, write_bytes
from tests.s3 import FaultyProxy, environment, s3_server

NUM_ADAPTERS = 100


def measure(proxy: FaultyProxy) -> list[dict[str, str | int | float]]:
    """A row for each step: its requests and seconds."""
    boto3.client("s3").create_bucket(Bucket="library")
    config = experiment("s3://library/run")
    rows: list[dict[str, str | int | float]] = []

    def count(step: str, action: Callable[[], object]) -> None:
        proxy.set_faults(())
        start = time.perf_counter()
        action()
        rows.append({"step": step, "requests": len(proxy.requests), "s": round(time.perf_counter() - start, 2)})

    count("write the library", lambda: make_library(config.output_root, NUM_ADAPTERS))
    count("plan its inversion", lambda: plan_inversion(config))
    items = plan_inversion(config).items
    for item in items:
        write_bytes(item.uri, b"")
    count("plan again", lambda: plan_inversion(config))
    count("see what is inverted", lambda: list_uris(config.synthetic_root, suffix=".parquet"))
    count("read all, one in memory", lambda: list(map(id, read_adapters(config.adapters_root))))
    count("read what is known of all", lambda: read_specs(list_adapters(config.adapters_root)))
    return rows


def main() -> None:
    with s3_server() as proxy:
        os.environ.update(environment(proxy))
        rows = measure(proxy)
    table = Table("step", "HTTP requests", "s", title=f"{NUM_ADAPTERS} adapters on S3")
    for row in rows:
        table.add_row(str(row["step"]), str(row["requests"]), str(row["s"]))
    Console().print(table)
    write_result("storage", {"num_adapters": NUM_ADAPTERS, "rows": rows})


if __name__ == "__main__":
    main()
