"""A program that the tests of several devices start as often as there are processes.

`python distributed_job.py ENGINE TASK FOLDER`, the backend by `KERAS_BACKEND`. Engines are "single",
"devices" (four for JAX, two for TensorFlow), "processes" (two, `PROCESS` and `PORTS` in the environment)
and "sharded" (weights over devices). What a task finds goes to `FOLDER/PROCESS.npz`.
"""

import contextlib
import io
import json
import os
import pathlib
import signal
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np

NUM_EXAMPLES, BATCH_SIZE = 44, 8
# What is the same everywhere need not be compiled twice.
CRITERIA = {
    "jax": ("taylor", "log_odds"),
    "tensorflow": ("taylor", "log_odds", "taylor_batch", "fisher", "oracle"),
}
NUM_DEVICES = {"jax": 4, "tensorflow": 2, "torch": 1}


def even_widths():
    """Keras is imported after the devices are set up."""
    import keras_taylor

    return keras_taylor.Selection(round_to=2)


class Job:
    """How one process takes part: the scope in which models are made, and its share of the data."""

    def __init__(self, engine, backend, folder):
        self.process = int(os.environ.get("PROCESS", 0))
        self.num_processes = 2 if engine == "processes" else 1
        self.ports = os.environ.get("PORTS", "").split(",")
        self.scope = contextlib.nullcontext
        self.backend = backend
        self.folder = pathlib.Path(folder)
        start = getattr(self, f"_{engine}_{backend}", None)
        if start is not None:
            start(int(os.environ.get("NUM_DEVICES", NUM_DEVICES[backend])))

    def _devices_jax(self, number):
        os.environ["XLA_FLAGS"] += f" --xla_force_host_platform_device_count={number}"
        import keras

        keras.distribution.set_distribution(keras.distribution.DataParallel())

    def _sharded_jax(self, number):
        os.environ["XLA_FLAGS"] += f" --xla_force_host_platform_device_count={number}"
        import keras

        mesh = keras.distribution.DeviceMesh((2, 2), ("batch", "model"))
        layout = keras.distribution.LayoutMap(mesh)
        layout["first/kernel"] = (None, None, None, "model")
        layout["second/kernel"] = (None, None, "model", None)
        keras.distribution.set_distribution(
            keras.distribution.ModelParallel(layout_map=layout, batch_dim_name="batch")
        )

    def _processes_jax(self, number):
        os.environ["XLA_FLAGS"] += f" --xla_force_host_platform_device_count={number // 2}"
        import jax

        # an engine that waits for a worker that died says so after this many seconds, by default 100
        jax.distributed.initialize(
            f"127.0.0.1:{self.ports[0]}", 2, self.process, heartbeat_timeout_seconds=10
        )
        import keras

        keras.distribution.set_distribution(keras.distribution.DataParallel(auto_shard_dataset=False))

    def _processes_torch(self, number):
        import torch.distributed as dist

        dist.init_process_group(
            "gloo", init_method=f"tcp://127.0.0.1:{self.ports[0]}", rank=self.process, world_size=2
        )

    def _devices_tensorflow(self, number):
        import tensorflow as tf

        (cpu,) = tf.config.list_physical_devices("CPU")
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * number)
        self.scope = tf.distribute.MirroredStrategy([f"CPU:{k}" for k in range(number)]).scope

    def _processes_tensorflow(self, number):
        os.environ["TF_CONFIG"] = json.dumps(
            {
                "cluster": {"worker": [f"127.0.0.1:{port}" for port in self.ports]},
                "task": {"type": "worker", "index": self.process},
            }
        )
        import tensorflow as tf

        self.scope = tf.distribute.MultiWorkerMirroredStrategy().scope

    def data(self, number=NUM_EXAMPLES):
        """Arrays, and the batch size to pass: JAX' processes read parts of each batch of their own."""
        random = np.random.default_rng(1)
        y = np.arange(number) % 3
        x = (random.normal(0, 1, (number, 6, 6, 2)) + y[:, None, None, None]).astype("float32")
        if self.backend == "tensorflow" or self.num_processes == 1:
            return (x, y), BATCH_SIZE
        size = BATCH_SIZE // 2
        mine = np.arange(number) // size % 2 == self.process
        mine[-(number % BATCH_SIZE) :] = (
            np.arange(number % BATCH_SIZE) // (number % BATCH_SIZE // 2) == self.process
        )
        return (x[mine], y[mine]), size


def build(normalized=True):
    """A small classifier with the same weights at every call."""
    import keras

    x = inputs = keras.Input((6, 6, 2), name="images")
    x = keras.layers.Conv2D(6, 3, name="first")(x)
    if normalized:
        x = keras.layers.BatchNormalization(name="norm")(x)
    x = keras.layers.Conv2D(8, 3, activation="relu", name="second")(keras.layers.ReLU(name="relu")(x))
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    model = keras.Model(inputs, keras.layers.Dense(3, name="head")(x), name="small")
    random = np.random.default_rng(3)
    for weight in model.weights:
        if weight.name in ("kernel", "gamma"):
            weight.assign(random.normal(weight.name == "gamma", 0.4, weight.shape))
    model.compile(
        keras.optimizers.SGD(0.05, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def values(model):
    """Weights as arrays, by path."""
    import keras

    return {f"weight {w.path}": np.array(keras.ops.convert_to_numpy(w)) for w in model.weights}


def with_prefix(prefix, arrays):
    return {f"{prefix}: {key}": value for key, value in arrays.items()}


def scores(job):
    """Scores by every criterion that reads data, and what is cut by them."""
    import keras_taylor

    with job.scope():
        model = build()
    data, size = job.data()
    found = {}
    for criterion in CRITERIA[job.backend]:
        result = keras_taylor.score(model, data, criterion=criterion, batch_size=size)
        found.update(with_prefix(criterion, result))
        if criterion == "taylor":
            plan = keras_taylor.make_plan(model, result, 0.3, selection=even_widths())
    small = keras_taylor.prune(model, plan)
    found["plan"] = np.array(plan.to_json())
    found.update(with_prefix("pruned", values(small)))
    return found


def uneven(job):
    """Scores where the last batch does not divide by the devices."""
    import keras_taylor

    with job.scope():
        model = build()
    data, size = job.data(int(os.environ["NUM_EXAMPLES"]))
    found = {}
    for criterion in ("taylor", "log_odds"):
        found.update(
            with_prefix(criterion, keras_taylor.score(model, data, criterion=criterion, batch_size=size))
        )
    with job.scope():
        prunable = keras_taylor.PrunableModel(build(normalized=False))
    prunable.optimizer.learning_rate = 0.0  # Keras weighs examples by the size of their part
    (x, y) = data
    prunable.fit(x, y, batch_size=size, verbose=0, shuffle=False)
    return {**found, **with_prefix("prunable", prunable.scores)}


def training(job):
    """A `PrunableModel` that trains, prunes, trains on and is stripped."""
    import keras_taylor

    with job.scope():
        model = build(normalized=False)  # BatchNormalization takes the statistics of each replica by itself
    (x, y), size = job.data()
    prunable = keras_taylor.PrunableModel(model, criterion="taylor_batch", selection=even_widths())
    arguments = {"batch_size": size, "verbose": 0, "shuffle": False}
    prunable.fit(x, y, **arguments)
    found = with_prefix("first", prunable.scores)
    prunable.prune(0.3)
    prunable.fit(x, y, **arguments)
    found.update(with_prefix("second", prunable.scores))
    small = prunable.strip()
    small.fit(x, y, **arguments)
    return {**found, "plan": np.array(prunable.plan.to_json()), **with_prefix("stripped", values(small))}


def ddp(job):
    """As `loop`, in the loop of `examples/torch_ddp.py`, or one of a single process like it."""
    import torch

    sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples"))
    import torch_ddp

    import keras_taylor

    prunable = keras_taylor.PrunableModel(build(normalized=False), selection=even_widths())
    (x, y), size = job.data()
    batches = list(zip(torch.tensor(x).split(size), torch.tensor(y).split(size), strict=True))
    optimizer = torch.optim.SGD([v.value for v in prunable.trainable_variables[:-1]], lr=0.05, momentum=0.9)
    if job.num_processes > 1:
        replica = torch.nn.parallel.DistributedDataParallel(prunable)
    else:
        replica = type(
            "Replica", (), {"__call__": lambda _, *a, **k: prunable(*a, **k), "module": prunable}
        )()
    torch_ddp.train_epoch(replica, optimizer, batches)
    found = with_prefix("first", prunable.scores)
    prunable.prune(0.3)
    torch_ddp.train_epoch(replica, optimizer, batches)
    found.update(with_prefix("second", prunable.scores))
    if job.num_processes > 1:
        torch_ddp.average_statistics(prunable)
    return {
        **found,
        "plan": np.array(prunable.plan.to_json()),
        **with_prefix("stripped", values(prunable.strip())),
    }


def loop(job):
    """As `training` up to the first pruning, in a loop that runs each step under the strategy."""
    import tensorflow as tf

    import keras_taylor

    with job.scope():
        strategy = tf.distribute.get_strategy()
        prunable = keras_taylor.PrunableModel(
            build(normalized=False), criterion="taylor_batch", selection=even_widths()
        )
    (x, y), size = job.data()

    def step(batch):
        with tf.GradientTape() as tape:
            loss = prunable.compute_loss(batch[0], batch[1], prunable(batch[0], training=True))
        gradients = tape.gradient(loss, prunable.trainable_variables)
        prunable.optimizer.apply_gradients(zip(gradients, prunable.trainable_variables, strict=True))

    run = tf.function(lambda batch: strategy.run(step, args=(batch,)))
    for batch in strategy.experimental_distribute_dataset(
        tf.data.Dataset.from_tensor_slices((x, y)).batch(size)
    ):
        run(batch)
    found = with_prefix("first", prunable.scores)
    prunable.prune(0.3)
    return {
        **found,
        "plan": np.array(prunable.plan.to_json()),
        **with_prefix("stripped", values(prunable.strip())),
    }


def refused(job):
    """What is said where the data, or the engine, does not allow a pass."""
    import keras_taylor

    with job.scope():
        model = build()
    data, size = job.data(int(os.environ.get("NUM_EXAMPLES", NUM_EXAMPLES)))
    found = {}
    for name, call in {
        "score": lambda: keras_taylor.score(model, data, batch_size=size),
        "compress": lambda: keras_taylor.compress(
            model, data, 0.3, batch_size=size, verbose=0, criterion="magnitude"
        ),
        "validation": lambda: keras_taylor.compress(
            model, tuple(part[:size] for part in data), 0.3, batch_size=size, verbose=0, validation_data=data
        ),
    }.items():
        try:
            call()
            found[name] = np.array("nothing")
        except ValueError as error:
            found[name] = np.array(str(error))
    return found


def compress(job, callbacks=(), **arguments):
    """A run of two rounds."""
    import keras_taylor

    with job.scope():
        model = build(normalized=False)
    data, size = job.data()
    np.random.seed(job.process)  # what is drawn from here on may differ
    small, info = keras_taylor.compress(
        model, data, 0.4, increment=0.2, selection=keras_taylor.Selection(round_to=2),
        batch_size=size, epochs=1, shuffle=False,
        callbacks=list(callbacks), return_info=True, validation_data=data, **{"verbose": 0, **arguments},
    )  # fmt: skip
    return {
        "rounds": np.array(json.dumps([done.layers for done in info.rounds])),
        "plan": np.array(info.plan.to_json()),
        "stop": np.array(info.stop_reason),
        "params": np.array(small.count_params()),
        "loss": np.array([done.metrics["loss"] for done in info.rounds if done.metrics]),
        **with_prefix("compressed", values(small)),
    }


def survive(job):
    """A run with backups; with `DIES` in the environment process 1 is killed when round 2 trains."""
    import keras

    class Die(keras.callbacks.Callback):
        rounds = 0

        def on_train_begin(self, logs=None):
            self.rounds += 1
            if self.rounds == 2 and job.process == 1 and "DIES" in os.environ:
                os.kill(os.getpid(), signal.SIGKILL)

    with contextlib.redirect_stdout(io.StringIO()) as said:
        arguments = {"criterion": "magnitude", "repair": False, "verbose": 2}  # less to compile
        found = compress(job, [Die()], backup_dir=job.folder / f"backups_{job.process}", **arguments)
    return {**found, "said": np.array(said.getvalue())}


def layouts(job):
    """How weights are spread over devices before and after a cut, and what is said where they cannot be."""
    import keras_taylor

    model = build(normalized=False)
    prunable = keras_taylor.PrunableModel(model, selection=even_widths())
    (x, y), size = job.data()
    prunable.fit(x, y, batch_size=size, verbose=0)
    prunable.prune(0.4)
    models = {"model": model, "stripped": prunable.strip()}
    models["pruned"] = keras_taylor.prune(model, prunable.plan)
    models["pruned"].fit(x, y, batch_size=size, verbose=0)
    found = {}
    for stage, each in models.items():
        for weight in each.weights:
            sharding = weight.value.sharding
            found[f"{stage}: {weight.path}"] = np.array(
                f"{sharding.spec} {sharding.shard_shape(weight.shape)}"
            )
    try:
        keras_taylor.prune(model, prunable.plan.keep("first", [0, 1, 2, 3, 4]))
    except ValueError as error:
        found["refused"] = np.array(str(error))
    return found


TASKS = {f.__name__: f for f in (scores, uneven, training, loop, ddp, refused, compress, survive, layouts)}


def main(engine, task, folder):
    """Runs one task and writes what it found."""
    if os.environ["KERAS_BACKEND"] != "tensorflow":
        sys.modules["tensorflow"] = None  # Keras would import it, for seconds, to set its seed
    job = Job(engine, os.environ["KERAS_BACKEND"], folder)
    import keras

    keras.utils.set_random_seed(0)  # weights of a model have to be the same in all processes
    for one in task.split("+"):
        found = TASKS[one](job)
        np.savez(job.folder / f"{one}_{job.process}.npz", **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
