"""State that is moved in threads, while a step is captured, is the state that the step then finds."""

import pytest
import torch
from torch import nn

from trainingcompiler.frameworks.pytorch.state.prefetch import StatePrefetcher
from trainingcompiler.frameworks.pytorch.state.shared_tensors import StateRegistry


@pytest.fixture
def registry():
    return StateRegistry()


def parameters(count: int = 40) -> list[nn.Parameter]:
    return [nn.Parameter(torch.full((3, 5), float(number))) for number in range(count)]


def test_tensors_are_moved_with_their_values(registry):
    tensors = parameters()
    before = [tensor.data_ptr() for tensor in tensors]
    with StatePrefetcher(registry) as prefetcher:
        prefetcher.copy(tensors[::2])  # some of them ahead
        assert [tensor.data_ptr() for tensor in tensors] == before  # which nobody notices
        prefetcher.move(tensors)
        prefetcher.wait()
    for number, tensor in enumerate(tensors):
        array = registry.of(tensor).array(None)
        assert tensor.data_ptr() == array.unsafe_buffer_pointer() != before[number]
        assert (tensor == number).all() and (torch.from_numpy(array.__array__().copy()) == number).all()


@pytest.mark.parametrize("write", ["in place", "new memory"])
def test_a_copy_that_is_older_than_the_values_is_not_taken(registry, write):
    (tensor,) = parameters(1)
    shared = registry.of(tensor)
    shared.copy()
    with torch.no_grad():
        if write == "in place":
            tensor.add_(7.0)
        else:
            tensor.data = torch.full((3, 5), 7.0)
    assert (shared.array(None) == 7.0).all() and (tensor == 7.0).all()


def test_memory_that_others_see_stays_where_it_is(registry):
    (tensor,) = parameters(1)
    view = tensor.detach()[:1]
    shared = registry.of(tensor)
    shared.copy()
    pointer = tensor.data_ptr()
    assert (shared.array(None) == 0.0).all() and tensor.data_ptr() == pointer == view.data_ptr()


def test_what_is_not_moved_after_all_is_left_alone(registry):
    """A step that cannot be captured leaves nothing behind: the tensor keeps its memory, and no copy is kept."""
    (tensor,) = parameters(1)
    pointer = tensor.data_ptr()
    with pytest.raises(RuntimeError, match="no capture"), StatePrefetcher(registry) as prefetcher:
        prefetcher.copy([tensor])
        raise RuntimeError("no capture")
    assert tensor.data_ptr() == pointer and registry.of(tensor)._copy is None


def test_what_fails_in_a_thread_fails_in_the_waiting_one(registry, monkeypatch):
    (tensor,) = parameters(1)

    def fail(self, sharding, written=False):
        raise MemoryError("no memory")

    monkeypatch.setattr(type(registry.of(tensor)), "array", fail)
    with StatePrefetcher(registry) as prefetcher:
        prefetcher.move([tensor])
        with pytest.raises(MemoryError, match="no memory"):
            prefetcher.wait()


def test_without_cells_nothing_is_moved():
    (tensor,) = parameters(1)
    pointer = tensor.data_ptr()
    with StatePrefetcher(None) as prefetcher:
        prefetcher.copy([tensor])
        prefetcher.move([tensor])
        prefetcher.wait()
    assert tensor.data_ptr() == pointer
