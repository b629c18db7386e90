"""release -> deployment: the production release on Ray Serve, behind one HTTP application.

    client -> Serve's proxy -> Ingress (FastAPI, retrieval) -> handle -> engine (ray.serve.llm on vLLM)

Only the ingress has a route. Models of other kinds than vllm are driven by the ingress itself, without an engine.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any, Self

import httpx

from goldgate.pipeline.errors import EnvironmentFailure, Refused, UsageError
from goldgate.pipeline.interrupts import undisturbed
from goldgate.pipeline.params import Params, load_params
from goldgate.pipeline.schema import Release
from goldgate.pipeline.store import Store
from goldgate.serving.model import Model, build_model, load_model_spec
from goldgate.serving.release import load_release, production, release_folder

Progress = Callable[[str, int, int], None]

START_TIMEOUT_S = 900.0
LOGICAL_CPUS = 16
"""What Ray may schedule on this machine, not how many cores it has: with few of them the ingress never starts."""

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "TOKENIZERS_PARALLELISM": "false",
}


class Served:
    """A running deployment. Close it, or use it as a context manager; only what was started here is shut down."""

    def __init__(self, url: str, release: str, stop: Callable[[], None]) -> None:
        """Keep the address, the release that was live at the start, and how to stop."""
        self.url = url
        self.release = release
        self._stop: Callable[[], None] | None = stop

    def wait(self) -> None:
        """Wait for SIGINT or SIGTERM. Call it from the main thread."""
        with _stop_signals() as stopped:
            stopped.wait()

    def close(self) -> None:
        """Let requests under way end, then shut down. Calling it twice is allowed."""
        stop, self._stop = self._stop, None
        if stop is not None:
            stop()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()


def serve_application(
    store: Store,
    application: str = "default",
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    block: bool = True,
    progress: Progress | None = None,
    timeout_s: float = START_TIMEOUT_S,
) -> Served:
    """Serve the production release of `application` and return when it is healthy; with `block`, when it was stopped.

    Raises UsageError (nothing promoted, bad port), Refused (the release's bytes changed) and EnvironmentFailure (port
    taken, model files damaged, engine not starting within `timeout_s`); whatever was started is then shut down again.
    """
    digest = production(store, application)
    if digest is None:
        raise UsageError(f"nothing is promoted for application {application!r}", "a release", "run goldgate promote")
    check_port(host, port)
    release = load_release(store, digest)
    params, model = _parts(store, release, progress)
    served = _start(store, release, params, model, (host, port), progress, timeout_s)
    if block:
        with served:
            served.wait()
    return served


def _parts(store: Store, release: Release, progress: Progress | None) -> tuple[Params, Model]:
    """Return parameters and model of a release; everything that can be wrong with them is said before Ray starts."""
    folder = release_folder(store, release.digest)
    params = load_params(folder / "params.toml")
    model = build_model(load_model_spec(folder / "model.toml"), store, progress)
    if model.digest != release.model:
        raise Refused(
            f"the model of release {release.digest[:12]} is not the one that was judged", release.model[:12],
            f"this machine has {model.digest[:12]}: install the versions of requirements.lock",
        )  # fmt: skip
    if model.spec.kind == "openai" and not os.environ.get(model.spec.url_env):
        raise UsageError(f"the environment variable {model.spec.url_env} is not set", "the endpoint's base URL")
    return params, model


def check_port(host: str, port: int) -> None:
    """Raise EnvironmentFailure when nobody can listen there, UsageError for what is no address."""
    if not 0 < port < 65536:
        raise UsageError(f"port {port} is no port", "1 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except socket.gaierror:
        raise UsageError(f"host {host!r} is not known", "a name or address of this machine") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise EnvironmentFailure(
                f"port {port} of {host} is taken", "a free port", "choose another with --port"
            ) from None
        raise EnvironmentFailure(
            f"cannot listen on {host}:{port}: {error.strerror}", "an address of this machine"
        ) from None


# ---------------------------------------------------------------- Ray


def _start(
    store: Store,
    release: Release,
    params: Params,
    model: Model,
    address: tuple[str, int],
    progress: Progress | None,
    timeout_s: float,
) -> Served:
    deadline = time.monotonic() + timeout_s
    cluster = _Cluster(f"goldgate-{release.application}")
    host, port = address
    try:
        _report(progress, "start Ray", 0)
        cluster.connect(host, port)
        _report(progress, "load the engine", 1)
        cluster.deploy(store, release.application, model, params.answer.batch)
        url = f"http://{'[' + host + ']' if ':' in host else host}:{port}"
        reachable = url.replace("0.0.0.0", "127.0.0.1").replace("[::]", "[::1]")  # noqa: S104 - where it listens
        cluster.wait_ready(reachable, deadline, timeout_s, progress)
    except BaseException:
        cluster.close()
        raise
    _report(progress, "healthy", 4)
    return Served(reachable, release.digest, cluster.close)


class _Cluster:
    """Ray and Serve as this process started or found them."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._own_ray = False
        self._own_serve = False
        self._deployed = False

    def connect(self, host: str, port: int) -> None:
        """Start Ray on this machine, or join the cluster that RAY_ADDRESS names, and open Serve's proxy."""
        # Before the imports: both read their settings when they are imported, and Ray's processes inherit them.
        os.environ.update(QUIET)
        import ray
        from ray import serve

        try:
            if not ray.is_initialized():
                elsewhere = os.environ.get("RAY_ADDRESS")
                local: dict[str, Any] = {"num_cpus": LOGICAL_CPUS, "object_store_memory": 256 * 1024 * 1024}
                ray.init(
                    address=elsewhere or "local",
                    include_dashboard=None if elsewhere else False,
                    log_to_driver=False,
                    logging_level="ERROR",
                    runtime_env={"env_vars": QUIET} if elsewhere else None,
                    **({} if elsewhere else local),
                )
                self._own_ray = True
            for chatty in ("ray", "ray.serve", "httpx"):  # ray.llm sends all of INFO to the console
                logging.getLogger(chatty).setLevel(logging.ERROR)
            self._own_serve = not _serve_runs()
            logs = {"log_level": "ERROR", "enable_access_log": False}
            serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port}, logging_config=logs)
        except (OSError, RuntimeError, ValueError, ConnectionError) as error:
            raise EnvironmentFailure(
                f"Ray does not start: {cause_of(str(error))}",
                "free memory and a writable /tmp",
                "run goldgate doctor",
            ) from error

    def deploy(self, store: Store, application: str, model: Model, batch: int) -> None:
        """Submit the application; it comes up in the background."""
        from ray.serve.api import RunTarget, run_many

        from goldgate.serving.ingress import Ingress

        engine = _engine(model, batch)
        ingress = _serve_deployment(Ingress).bind(
            str(store.root), application, model.digest, **({"engine": engine} if engine else {})
        )
        target = RunTarget(
            target=ingress, name=self._name, route_prefix="/", logging_config={"enable_access_log": False}
        )
        self._deployed = True
        run_many([target], wait_for_applications_running=False)

    def wait_ready(self, url: str, deadline: float, timeout_s: float, progress: Progress | None) -> None:
        """Wait until /healthz is green. Raises EnvironmentFailure with the cause when a deployment failed."""
        from ray import serve

        while time.monotonic() < deadline:
            status = serve.status().applications.get(self._name)
            if status is not None and str(status.status.value) in {"DEPLOY_FAILED", "UNHEALTHY"}:
                messages = [status.message, *(d.message for d in status.deployments.values())]
                raise EnvironmentFailure(
                    f"the engine does not start: {cause_of(max(messages, key=len))}",
                    "", "check [engine] of the model file and the free memory (goldgate doctor)",
                )  # fmt: skip
            code, body = _healthz(url)
            if code == 200:
                return
            if body.get("switch_failed"):
                raise EnvironmentFailure(f"the release cannot be served: {body['switch_failed']}")
            reason = body.get("reason", "the ingress is starting")
            _report(progress, str(reason), 3 if "engine" in str(reason) else 2)
            time.sleep(0.5)
        raise EnvironmentFailure(f"not healthy within {timeout_s:g} s", "", "see goldgate doctor")

    def close(self) -> None:
        """Shut down what this process started, requests under way first."""
        import ray
        from ray import serve

        # Ray tells the driver about its own shutdown as if it were a failure, on stdout.
        with undisturbed(), contextlib.redirect_stdout(io.StringIO()):
            with contextlib.suppress(Exception):
                # Deleting the application lets requests under way end; shutting Serve down would cut them off.
                if self._deployed:
                    serve.delete(self._name)
            with contextlib.suppress(Exception):
                if self._own_serve:
                    serve.shutdown()
            if self._own_ray:
                ray.shutdown()
        self._own_ray = self._own_serve = self._deployed = False


def _serve_runs() -> bool:
    from ray import serve

    return bool(serve.status().proxies)


def _serve_deployment(ingress: Any) -> Any:  # noqa: ANN401 - ray publishes no types
    from ray import serve

    return serve.deployment(
        ingress,
        name="ingress",
        num_replicas=1,
        max_ongoing_requests=256,
        # One more try for a passing trouble, then the deployment fails: Serve's default is to try for ever.
        max_constructor_retry_count=1,
        graceful_shutdown_timeout_s=30,
        ray_actor_options={"num_cpus": 1},
    )


def _engine(model: Model, batch: int) -> Any:  # noqa: ANN401 - ray publishes no types
    """Return the engine's application for a vllm model, None for the others."""
    if model.spec.kind != "vllm":
        return None
    try:
        from goldgate.serving.engine import engine_deployment

        return engine_deployment(model, batch)
    except ImportError as error:
        raise EnvironmentFailure(f"the engine is not installed ({error.name})", "", "install goldgate[cpu]") from error
    except ValueError as error:
        raise UsageError(f"the engine cannot be configured: {cause_of(str(error))}", "", "see [engine]") from error


def _healthz(url: str) -> tuple[int, dict[str, Any]]:
    try:
        reply = httpx.get(f"{url}/healthz", timeout=5)
        body = reply.json()
    except (httpx.HTTPError, ValueError):
        return 0, {}
    return reply.status_code, body if isinstance(body, dict) else {}


_RAISED = re.compile(r"^[\w.]*(?:Error|Exception|Interrupt)\b[^:]*:", re.MULTILINE)


def cause_of(traceback: str, longest: int = 400) -> str:
    """Return the last exception of a traceback with its message, folded onto one line."""
    raised = [match.start() for match in _RAISED.finditer(traceback)]
    text = traceback[raised[-1] :] if raised else traceback
    return " ".join(text.split())[:longest]


@contextlib.contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """Set an event on SIGINT and SIGTERM instead of raising in the middle of something."""
    stopped = threading.Event()

    def stop(_: int, __: FrameType | None) -> None:
        stopped.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _report(progress: Progress | None, what: str, done: int) -> None:
    if progress is not None:
        progress(what, done, 4)
