"""`tc.compile` of hand-written TensorFlow steps."""

import jax
import numpy as np
import pytest
import tensorflow as tf

import trainingcompiler as tc
from trainingcompiler import TrainingCompilerConfig
from trainingcompiler.errors import FallbackError, UsageError
from trainingcompiler.frameworks.tensorflow import bridge, hooks, state
from trainingcompiler.frameworks.tensorflow.engine import TF_GRAPH, XLA
from trainingcompiler.frameworks.tensorflow.tracing import Traces
from trainingcompiler.reporting.events import EngineChosen, FellBack, Note, Recompiled, subscribe
from trainingcompiler.reporting.statistics import current as statistics


@pytest.fixture
def config(tmp_path_factory):
    folder = str(tmp_path_factory.getbasetemp() / "executables")
    yield TrainingCompilerConfig(engine="xla", fallback="error", quiet=True, cache_dir=folder)
    hooks.uninstall()


@pytest.fixture
def events():
    seen = []
    unsubscribe = subscribe(seen.append)
    yield seen
    unsubscribe()


class Loop:
    """Linear regression by hand, with momentum, in float64."""

    def __init__(self):
        self.w = tf.Variable(np.zeros((3, 2)), name="w")
        self.velocity = tf.Variable(np.zeros((3, 2)), trainable=False, name="velocity")
        self.count = tf.Variable(0, dtype=tf.int64, trainable=False, name="count")
        self.rate = tf.Variable(0.1, dtype=tf.float64, trainable=False, name="rate")

    def step(self, x, y, power=2):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.abs(x @ self.w - y) ** power)
        gradient = tape.gradient(loss, self.w)
        self.velocity.assign(0.9 * self.velocity + gradient)
        self.w.assign_sub(self.rate * self.velocity)
        self.count.assign_add(1)
        return {"loss": loss, "extra": [gradient, None]}


def batches(count=20, rows=8):
    random = np.random.default_rng(0)
    return [
        (tf.constant(random.standard_normal((rows, 3))), tf.constant(random.standard_normal((rows, 2))))
        for _ in range(count)
    ]


def run(step, loop, data):
    losses = [float(step(x, y)["loss"]) for x, y in data]
    return [np.array(losses), loop.w.numpy(), loop.velocity.numpy(), loop.count.numpy()]


@pytest.mark.parametrize("kind", ["plain", "tf.function", "jit_compile"])
def test_a_hand_written_step_trains_as_tensorflow_does(kind, config):
    plain, ours = Loop(), Loop()
    function = {
        "plain": lambda step: step,
        "tf.function": tf.function,
        "jit_compile": lambda step: tf.function(step, jit_compile=True, autograph=False),
    }[kind](ours.step)
    right = run(plain.step, plain, batches())
    got = run(tc.compile(function, config), ours, batches())
    for one, other in zip(right, got, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-7)


def test_what_is_returned_keeps_its_structure(config):
    loop = Loop()
    result = tc.compile(loop.step, config)(*batches()[0])
    assert list(result) == ["loss", "extra"] and result["extra"][1] is None
    assert isinstance(result["loss"], tf.Tensor) and result["extra"][0].shape == (3, 2)


def test_numpy_arrays_and_keyword_arguments(config, events):
    loop = Loop()
    step = tc.compile(loop.step, config)
    (x, y) = batches()[0]
    step(x.numpy(), y=y.numpy())
    step(x.numpy(), y=y.numpy())
    assert loop.count.numpy() == 2 and not [event for event in events if isinstance(event, Recompiled)]


def test_arguments_in_any_order_and_a_variable_among_them(config):
    total = tf.Variable(0.0)

    def step(x, y=2.0, *, into, b=1.0, a=1.0):
        return into.assign_add(x * 1000 + y * 100 + b * 10 + a)

    step = tc.compile(tf.function(step), config)
    one, two, three, four = (tf.constant(float(number)) for number in (1, 2, 3, 4))
    assert float(step(b=three, y=two, a=four, x=one, into=total)) == 1234
    assert float(step(one, into=total)) == 1234 + 1211


def test_another_constant_is_another_program(config, events):
    plain, ours = Loop(), Loop()
    step = tc.compile(ours.step, config)
    for power in (2, 3, 2):
        one, other = plain.step(*batches()[0], power=power), step(*batches()[0], power=power)
        np.testing.assert_allclose(one["loss"], other["loss"], rtol=1e-7)
    (event,) = [event for event in events if isinstance(event, Recompiled)]
    assert "int 2 -> int 3" in event.changed and event.where.startswith("test_compile.py:")


def test_a_further_shape_is_named_with_both_sizes(config, events):
    step = tc.compile(Loop().step, config)
    for rows in (8, 5, 8, 5):
        step(*batches(1, rows)[0])
    (event,) = [event for event in events if isinstance(event, Recompiled)]
    assert event.changed == "x float64[8, 3] -> float64[5, 3], y float64[8, 2] -> float64[5, 2]"
    assert event.count == 2


def test_variables_are_taken_over_and_given_back(config):
    loop = Loop()
    step = tc.compile(loop.step, config)
    step(*batches()[0])
    cell = state.state_of(loop.w)  # asks for the handle, which gives the value back
    assert cell.array is None
    step(*batches()[0])
    assert cell.array is not None and cell.is_ahead
    address = cell.array.unsafe_buffer_pointer()
    step(*batches()[0])
    assert cell.array.unsafe_buffer_pointer() == address  # updated in place
    loop.rate.assign(0.0)
    before = loop.w.numpy()
    assert cell.array is None and np.isfinite(before).all()
    step(*batches()[0])
    np.testing.assert_array_equal(loop.w.numpy(), before)


def test_the_program_names_its_state(config):
    loop = Loop()
    traced = tf.function(lambda x, y: loop.step(x, y)["loss"])
    args = [np.zeros((8, 3)), np.zeros((8, 2))]
    trace, _ = Traces(traced.get_concrete_function, is_checked=True).of(tuple(args), args)
    bridged = bridge.export(trace, [tf.TensorSpec(item.shape, item.dtype) for item in args], "step")
    program = bridged.program
    assert {spec.name: spec.role for spec in program.state} == {
        "w": "parameter",
        "velocity": "buffer",
        "count": "buffer",
    }
    assert [(spec.name, spec.role) for spec in program.inputs][2:] == [("rate", "buffer")]
    assert [spec.shape for spec in program.inputs[:2]] == [(8, 3), (8, 2)]
    assert [spec.dtype for spec in program.outputs] == [np.float64]


def test_a_generator_of_tensorflow_is_state(config):
    results = []
    for compiled in (False, True):
        generator = tf.random.Generator.from_seed(7, alg="philox")
        total = tf.Variable(0.0)

        def step(x, generator=generator, total=total):
            total.assign_add(tf.reduce_sum(x * generator.normal((4,))))
            return total.read_value()

        function = tf.function(step, jit_compile=True)
        function = tc.compile(function, config) if compiled else function
        results.append([float(function(tf.ones((4,)))) for _ in range(5)])
    np.testing.assert_allclose(*results, rtol=1e-5)
    assert len(set(results[1])) == 5


def test_a_step_that_assigns_nothing_is_refused(config):
    with pytest.raises(UsageError, match=r"tc.compile\(loss\): loss assigns no tf.Variable"):

        def loss(x):
            return tf.multiply(x, 2)

        tc.compile(loss, config)(tf.ones(3))


def test_what_cannot_be_compiled_is_named(config, events):
    count = tf.Variable(0)

    def step(x):
        count.assign_add(tf.strings.length(tf.strings.as_string(x)))
        return count.read_value()

    with pytest.raises(FallbackError, match="test_compile.py:.*XLA has no kernel for AsString"):
        tc.compile(step, config)(tf.constant(12))
    eager = TrainingCompilerConfig(engine="xla", quiet=True)
    function = tc.compile(step, eager)
    assert [int(function(tf.constant(12))) for _ in range(3)] == [2, 4, 6]
    (event,) = [event for event in events if isinstance(event, FellBack)]
    assert event.operator == "AsString" and event.permanent


def test_an_error_of_the_step_is_its_own(config):
    def step(x):
        raise RuntimeError("mine", tf)

    with pytest.raises(RuntimeError, match="mine"):
        tc.compile(step, TrainingCompilerConfig(engine="xla", quiet=True))(tf.ones(3))


def test_auto_measures_and_uses_every_batch_once(config, events):
    plain, ours = Loop(), Loop()
    step = tc.compile(ours.step, TrainingCompilerConfig(engine="auto", quiet=True, cache_dir=config.cache_dir))
    right, got = run(plain.step, plain, batches(60)), run(step, ours, batches(60))
    for one, other in zip(right, got, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-7)
    (event,) = [event for event in events if isinstance(event, EngineChosen)]
    assert event.engine in event.times_ms and "xla" in event.times_ms and len(event.times_ms) >= 2


def test_engine_tensorflow_compiles_nothing(config):
    before = statistics().compiles
    loop = Loop()
    step = tc.compile(loop.step, TrainingCompilerConfig(engine="tensorflow", quiet=True))
    step(*batches()[0])
    assert loop.count.numpy() == 1 and statistics().compiles == before


def test_an_unknown_version_is_noted_and_one_without_the_bridge_refused(monkeypatch):
    assert bridge.check_version() == ""
    monkeypatch.setattr(tf, "__version__", "2.99.0")
    assert "2.99.0 is not one that the bridge to XLA has been tested with (2.20 to 2.21)" in bridge.check_version()
    monkeypatch.setattr(tf, "function", lambda function: function)
    with pytest.raises(tc.TrainingCompilerError, match="has no tf.function.experimental_get_compiler_ir"):
        bridge.check_version()


def test_hooks_leave_nothing_behind(config):
    from tensorflow.python.ops.resource_variable_ops import BaseResourceVariable

    loop = Loop()
    step = tc.compile(loop.step, config)
    step(*batches()[0])
    hooks.uninstall()
    assert "_handle" not in vars(BaseResourceVariable)
    assert loop.count.numpy() == 1
    loop.count.assign(5)
    assert loop.count.numpy() == 5


def test_what_xla_refuses_to_compile_runs_in_tensorflow(config, events, monkeypatch):
    def refuse(*_):
        raise jax.errors.JaxRuntimeError("UNIMPLEMENTED: not for this device\nand more")

    monkeypatch.setattr("trainingcompiler.frameworks.tensorflow.programs.compiler.compile", refuse)
    loop = Loop()
    step = tc.compile(loop.step, TrainingCompilerConfig(engine="xla", quiet=True))
    for batch in batches(3):
        step(*batch)
    assert loop.count.numpy() == 3
    (event,) = [event for event in events if isinstance(event, FellBack)]
    assert event.reason == "XLA could not compile it: UNIMPLEMENTED: not for this device"


def test_where_the_graph_has_won_new_shapes_are_tensorflows(config, events):
    loop = Loop()
    auto = TrainingCompilerConfig(engine="auto", quiet=True, cache_dir=config.cache_dir)
    step = tc.compile(tf.function(loop.step), auto)
    step(*batches()[0])
    step._runner._choice.chosen = TF_GRAPH
    for rows in (3, 4, 5):
        step(*batches(1, rows)[0])
    assert loop.count.numpy() == 4 and len(step._runner._steps) == 1
    assert not [event for event in events if isinstance(event, Recompiled)]


def test_tensorflows_xla_is_dropped_where_it_fails(config, events, monkeypatch):
    from trainingcompiler.frameworks.tensorflow.programs import TracedStep

    def fail(self, leaves, jit_compile=False):
        raise tf.errors.InvalidArgumentError(None, None, "no cluster")

    monkeypatch.setattr(TracedStep, "run_in_tensorflow", fail)
    loop = Loop()
    step = tc.compile(tf.function(loop.step, jit_compile=True), TrainingCompilerConfig(engine="auto", quiet=True))
    for batch in batches(20):
        step(*batch)
    assert loop.count.numpy() == 20 and step._runner._choice.chosen == XLA
    assert ["no cluster" in event.text for event in events if isinstance(event, Note)] == [True]


def test_a_function_that_needs_to_run_eagerly_does(config, events):
    loop = Loop()

    def step(x, y):
        result = loop.step(x, y)
        return float(tf.identity(result["loss"]).numpy())  # only an eager tensor has a value

    compiled = tc.compile(step, TrainingCompilerConfig(engine="xla", quiet=True))
    losses = [compiled(*batch) for batch in batches(4)]
    assert all(isinstance(loss, float) for loss in losses) and loop.count.numpy() == 4
    (event,) = [event for event in events if isinstance(event, FellBack)]
    assert "tracing it raised" in event.reason and event.where.startswith("test_compile.py:")
