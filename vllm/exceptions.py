"""Errors with a message meant for the user: one clear line saying which value, what is allowed, what to do."""


class VLLMValidationError(ValueError):
    """A value of one request is not allowed.

    Args:
        message: What the user reads.
        param: Name of the request field, as the user spelled it, or None.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextLengthError(VLLMValidationError):
    """A prompt leaves no room for an answer. Clients read the sentence, which is vLLM's, to shorten their prompts.

    Args:
        limit: Tokens of prompt and answer together.
        at_least: Tokens of the prompt, or the fewest that it can have.
        num_output: Tokens that were asked for.
    """

    def __init__(self, limit: int, at_least: int, param: str | None, num_output: int = 1) -> None:
        super().__init__(
            f"This model's maximum context length is {limit} tokens. However, you requested {num_output} output tokens "
            f"and your prompt contains at least {at_least} input tokens, for a total of at least "
            f"{at_least + num_output} tokens. Send a shorter prompt.",
            param,
        )
        self.limit = limit
        self.at_least = at_least


class StartupError(RuntimeError):
    """The engine cannot start with these arguments on this machine; printed as one line, without a traceback."""


class ServerBusyError(RuntimeError):
    """What the request needs is taken by others; the same request may succeed later."""


class EngineDeadError(RuntimeError):
    """The engine process has ended; no request can be served any more, or not until it has started again.

    Args:
        restarts: Whether it is being started again.
    """

    def __init__(self, restarts: bool = False) -> None:
        advice = "it is being started again, try again soon" if restarts else "restart the server"
        super().__init__(f"The engine process has ended; {advice}.")
        self.restarts = restarts


class EngineStalledError(RuntimeError):
    """The engine has work and does not get on with it; it may yet.

    Args:
        seconds: How long it has finished no step.
        limit: How long that may be.
    """

    def __init__(self, seconds: float, limit: float) -> None:
        super().__init__(
            f"The engine has work and has finished no step for {seconds:.0f} s; more than {limit:g} s are too long "
            "(VLLM_EXECUTE_MODEL_TIMEOUT_S)."
        )
