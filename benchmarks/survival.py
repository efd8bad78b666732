"""Kills `compress` with SIGKILL at random moments, calls again until it is done, and looks at the result.

The digits CNN of `examples/quickstart.py`, trained once; three rounds of one epoch on a
part of the data. The moment of each kill is uniform over the time that a run takes
that nobody kills, counted from when the worker is about to call `compress`; now and then the
next run is killed too. Workers are forked from a server that has imported all, so that no
kill is lost on imports. Usage: `python benchmarks/survival.py --kills 50`.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import pathlib
import random
import re
import sys
import tempfile
import textwrap
import time

ROOT = pathlib.Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples"), str(ROOT / "benchmarks")]
GOAL, EXAMPLES = 0.3, 400
FINAL = re.compile(r"round-0003-[0-9a-f]{16}\.npz")


def train(folder):
    """Trains the network of the example for ten epochs, and saves it."""
    import keras
    import quickstart

    keras.utils.set_random_seed(0)
    x_train, x_test, y_train, y_test = quickstart.digits()
    model = quickstart.small_cnn()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(2e-3), loss, metrics=["accuracy"])
    model.fit(x_train, y_train, epochs=10, batch_size=64, verbose=0)
    model.save(os.path.join(folder, "model.keras"))
    report(folder, model, x_test, y_test)


def compress(folder, directory, begun):
    """One call; what it led to goes to `result.json`. `begun` is set right before it."""
    import keras
    import quickstart

    import keras_taylor

    x_train, x_test, y_train, y_test = quickstart.digits()
    model = keras.models.load_model(os.path.join(folder, "model.keras"))
    data = x_train[:EXAMPLES], y_train[:EXAMPLES]
    keras.utils.set_random_seed(0)
    lines = open(os.path.join(folder, "lines.txt"), "w")  # noqa: SIM115
    sys.stdout = lines
    begun.set()
    start = time.perf_counter()
    small, info = keras_taylor.compress(
        model, data, goal=GOAL, increment=0.1, epochs=1, batch_size=64,
        backup_dir=directory, return_info=True, verbose=2,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    lines.flush()
    more = {"rounds": len(info.rounds), "before": model.count_params(), "seconds": seconds}
    report(folder, small, x_test, y_test, **more)


def report(folder, model, x, y, **more):
    import keras
    import numpy as np

    outputs = model.predict(x, verbose=0)
    weights = b"".join(keras.ops.convert_to_numpy(w).tobytes() for w in model.weights)
    found = {
        "accuracy": float(np.mean(outputs.argmax(-1) == y)),
        "finite": bool(np.isfinite(outputs).all()),
        "params": model.count_params(),
        "weights": hashlib.sha256(weights).hexdigest(),
        **more,
    }
    path = pathlib.Path(folder, "result.json")
    path.with_suffix(".tmp").write_text(json.dumps(found))
    path.with_suffix(".tmp").replace(path)


class Runs:
    """Starts workers and kills them."""

    def __init__(self, folder):
        self.folder = folder
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["survival"])

    def train(self):
        worker = self._context.Process(target=train, args=(self.folder,))
        worker.start()
        worker.join()
        return self.result()

    def run(self, directory, kill_after=None):
        """Starts a worker; whether it ended before it was killed."""
        begun = self._context.Event()
        worker = self._context.Process(target=compress, args=(self.folder, directory, begun))
        worker.start()
        while not begun.wait(0.1):
            assert worker.is_alive(), f"the worker ended with {worker.exitcode} before it began"
        worker.join(kill_after)
        killed = worker.is_alive()
        if killed:
            worker.kill()
            worker.join()
        elif worker.exitcode:
            raise RuntimeError(f"a worker failed: exit code {worker.exitcode}")
        return not killed

    def result(self):
        return json.loads(pathlib.Path(self.folder, "result.json").read_text())

    def resumed_after(self):
        """Round after which the last run went on; 0: it started anew."""
        lines = pathlib.Path(self.folder, "lines.txt").read_text()
        match = re.search(r"^resumed after round (\d+) of 3", lines, re.MULTILINE)
        return int(match.group(1)) if match else 0


def trial(runs, directory, seconds, generator, kills_left):
    """Kills once, or up to three times, then calls until it is done.

    Returns:
        How often it was killed, the rounds that were done when the last run began, and
        the number of half-written files that it found.
    """
    wanted = min(kills_left, generator.choice([1, 1, 1, 2, 3]))
    kills = 0
    for _ in range(wanted):
        if runs.run(directory, generator.uniform(0, seconds)):
            break
        kills += 1
    done_before = max([0, *(int(p.name[6:10]) for p in pathlib.Path(directory).glob("round-*.npz"))])
    unfinished = len(list(pathlib.Path(directory).glob("unfinished-*")))
    runs.run(directory)
    return kills, done_before, unfinished


def faults(runs, directory, done_before, whole):
    """What is wrong with a finished run, in words."""
    result, found = runs.result(), []
    if runs.resumed_after() != done_before:
        found.append(f"resumed after round {runs.resumed_after()}, not {done_before}")
    if result["params"] > (1 - GOAL) * result["before"] or result["rounds"] != 3:
        found.append("goal missed")
    if not result["finite"]:
        found.append("predictions not finite")
    if abs(result["accuracy"] - whole["accuracy"]) > 0.02:
        found.append(f"accuracy {result['accuracy']:.2%}")
    names = [p.name for p in pathlib.Path(directory).iterdir()]
    if len(names) != 1 or not FINAL.fullmatch(names[0]):
        found.append(f"left behind: {names}")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    os.environ["KERAS_BACKEND"] = arguments.backend
    os.environ["OMP_NUM_THREADS"] = "1"  # a forked process cannot use the threads of its parent
    os.environ["PYTHONPATH"] = os.pathsep.join([*sys.path[:3], os.environ.get("PYTHONPATH", "")])
    generator = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(folder)
        original = runs.train()
        seconds = []
        for name in ("whole", "again"):
            runs.run(os.path.join(folder, name))
            whole = runs.result()
            seconds.append(whole["seconds"])
        trials, kills, late = [], 0, 0
        while kills < arguments.kills:
            directory = os.path.join(folder, f"run{len(trials) + late}")
            killed, done_before, unfinished = trial(
                runs, directory, max(seconds), generator, arguments.kills - kills
            )
            if not killed:  # it was faster than the one that was timed
                late += 1
                continue
            kills += killed
            wrong = faults(runs, directory, done_before, whole)
            result = runs.result()
            same = result["weights"] == whole["weights"]
            trials.append((killed, done_before, unfinished, wrong, same, result["accuracy"]))
            print(kills, trials[-1], file=sys.stderr, flush=True)
    print_results(arguments, original, whole, max(seconds), late, trials)


def print_results(arguments, original, whole, seconds, late, trials):
    from common import machine, markdown_table

    told = f"""`python benchmarks/survival.py --kills {arguments.kills}`, {arguments.backend}: the digits CNN
        of `examples/quickstart.py`, goal {GOAL} in three rounds of one epoch on {EXAMPLES} images; SIGKILL
        at a moment uniform over the {seconds:.1f} s of a run that nobody kills, one to three times a run,
        then the same call until it is done. {late} runs that ended before they were killed are left out.
        Accuracy on 450 test images: {original["accuracy"]:.2%} before, {whole["accuracy"]:.2%} after a run
        that nobody killed."""
    fault = """A fault is: it goes on after another round than the last one on disk, the goal is missed, a
        prediction is not finite, the accuracy is more than 2 points from that of the run not killed, or the
        directory holds anything but the one final state."""
    print("# Runs that are killed\n")
    for text in (told, fault):
        print(textwrap.fill(" ".join(text.split()), 110), end="\n\n")
    print(machine([arguments.backend]), end="\n\n")
    header = ["rounds on disk at the last call", "runs", "kills", "half-written files found", "faults"]
    header += ["weights as in the run not killed", "accuracy"]
    rows = []
    for done in (*range(4), "all"):
        part = [t for t in trials if done in ("all", t[1])]
        accuracies = [f"{t[5]:.2%}" for t in part] or ["none"]
        rows.append([
            str(done),
            str(len(part)),
            str(sum(t[0] for t in part)),
            str(sum(t[2] for t in part)),
            str(sum(bool(t[3]) for t in part)),
            str(sum(t[4] for t in part)),
            min(accuracies) if len(set(accuracies)) == 1 else f"{min(accuracies)} to {max(accuracies)}",
        ])  # fmt: skip
    print(markdown_table(header, rows))
    for number, fault in [(i, t[3]) for i, t in enumerate(trials) if t[3]]:
        print(f"\nRun {number}: {'; '.join(fault)}")


if __name__ == "__main__":
    main()
elif multiprocessing.parent_process() is None:  # in the server that workers are forked from
    import keras
    import quickstart  # noqa: F401

    keras.utils.set_random_seed(0)  # imports TensorFlow, where it is installed
