"""Property tests that run on a fixed list of cases, and on many more where hypothesis is there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

try:
    import hypothesis
    from hypothesis import strategies
except ImportError:  # tests/requirements.txt has it; the fixed cases need nothing
    hypothesis = strategies = None

TEXTS = [
    "",
    " \t\r\n\u2028\x85",
    "nul \0 byte",
    "\u202eright to left \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627\u202c",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 family \U0001f3f3\ufe0f\u200d\U0001f308",
    "e\u0301 and \u00e9 and \ufb01 and \u212b",
    "\ufeff\ufffd\uffff\U0010ffff",
    "红色的圆 \u3000 まる",
]


def widened(
    name: str, fixed: Sequence[Any], more: Callable[[Any], Any], count: int = 60
) -> Callable:
    """Run a test with `name` = each of `fixed`, and `count` that hypothesis makes of `more`."""
    if hypothesis is None:
        return pytest.mark.parametrize(name, fixed, ids=range(len(fixed)))

    def wrap(test: Callable) -> Callable:
        for case in fixed:
            test = hypothesis.example(**{name: case})(test)
        test = hypothesis.given(**{name: more(strategies)})(test)
        settings = {"max_examples": count, "deadline": None, "derandomize": True, "database": None}
        return hypothesis.settings(**settings)(test)

    return wrap


def spelled(words: Sequence[str]) -> Callable[[Any], Any]:
    """Strategy: texts in which these words stand whole, cut, nested, or in another case."""

    def texts(st):
        word = st.sampled_from(sorted(words))
        odd = st.sampled_from(
            [str.upper, str.title, lambda w: w[1:], lambda w: w[:-1], str.swapcase]
        )
        spoilt = st.builds(lambda change, w: change(w), odd, word)
        return st.lists(word | spoilt | st.text(max_size=8), max_size=6).map("".join)

    return texts
