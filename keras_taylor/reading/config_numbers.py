"""The whole numbers in a configuration, and which axes of weights each of them counts.

Layers and tasks are made again, smaller, from their configurations. Which numbers have to fall is seen from
shapes: the layer or task is made with other numbers, without values of weights.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

from keras_taylor.support.types import FloatArray

KnownShape: TypeAlias = tuple[int, ...]

# The keys that lead to a number, through dicts and lists.
NumberPath: TypeAlias = tuple[str | int, ...]
Numbers: TypeAlias = Mapping[NumberPath, int]
KnownShapes: TypeAlias = MutableMapping[tuple[tuple[NumberPath, int], ...], list[KnownShape] | None]

_MOST_NUMBERS = 3  # of a configuration that change together
_MOST_UNITS = 64  # of a group that leave in one step
_LITTLE = 3  # a change that is lost where numbers are rounded to multiples of eight
_SMALL = 4  # numbers up to this one are doubled first: half of them may be a special case


class WeightAxis(NamedTuple):
    """An axis of a weight, given by the weight's position in `weights`."""

    weight: int
    axis: int


AxisCounts: TypeAlias = Mapping[WeightAxis, float]


class Step(NamedTuple):
    """Units that leave together with the numbers that fall.

    Attributes:
        units: Group -> how many of its units leave in one step.
        numbers: By how much each number falls in one step.
    """

    units: Mapping[str, int]
    numbers: Numbers


class ConfigNumbers:
    """The numbers in the configuration of a layer or task, and the shapes of its weights with other ones.

    Args:
        numbers: The numbers above 1.
        shapes: The shapes of its weights.
        find_shapes: The shapes of the weights with changed numbers. It may raise anything.
        known: What `find_shapes` has found for the same configuration.
    """

    def __init__(
        self,
        numbers: Numbers,
        shapes: Sequence[KnownShape],
        find_shapes: Callable[[Numbers], list[KnownShape]],
        known: KnownShapes | None = None,
    ) -> None:
        self.numbers, self.shapes = numbers, list(shapes)
        self._find_shapes = find_shapes
        self._known: KnownShapes = {} if known is None else known
        self._growth: dict[NumberPath, AxisCounts] = {}
        self._limits: dict[NumberPath, set[WeightAxis]] = {}  # axes beyond which a number touches none
        self._has_failed = False
        self._has_led = False

    @functools.cached_property
    def lead_back(self) -> bool:
        """Whether the configuration as it is leads to the shapes that the weights have."""
        return self._has_led or self.shapes_with({}) == self.shapes

    def shapes_with(self, changes: Numbers) -> list[KnownShape] | None:
        """The shapes of the weights if the configuration had these numbers; `None` if it cannot have them."""
        key = tuple(changes.items())
        if key not in self._known:
            try:
                self._known[key] = self._find_shapes(changes)
            except Exception:  # a class may raise anything
                self._known[key] = None
        return self._known[key]

    def growth(self, path: NumberPath) -> AxisCounts:
        """How fast the axes of weights grow with a number that changes alone, for the axes that do.

        The first answer may be all that is asked for. Before the second one the configuration has to lead
        back to the weights, or else nothing that is made of it tells anything.
        """
        if path not in self._growth:
            is_of_use = not self._growth or self.lead_back
            self._growth[path] = self._find_growth(path) if is_of_use else {}
        return self._growth[path]

    def find_step(self, axes: AxisCounts, groups: Mapping[str, AxisCounts]) -> Step | None:
        """The step with the fewest numbers that touches a group; `None` if there is none.

        Numbers that are a length of the group are tried first, so that most others are never changed.

        Args:
            axes: How many entries along the axes of weights go with one unit of the group; NaN where that
                differs from unit to unit.
            groups: The same of all groups that may leave in the same step, the group itself among them.
        """
        likely, others = self._sorted_paths(axes)
        tried: set[tuple[NumberPath, ...]] = set()
        for paths in (likely, [*likely, *others]):
            if self._has_failed and not self.lead_back:
                break
            for combination in self._combinations(paths, axes):
                step = None if combination in tried else self._solve(combination, groups)
                if step is not None:
                    return step
                tried.add(combination)
            if not self._has_failed:
                self._has_failed = True
                self._find_limits()
        return None

    def shapes_after(
        self, step: Step, groups: Mapping[str, AxisCounts], num_steps: int = 1
    ) -> list[KnownShape]:
        """The shapes that remain after some steps."""
        shapes = [list(shape) for shape in self.shapes]
        for name, units in step.units.items():
            for (weight, axis), count in groups[name].items():
                shapes[weight][axis] -= int(num_steps * units * count)
        return [tuple(shape) for shape in shapes]

    def changes_of(self, step: Step, num_steps: int = 1) -> Numbers:
        """The numbers after some steps."""
        return {path: self.numbers[path] - num_steps * fall for path, fall in step.numbers.items()}

    def lead_to(self, step: Step, groups: Mapping[str, AxisCounts], num_steps: int = 1) -> bool:
        """Whether the numbers after some steps lead to the shapes that remain."""
        changes = self.changes_of(step, num_steps)
        is_right = self.shapes_with(changes) == self.shapes_after(step, groups, num_steps)
        self._has_led = self._has_led or is_right
        return is_right

    def has_led_to(self, step: Step, groups: Mapping[str, AxisCounts]) -> bool:
        """Whether some number of steps is known to lead to the right shapes, with nothing made for it."""
        if len(step.numbers) > 1:
            return False
        ((path, fall),) = step.numbers.items()
        num_steps, rest = divmod(self.numbers[path] - _lower(self.numbers[path]), fall)
        is_known = tuple(self.changes_of(step, num_steps).items()) in self._known
        return not rest and num_steps > 0 and is_known and self.lead_to(step, groups, num_steps)

    def _find_growth(self, path: NumberPath) -> AxisCounts:
        number = self.numbers[path]
        if number > _SMALL:
            growth = self._growth_to(path, _lower(number))
            if growth is not None and all(float(rate).is_integer() for rate in growth.values()):
                return growth
        for other in (2 * number, number + 1, number // 2):
            growth = self._growth_to(path, other)
            if growth is not None:
                return growth
        return {}

    def _growth_to(self, path: NumberPath, other: int) -> AxisCounts | None:
        """How much axes grow if a number grows by one; nothing if there are other weights then."""
        differences = self._differences({path: other})
        if differences is None:
            return None if self.shapes_with({path: other}) is None else {}
        return {axis: change / (other - self.numbers[path]) for axis, change in differences.items()}

    def _differences(self, changes: Numbers) -> dict[WeightAxis, int] | None:
        """How much longer axes are with changed numbers; `None` if there are other weights then, or none."""
        changed, shapes = self.shapes_with(changes), self.shapes
        if changed is None or [len(shape) for shape in changed] != [len(shape) for shape in shapes]:
            return None
        return {
            WeightAxis(weight, axis): new - size
            for weight, (before, after) in enumerate(zip(shapes, changed, strict=True))
            for axis, (size, new) in enumerate(zip(before, after, strict=True))
            if new != size
        }

    def _touches(self, path: NumberPath, axes: AxisCounts) -> bool:
        """Whether a number touches a group."""
        return not axes.keys().isdisjoint(self._limits.get(path, axes)) and not axes.keys().isdisjoint(
            self.growth(path)
        )

    def _find_limits(self) -> None:
        """Changes all larger numbers a little, at once: most do not touch most groups, or are rounded."""
        large = [path for path, number in self.numbers.items() if number > _SMALL]
        differences = self._differences({path: self.numbers[path] - _LITTLE for path in large})
        if differences is not None:
            self._limits = {path: set(differences) for path in large}

    def _sorted_paths(self, axes: AxisCounts) -> tuple[list[NumberPath], list[NumberPath]]:
        """The numbers that are a length of a group, and the others, both in the configuration's order."""
        sizes: set[float] = {self.shapes[weight][axis] for weight, axis in axes}
        sizes |= {self.shapes[weight][axis] / count for (weight, axis), count in axes.items()}
        likely = [path for path, number in self.numbers.items() if number in sizes]
        return likely, [path for path, number in self.numbers.items() if number not in sizes]

    def _combinations(
        self, paths: Sequence[NumberPath], axes: AxisCounts
    ) -> Iterable[tuple[NumberPath, ...]]:
        """Yields combinations of numbers that touch a group, the smallest ones first."""

        yield from ((path,) for path in paths if self._touches(path, axes))
        touching = [path for path in paths if self._touches(path, axes)]
        for count in range(2, min(_MOST_NUMBERS, len(touching)) + 1):
            yield from itertools.combinations(touching, count)

    def _solve(self, paths: Sequence[NumberPath], groups: Mapping[str, AxisCounts]) -> Step | None:
        """The step in which exactly these numbers fall, if there is one up to its size."""
        grown = set[WeightAxis]().union(*(self.growth(path) for path in paths))
        names = [name for name, axes in groups.items() if not grown.isdisjoint(axes)]
        rows = sorted(grown.union(*(groups[name] for name in names)))
        columns = [self.growth(path) for path in paths] + [groups[name] for name in names]
        matrix = np.array([[column.get(row, 0.0) for column in columns] for row in rows])
        matrix[:, len(paths) :] *= -1
        if not names or np.isnan(matrix).any():
            return None
        solution = _single_solution(np.unique(matrix, axis=0))
        if solution is None:
            return None
        falls, units = solution[: len(paths)].tolist(), solution[len(paths) :].tolist()
        return Step(dict(zip(names, units, strict=True)), dict(zip(paths, falls, strict=True)))


def _lower(number: int) -> int:
    """About half of a number, and odd: whatever rounds to a multiple shows."""
    return number // 2 | 1


def _single_solution(matrix: FloatArray) -> FloatArray | None:
    """The smallest positive whole `v` with `matrix @ v = 0`, if it is the only one but for a factor."""
    _, sizes, rows = np.linalg.svd(matrix)
    rank = int((sizes > 1e-9 * sizes[0]).sum())
    if rank != matrix.shape[1] - 1:
        return None
    solution = rows[-1] / rows[-1][np.abs(rows[-1]).argmax()]
    if (solution < 1e-6).any():
        return None
    solution = solution / solution.min()
    for factor in range(1, _MOST_UNITS + 1):
        whole = (factor * solution).round()
        if np.allclose(whole, factor * solution, atol=1e-6):
            return whole.astype(np.int64) if whole.max() <= _MOST_UNITS**2 else None
    return None
