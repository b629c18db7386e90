"""model -> vLLM deployment of ray.serve.llm, reached by deployment handle only.

The deployment has no HTTP door: Serve routes to the application's ingress alone, and this class adds one method that
takes a prompt which the ingress has rendered and tokenized. The engine never applies a chat template.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING

import ray
from ray.llm._internal.common.callbacks.base import CallbackBase  # no public name; ray is pinned
from ray.serve.config import RequestRouterConfig
from ray.serve.llm import LLMConfig, build_llm_deployment
from ray.serve.llm.deployment import LLMServer

from goldgate.serving.generate import engine_arguments
from goldgate.serving.handle import EnginePiece, EnginePrompt, piece_of
from goldgate.serving.model import Model

if TYPE_CHECKING:
    from ray.serve import Application

IMBALANCED_THRESHOLD = 20
"""Requests by which one replica may be ahead before prefix affinity yields to load balancing (the default is never)."""

# The same class as ray.serve.llm.request_router.PrefixCacheAffinityRouter. That public module imports vLLM, and the
# router runs inside the ingress: this name saves it 1 GB of memory and 15 s of start-up.
ROUTER = "ray.llm._internal.serve.routing_policies.prefix_aware.prefix_aware_router.PrefixCacheAffinityRouter"

QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",  # the in-process generator turns it off, and environments are inherited
    "RAYLLM_ENABLE_REQUEST_PROMPT_LOGS": "0",  # questions are not written to log files
}


class LocalFiles(CallbackBase):  # type: ignore[misc]
    """The weights lie on this machine: skip Ray's download step, which starts one more process that imports vLLM."""

    async def on_before_node_init(self) -> None:
        """Turn the step off."""
        self.ctx.run_init_node = False


class EngineServer(LLMServer):  # type: ignore[misc]
    """ray.serve.llm's server with a method for rendered prompts, and without its telemetry actor."""

    async def _start_engine(self) -> None:
        # The inherited method also starts a detached TelemetryAgent actor (1 GB), even with usage statistics off.
        await self.engine.start()

    async def generate_text(self, request: EnginePrompt) -> AsyncGenerator[EnginePiece, None]:
        """Yield text as it is generated, and last the token counts. An engine error raises ValueError.

        Cancelling the call (the client went away) ends the request inside vLLM.
        """
        from ray.serve.llm.openai_api_models import CompletionRequest

        completion = CompletionRequest(
            model=self._llm_config.model_id,
            prompt=list(request.token_ids),
            stream=True,
            stream_options={"include_usage": True},
            **request.sampling,
        )
        async for events in await self.completions(completion):
            for event in events if isinstance(events, list) else [events]:
                piece = piece_of(event)
                if piece is not None:
                    yield piece

    async def alive(self, probe: EnginePrompt) -> None:
        """Return when the engine is alive, else raise. `probe` is for the router, which looks for a prompt to route."""
        del probe
        await self.check_health()


def engine_deployment(model: Model, batch: int) -> Application:
    """Return the deployment of `model`, named by its digest, with the gate's engine settings.

    `batch` is the largest number of prompts that are generated together. Needs a connection to Ray.
    """
    config = LLMConfig(
        model_loading_config={"model_id": model.spec.name, "model_source": str(model.path)},
        accelerator_config={"kind": _accelerator()},
        engine_kwargs={**engine_arguments(model.spec, batch), "generation_config": "vllm"},
        runtime_env={"env_vars": {**QUIET, "VLLM_CPU_KVCACHE_SPACE": str(model.spec.engine.kv_cache_gib)}},
        callback_config={"callback_class": LocalFiles},
        experimental_configs={"stream_batching_interval_ms": 10},
        deployment_config={
            "name": model.digest[:12],
            "num_replicas": 1,
            "max_ongoing_requests": 256,
            # One more try for a passing trouble, then the deployment fails: Serve's default is to try for ever.
            "max_constructor_retry_count": 1,
            "request_router_config": RequestRouterConfig(
                request_router_class=ROUTER, request_router_kwargs={"imbalanced_threshold": IMBALANCED_THRESHOLD}
            ),
        },
    )
    return build_llm_deployment(config, deployment_cls=EngineServer, name_prefix="engine-")


def _accelerator() -> str:
    return "gpu" if ray.cluster_resources().get("GPU", 0) else "cpu"
