"""How a text went on after what was written just now: matches of its end, and the likeliest continuation.

The recipe is suffix decoding's (SuffixDecoding, arXiv 2411.04975, section 3 and its published code): for
every length of match with the end of the text, follow the most frequent continuation while its estimated
probability stays above a minimum, at most as far as the match is long; the score of a continuation is the
sum of its probabilities, and the best score wins, the longer match at a tie.

The structure is not its suffix tree but the hash chains of deflate (RFC 1951, section 4) over pairs of
tokens: a tree costs 64 node updates for each token, a chain one dictionary entry, which is what Python can
pay while a step of the model takes a few milliseconds. The price: matches begin at two tokens, and only
the `MAX_LINKS` latest places of a pair are looked at.
"""

from __future__ import annotations

from collections.abc import Iterable

MAX_MATCH = 32  # tokens of the end of a text that are compared; a longer match is no better
MAX_LINKS = 48  # places of a pair that are looked at, the latest first
MAX_PLACES = 12  # of the best matches among them that vote
MIN_PROBABILITY = 0.1  # of a continuation, as its places tell it: below, it is cut
SEPARATOR = -1  # between texts of one index; nothing goes on across it

Continuation = tuple[list[int], float, int]  # tokens, score, length of the match
NONE: Continuation = ([], 0.0, 0)


class SuffixIndex:
    """Token ids, and where each pair of them occurred before. Appending costs O(1) a token."""

    __slots__ = ("_before", "_latest", "tokens")

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self.tokens: list[int] = []
        self._latest: dict[int, int] = {}  # pair -> the latest place that follows it
        self._before: list[int] = []  # place -> the one before it that follows the same pair, or -1
        self.extend(tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Append tokens."""
        mine, latest, before = self.tokens, self._latest, self._before
        for token in tokens:
            place = len(mine)
            if place >= 2:
                pair = mine[-2] << 32 | mine[-1] & 0xFFFFFFFF
                before.append(latest.get(pair, -1))
                latest[pair] = place
            else:
                before.append(-1)
            mine.append(token)

    def continuation(self, tail: list[int], k: int) -> Continuation:
        """The best guess of at most `k` tokens after a text that ends with `tail` ([n], MAX_MATCH suffice).

        The text may be the one that is indexed: then a repetition goes on into the guess itself.
        """
        matches = self._matches(tail)
        best = NONE
        for length in sorted({length for length, _ in matches}, reverse=True)[:4]:
            places = [place for found, place in matches if found >= length]
            tokens, score = self._walk(places, min(k, length))
            if score > best[1]:
                best = (tokens, score, length)
        return best

    def _matches(self, tail: list[int]) -> list[tuple[int, int]]:
        """(length of the match, place that follows it), the longest first, then the latest."""
        if len(tail) < 2 or not self.tokens:
            return []
        mine, before = self.tokens, self._before
        longest = min(MAX_MATCH, len(tail))
        whole = tail[-longest:]
        place = self._latest.get(tail[-2] << 32 | tail[-1] & 0xFFFFFFFF, -1)
        matches: list[tuple[int, int]] = []
        full = 0
        for _ in range(MAX_LINKS):
            if place < 0:
                break
            if mine[max(0, place - longest) : place] == whole:
                matches.append((longest, place))
                full += 1
                if full == MAX_PLACES:
                    break
            else:
                length, most = 2, min(place, longest)
                while length < most and mine[place - 1 - length] == whole[longest - 1 - length]:
                    length += 1
                matches.append((length, place))
            place = before[place]
        matches.sort(reverse=True)
        return matches[:MAX_PLACES]

    def _walk(self, places: list[int], k: int) -> tuple[list[int], float]:
        """Follow the most frequent token (of equals the first place's), and sum up how likely it is."""
        mine, size = self.tokens, len(self.tokens)
        guess: list[int] = []
        probability, score = 1.0, 0.0
        while len(guess) < k:
            votes: dict[int, list[int]] = {}
            for place in places:
                token = mine[place] if place < size else guess[place - size]
                if token != SEPARATOR:
                    votes.setdefault(token, []).append(place + 1)
            if not votes:
                break
            token, following = max(votes.items(), key=lambda vote: len(vote[1]))
            probability *= len(following) / len(places)
            if probability < MIN_PROBABILITY:
                break
            guess.append(token)
            score += probability
            places = following
        return guess, score
