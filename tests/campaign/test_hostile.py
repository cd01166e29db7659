"""Values that nobody ought to write."""

import pytest

from tests.campaign.conftest import Campaign
from tests.campaign.hostile import Case, cases

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def _kind(case: Case) -> str:
    first, _, rest = case.where.partition(" ")
    return f"ulbq {rest.split()[0]}" if first == "option" else first


def test_there_are_two_hundred() -> None:
    assert len(cases()) >= 200


@pytest.mark.parametrize("kind", sorted({_kind(case) for case in cases()}))
def test_values(kind: str, world: str, campaign: Campaign) -> None:
    trials = [{"world": world, "number": number} for number, case in enumerate(cases()) if _kind(case) == kind]
    campaign.run("hostile value", kind, "hostile:trial", trials)
