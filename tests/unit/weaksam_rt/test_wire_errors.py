import pytest

from weaksam_rt.errors import (
    ArtifactError,
    ContractError,
    ImageError,
    InferenceError,
    InferenceTimeoutError,
    ServerUnavailableError,
)
from weaksam_rt.wire_errors import error_from_text, text_from_error


@pytest.mark.parametrize(
    "kind",
    [
        ArtifactError,
        ContractError,
        ImageError,
        InferenceError,
        InferenceTimeoutError,
        ServerUnavailableError,
    ],
)
def test_an_error_crosses_the_wire_as_the_same_kind(kind):
    error = error_from_text(text_from_error(kind("what, got\nand what to do")))
    assert type(error) is kind
    assert str(error) == "what, got\nand what to do"


def test_a_bad_argument_arrives_as_a_refused_request():
    error = error_from_text(text_from_error(ValueError("score_thresh must be in [0, 1]")))
    assert type(error) is InferenceError
    assert str(error) == "score_thresh must be in [0, 1]"


def test_what_triton_puts_in_front_is_dropped():
    text = "in ensemble 'x', Failed to process: [ImageError] the file is empty"
    assert str(error_from_text(text)) == "the file is empty"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Request timeout expired", InferenceTimeoutError),
        ("Exceeds maximum queue size", ServerUnavailableError),
    ],
)
def test_refusals_of_triton_are_known_by_their_words(text, kind):
    assert type(error_from_text(text)) is kind


@pytest.mark.parametrize("text", ["", "something else", "[KeyError] x", "[WeakSamError] x"])
def test_other_texts_are_not_ours(text):
    assert error_from_text(text) is None
