"""The service, started and ended: on a Ray of its own by `lr-ray serve`, or by `serve deploy` on a cluster."""

import logging
import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from lr_ray import errors
from lr_ray.errors import ClusterError, ConfigError
from lr_ray.runtime.session import local_ray
from lr_ray.serving.config import ServingConfig
from lr_ray.serving.keys import read_keys
from lr_ray.serving.problems import is_loopback
from lr_ray.serving.tracing import check_tracing
from lr_ray.storage.filesystem import check_exclusive, write_bytes
from lr_ray.storage.manifest import read_meta_lora_manifest

_logger = logging.getLogger("lr_ray.serving")
APP_NAME = "lr-ray"
_DRAIN_S = 30.0
"""So long requests under way may take when the service ends."""
_ENVIRONMENT = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_worker_niceness": "0",
}
"""One event loop for Serve and the application, for nothing here blocks it; and no processes that are nice to all others."""


def serve_until_stopped(config: ServingConfig) -> Iterator[str]:
    """Serve; yields the service's URL when it is ready, then ends on Ctrl-C or SIGTERM.

    Raises: as `served`.
    """
    stopped = threading.Event()
    with served(config) as url, _signals(stopped):  # after Ray has set its own
        yield url
        stopped.wait()


@contextmanager
def served(config: ServingConfig) -> Iterator[str]:
    """The service, for as long as the context lasts; yields its URL when every replica is ready.

    At the end new requests are refused, and those under way finished, for half a minute at most.

    Raises:
        AdapterError, BackboneError, StorageError: a meta-LoRA cannot be loaded.
        ClusterError: Ray cannot be started or joined, runs a Serve of its own, or the port is taken.
        ConfigError: another host than this machine without keys, an unusable file of keys, tracing without what it needs, or
            meta-LoRAs that do not share a backbone and an image size.
    """
    check_exposure(config)
    _check_parts(config)
    check_exclusive(config.tasks)
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with local_ray(dashboard=False, libraries=False):
        from ray import serve
        from ray.serve.config import HTTPOptions

        for noisy in ("ray.serve", "ray._common"):
            logging.getLogger(noisy).setLevel(logging.ERROR)
        found = serve.status()
        if found.applications or found.proxies:  # which listen where they were told, not where this is
            raise ClusterError("Ray Serve runs already on this Ray; end it (`serve shutdown`), or start this on another Ray")
        try:
            http = HTTPOptions(host=config.host, port=config.port)
            serve.start(proxy_location="HeadOnly", http_options=http, logging_config=_quiet())
            _run(config)
            yield f"http://{'[' + config.host + ']' if ':' in config.host else config.host}:{config.port}"
            _drain()
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            raise ClusterError(f"Ray Serve on {config.host}:{config.port}: {reason}; is the port free?") from error
        finally:
            serve.shutdown()


def build_application(arguments: dict[str, Any]) -> Any:
    """For `serve run` and `serve deploy`, which call it by its import path.

    Args:
        arguments: of `ServingConfig`; host and port are Serve's own there.

    Raises: as `served`, and ConfigError for arguments that are not those, or without keys.
    """
    config = ServingConfig.of(arguments)
    _check_keys(config)
    _check_parts(config)
    check_exclusive(config.tasks)
    from lr_ray.runtime.deployments import application
    from lr_ray.serving.multiplex import load_multiplex  # timm takes seconds

    loaded = load_multiplex(config.meta_loras, precision=config.precision)
    return application(config, (loaded.catalogue, loaded.image_px))


def write_serve_config(config: ServingConfig, path: Path) -> None:
    """A config of Ray Serve that `serve run` and `serve deploy` take.

    Raises: as `served`; ConfigError also without keys; StorageError also where it cannot be written.
    """
    _check_keys(config)
    _check_parts(config)
    arguments = {name: value for name, value in config.arguments().items() if value is not None}
    content = {
        "proxy_location": "EveryNode",
        "http_options": {"host": config.host, "port": config.port},
        "logging_config": {"log_level": "WARNING", "enable_access_log": False},
        "applications": [
            {
                "name": APP_NAME,
                "route_prefix": "/",
                "import_path": f"{__name__}:{build_application.__name__}",
                "args": arguments,
            }
        ],
    }
    write_bytes(str(path), yaml.safe_dump(content, sort_keys=False, allow_unicode=True).encode())


def check_exposure(config: ServingConfig) -> None:
    """Raise where others than this machine could come in without a key, or the keys cannot be read.

    Raises:
        ConfigError: see there.
    """
    if config.keys is not None:
        read_keys(config.keys)
    elif not is_loopback(config.host):
        raise ConfigError(
            f"--host {config.host} is reached from other machines; add --keys FILE (`lr-ray serve key add NAME` makes one), "
            "or leave --host out"
        )


def _check_parts(config: ServingConfig) -> None:
    """Raise where anything is wrong that can be seen without loading a model."""
    check_tracing()
    for path in config.meta_loras.values():
        read_meta_lora_manifest(path)


def _check_keys(config: ServingConfig) -> None:
    """Raise where there are no keys: Ray Serve listens where its own `http_options` say, or did when it was started.

    Raises:
        ConfigError: see there.
    """
    if config.keys is None:
        raise ConfigError(
            "no keys: under Ray Serve's own commands the service needs them, for Serve may listen where others reach it; add "
            "--keys FILE (`lr-ray serve key add NAME` makes one), or use `lr-ray serve start` for this machine only"
        )
    check_exposure(config)


def _run(config: ServingConfig) -> None:
    """Return when every replica is ready.

    Raises:
        LrRayError: what the first replica of the backbone met; a ClusterError where that is no error of ours.
    """
    from ray import serve

    from lr_ray.runtime.deployments import BACKBONE, application

    try:
        serve.run(application(config, None), name=APP_NAME, route_prefix="/")
    except RuntimeError as error:
        status = serve.status().applications.get(APP_NAME)
        told = status.deployments[BACKBONE].message if status and BACKBONE in status.deployments else ""
        met = re.search(rf"^{re.escape(errors.__name__)}\.(\w+): (.+)", told, re.MULTILINE)
        if met is not None:
            raise getattr(errors, met[1])(met[2]) from error
        reason = (told or str(error)).strip().rpartition("\n")[2]
        raise ClusterError(f"Ray Serve cannot start the backbone: {reason}") from error


def _drain() -> None:
    """Wait until no request is under way, unless the application is gone."""
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    try:
        done = serve.get_app_handle(APP_NAME).drain.remote(_DRAIN_S).result(timeout_s=_DRAIN_S + 5)
    except (RayError, RayServeException, TimeoutError) as error:
        _logger.error("ended without waiting for requests: %s", str(error).strip().rpartition("\n")[2])
        return
    if not done:
        _logger.error("ended with requests under way: they took more than %.0f s", _DRAIN_S)


def _quiet() -> Any:
    """No line for every request: a service may have many, and none of it is anyone else's business."""
    from ray.serve.schema import LoggingConfig

    return LoggingConfig(log_level="WARNING", enable_access_log=False)


@contextmanager
def _signals(stopped: threading.Event) -> Iterator[None]:
    """Within the context SIGTERM and Ctrl-C set the event."""
    wanted = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, lambda *_: stopped.set()) for number in wanted}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
