"""`GET /v1/models`."""

from __future__ import annotations

from typing import Any

from vllm.config import ModelConfig
from vllm.entrypoints.chat.served_models import ServedModels
from vllm.entrypoints.http.api_model import now, random_id


class ServingModels:
    """Lists the names of the one model, each as a model of its own."""

    def __init__(self, config: ModelConfig, models: ServedModels) -> None:
        self._models = models
        self._root = config.model
        self._max_model_len = config.max_model_len
        self._created = now()

    def list(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._card(name) for name in self._models.names]}

    def get(self, name: str) -> dict[str, Any]:
        """One entry of the list; raises ApiError 404 for a name that is not served."""
        return self._card(self._models.resolve(name))

    def _card(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "vllm",
            "root": self._root,
            "parent": None,
            "max_model_len": self._max_model_len,
            "permission": [
                {
                    "id": f"modelperm-{random_id()}",
                    "object": "model_permission",
                    "created": self._created,
                    "allow_create_engine": False,
                    "allow_sampling": True,
                    "allow_logprobs": True,
                    "allow_search_indices": False,
                    "allow_view": True,
                    "allow_fine_tuning": False,
                    "organization": "*",
                    "group": None,
                    "is_blocking": False,
                }
            ],
        }
