"""The one exception that a bad checkpoint raises."""

from pathlib import Path


class CheckpointError(ValueError):
    """A checkpoint folder cannot be loaded: something is missing, damaged or not supported.

    The text names the file (and the tensor), what was expected and what was given.
    """

    @classmethod
    def at(cls, file: Path, what: str, expected: str, given: str) -> "CheckpointError":
        """Builds the text in the one form that all messages have.

        Args:
            file: the file at fault.
            what: the field or tensor inside it.
            expected: what a good file has there.
            given: what this one has.
        """
        return cls(f"{file}: {what}: expected {expected}, got {given}")
