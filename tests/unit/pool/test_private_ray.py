"""A contract with Ray 2.60: which methods start what `pool/private_ray.py` leaves out, and what it hides."""

import inspect

from ray._private import services, utils
from ray._private.node import Node

from f2l_vllm.pool import private_ray


def test_these_methods_start_the_daemons_and_return_nothing_that_is_used():
    starts = inspect.getsource(Node.start_head_processes) + inspect.getsource(Node.start_ray_processes)
    for name in private_ray.LEFT_OUT:
        assert callable(getattr(Node, name))
        assert starts.count(f"self.{name}(") == 1
        assert f"= self.{name}(" not in starts


def test_agents_serve_less_without_the_extra():
    assert f"import {private_ray.EXTRA} " in inspect.getsource(utils.get_dashboard_dependency_error)
    assert 'dashboard_agent_command.append("--minimal")' in inspect.getsource(services.start_raylet)


def test_a_ray_that_is_started_later_has_all_of_them():
    before = [getattr(Node, name) for name in private_ray.LEFT_OUT]
    is_minimal = utils.get_dashboard_dependency_error() is not None
    with private_ray.few_daemons():
        assert utils.get_dashboard_dependency_error() is not None
        assert before != [getattr(Node, name) for name in private_ray.LEFT_OUT]
    assert (utils.get_dashboard_dependency_error() is not None) == is_minimal
    assert before == [getattr(Node, name) for name in private_ray.LEFT_OUT]


def test_a_ray_without_one_of_these_methods_starts(monkeypatch):
    monkeypatch.delattr(Node, private_ray.LEFT_OUT[0])
    with private_ray.few_daemons():
        assert not hasattr(Node, private_ray.LEFT_OUT[0])
    assert not hasattr(Node, private_ray.LEFT_OUT[0])
