"""Drafts from the text itself: what followed the last time the text ended like this.

A draft is verified in one pass of several rows (generate.py), which on a CPU costs little more than
a pass of one: the weights are read once.  Nothing here can change a token, only how many passes it
takes, so the decisions may rest on the clock.
"""

import time
from collections.abc import Callable, Sequence

#: The shortest match that is followed.  In novels a match of 2 tokens is right one time in four.
NGRAM = 3
#: The longest match that is told from a longer one; with CANDIDATES it bounds the work of a token.
LONGEST = 32
#: Earlier places that are compared for the longest match, the latest first.
CANDIDATES = 8
#: Shares of right guesses after matches of 3, 4-7, 8-15, 16-31 and more tokens, measured in novels:
#: what is assumed before the text has told its own.
CHANCES = (0.4, 0.5, 0.6, 0.85, 0.95)
#: Weight of the newest guess in such a share: what a text does changes within some 8 tokens.
RECENT = 1 / 8
#: Rows a pass may have.  Few sizes, so that each is measured often.
ROWS = (1, 2, 4, 8, 16, 32)
#: How many times faster than plain decoding a draft must promise to be: above the clock's noise.
MARGIN = 1.05
#: Measurements that tell the cost of a size: one alone may have been disturbed.
MEASUREMENTS = 2
#: Weight of a pass that took longer than thought; one that took less counts at once.
SLOWER = 1 / 4
#: Passes after which a size that was not used is measured anew, so no bad moment is kept forever.
STALE = 512


class Matches:
    """A text, and where its end has occurred before.

    The `length` tokens before `source` are also the last of the text: the longest match among the
    latest CANDIDATES, the later of two.  0 is no match.  A token costs O(1).
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = list(tokens)
        self.length = 0
        self.source = 0
        # By the NGRAM tokens before it, the latest place; and for each place the one before that.
        self._latest: dict[tuple[int, ...], int] = {}
        self._earlier: list[int] = [-1] * min(NGRAM, len(self.tokens) + 1)
        latest, earlier = self._latest, self._earlier
        ngrams = zip(*(self.tokens[i:] for i in range(NGRAM)), strict=False)
        for place, ngram in enumerate(ngrams, NGRAM):
            earlier.append(latest.get(ngram, -1))
            latest[ngram] = place
        self._find()

    def append(self, token: int) -> None:
        """The text goes on; a match that foretold `token` goes on with it."""
        followed = self.length > 0 and self.tokens[self.source] == token
        self.tokens.append(token)
        place = len(self.tokens)
        if place < NGRAM:
            self._earlier.append(-1)
            return
        ngram = tuple(self.tokens[-NGRAM:])
        self._earlier.append(self._latest.get(ngram, -1))
        self._latest[ngram] = place
        if followed:
            self.source += 1
            self.length += 1
        else:
            self._find()

    def continuation(self, n: int) -> list[int]:
        """The n tokens that follow if the text repeats itself from `source` on, over and over."""
        known = self.tokens[self.source : self.source + n]
        while len(known) < n:
            known += known[: n - len(known)]
        return known

    def _find(self) -> None:
        self.length = 0
        place = self._earlier[-1]
        for _ in range(CANDIDATES):
            if place < 0:
                return
            length = self._common(place)
            if length > self.length:
                self.length, self.source = length, place
            place = self._earlier[place]

    def _common(self, place: int) -> int:
        """How many tokens before `place` are also the last ones, NGRAM of them known to be."""
        tokens, end = self.tokens, len(self.tokens)
        length, most = NGRAM, min(place, LONGEST)
        while length < most and tokens[place - length - 1] == tokens[end - length - 1]:
            length += 1
        return length


class Costs:
    """Seconds that passes of this model take by their rows, on this machine as it is now.

    Shared by all requests.  The lowest counts, soon forgotten: what disturbs a pass only adds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self._passes = 0
        self._seconds: dict[int, float] = {}
        self._measurements = dict.fromkeys(ROWS, 0)
        self._last = dict.fromkeys(ROWS, 0)

    def record(self, rows: int, seconds: float) -> None:
        """A pass of `rows`, one of ROWS, has taken `seconds`."""
        self._passes += 1
        if self._is_stale(rows):
            self._measurements[rows] = 0
        old = self._seconds[rows] if self._measurements[rows] else seconds
        self._seconds[rows] = seconds if seconds < old else old + (seconds - old) * SLOWER
        self._measurements[rows] += 1
        self._last[rows] = self._passes

    def best_rows(self, chance: float, limit: int) -> int:
        """The rows, up to `limit`, that promise the most tokens a second; 1 where no draft pays.

        Each drafted token is right with probability `chance` < 1 if all before it were.  A size
        that is not known yet is thought to cost what the two below it foretell.
        """
        if not self._measurements[1]:
            return 1
        best, lower, cost, slope, known = 1, 1, self._seconds[1], 0.0, True
        highest = MARGIN / cost
        for rows in ROWS[1:]:
            if rows > limit:
                break
            lower_known, known = known, self._is_known(rows)
            if known:
                seconds = self._seconds[rows]
                slope = max(0.0, (seconds - cost) / (rows - lower))
                lower, cost = rows, seconds
            elif lower_known:
                seconds = cost + slope * (rows - lower)
            else:
                continue
            rate = (1 - chance**rows) / (1 - chance) / seconds
            if rate > highest:
                best, highest = rows, rate
        return best

    def _is_known(self, rows: int) -> bool:
        return self._measurements[rows] >= MEASUREMENTS and not self._is_stale(rows)

    def _is_stale(self, rows: int) -> bool:
        return self._passes - self._last[rows] > STALE


class Drafts:
    """The drafts of one request: as long as the text's own record says that they pay.

    Every token tells whether the match before it was right, drafted or not; so what a draft is
    worth is learned for nothing, and no draft is made only to find out.
    """

    def __init__(self, prompt: Sequence[int], costs: Costs) -> None:
        self.costs = costs
        self._matches = Matches(prompt)
        self._chances = list(CHANCES)

    def append(self, token: int) -> None:
        """The token that was chosen."""
        matches = self._matches
        if matches.length:
            i = self._class()
            hit = matches.tokens[matches.source] == token
            self._chances[i] += (hit - self._chances[i]) * RECENT
        matches.append(token)

    def draft(self, limit: int) -> list[int]:
        """Tokens that may come next, for a pass of at most `limit` rows; or none."""
        if not self._matches.length:
            return []
        rows = self.costs.best_rows(self._chances[self._class()], limit)
        return self._matches.continuation(rows - 1)

    def _class(self) -> int:
        return min(self._matches.length, LONGEST).bit_length() - NGRAM.bit_length()
