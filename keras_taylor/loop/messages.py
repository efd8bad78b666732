"""What `compress` says of itself."""

import numpy as np

from keras_taylor.budget.measured_costs import format_amount

_UNITS = {"params": "parameters", "flops": "FLOPs", "activation_memory": "bytes of activations"}


def opening(model, info, num_rounds, scored, draws, repairs, carries, rate, epochs):
    """Lines before the first round.

    Args:
        model: The model to prune.
        info: The run's `Info`, goal and costs filled in.
        num_rounds: How many rounds there will be.
        scored: Examples a scoring pass, at most; `None`: scores need no data.
        draws: Whether labels are drawn from the model's own predictions.
        repairs: Whether the layers that lose inputs are refitted.
        carries: Whether the optimizer's state goes on.
        rate: The learning rate of the fine-tuning; `None`: the compiled one.
        epochs: Epochs of fine-tuning a round.
    """
    trainable = sum(int(np.prod(w.shape)) for w in model.trainable_weights)
    detail = f" ({trainable:,} trainable)" if list(info.goal) == ["params"] else ""
    source = " without data" if scored is None else f" from at most {scored:,} examples"
    steps = [
        f"'{info.criterion}' scores{source}" + draws * " with labels drawn from the model's own predictions"
    ]
    steps += ["repair"] * bool(repairs)
    if epochs:
        how = "" if carries else " with a new optimizer"
        how += "" if rate is None else f" at a learning rate of {rate:.3g}"
        steps.append(f"fine-tuning{how}, epochs: {epochs}")
    parts = [_asked(what, value, info.before[what]) for what, value in info.goal.items()]
    yield f"{' and '.join(parts)}{detail}; rounds: {num_rounds}; in each: {', then '.join(steps)}"
    if info.round_to > 1:
        yield f"every group of channels keeps a multiple of {info.round_to}"
    frozen = [layer.name for layer in model.layers if layer.weights and not layer.trainable]
    if frozen:
        names = ", ".join(frozen[:5]) + (", ..." if len(frozen) > 5 else "")
        yield f"frozen, so pruned but not fine-tuned: {len(frozen)} layers ({names})"
    if info.inexact:
        num = sum(entry["channels"] for entry in info.inexact.values())
        names = ", ".join(list(info.inexact)[:5]) + (", ..." if len(info.inexact) > 5 else "")
        yield f"open with exact=False only, as they are normalized together: {num:,} channel units ({names})"
    if info.unknown:
        yield f"without a rule, so what they read stays: {', '.join(info.unknown)}"


def _asked(what, value, before):
    unit = _UNITS.get(what, what)
    before = f"{format_amount(what, before, named=False)} {unit}"
    if isinstance(value, float):
        return f"remove {100 * value:.4g} % of {before}"
    return f"leave at most {format_amount(what, value, named=False)} of {before}"


def described(done, before):
    """One line about a round that is done: a `Round`, and the costs before the run."""
    parts = [f"{done.params:,} parameters left ({1 - done.params / before['params']:.1%} gone)"]
    if done.flops is not None:
        parts.append(f"{1 - done.flops / before['flops']:.1%} of FLOPs gone")
    parts += [f"{name} {values[-1]:.4g}" for name, values in done.history.items() if values]
    return ", ".join(parts) + f", {sum(done.seconds.values()):.1f} s"


def what_is_kept(num_done, num_rounds, backed_up):
    """What a run that failed leaves behind."""
    done = f"`compress` had completed {num_done} of {num_rounds} rounds"
    if not backed_up:
        return f"{done}. With `backup_dir` they would be kept, and the same call would go on from there."
    return f"{done}; the same call, with the same `backup_dir`, goes on from there."


def undone(error, num_done, rate):
    """Why a run stopped with a `Diverged`, what to change, and what the result is."""
    result = f"that of round {num_done}" if num_done else "an unpruned copy of the model"
    return (
        f"{error.what} in round {num_done + 1} {error.where}: lower the learning rate ({rate:.4g} now); "
        f"the result is {result}"
    )


def as_call(**arguments):
    """A call of `compress` as text, with those arguments that are short."""
    short = {
        k: v for k, v in arguments.items() if isinstance(v, (str, int, float, dict)) and len(repr(v)) < 80
    }
    return ", ".join(["keras_taylor.compress(model, ds", *(f"{k}={v!r}" for k, v in short.items())]) + ")"
