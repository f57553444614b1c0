"""The verdict of a report: the heads of the articles that compare the stacks, with figures in place of adjectives.

Every figure here is taken from another table of the same report. Pros and cons follow from them by the rules in RULES.
"""

from collections.abc import Sequence

from common.comparison.figures import Figure


def figures(found: Sequence[Figure]) -> list[Figure]:
    return []
