"""Noticing that a worker is stuck: that a lane of it owes answers and gives none."""

from dataclasses import dataclass, field

from segrpc.service.engine.work import LaneName

LOOKS = 8  # in a row at which a lane that owes answers has given none: then it is stuck


@dataclass(slots=True)
class Debts:
    """What a lane owes.

    Attributes:
        count: How many answers.
        moved: Whether it gave one since the last look, or owed none in between.
        silent_looks: At how many looks in a row it had not moved.
    """

    count: int = 0
    moved: bool = True
    silent_looks: int = 0


@dataclass(slots=True)
class Watchdog:
    """Keeps the debts of a worker's lanes.

    It counts looks instead of reading a clock: while the server itself does not run, as in a container that is paused,
    it does not look either, and no worker is blamed for it.
    """

    _lanes: dict[LaneName, Debts] = field(default_factory=lambda: {"decode": Debts(), "encode": Debts()})

    def asked(self, lane: LaneName) -> None:
        """Take note of a work."""
        debts = self._lanes[lane]
        debts.moved = debts.moved or not debts.count
        debts.count += 1

    def answered(self, lane: LaneName) -> None:
        """Take note that a work has ended."""
        debts = self._lanes[lane]
        debts.moved = True
        debts.count -= 1

    def look(self) -> LaneName | None:
        """Look at the lanes, as is to be done in regular intervals; return one that is stuck."""
        stuck = None
        for lane, debts in self._lanes.items():
            debts.silent_looks = debts.silent_looks + 1 if debts.count and not debts.moved else 0
            debts.moved = False
            if debts.silent_looks >= LOOKS:
                stuck = lane
        return stuck
