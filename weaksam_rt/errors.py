"""Every error that this package raises on purpose.

::

    WeakSamError
    +-- ContractError           an array's name, dtype or shape differs from the model's contract
    +-- ImageError              the bytes are not an image that we accept
    +-- ArtifactError           a model file or manifest is missing, damaged or from elsewhere
    +-- ReleaseError            a release was refused, taken back or not cleared away
    +-- BackendUnavailableError  what a chosen backend needs is not on this machine
    +-- ServerUnavailableError  no server answers, or it does not serve the model
    +-- InferenceTimeoutError   the deadline passed
    +-- InferenceError          the server refused or failed this request

Bad arguments and configs raise ``ValueError``. ``ImageError`` is a ``ValueError`` too: the caller
chose the bytes.
"""


class WeakSamError(Exception):
    """Base of all errors of this package; catch it to catch them all."""


class ContractError(WeakSamError):
    """An array does not fit the model's contract; the message names array, got and expected."""


class ImageError(WeakSamError, ValueError):
    """The bytes cannot be used as an image; the message says what they are and what to send."""


class ArtifactError(WeakSamError):
    """A model file or its manifest cannot be trusted; the message says which and how to remake
    it.
    """


class ReleaseError(WeakSamError):
    """A release was refused, taken back or not cleared away; the message says what is served."""


class BackendUnavailableError(WeakSamError):
    """An explicitly chosen backend cannot run here; the message says what is missing."""


class ServerUnavailableError(WeakSamError):
    """No server answers at the address, or it does not serve the model (yet). Safe to retry."""


class InferenceTimeoutError(WeakSamError):
    """The deadline passed before the answer came."""


class InferenceError(WeakSamError):
    """The server answered this request with an error; retrying the same request will not help."""
