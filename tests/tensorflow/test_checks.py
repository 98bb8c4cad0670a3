"""What TensorFlow's kernels refuse of a step's values is refused in its words, also where XLA would compute on."""

import numpy as np
import pytest
import tensorflow as tf

import trainingcompiler as tc
from trainingcompiler import TrainingCompilerConfig
from trainingcompiler.frameworks.tensorflow import hooks
from trainingcompiler.reporting.events import FellBack, subscribe
from trainingcompiler.reporting.statistics import current as statistics

NAN = float("nan")
TABLE = tf.reshape(tf.range(15.0), (5, 3))


@pytest.fixture
def config(tmp_path_factory):
    folder = str(tmp_path_factory.getbasetemp() / "executables")
    yield TrainingCompilerConfig(engine="xla", fallback="error", quiet=True, cache_dir=folder)
    hooks.uninstall()


@tf.function
def looked_up(x):
    return tf.gather(TABLE, x)


def asserted(x):
    tf.debugging.assert_positive(x, "not positive")
    return x


def counted(x):
    return tf.while_loop(lambda k, s: k < 3, lambda k, s: (k + 1, s + tf.gather(TABLE, x + k)), [0, tf.zeros(3)])[1]


def repeated(x):
    return tf.while_loop(lambda k, s: k < 2, lambda k, s: (k + 1, tf.debugging.check_numerics(s - 1, "bad")), [0, x])[1]


CASES = {  # a function, values that it takes, and values that TensorFlow refuses
    "gather": (lambda x: tf.gather(TABLE, x), [1, 4], [1, 5]),
    "gather along a dim": (lambda x: tf.gather(TABLE, x, axis=1), [0, 2], [0, 3]),
    "gather in batches": (lambda x: tf.gather(TABLE[:2], x, batch_dims=1), [[0], [2]], [[0], [3]]),
    "gather_nd": (lambda x: tf.gather_nd(TABLE, x), [[4, 2]], [[4, 3]]),
    "labels": (lambda x: tf.nn.sparse_softmax_cross_entropy_with_logits(x, TABLE[:2]), [0, 2], [0, 3]),
    "assertion": (asserted, [1.0], [-1.0]),
    "check_numerics": (lambda x: tf.debugging.check_numerics(x, "bad"), [1.0], [NAN]),
    "division": (lambda x: 7 // x, [2], [0]),
    "remainder": (lambda x: 7 % x, [2], [0]),
    "power": (lambda x: 2**x, [2], [-1]),
    "inverse": (tf.linalg.inv, [[2.0, 0.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]),
    "scatter_nd": (lambda x: tf.scatter_nd(x, tf.ones(1), [4]), [[3]], [[4]]),
    "tensor_scatter": (lambda x: tf.tensor_scatter_nd_add(tf.zeros(4), x, tf.ones(1)), [[3]], [[4]]),
    "segments": (lambda x: tf.math.unsorted_segment_sum(tf.ones(2), x, 3), [-1, 2], [-1, 3]),
    "index": (lambda x: TABLE[x[0], 1], [-5], [5]),
    "slice": (lambda x: tf.slice(TABLE, tf.stack([x[0], 0]), [2, 3]), [3], [4]),
    "reverse_sequence": (lambda x: tf.reverse_sequence(TABLE[:2], x, seq_axis=1), [1, 3], [1, 4]),
    "permutation": (tf.math.invert_permutation, [1, 0], [1, 2]),
    "element of a list": (lambda x: tf.TensorArray(tf.float32, 5).unstack(TABLE).read(x[0]), [4], [5]),
    "random range": (lambda x: tf.random.stateless_uniform((3,), [1, 2], 0, x[0], tf.int32), [1], [0]),
    "in a tf.function": (looked_up, [4], [5]),
    "in a loop": (lambda x: counted(x[0]), [2], [3]),
    "what a loop computes": (repeated, [1.0], [NAN]),
    "in a branch": (lambda x: tf.cond(x[0] > 2, lambda: looked_up(x)[0], lambda: tf.zeros(3)), [4], [5]),
    "in a map": (lambda x: tf.map_fn(lambda i: tf.gather(TABLE, i), x, fn_output_signature=tf.float32), [1, 4], [5, 1]),
}


@pytest.mark.parametrize("name", CASES)
def test_a_value_that_tensorflow_refuses_is_refused(name, config):
    compute, good, bad = CASES[name]
    seen = []
    for compiled in (False, True):
        total = tf.Variable(0.0)

        def step(x, total=total):
            return total.assign_add(tf.reduce_sum(tf.cast(compute(x), tf.float32)))

        function = tf.function(step)
        before = statistics().compiled_steps
        function = tc.compile(function, config) if compiled else function
        function(tf.constant(good))
        with pytest.raises(tf.errors.InvalidArgumentError) as caught:
            function(tf.constant(bad))
        function(tf.constant(good))
        assert statistics().compiled_steps == before + 2 * compiled
        lines = [line.rpartition("}} ")[2] for line in str(caught.value).splitlines()]
        seen.append(
            (
                total.numpy(),
                next(line for line in lines if line and "Graph execution" not in line and " at " not in line),
            )
        )
    assert seen[0][0] == pytest.approx(seen[1][0])
    assert seen[0][1] == seen[1][1]


def test_rows_of_a_variable_are_checked(config):
    table = tf.Variable(TABLE)
    step = tc.compile(tf.function(lambda x: table.scatter_add(tf.IndexedSlices(tf.gather(table, x), x))), config)
    step(np.array([4]))
    kept = table.numpy()
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"= 5 is not in \[0, 5\)"):
        step(np.array([5]))
    np.testing.assert_array_equal(table.numpy(), kept)


def test_a_step_that_asks_for_xla_is_not_checked(config):
    """TensorFlow's own XLA clamps the index too."""
    total = tf.Variable(0.0)
    step = tf.function(lambda x: total.assign_add(tf.gather(TABLE[:, 0], x)), jit_compile=True)
    compiled = tc.compile(step, config)
    assert float(compiled(np.int64(7))) == 12.0
    assert float(step(np.int64(7))) == 24.0


def test_where_tensorflow_computes_on_it_runs_the_step_again(config):
    """`in_top_k` is no error for a target that does not exist, and XLA has another answer."""
    total = tf.Variable(0)
    scores = tf.zeros((1, 3))

    def step(x):
        return total.assign_add(tf.cast(tf.math.in_top_k(x, scores, 2), tf.int32)[0])

    events = []
    unsubscribe = subscribe(lambda event: events.append(event) if isinstance(event, FellBack) else None)
    compiled = tc.compile(tf.function(step), TrainingCompilerConfig(engine="xla", quiet=True))
    found = [int(compiled(np.array([target]))) for target in (0, 7, 7, 1, 7, 7)]
    unsubscribe()
    assert found == [1, 1, 1, 2, 2, 2]
    (event,) = events
    assert event.operator == "InTopKV2" and event.where.startswith("test_checks.py:")
    assert (
        "3 times it has had values for InTopKV2" in event.reason
        and "TensorFlow had to run the step again" in event.reason
    )


def test_what_would_have_to_be_written_twice_is_tensorflows(config):
    total = tf.Variable(1.0)

    @tf.function
    def inner(x):
        total.assign_add(1.0)
        return tf.debugging.check_numerics(total * x, "bad")

    events = []
    unsubscribe = subscribe(lambda event: events.append(event) if isinstance(event, FellBack) else None)
    compiled = tc.compile(tf.function(lambda x: inner(x)), TrainingCompilerConfig(engine="xla", quiet=True))
    assert [float(compiled(tf.constant(2.0))) for _ in range(2)] == [4.0, 6.0]
    unsubscribe()
    assert events[0].where.startswith("test_checks.py:")
    assert "a value that TensorFlow checks inside a loop, a branch or a tf.function depends on" in events[0].reason


def test_what_only_sizes_decide_leaves_tensorflows_xla_in_the_race(config):
    """The gradient of a mean gathers sizes; nobody has to look at the values of every step for that."""
    weight = tf.Variable(2.0)

    @tf.function(input_signature=[tf.TensorSpec((None,), tf.float32)])
    def step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((weight * x) ** 2, keepdims=True)[tf.shape(x)[0] - tf.size(x)]
        weight.assign_sub(0.1 * tape.gradient(loss, weight))
        return loss

    compiled = tc.compile(step, TrainingCompilerConfig(engine="auto", quiet=True, cache_dir=config.cache_dir))
    compiled(tf.ones(3))
    (traced,) = compiled._runner._steps.values()
    checks = traced.bridged.trace.checks
    assert checks and all(check.is_fixed for check in checks) and traced.is_sound
    assert "tensorflow (its XLA)" in compiled._runner._choice._times_s
