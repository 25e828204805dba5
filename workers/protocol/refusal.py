"""The exception for requests that the daemon answers with an error of its own."""


class Refusal(Exception):
    """A request is not run, or its result cannot be sent, and its client receives an error.

    `kind` becomes the reply's `error_type`, `message` its `error`.
    """

    # Both are set in a Refusal of the kind Overloaded. The reason is one of `fields.REASONS`.
    retry_after: float | None = None  # seconds
    reason: str | None = None

    def __init__(
        self,
        kind: str,
        message: str,
        request_id: str | None = None,
        perl_caller: str | None = None,
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.request_id = request_id
        self.perl_caller = perl_caller
