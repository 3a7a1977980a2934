"""Errors that a user can cause and can act on.

Anything derived from `DeepzooError` means "the input is wrong", never "the program is wrong". Its
message is one line that names the thing, what was expected and what to do; the command line prints
it as `deepzoo: <message>` on stderr and exits with status 2, without a traceback.
"""


class DeepzooError(Exception):
    """A mistake in what the user gave us: the base of every error raised on purpose."""


class ConfigError(DeepzooError):
    """A `config.json`, a `Config` or an option that cannot be right."""


class WeightError(DeepzooError):
    """A published weight file that is missing, damaged or does not fit its config."""


class CheckpointError(DeepzooError):
    """A step directory of this project that is missing, unfinished or fails its fingerprints."""


class TokenizerError(DeepzooError):
    """A `tokenizer.json` that is missing, damaged or does not fit its model."""


class RequestError(DeepzooError):
    """A prompt, a chat message or a sampling option that cannot be served."""
