"""The life of one interactive session, from opening it to comparing all that is left of it."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from segrpc.client import AsyncRefineSession, AsyncSegmentationClient, RefineResult
from tests.reliability.hand import Hand
from tests.reliability.record import Effort, Record
from tests.reliability.serving import Scale, image

OBJECTS = ("1", "2")
DRAG_CHANCE, DRAG_MOVES = 0.1, 5
RECONNECT_SECONDS = 120.0

Policy = Literal["latest_wins", "every_edit"]


@dataclass
class Life:
    """A session in progress.

    Attributes:
        client: Whose session it is.
        session: The session.
        file: The image.
        hands: Who edits which object.
        chance: Where choices come from.
    """

    client: AsyncSegmentationClient
    session: AsyncRefineSession
    file: bytes
    hands: Mapping[str, Hand]
    chance: random.Random

    @classmethod
    async def begin(
        cls, client: AsyncSegmentationClient, number: int, file_number: int, scale: Scale, record: Record
    ) -> "Life | None":
        """Open a session; return None if the server has no room.

        Args:
            client: The client.
            number: Of the session: the same number makes the same choices.
            file_number: Of the image.
            scale: The size of images.
            record: What callers saw.
        """
        chance = random.Random(number)
        file = image(file_number, scale)
        policy: Policy = chance.choice(["every_edit", "latest_wins"])
        session = client.refine(file, edit_policy=policy, reconnect=RECONNECT_SECONDS)
        if await record.ask("open", session.open) is None:
            return None
        hands = {name: Hand(name, chance, scale.width, scale.height) for name in OBJECTS}
        return cls(client, session, file, hands, chance)

    async def go_on(self, edits: int, effort: Effort, record: Record) -> None:
        """Edit a number of times, unless the time is over before."""
        for _ in range(edits):
            if effort.over:
                return
            hand = self.chance.choice(list(self.hands.values()))
            if hand.state.clicks and self.chance.random() < DRAG_CHANCE:
                await self._drag(hand, record)
            else:
                await self._edit(hand, record)

    async def _edit(self, hand: Hand, record: Record) -> None:
        edit = hand.next()
        result = await record.ask("edit", lambda: self.session.wait(self.session.send(edit)))
        if result is not None:
            hand.acknowledged(edit, result)
            self.check(hand)

    async def _drag(self, hand: Hand, record: Record) -> None:
        """Send edits without waiting for each; those that are refused, if any are, change nothing."""
        moves = hand.drag(DRAG_MOVES)
        numbers = [self.session.send(move) for move in moves]
        taken, result = [], None
        for move, number in zip(moves, numbers, strict=True):
            answer = await record.ask("drag", lambda number=number: self.session.wait(number))  # type: ignore[misc]
            if answer is not None:
                taken.append(move)
                result = answer
        if result is not None:
            hand.acknowledged_together(taken, self.session.results[hand.object_id])
            self.check(hand)

    def check(self, hand: Hand) -> None:
        """Compare an object with what was acknowledged of it."""
        result = self.session.result(hand.object_id)
        if result is not None:
            hand.check(result, self.session.shown_round(hand.object_id))

    async def repeat(self, record: Record) -> int:
        """Compute the session again; return how many rounds that were.

        Raises:
            AssertionError: If a mask differs, or one that is shown is not among them.
        """
        export = self.session.export()
        await repeat(self.client, export, self.file, self.session.results, record)
        return len(export["rounds"])


async def repeat(
    client: AsyncSegmentationClient,
    export: dict[str, Any],
    file: bytes,
    results: Mapping[str, RefineResult],
    record: Record,
) -> None:
    """Compute an exported session again by single calls, and compare all masks that it has.

    Raises:
        AssertionError: If a mask differs, or one that is shown is not among them.
    """
    replayed = await record.insist("replay", lambda: client.replay(export, file))
    assert replayed.same_image, (replayed.image, export["image"])
    assert replayed.identical, [one.revision for one in replayed.different]
    compared = {one.revision for one in replayed.rounds if one.identical}
    shown = {result.shown_revision for result in results.values()} - {0}
    assert shown <= compared, (shown, compared)
