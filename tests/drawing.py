"""Which tests of a large family a run takes: by chance, and the same ones for the same seed."""

import collections
import hashlib
import math


def draw_names(names, share, seed):
    """That share of the names, rounded up. Every name has the same chance, whatever its place."""
    by_chance = sorted(names, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())
    return set(by_chance[: math.ceil(share * len(by_chance))])


def left_out(tests, seed):
    """Of (name, family, share) the names that are not drawn. The share of None is no family's: it is always taken."""
    families = collections.defaultdict(list)
    for name, family, share in tests:
        if share is not None:
            families[family, share].append(name)
    return {name for (_, share), names in families.items() for name in set(names) - draw_names(names, share, seed)}
