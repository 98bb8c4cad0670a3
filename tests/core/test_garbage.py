"""The garbage collector at rest."""

import gc

import pytest

from trainingcompiler.compiling.gc_pause import gc_paused


@pytest.fixture(autouse=True)
def collecting():
    before = gc.isenabled()
    yield
    (gc.enable if before else gc.disable)()


def test_it_rests_inside_and_goes_on_afterwards():
    gc.enable()
    with gc_paused():
        with gc_paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()


def test_it_goes_on_after_an_error():
    gc.enable()
    with pytest.raises(ValueError, match="inside"), gc_paused():
        raise ValueError("inside")
    assert gc.isenabled()


def test_who_turned_it_off_turns_it_on():
    gc.disable()
    with gc_paused():
        pass
    assert not gc.isenabled()
