"""From what was asked to what can be: whole widths, heads that can be shared out, blocks and experts that remain."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from thanos.pattern import Axis


@dataclass(frozen=True)
class HeadGoal:
    """Which heads every block loses.

    Attributes:
        removed: query heads.
        even: the same number from each group; else whole groups with their key and value heads.
        heads, groups: query heads and groups that stay.
    """

    removed: int
    even: bool
    heads: int
    groups: int


def channels_to_keep(axis: Axis, width: int, multiple: int) -> int:
    """The width after removal, rounded to a multiple, halves up.

    Raises:
        ValueError: the rounded width leaves nothing, or everything.
    """
    wanted = width - axis.of(width)
    kept = math.floor(wanted / multiple + Fraction(1, 2)) * multiple
    if wanted <= 0 or kept <= 0:
        raise ValueError(
            f"{axis} leaves no channel of {width} in multiples of {multiple}; ask for less, or for another --multiple"
        )
    if kept >= width:
        raise ValueError(
            f"{axis} removes no channel of {width}, as widths are rounded to multiples of {multiple}; "
            "ask for more, or for another --multiple"
        )
    return kept


def whole_count(axis: Axis, total: int, what: str) -> int:
    """How many of ``total`` go, rounded, halves up.

    Raises:
        ValueError: none, or all.
    """
    count = math.floor(axis.of(total) + Fraction(1, 2))
    if count < 1:
        raise ValueError(f"{axis} rounds to no {what} of {total}; ask for more")
    if count >= total:
        raise ValueError(f"{axis} leaves none of {total} {what}s; ask for less")
    return count


def head_goals(axis: Axis, heads: int, groups: int, possible: Callable[[int, int], str | None]) -> list[HeadGoal]:
    """The ways to remove query heads that come closest to what was asked: one, or two that remove equally many.

    Args:
        axis: ``heads`` or ``kv-heads``.
        heads, groups: query heads, and key and value heads.
        possible: why a configuration cannot say so many heads and groups; None where it can.

    Raises:
        ValueError: nothing that can be said is closer to what was asked than leaving the heads alone.
    """
    size = heads // groups
    goals = [HeadGoal(count * size, False, heads - count * size, groups - count) for count in range(1, groups)]
    if axis.name == "heads" and groups < heads:
        goals += [HeadGoal(count * groups, True, heads - count * groups, groups) for count in range(1, size)]
    asked = axis.of(heads) if axis.name == "heads" else axis.of(groups) * size
    if asked >= heads:
        raise ValueError(f"{axis} leaves none of {heads} heads; ask for less")
    reason = None
    for distance in sorted({abs(goal.removed - asked) for goal in goals}):
        if distance >= asked:
            break
        near = [goal for goal in goals if abs(goal.removed - asked) == distance]
        near = [goal for goal in near if goal.removed == max(goal.removed for goal in near)]
        problems = [possible(goal.heads, goal.groups) for goal in near]
        fit = [goal for goal, problem in zip(near, problems, strict=True) if problem is None]
        if fit:
            return fit
        reason = reason or problems[0]
    shared = f"{heads} query heads in {groups} groups" if groups < heads else f"{heads} heads"
    raise ValueError(f"{axis} cannot be shared out over {shared}" + (f": {reason}" if reason else "; ask for more"))
