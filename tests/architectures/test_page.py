"""docs/families.md is what the table of families and the tests make of it."""

from tests.helpers.families_page import PAGE, page


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == page(), "run: python -m tests.helpers.families_page"
