"""Several processes that do one job: which one this is, what they tell each other, and how one that dies is seen."""

from moekern.team.member import Member, Part
from moekern.team.team import ALONE, Team, current

__all__ = ["ALONE", "Member", "Part", "Team", "current"]
