"""Errors a user of saetrain can act on: what was expected, what came, what to do."""


class SaetrainError(Exception):
    """Base of every error that the commands print without a traceback."""


class ConfigError(SaetrainError):
    """A setting is unknown, missing or out of range."""


class TrainingError(SaetrainError):
    """Training cannot go on: non-finite loss, a damaged checkpoint, a run folder in the way."""
