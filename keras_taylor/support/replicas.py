"""Several devices: sums over them, and values on which their processes agree.

Only this module knows how each backend divides a batch among devices:

- JAX (`keras.distribution`) runs one program on the whole batch, so every sum is over the whole batch.
- TensorFlow (`tf.distribute`) runs the step once for each replica, on a part of the batch.
- Keras' trainer for PyTorch uses one device. With DistributedDataParallel in a loop of the user's, each
  process works alone.
"""

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_taylor.support.types import Array, Tensor


class _Division(NamedTuple):
    """How a batch is divided among devices."""

    num_parts: int
    must_be_equal: bool  # whether all devices must get the same number of examples


class _Process(NamedTuple):
    """One of several processes that run the same program on one model."""

    number: int
    num_processes: int


def num_replicas() -> int:
    """The number by which Keras divides a replica's loss, so that the gradients of all replicas add up."""
    strategy = _strategy()
    return 1 if strategy is None else strategy.num_replicas_in_sync


def sum_over_replicas(values: Tensor) -> Tensor:
    """The sum of a tensor over all replicas, the same in each; outside of replicas, the tensor itself."""
    context = _replica_context()
    return values if context is None else context.all_reduce("SUM", values)


def num_examples_before(batch: Tensor) -> Tensor:
    """The number of examples of the batch on replicas before this one, an int32 scalar.

    Args:
        batch: The number of examples on this replica.
    """
    context = _replica_context()
    if context is None:
        return 0
    order = keras.ops.arange(num_replicas())
    here = keras.ops.cast(order == context.replica_id_in_sync_group, "int32")
    counts = context.all_reduce("SUM", here * keras.ops.cast(batch, "int32"))
    return keras.ops.sum(counts * keras.ops.cast(order < context.replica_id_in_sync_group, "int32"))


def strategy_scope(model: keras.Model) -> AbstractContextManager[Any]:
    """A context in which new variables are placed as those of a model are.

    `model.fit` finds the strategy under which the model was made. So do the verbs of this package.
    """
    strategy = getattr(model, "distribute_strategy", None)  # an attribute of Keras' TensorFlow trainer
    return contextlib.nullcontext() if strategy is None else strategy.scope()


def check_batches(num_examples: int | None, batch_size: int, argument: str = "ds") -> None:
    """Refuses batches that `fit` cannot divide among the devices.

    Args:
        num_examples: Number of examples, `None` if unknown.
        batch_size: Number of examples in a batch.
        argument: Name of the argument that holds them.

    Raises:
        ValueError: if a batch, or the smaller last one, cannot be divided; under a strategy that Keras'
            trainer cannot run.
    """
    if _has_workers(_strategy()):
        raise ValueError(
            "Keras' trainer cannot `fit` under MultiWorkerMirroredStrategy (keras-team/keras#20585). "
            "Expected MirroredStrategy, or `keras.distribution.DataParallel` on JAX for several processes; a "
            "PrunableModel in a training loop of your own, with `strategy.run`, works under either. "
            "Received: a model made under MultiWorkerMirroredStrategy"
        )
    parts, even = _division()
    sizes = [batch_size] if num_examples is None or num_examples >= batch_size else []
    if num_examples is not None and num_examples % batch_size:
        sizes.append(num_examples % batch_size)
    for size in sizes:
        # TensorFlow gives each device the same number, rounded up, until no example is left
        if size % parts if even else (parts - 1) * -(-size // parts) >= size:
            wanted = f"a multiple of {parts} examples" + ("" if even else ", or enough for the last device")
            raise ValueError(
                f"A batch of {size} examples cannot be spread over {parts} devices. Expected in each batch, "
                f"the last one too, {wanted}: pass another `batch_size`, or leave out examples. "
                f"Received: {argument} of {num_examples} examples in batches of {batch_size}"
            )


def num_processes() -> int:
    """The number of processes that run this program on one model, each with some of the devices."""
    return _process().num_processes


def is_first_process() -> bool:
    """Whether this is the process that writes files and prints."""
    return _process().number == 0


def from_first_process(array: Array) -> Array:
    """The array of the first process, in every process. Shapes may differ, ranks may not."""
    if num_processes() == 1:
        return array
    array = np.asarray(array)
    if array.dtype == bool:
        return from_first_process(array.astype(np.int32)).astype(bool)
    shape = _broadcast(np.array(array.shape, np.int32))
    return _broadcast(array if is_first_process() else np.zeros(shape, array.dtype)).astype(array.dtype)


def bytes_from_first_process(function: Callable[[], bytes]) -> bytes:
    """Calls a function in the first process; returns its bytes in every process.

    Raises:
        ValueError: the error of the function, in every process, so that none waits for one that gave up.
    """
    if num_processes() == 1:
        return function()
    content = b""
    error: ValueError | None = None
    if is_first_process():
        try:
            content = function()
        except ValueError as raised:
            error = raised
    complaint = _broadcast_bytes(b"" if error is None else str(error).encode())
    if complaint:
        raise error or ValueError(complaint.decode())
    return _broadcast_bytes(content)


def _broadcast_bytes(content: bytes) -> bytes:
    length = int(from_first_process(np.array([len(content)], np.int32))[0])
    padded = content.ljust(
        -(-len(content) // 4) * 4, b"\0"
    )  # JAX broadcasts by adding, and has int32 on every platform
    return from_first_process(np.frombuffer(padded, np.int32)).tobytes()[:length]


def _division() -> _Division:
    """How the current strategy or distribution divides a batch."""
    distribution = _distribution()
    if distribution is None:
        return _Division(num_replicas(), must_be_equal=False)
    mesh = distribution.device_mesh
    parts = int(mesh.shape[mesh.axis_names.index(distribution.batch_dim_name)])
    if not distribution.auto_shard_dataset:  # each process reads batches of its own
        parts = max(parts // distribution.num_processes, 1)
    return _Division(parts, must_be_equal=True)


def _process() -> _Process:
    """This process among those that work on one model."""
    distribution = _distribution()
    if distribution is None:
        return _Process(0, 1)
    devices = distribution.device_mesh.backend_mesh.devices.flat
    if len({device.process_index for device in devices}) == 1:  # each process has a model of its own
        return _Process(0, 1)
    import jax

    return _Process(jax.process_index(), jax.process_count())


def _broadcast(array: Array) -> Array:
    """The array of the first of several processes; the others pass zeros of the same shape."""
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.broadcast_one_to_all(array))


def _distribution() -> keras.distribution.DataParallel | keras.distribution.ModelParallel | None:
    """The current `keras.distribution` on JAX, the only backend that uses it; else `None`."""
    return keras.distribution.distribution() if keras.backend.backend() == "jax" else None


def _strategy() -> Any:  # a `tf.distribute.Strategy`; TensorFlow is imported only where it runs
    """The current `tf.distribute` strategy if it has several replicas, else `None`."""
    if keras.backend.backend() != "tensorflow":
        return None
    import tensorflow as tf

    strategy = tf.distribute.get_strategy()
    return strategy if strategy.num_replicas_in_sync > 1 else None


def check_layout(variable: keras.Variable, shape: Sequence[int], name: str) -> None:
    """Refuses a shape that the layout of a variable over devices does not allow.

    Args:
        variable: A Keras variable.
        shape: Its shape after the cut.
        name: Its name, for messages.

    Raises:
        ValueError: if the number of devices that share an axis does not divide the size of the axis.
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


def _has_workers(strategy: Any) -> bool:
    if strategy is None:
        return False
    import tensorflow as tf

    return isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)


def _replica_context() -> Any:  # a `tf.distribute.ReplicaContext`
    """The context of the replica that runs, or `None`."""
    if _strategy() is None:
        return None
    import tensorflow as tf

    return tf.distribute.get_replica_context()
