"""Several devices: what is summed over them, and what their processes agree on.

The only place that knows how each engine spreads a batch over devices:

- JAX (`keras.distribution`) runs one program on the whole batch: sums are over all of it by themselves.
- TensorFlow (`tf.distribute`) runs the step once a replica, on a part of the batch each.
- PyTorch's trainer knows one device; in loops with DistributedDataParallel each process is on its own.
"""

import contextlib

import keras
import numpy as np


def num_replicas():
    """By how many Keras divides the loss of a replica, so that the gradients of all of them add up."""
    strategy = _strategy()
    return 1 if strategy is None else strategy.num_replicas_in_sync


def sum_over_replicas(values):
    """The sum of a tensor over all replicas, the same in each; outside of replicas the tensor itself."""
    context = _replica_context()
    return values if context is None else context.all_reduce("SUM", values)


def num_examples_before(batch):
    """How many examples of the batch are on replicas before this one, an int32 scalar.

    Args:
        batch: How many are on this one.
    """
    context = _replica_context()
    if context is None:
        return 0
    order = keras.ops.arange(num_replicas())
    here = keras.ops.cast(order == context.replica_id_in_sync_group, "int32")
    counts = context.all_reduce("SUM", here * keras.ops.cast(batch, "int32"))
    return keras.ops.sum(counts * keras.ops.cast(order < context.replica_id_in_sync_group, "int32"))


def strategy_scope(model):
    """A context in which new variables live where those of a model do.

    `model.fit` finds the strategy that the model was made under by itself; so do the verbs of this package.
    """
    strategy = getattr(model, "distribute_strategy", None)  # what Keras' trainer for TensorFlow has
    return contextlib.nullcontext() if strategy is None else strategy.scope()


def check_batches(num_examples, batch_size, what="ds"):
    """Refuses batches that `fit` cannot spread over the devices.

    Args:
        num_examples: How many examples there are, or `None`.
        batch_size: Examples a batch.
        what: The argument that they come from.

    Raises:
        ValueError: if a batch, or what is left for the last one, does not go round; under a strategy that
            Keras' trainer cannot run.
    """
    if _has_workers(_strategy()):
        raise ValueError(
            "Keras' trainer cannot `fit` under MultiWorkerMirroredStrategy (keras-team/keras#20585). "
            "Expected MirroredStrategy, or `keras.distribution.DataParallel` on JAX for several processes; a "
            "PrunableModel in a training loop of your own, with `strategy.run`, works under either. "
            "Received: a model made under MultiWorkerMirroredStrategy"
        )
    parts, even = _parts()
    sizes = [batch_size] if num_examples is None or num_examples >= batch_size else []
    if num_examples is not None and num_examples % batch_size:
        sizes.append(num_examples % batch_size)
    for size in sizes:
        # TensorFlow gives each device the same number, rounded up, as long as there are some
        if size % parts if even else (parts - 1) * -(-size // parts) >= size:
            wanted = f"a multiple of {parts} examples" + ("" if even else ", or enough for the last device")
            raise ValueError(
                f"A batch of {size} examples cannot be spread over {parts} devices. Expected in each batch, "
                f"the last one too, {wanted}: pass another `batch_size`, or leave out examples. "
                f"Received: {what} of {num_examples} examples in batches of {batch_size}"
            )


def num_processes():
    """How many processes run this program together, on one model: each has a part of the devices."""
    return _process()[1]


def is_first_process():
    """Whether this is the process that writes files and speaks."""
    return _process()[0] == 0


def from_first_process(array):
    """The first process' array, in every process; the others' may have other shapes of as many axes."""
    if num_processes() == 1:
        return array
    array = np.asarray(array)
    if array.dtype == bool:
        return from_first_process(array.astype(np.int32)).astype(bool)
    shape = _from_first(np.array(array.shape, np.int32))
    return _from_first(array if is_first_process() else np.zeros(shape, array.dtype)).astype(array.dtype)


def bytes_from_first_process(function):
    """Bytes that a function without arguments returns in the first process, in every process.

    Raises:
        ValueError: that of the function, in every process: none of them waits for one that gave up.
    """
    if num_processes() == 1:
        return function()
    content, error = b"", None
    if is_first_process():
        try:
            content = function()
        except ValueError as raised:
            error = raised
    complaint = _agreed_bytes(b"" if error is None else str(error).encode())
    if complaint:
        raise error or ValueError(complaint.decode())
    return _agreed_bytes(content)


def _agreed_bytes(content):
    length = int(from_first_process(np.array([len(content)], np.int32))[0])
    padded = content.ljust(-(-len(content) // 4) * 4, b"\0")  # JAX adds them up, and knows int32 everywhere
    return from_first_process(np.frombuffer(padded, np.int32)).tobytes()[:length]


def _parts():
    """Over how many devices a batch is spread, and whether all must get the same number of examples."""
    distribution = _distribution()
    if distribution is None:
        return num_replicas(), False
    mesh = distribution.device_mesh
    parts = int(mesh.shape[mesh.axis_names.index(distribution.batch_dim_name)])
    # where processes read data of their own, a batch is what one of them reads
    return parts if distribution.auto_shard_dataset else max(parts // distribution.num_processes, 1), True


def _process():
    """The number of this process, and of how many that work together."""
    distribution = _distribution()
    if distribution is None:
        return 0, 1
    devices = distribution.device_mesh.backend_mesh.devices.flat
    if len({device.process_index for device in devices}) == 1:  # each process has a model of its own
        return 0, 1
    import jax

    return jax.process_index(), jax.process_count()


def _from_first(array):
    """What the first of several processes has; the others give zeros of the same shape."""
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.broadcast_one_to_all(array))


def _distribution():
    """The `keras.distribution` that is current, where the engine heeds it, or `None`."""
    return keras.distribution.distribution() if keras.backend.backend() == "jax" else None


def _strategy():
    """The `tf.distribute` strategy of several replicas that is current, or `None`."""
    if keras.backend.backend() != "tensorflow":
        return None
    import tensorflow as tf

    strategy = tf.distribute.get_strategy()
    return strategy if strategy.num_replicas_in_sync > 1 else None


def check_layout(variable, shape, name):
    """Refuses a shape that the layout of a variable over devices does not allow.

    Args:
        variable: A Keras variable.
        shape: What is to be left of it.
        name: Of the variable, for messages.

    Raises:
        ValueError: if an axis does not divide by the number of devices that share it.
    """
    if _distribution() is None:
        return
    sharding = variable.value.sharding
    try:
        sharding.shard_shape(tuple(shape))
    except ValueError as error:
        raise ValueError(
            f"Weight '{name}' is spread over devices by {sharding.spec} on {dict(sharding.mesh.shape)}, and "
            "what the plan leaves of it does not divide by their number. Expected multiples: make the plan "
            "with `round_to`, say, or lay this weight out otherwise in the `LayoutMap`. "
            f"Received: plan that leaves the shape {tuple(shape)} of {tuple(variable.shape)}"
        ) from error


def _has_workers(strategy):
    if strategy is None:
        return False
    import tensorflow as tf

    return isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)


def _replica_context():
    """That of the replica that runs, or `None`."""
    if _strategy() is None:
        return None
    import tensorflow as tf

    return tf.distribute.get_replica_context()
