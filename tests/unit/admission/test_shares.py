"""Who gives when a cache is full."""

from segrpc.service.admission.shares import Shares

ENTRIES = [("bob", 1), ("alice", 2), ("alice", 3), ("carol", 4)]  # the longest unused first


def shares(**held: int) -> Shares:
    made = Shares(10, 0.5)
    for owner, amount in held.items():
        made.add(owner, amount)
    return made


def test_who_has_more_than_its_share_gives_its_oldest() -> None:
    assert shares(bob=1, alice=6, carol=3).first_to_go(ENTRIES) == 2


def test_of_several_beyond_their_share_the_one_with_most_gives() -> None:
    assert shares(bob=6, alice=7, carol=8).first_to_go(ENTRIES) == 4


def test_while_all_are_within_their_shares_the_oldest_goes() -> None:
    assert shares(bob=3, alice=5, carol=2).first_to_go(ENTRIES) == 1


def test_if_nothing_may_go_of_who_should_give_the_oldest_does() -> None:
    assert shares(dave=9).first_to_go(ENTRIES) == 1
    assert shares(dave=9).first_to_go([]) is None


def test_what_is_given_back_does_not_count() -> None:
    made = shares(bob=1, alice=6, carol=3)
    made.add("alice", -6)
    made.add("carol", 3)
    assert made.first_to_go(ENTRIES) == 4
