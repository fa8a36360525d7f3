"""A router's numbers, and how many experts of a layer it can work with."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from moekern.errors import InputError, check_type


@dataclass(frozen=True, slots=True)
class Router:
    """E experts, top-k of them chosen, from the best topk_group of n_group groups; n_group is 1 without groups.

    A group's rank is taken from its group_top best experts (2 in the DeepSeek-V3 family, 1 in V2). Families without
    groups have a group_top of 0 in their table, which counts as 1.
    """

    num_experts: int
    top_k: int
    n_group: int = 1
    topk_group: int = 1
    group_top: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "group_top", max(1, self.group_top))

    def of(self, experts: int) -> Router:
        """The same router in a layer with so many experts."""
        return replace(self, num_experts=experts)


def parse_keep(text: str, flag: str = "--keep") -> float | int:
    """--keep (or another flag) as a person writes it: "64" is a count, "0.5" and "50%" are shares."""
    try:
        value = float(text[:-1]) / 100 if text.endswith("%") else int(text) if text.isdecimal() else float(text)
    except ValueError:
        raise InputError(f"{flag} {text}: expected a share such as 0.5 or 50%, or a count such as 64") from None
    check_keep(value, flag)
    return value


def check_keep(keep: float | int, flag: str = "--keep") -> None:
    """Raise InputError unless `keep` is a share in (0, 1] or a count from 1, and TypeError for what is no number."""
    check_type("keep", keep, int, float)
    if isinstance(keep, bool) or not (0 < keep <= 1 if isinstance(keep, float) else keep >= 1):
        raise InputError(f"{flag} {keep}: expected a share above 0 and up to 1 (0.5, 50%), or a count from 1 (64)")


def kept_count(keep: float | int, router: Router) -> int:
    """Experts a layer keeps: a count as given, a share (float) rounded to the nearest multiple of n_group, ties up.

    Raises InputError, with the nearest legal counts, when the router could not work with it.
    """
    check_keep(keep)
    if isinstance(keep, int):
        count, made = keep, ""
    else:
        step = router.n_group
        # 1e-9 undoes the error of a decimal share: 0.35 of 10 is 3.5, a tie.
        count = math.floor(keep * router.num_experts / step + 0.5 + 1e-9) * step
        made = f" of {router.num_experts} experts is {count}"
    problem = count_problem(count, router)
    if problem:
        raise InputError(f"--keep {keep}{made}: {problem}; {nearest_counts(count, router)}")
    return count


def keep_note(keep: float | int, kept: int, experts: int) -> str | None:
    """What is to be said of a --keep that came to another number than was asked for, or to all; None of others.

    A share between two numbers is rounded to one of them without a word.
    """
    asked = keep if isinstance(keep, int) else round(keep * experts, 3)
    if kept == experts and asked < experts:
        return f"--keep {keep}: {asked:g} of {experts} experts is rounded to all of them: nothing is dropped"
    if abs(kept - asked) >= 1:
        why = "what the router's groups and --multiple-of allow"
        return f"--keep {keep}: {asked:g} of {experts} experts are asked for, {kept} are kept: {why}"
    return None


def count_problem(count: int, router: Router) -> str | None:
    """Why a router cannot work with `count` experts a layer; None when it can."""
    size = count // router.n_group
    if count > router.num_experts:
        return f"more than the {router.num_experts} experts there are"
    if count < router.top_k:
        return f"fewer than the {router.top_k} that each token chooses (top_k)"
    if count % router.n_group:
        return f"not a multiple of the router's {router.n_group} groups (n_group)"
    if router.n_group > 1 and router.topk_group * size < router.top_k:
        return (
            f"{size} in each group, and {router.topk_group} chosen groups (topk_group) of {size} hold fewer than "
            f"top_k = {router.top_k}"
        )
    if router.n_group > 1 and size < router.group_top:
        return f"{size} in each group, but a group is ranked by its best {router.group_top}"
    return None


def nearest_counts(count: int, router: Router) -> str:
    legal = [n for n in range(1, router.num_experts + 1) if count_problem(n, router) is None]
    around = [*[n for n in legal if n < count][-1:], *[n for n in legal if n > count][:1]]
    return f"nearest legal: {' or '.join(map(str, around))}" if around else "no count is legal for this router"


def check_share(flag: str, value: float) -> None:
    """Raise InputError, which names the flag, for what is no share of a whole."""
    if not 0 < value <= 1:
        raise InputError(f"{flag} {value:g}: expected a share above 0 and up to 1, such as 0.98")
