"""The one error type for bad input."""


class InputError(Exception):
    """What a user gave (a recipe, a flag, a file) cannot be used.

    The message is one plain line: what is wrong, where, and what would be right. Commands print it and exit with
    status 2 (see :func:`moe_dit.command.run`); nothing else catches it.

    Args:
        message: the line to print.
        local: True where only this rank may have met the problem (a file that one node cannot read), so that the
            line must be printed even when rank 0 is fine.
    """

    def __init__(self, message: str, *, local: bool = False):
        super().__init__(" ".join(message.split()))
        self.local = local
