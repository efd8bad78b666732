"""What `compress` tells the user, and the call that repeats a run."""

import ast
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_taylor.budget.costs import known_cost
from keras_taylor.budget.measured_costs import format_amount
from keras_taylor.reports.info import Info
from keras_taylor.reports.run_record import GoalRecord, RateRecord, Round
from keras_taylor.support.arguments import OMITTED, format_value
from keras_taylor.support.optimizers import describe_learning_rate
from keras_taylor.support.types import Costs

_UNIT_NAMES = {"params": "parameters", "flops": "FLOPs", "activation_memory": "bytes of activations"}
_MAX_NAMES = 5  # layers named in a line
_MAX_METRICS = 3  # metrics in a line, each on the training and on the validation data


@dataclasses.dataclass(frozen=True)
class RoundOutline:
    """What happens in every round.

    Attributes:
        num_rounds: How many rounds there are.
        num_scored: Most examples of a scoring pass; `None`: scores need no data.
        draws_labels: Whether labels are drawn from the model's own predictions.
        repairs: Whether the layers that lose inputs are refitted.
        carries_optimizer: Whether the optimizer's state goes on from round to round.
        learning_rate: That of the fine-tuning, or of the first trial; `None`: the optimizer has a schedule.
        tries_rates: Whether trials find a higher one.
        epochs: Epochs of each round that is fine-tuned; empty: none is.
        judged_on: The examples on which states of a model are compared, in words; empty if they are not.
    """

    num_rounds: int
    num_scored: int | None
    draws_labels: bool
    repairs: bool
    carries_optimizer: bool
    learning_rate: float | None
    tries_rates: bool
    epochs: Sequence[int]
    judged_on: str = ""


def describe_run(model: keras.Model, info: Info, outline: RoundOutline) -> Iterator[str]:
    """Yields the lines before the first round.

    Args:
        model: The model to prune.
        info: The run's `Info` with its goal and costs.
        outline: What happens in every round.
    """
    trainable = sum(int(np.prod(w.shape)) for w in model.trainable_weights)
    detail = f" ({trainable:,} trainable)" if list(info.goal) == ["params"] else ""
    goals = " and ".join(
        _describe_goal(cost, value, known_cost(info.before, cost)) for cost, value in info.goal.items()
    )
    steps = ", then ".join(_describe_steps(info.criterion, outline))
    yield f"{goals}{detail}; rounds: {outline.num_rounds}; in each: {steps}"
    if outline.epochs:
        rate = describe_learning_rate(model, outline.learning_rate)
        yield f"learning rate: {rate}" + (
            "; short trials of it and higher ones come first" if outline.tries_rates else ""
        )
    if info.round_to > 1:
        yield f"every group of channels keeps a multiple of {info.round_to}"
    frozen = list(_frozen_layers(model))
    if frozen:
        yield f"frozen, so pruned but not fine-tuned: {_count_layers(frozen)}"
    if info.inexact:
        num = sum(entry["channels"] for entry in info.inexact.values())
        names = _join_names(list(info.inexact))
        yield f"open with exact=False only, as they are normalized together: {num:,} channel units ({names})"
    if info.unknown:
        yield f"without a rule, so what they read stays: {', '.join(info.unknown)}"


def _describe_steps(criterion: str, outline: RoundOutline) -> Iterator[str]:
    source = (
        " without data" if outline.num_scored is None else f" from at most {outline.num_scored:,} examples"
    )
    drawn = " with labels drawn from the model's own predictions" if outline.draws_labels else ""
    yield f"'{criterion}' scores{source}{drawn}"
    if outline.repairs:
        yield "repair"
    if outline.epochs:
        optimizer = "" if outline.carries_optimizer else " with a new optimizer"
        falling = "" if outline.learning_rate is None else " at a learning rate that falls to zero"
        when = "where a goal is reached " if len(outline.epochs) < outline.num_rounds else ""
        differ = len(set(outline.epochs)) > 1
        epochs = ", then ".join(map(str, outline.epochs if differ else outline.epochs[:1]))
        yield f"{when}fine-tuning{optimizer}{falling}, epochs: {epochs}"
        if outline.judged_on:
            yield f"the best state on {outline.judged_on} is kept"


def _describe_goal(cost: str, value: float | int, before: int) -> str:
    total = f"{format_amount(cost, before, named=False)} {_UNIT_NAMES.get(cost, cost)}"
    if isinstance(value, float):
        return f"remove {100 * value:.4g} % of {total}"
    return f"leave at most {format_amount(cost, value, named=False)} of {total}"


def _frozen_layers(model: keras.Model, prefix: str = "") -> Iterator[str]:
    """Names of frozen layers; a model in the model is named as a whole if all of it is frozen."""
    for layer in model.layers:
        if layer.weights and not layer.trainable:
            yield prefix + layer.name
        elif isinstance(layer, keras.Model):
            yield from _frozen_layers(layer, f"{prefix}{layer.name}/")


def _count_layers(names: list[str]) -> str:
    return f"{len(names)} layer{'s' if len(names) > 1 else ''} ({_join_names(names)})"


def _join_names(names: list[str]) -> str:
    return ", ".join(names[:_MAX_NAMES]) + (", ..." if len(names) > _MAX_NAMES else "")


def describe_round(done: Round, before: Costs) -> str:
    """Returns a line about a completed round; `before` are the costs before the run."""
    parts = [f"{done.params:,} parameters left ({_share_gone(done.costs, before, 'params')} gone)"]
    if done.flops is not None:
        parts.append(f"{_share_gone(done.costs, before, 'flops')} of FLOPs gone")
    known = done.known_metrics
    parts += [f"{name} {known[name]:.4g}" for name in _shown_metrics(list(known))]
    parts.append(f"{sum(done.seconds.values()):.1f} s")
    if done.learning_rate is not None and done.learning_rate["trials"]:
        parts.append(_describe_trials(done.learning_rate))
    verdict = done.verdict()
    return ", ".join(parts) + (f"; {verdict}" if verdict else "")


def _shown_metrics(names: list[str]) -> list[str]:
    """The metrics that a line has room for.

    Of many, those on the validation data, if there are any, without losses of single outputs. A round that
    is not trained has values on the validation data only, and its line shows the same ones.
    """
    if len({name.removeprefix("val_") for name in names}) <= _MAX_METRICS:
        return names
    validated = [name for name in names if name.startswith("val_")] or names
    return [name for name in validated if not name.endswith("_loss") or name == "val_loss"]


def _describe_trials(rate: RateRecord) -> str:
    """Which learning rate was chosen, and why."""
    found = ", ".join(f"{value:.4g} at {one:.3g}" for one, value in rate["trials"])
    return (
        f"learning rate {rate['peak']:.3g}, chosen by trials "
        f"({rate['measure']} after {rate['steps']} steps: {found})"
    )


def _share_gone(costs: Costs, before: Costs, cost: str) -> str:
    amount = known_cost(before, cost)
    return f"{1 - known_cost(costs, cost) / amount if amount else 0:.1%}"


def describe_kept_rounds(num_done: int, num_rounds: int, backed_up: bool) -> str:
    """Returns what a run that failed leaves behind."""
    done = f"`compress` had completed {num_done} of {num_rounds} rounds"
    if not backed_up:
        return f"{done}. With `backup_dir` they would be kept, and the same call would go on from there."
    return f"{done}; the same call, with the same `backup_dir`, goes on from there."


def describe_missed_goals(stops: Sequence[GoalRecord]) -> str:
    """Returns which goals do not hold by the last measurement, and by how much; empty if all do."""
    missed = [f"round {stop['round']}: {'; '.join(stop['missed'])}" for stop in stops if stop.get("missed")]
    return f"the goal does not hold after {', '.join(missed)}" if missed else ""


def describe_lag(info: Info) -> str:
    """Returns that FLOPs fell by less than half as much as parameters, and the goal that helps; else ""."""
    params, flops = (info.reduction.get(cost) for cost in ("params", "flops"))
    if (
        "params" not in info.goal
        or len(info.goal) > 1
        or params is None
        or flops is None
        or 2 * flops >= params
    ):
        return ""
    return (
        f"{params:.1%} of the parameters are gone, and {flops:.1%} of the FLOPs. If it is speed that counts: "
        f'goal={{"flops": {params:.2g}}}'
    )


def explain_divergence(error: Exception, num_done: int, learning_rate: float) -> str:
    """Returns why fine-tuning ended the run, what to change, and which model the result is."""
    result = f"that of round {num_done}" if num_done else "an unpruned copy of the model"
    return (
        f"{error} in round {num_done + 1}: lower the learning rate ({learning_rate:.4g} now); the result is "
        f"{result}"
    )


def explain_no_training(obstacle: str) -> str:
    """Returns why there is no fine-tuning after all, and what to do."""
    return (
        f"no fine-tuning, since nothing could tell whether it helps: {obstacle}. Pass `validation_data`, or "
        "`learning_rate=keras_taylor.FineTuning(keep_best=False)`"
    )


def explain_failure(failure: str, number: int, learning_rate: float) -> str:
    """Returns why an earlier state of a round was kept, and what to change."""
    return (
        f"{failure} in round {number}: an earlier state of its model is kept; lower the learning rate "
        f"({learning_rate:.4g} now)"
    )


def format_call(arguments: Mapping[str, Any]) -> str:
    """Returns a call of `compress` as Python code that repeats a run.

    Layers are written as their names, functions as theirs. A value that has no such text, such as data or
    a callback, is written as `...`, and a comment at the end says in which arguments that happened.

    Args:
        arguments: The arguments beside the model and the data.
    """
    texts = {name: format_value(value) for name, value in arguments.items()}
    call = ", ".join(["model", "ds", *(f"{name}={text}" for name, text in texts.items())])
    omitted = [name for name, text in texts.items() if _has_ellipsis(text)]
    comment = f"  # {OMITTED} in {', '.join(omitted)}: not shown" if omitted else ""
    return f"keras_taylor.compress({call}){comment}"


def _has_ellipsis(text: str) -> bool:
    tree = ast.parse(text, mode="eval")
    return any(isinstance(node, ast.Constant) and node.value is Ellipsis for node in ast.walk(tree))
