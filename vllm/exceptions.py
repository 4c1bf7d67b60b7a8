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
