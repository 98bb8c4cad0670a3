"""What this machine has for workers."""

import socket

import pytest

from trainingcompiler.processes import host_resources


@pytest.mark.parametrize(
    ("visible", "count"),
    [(None, 4), ("", 0), ("0", 1), ("2,3", 2), ("-1", 0), ("0,7,1", 1), ("GPU-1a,GPU-2b", 2), (" 0, 1", 2)],
)
def test_gpus_are_counted_as_cuda_shows_them(monkeypatch, visible, count):
    monkeypatch.setattr(host_resources, "_installed_gpus", lambda: 4)
    assert host_resources.gpu_count({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}) == count


def test_without_a_driver_there_are_none(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr("ctypes.CDLL", missing)
    assert host_resources.gpu_count({}) == 0


def test_ports_are_free_and_different():
    ports = host_resources.free_ports(20)
    assert len(set(ports)) == 20
    with socket.create_server(("", ports[0])):
        assert not host_resources.is_free(ports[0])
    assert host_resources.is_free(ports[1])


def test_no_port_is_left(monkeypatch):
    monkeypatch.setattr(host_resources, "is_free", lambda port: False)
    with pytest.raises(OSError, match="2 free ports were looked for between 20000 and 31999: 0 are free"):
        host_resources.free_ports(2)


def test_processors():
    assert host_resources.cpu_count() >= 1
