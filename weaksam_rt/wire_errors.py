"""Errors as text: how an exception of the server becomes the same exception in its caller.

Triton carries one string per failed request. Ours begins with the kind in brackets:
``[ImageError] the file is truncated ...``. Triton's own refusals are recognised by their words.
"""

import re

from weaksam_rt.errors import (
    ArtifactError,
    ContractError,
    ImageError,
    InferenceError,
    InferenceTimeoutError,
    ServerUnavailableError,
    WeakSamError,
)

_KINDS: dict[str, type[WeakSamError]] = {
    kind.__name__: kind
    for kind in (
        ArtifactError,
        ContractError,
        ImageError,
        InferenceError,
        InferenceTimeoutError,
        ServerUnavailableError,
    )
}
_MESSAGE = re.compile(rf"\[({'|'.join(_KINDS)})\] (.*)", re.DOTALL)

_TRITON_REFUSALS: tuple[tuple[str, type[WeakSamError], str], ...] = (
    (
        "timeout expired",
        InferenceTimeoutError,
        "the request waited in the server's queue until its deadline; send fewer at a time or "
        "allow more time",
    ),
    (
        "maximum queue size",
        ServerUnavailableError,
        "the server is overloaded and its queue is full; send fewer requests at a time",
    ),
)


def text_from_error(error: WeakSamError | ValueError) -> str:
    """The message with its kind in front; a plain ``ValueError`` travels as ``InferenceError``,
    because what was asked for can never be answered.
    """
    kind = next((k for k in type(error).__mro__ if k.__name__ in _KINDS), InferenceError)
    return f"[{kind.__name__}] {error}"


def error_from_text(text: str) -> WeakSamError | None:
    """The exception that a message stands for, or None if it is not one that we know.

    Whatever stands in front of the kind (Triton puts the model's name there) is dropped.
    """
    match = _MESSAGE.search(text)
    if match is not None:
        return _KINDS[match[1]](match[2])
    for words, kind, meaning in _TRITON_REFUSALS:
        if words in text.lower():
            return kind(f"{meaning} ({text})")
    return None
