"""Which names this server's model answers to, and the mark that tells servers apart."""

from __future__ import annotations

import hashlib
import json

from vllm.config import VllmConfig
from vllm.entrypoints.http.errors import ApiError
from vllm.entrypoints.http.json_body import snippet
from vllm.version import __version__


class ServedModels:
    """The names of the one model; each of them is accepted, the first is reported back for a request without one.

    Args:
        fingerprint_mode: What `system_fingerprint` holds: "full", the server's version and a hash of what decides which
            tokens come; "hash", that alone; "custom", `fingerprint_value`; "none", null.
        fingerprint_value: The text of mode "custom".

    Attributes:
        fingerprint: `system_fingerprint` of answers.
    """

    def __init__(
        self, config: VllmConfig, fingerprint_mode: str = "full", fingerprint_value: str | None = None
    ) -> None:
        model = config.model
        shape = json.dumps(model.hf_config.to_dict(), sort_keys=True, default=str)
        parts = (model.weights_digest, shape, model.dtype, config.device, config.attention_backend, __version__)
        digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:8]
        known = {"full": f"vllm-{__version__}-{digest}", "hash": digest, "custom": fingerprint_value, "none": None}
        self.fingerprint: str | None = known[fingerprint_mode]
        self.names = config.model.served_model_names

    def resolve(self, model: str | None) -> str:
        """The name to report back; a request without a model means the first one.

        Raises:
            ApiError: 404 for a name that is not served.
        """
        if not model:
            return self.names[0]
        if model not in self.names:
            raise ApiError(
                404, f"The model {snippet(model)} does not exist; this server has {', '.join(self.names)}.", "model"
            )
        return model
