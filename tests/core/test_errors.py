"""What an error says."""

import pickle

import pytest

from trainingcompiler import errors


def test_one_mistake_is_the_message_and_several_are_a_list():
    assert str(errors.ConfigError(["a is wrong"])) == "a is wrong"
    assert str(errors.ConfigError(["a is wrong", "b is wrong"])) == (
        "2 mistakes in the configuration:\n  - a is wrong\n  - b is wrong"
    )


def test_capture_error_names_place_and_operator():
    error = errors.CaptureError("no lowering", where="train.py:88", operator="aten.cumsum.default")
    assert (error.reason, error.where, error.operator) == ("no lowering", "train.py:88", "aten.cumsum.default")
    assert str(error) == "train.py:88: no lowering (operator aten.cumsum.default)"
    assert str(errors.CaptureError("aten.x.y has no lowering", operator="aten.x.y")) == "aten.x.y has no lowering"


def test_fallback_error_says_what_to_do():
    text = str(errors.FallbackError("LBFGS takes a closure", where="train.py:12"))
    assert text.startswith("train.py:12: LBFGS takes a closure\n")
    assert "--fallback=eager" in text


@pytest.mark.parametrize(
    "error",
    [
        errors.ConfigError(["a", "b"]),
        errors.CaptureError("r", "w", "o"),
        errors.FallbackError("r"),
        errors.UsageError("u"),
    ],
)
def test_errors_survive_pickling(error):
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)


def test_errors_are_also_the_builtin_kind_a_person_would_catch():
    assert issubclass(errors.ConfigError, ValueError)
    assert issubclass(errors.GradientNotKeptError, RuntimeError)
    assert all(
        issubclass(kind, errors.TrainingCompilerError)
        for kind in (errors.ConfigError, errors.CaptureError, errors.FallbackError, errors.UsageError)
    )
